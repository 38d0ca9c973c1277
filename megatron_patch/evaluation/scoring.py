"""How likely a model finds the tokens of rows: sums of -log p in nats, in any parallel layout.

Logits stay split over tensor-parallel ranks (megatron-core's vocabulary-parallel cross entropy, in fp32); only the last
pipeline stage has them; data-parallel ranks share the rows. Every rank calls `score` with the same rows and gets the
same sums. What a row gets does not depend on its neighbours: its padding is at its end, where no token looks.

It knows token ids and megatron-core's GPTModel: no text, no tokenizer, no arguments. Shapes: B rows of a micro-batch,
S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_patch.evaluation.windows import Batch, Row, batches
from megatron_patch.layers.rotary import BY_LENGTH, Rotary

_MICROBATCHES_PER_STAGE = 4
"""Of one pipeline schedule: with so many, stages wait for each other a fifth of the time at most."""

_LOGITS = 1 << 24
"""How many are in memory at a time."""

_Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.no_grad()
def score(
    model: GPTModel,
    rows: Sequence[Row],
    *,
    micro_batch_size: int = 1,
    on_batch: Callable[[int], None] = lambda num_tokens: None,
) -> np.ndarray:
    """The sum of -log p of the tokens that count, of each row: float64, in nats, the same on every rank.

    Args:
        model: this rank's part, as `build_model` makes it.
        micro_batch_size: rows computed at a time on one data-parallel rank; no result depends on it.
        on_batch: told after each batch how many tokens were scored in it, by all ranks together.
    """
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    most = _MICROBATCHES_PER_STAGE * stages if stages > 1 else 1
    found = torch.zeros(len(rows), dtype=torch.float64, device=_device(model))
    with _evaluating(model):
        for batch in batches([row.length for row in rows], micro_batch_size, ranks, most):
            for microbatch, sums_B in enumerate(_forward(model, rows, batch, rank)):
                numbers = [number for number in batch.share(rank, microbatch) if number is not None]
                found[numbers] = sums_B[: len(numbers)]
            on_batch(sum(rows[number].counts for number in batch.rows if number is not None))
    # Ranks without a row, or without logits, have zeros: adding up is gathering.
    dist.all_reduce(found, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(found, group=parallel_state.get_pipeline_model_parallel_group())
    return found.cpu().numpy()


def _forward(model: GPTModel, rows: Sequence[Row], batch: Batch, rank: int) -> list[Tensor]:
    """The sums of each micro-batch of this rank, [B] each; nothing but on the last pipeline stage."""
    length = batch.length
    if model.config.sequence_parallel:
        length += -length % model.config.tensor_model_parallel_size
    shares = (batch.share(rank, number) for number in range(batch.num_microbatches))
    inputs = (_inputs([rows[i] if i is not None else None for i in one], length, _device(model)) for one in shares)
    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=inputs,
        model=[model],
        num_microbatches=batch.num_microbatches,
        seq_length=length,
        micro_batch_size=batch.micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _inputs(rows: Sequence[Row | None], length: int, device: torch.device) -> _Inputs:
    """Tokens, positions, labels and which positions count, [B, S] each."""
    tokens, labels = (np.zeros((len(rows), length), np.int64) for _ in range(2))
    positions = np.tile(np.arange(length), (len(rows), 1))
    counts = np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        if row is None:
            continue
        size = row.length
        tokens[index, :size], tokens[index, size:] = row.ids[:-1], row.ids[-2]
        labels[index, :size] = row.ids[1:]
        positions[index, size:] = size - 1  # so that a row's last position tells its length
        counts[index, size - row.counts : size] = True
    return tuple(torch.from_numpy(array).to(device) for array in (tokens, positions, labels, counts))


def _forward_step(inputs: Iterator[_Inputs], model: GPTModel) -> tuple[Tensor, partial]:
    tokens_BS, positions_BS, labels_BS, counts_BS = next(inputs)
    rotary = getattr(model, "rotary_pos_emb", None)
    if isinstance(rotary, Rotary) and rotary.rope.rope_type in BY_LENGTH:
        rotary.positions_SBA = positions_BS.T[..., None]  # turns by each row's own length, not the padded one
    with _before_output_layer(model) as seen:
        output = model(tokens_BS, positions_BS, None)
    if model.post_process:
        output = _losses(model, *seen, labels_BS)
    return output, partial(_sums, counts_BS)


def _sums(counts_BS: Tensor, losses_BS: Tensor, non_loss_data: bool = True) -> Tensor:
    return torch.where(counts_BS, losses_BS.double(), 0.0).sum(1)


# ------------------------------------------------------------------------------------------------------------- the head


@contextmanager
def _before_output_layer(model: GPTModel) -> Iterator[list[Any]]:
    """Keeps what the output layer is called with, hidden states and options, and lets it see one position only."""
    seen: list[Any] = []

    def keep(_layer: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        seen.extend((inputs[0], {**options, "runtime_gather_output": False}))
        return (inputs[0][:1], *inputs[1:]), options

    if not model.post_process:
        yield seen
        return
    hook = model.output_layer.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
    try:
        yield seen
    finally:
        hook.remove()


def _losses(model: GPTModel, hidden_SBH: Tensor, options: dict[str, Any], labels_BS: Tensor) -> Tensor:
    """-log p of the labels, [B, S], some positions at a time: all logits at once would take the most memory of all."""
    # With sequence parallelism each rank has a part of the positions, and the output layer gathers what it is given.
    parts = labels_BS.shape[1] // len(hidden_SBH)
    labels_BPS = labels_BS.unflatten(1, (parts, -1))
    size = max(1, _LOGITS // (labels_BS.shape[0] * parts * model.output_layer.output_size_per_partition))
    found = []
    for first in range(0, len(hidden_SBH), size):
        logits_SBV, _ = model.output_layer(hidden_SBH[first : first + size], **options)
        losses_BS = model.compute_language_model_loss(labels_BPS[:, :, first : first + size].flatten(1), logits_SBV)
        found.append(losses_BS.unflatten(1, (parts, -1)))
    return torch.cat(found, 2).flatten(1)


def _device(model: GPTModel) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _evaluating(model: GPTModel) -> Iterator[None]:
    was_training, rotary = model.training, getattr(model, "rotary_pos_emb", None)
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        if isinstance(rotary, Rotary):
            rotary.positions_SBA = None
