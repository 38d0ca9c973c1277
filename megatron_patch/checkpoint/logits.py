"""Logits of a checkpoint, from megatron-core and from transformers, on the same tokens.

Runs in one process, or at any tensor and pipeline parallel size where megatron-core's parallel state is initialised on
every rank: rank 0 then also runs transformers. It knows no arguments and no training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint.filling import fill
from megatron_patch.checkpoint.formats import Source
from megatron_patch.checkpoint.megatron import load_weights
from megatron_patch.model import build_model, transformer_config
from megatron_patch.models import family_for


@dataclass(frozen=True)
class TextResult:
    """Both models on one text."""

    name: str
    tokens: int
    max_abs: float
    hf_loss: float
    megatron_loss: float
    top1: float


def compare_logits(
    hf: Path, megatron: Path | Source, samples: Sequence[tuple[str, list[int]]], dtype: torch.dtype
) -> tuple[TextResult, ...]:
    """Both models on each (name, token ids); every rank gets the results.

    Args:
        megatron: a torch_dist checkpoint, or any opened source.
        dtype: of both computations.
    """
    chunks = load_model(megatron, dtype)
    reference = _reference(hf, dtype) if dist.get_rank() == 0 else None
    results = []
    for name, ids in samples:
        tokens = torch.tensor([ids], device=_device())
        ours = _to_rank_0(logits(chunks, tokens))
        if reference is not None:
            with torch.no_grad():
                results.append(_compare(name, reference(tokens).logits[0].float(), ours, tokens[0]))
    shared = [tuple(results)]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _reference(hf: Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if reason := no_reference(layout.read_config(hf)):
        raise ValueError(f"{hf}: {reason}; compare by --level checksums")
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(hf, dtype=dtype).to(_device()).eval()


def no_reference(config: Mapping[str, Any]) -> str:
    """Why there are no logits of transformers to compare with, if so."""
    family = family_for(config)
    return "" if family.reference == "transformers" else f"transformers has no model of the family {family.name}"


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_model(
    checkpoint: Path | Source, dtype: torch.dtype, *, parallel_output: bool = False, sequence_parallel: bool = False
) -> list[GPTModel]:
    """This rank's part of a checkpoint's model, in the layout of megatron-core's parallel state.

    Args:
        parallel_output: leave the logits split over tensor-parallel ranks.
        sequence_parallel: split activations along the sequence over them, too.
    """
    if isinstance(checkpoint, Source):
        architecture = checkpoint.model.architecture
    else:
        config = layout.read_config(checkpoint)
        architecture = family_for(config).describe(config)
    fields = transformer_config(
        architecture,
        dtype,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        perform_initialization=False,  # every weight is about to be loaded
        mtp_num_layers=None,  # layers that predict further tokens have no part in the logits, and want labels
    )
    chunks = [build_model(architecture, fields, parallel_output=parallel_output).to(_device()).eval()]
    if isinstance(checkpoint, Source):
        fill(chunks, checkpoint)
    else:
        load_weights(chunks, checkpoint)
    return chunks


def logits(chunks: list[GPTModel], tokens: Tensor) -> Tensor | None:
    """Logits [sequence, padded vocabulary] of tokens [1, sequence] on the last pipeline stage; None elsewhere."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]

    def forward_step(_iterator: Iterator[Any] | None, model: GPTModel) -> tuple[Tensor, Any]:
        return model(tokens, positions, None), partial(_keep)

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=chunks,
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs[0][0] if outputs else None


def _keep(output: Tensor, non_loss_data: bool = True) -> Tensor:
    return output


def _to_rank_0(output: Tensor | None) -> Tensor | None:
    """Bring the last pipeline stage's logits to rank 0."""
    # Every pipeline has the same logits; they come from the one that rank 0 belongs to.
    owner = [parallel_state.get_pipeline_model_parallel_last_rank()]
    dist.broadcast_object_list(owner, src=0)
    box = [None if output is None else output.float().cpu()]
    if owner[0] != 0 and dist.get_rank() == owner[0]:
        dist.send_object_list(box, dst=0)
    if owner[0] != 0 and dist.get_rank() == 0:
        dist.recv_object_list(box, src=owner[0])
    return box[0].to(_device()) if dist.get_rank() == 0 else None


def _compare(name: str, hf: Tensor, megatron: Tensor, tokens: Tensor) -> TextResult:
    megatron = megatron[:, : hf.shape[1]]
    losses = [F.cross_entropy(one[:-1].double(), tokens[1:]).item() for one in (hf, megatron)]
    same = (hf.argmax(dim=-1) == megatron.argmax(dim=-1)).double().mean().item()
    return TextResult(name, len(tokens), (hf - megatron).abs().max().item(), *losses, same)
