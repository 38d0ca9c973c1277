"""Output layers that megatron-core does not have: with a bias, or with rows of length 1.

`add_max_z_loss` keeps logits small in training. Each function amends a built GPTModel; where this pipeline stage has no
output layer it does nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor, nn


def add_bias(model: GPTModel) -> None:
    """Logits get a bias each, split over ranks as the vocabulary is (GPT-J)."""
    if model.post_process:
        head = model.output_layer
        like = head.weight if head.weight is not None else model.shared_embedding_or_output_weight()
        head.bias = nn.Parameter(torch.zeros(head.output_size_per_partition, dtype=like.dtype, device=like.device))
        set_tensor_model_parallel_attributes(head.bias, True, 0, 1)
        head.bias.allreduce = True


def normalize(model: GPTModel) -> None:
    """Rows of the output layer count by their direction only, ``h W_i / |W_i|`` (Baichuan 2, section 2.3: NormHead)."""
    if model.post_process:
        model.output_layer.register_forward_pre_hook(_with_unit_rows, with_kwargs=True)


def add_max_z_loss(model: GPTModel, weight: float) -> None:
    """Each token's loss has ``weight * z^2`` more, z its largest logit (Baichuan 2, section 2.6: max-z loss)."""
    if not model.post_process:
        return
    plain = model.compute_language_model_loss

    def with_z(labels_BS: Tensor, logits_SBV: Tensor) -> Tensor:
        if not model.training:  # so that validation reports the loss of the text
            return plain(labels_BS, logits_SBV)
        z_SB = _largest(logits_SBV)  # first: core's cross entropy changes the logits in place
        return plain(labels_BS, logits_SBV) + weight * z_SB.T.float() ** 2

    model.compute_language_model_loss = with_z


def _largest(logits_SBV: Tensor) -> Tensor:
    """The largest logit over all ranks' parts of the vocabulary; its gradient goes to the first rank that has it."""
    group, mine = get_tensor_model_parallel_group(), logits_SBV.max(dim=-1).values
    found = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(found, mine.detach().contiguous(), group=group)
    largest, owner = torch.stack(found).max(dim=0)
    return torch.where(owner == group.rank(), mine, largest)


def _with_unit_rows(head: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if torch.is_grad_enabled():
        return inputs, {**options, "weight": F.normalize(head.weight)}
    version, rows = getattr(head, "unit_rows", (None, None))
    if version != head.weight._version:  # once, and not for every token that is generated
        rows = F.normalize(head.weight)
        head.unit_rows = (head.weight._version, rows)
    return inputs, {**options, "weight": rows}
