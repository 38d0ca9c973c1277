"""How likely a model finds the tokens of rows, and whether they are its first choice, in any parallel layout.

Logits stay split over tensor-parallel ranks (megatron-core's vocabulary-parallel cross entropy, in fp32); only the last
pipeline stage has them; data-parallel ranks share the rows. Every rank calls `score` with the same rows and gets the
same answers. What a row gets does not depend on its neighbours: its padding is at its end, where no token looks. Rows
of the same input, such as one question with several answers of one token, cost one pass.

It knows token ids and megatron-core's GPTModel: no text, no tokenizer, no arguments. Shapes: B inputs of a micro-batch,
R >= B rows that have them, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_patch.evaluation.windows import Row, batches
from megatron_patch.layers.rotary import BY_LENGTH, Rotary

_MICROBATCHES_PER_STAGE = 4
"""Of one pipeline schedule: with so many, stages wait for each other a fifth of the time at most."""

_LOGITS = 1 << 24
"""How many are in memory at a time."""


@dataclass(frozen=True)
class Scores:
    """What was found of each row; every rank has it."""

    negative_log_likelihood: np.ndarray
    """Sum of -log p over the tokens that count: float64, in nats."""
    greedy: np.ndarray
    """Whether each of them is the model's most likely one."""


@dataclass(frozen=True)
class _Inputs:
    """One micro-batch."""

    tokens_BS: Tensor
    positions_BS: Tensor
    labels_RS: Tensor
    counts_RS: Tensor
    """Which positions count."""
    inputs_R: Tensor
    """Which of the inputs each row has."""
    first: int
    """The first position that counts in any row."""


@torch.no_grad()
def score(
    model: GPTModel,
    rows: Sequence[Row],
    *,
    micro_batch_size: int = 1,
    on_batch: Callable[[int], None] = lambda num_tokens: None,
) -> Scores:
    """Score the tokens that count, of each row.

    Args:
        model: this rank's part, as `build_model` makes it.
        micro_batch_size: inputs computed at a time on one data-parallel rank; no result depends on it.
        on_batch: told after each batch how many tokens were scored in it, by all ranks together.
    """
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    most = _MICROBATCHES_PER_STAGE * stages if stages > 1 else 1
    inputs = _alike(rows)
    found = torch.zeros(2, len(rows), dtype=torch.float64, device=_device(model))
    with _evaluating(model):
        for batch in batches([rows[alike[0]].length for alike in inputs], micro_batch_size, ranks, most):
            shares = [_rows(batch.share(rank, number), inputs) for number in range(batch.num_microbatches)]
            for share, sums_2R in zip(shares, _forward(model, rows, shares, batch.length), strict=False):
                numbers = [number for alike in share for number in alike]
                found[:, numbers] = sums_2R[:, : len(numbers)]
            on_batch(sum(rows[number].counts for alike in _rows(batch.rows, inputs) for number in alike))
    # Ranks without a row, or without logits, have zeros: adding up is gathering.
    dist.all_reduce(found, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(found, group=parallel_state.get_pipeline_model_parallel_group())
    return Scores(found[0].cpu().numpy(), found[1].cpu().numpy() == 0)


def _alike(rows: Sequence[Row]) -> list[list[int]]:
    """Numbers of the rows, those of the same input together."""
    found: dict[bytes, list[int]] = {}
    for number, row in enumerate(rows):
        found.setdefault(row.ids[:-1].astype(np.int64).tobytes(), []).append(number)
    return list(found.values())


def _rows(share: Sequence[int | None], inputs: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The rows of each input; none where there is no input."""
    return [() if number is None else inputs[number] for number in share]


def _forward(
    model: GPTModel, rows: Sequence[Row], shares: Sequence[Sequence[Sequence[int]]], length: int
) -> list[Tensor]:
    """What `_measure` finds in each micro-batch of this rank; nothing but on the last pipeline stage."""
    if model.config.sequence_parallel:
        length += -length % model.config.tensor_model_parallel_size
    inputs = (_inputs([[rows[number] for number in alike] for alike in one], length, _device(model)) for one in shares)
    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=inputs,
        model=[model],
        num_microbatches=len(shares),
        seq_length=length,
        micro_batch_size=len(shares[0]),
        forward_only=True,
        collect_non_loss_data=True,
    )


def _inputs(share: Sequence[Sequence[Row]], length: int, device: torch.device) -> _Inputs:
    owners = [index for index, alike in enumerate(share) for _ in alike] or [0]
    tokens, positions = np.zeros((len(share), length), np.int64), np.tile(np.arange(length), (len(share), 1))
    labels, counts = np.zeros((len(owners), length), np.int64), np.zeros((len(owners), length), bool)
    for index, row in ((index, alike[0]) for index, alike in enumerate(share) if alike):
        tokens[index, : row.length], tokens[index, row.length :] = row.ids[:-1], row.ids[-2]
        positions[index, row.length :] = row.length - 1  # so that a row's last position tells its length
    for index, row in enumerate(row for alike in share for row in alike):
        labels[index, : row.length] = row.ids[1:]
        counts[index, row.length - row.counts : row.length] = True
    tensors = (torch.from_numpy(array).to(device) for array in (tokens, positions, labels, counts, np.array(owners)))
    return _Inputs(*tensors, first=int(counts.any(0).argmax()))


def _forward_step(micro_batches: Iterator[_Inputs], model: GPTModel) -> tuple[Tensor, Callable[[Tensor, bool], Tensor]]:
    inputs = next(micro_batches)
    rotary = getattr(model, "rotary_pos_emb", None)
    if isinstance(rotary, Rotary) and rotary.rope.rope_type in BY_LENGTH:
        rotary.positions_SBA = inputs.positions_BS.T[..., None]  # turns by each row's own length, not the padded one
    with _before_output_layer(model) as seen:
        output = model(inputs.tokens_BS, inputs.positions_BS, None)
    if model.post_process:
        output = _measure(model, *seen, inputs)
    return output, lambda output, non_loss_data: output


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


def _measure(model: GPTModel, hidden_SBH: Tensor, options: dict[str, Any], inputs: _Inputs) -> Tensor:
    """Of each row the sum of -log p, and how many tokens are not the most likely ones: [2, R].

    Some positions at a time: all logits at once would take the most memory of all.
    """
    # With sequence parallelism each rank has a part of the positions, and the output layer gathers what it is given.
    parts = inputs.labels_RS.shape[1] // len(hidden_SBH)
    labels_RPS, counts_RPS = (one.unflatten(1, (parts, -1)) for one in (inputs.labels_RS, inputs.counts_RS))
    rows = len(inputs.inputs_R)
    size = max(1, _LOGITS // (rows * parts * model.output_layer.output_size_per_partition))
    found_2R = torch.zeros(2, rows, dtype=torch.float64, device=hidden_SBH.device)
    for first in range(inputs.first if parts == 1 else 0, len(hidden_SBH), size):
        part = slice(first, first + size)
        labels_RS, counts_RS = labels_RPS[:, :, part].flatten(1), counts_RPS[:, :, part].flatten(1)
        logits_SRV, _ = model.output_layer(hidden_SBH[part].index_select(1, inputs.inputs_R), **options)
        missed_RS = _most_likely(logits_SRV) != labels_RS  # first: core's cross entropy changes the logits in place
        losses_RS = model.compute_language_model_loss(labels_RS, logits_SRV)
        both_2RS = torch.stack((losses_RS.double(), missed_RS.double()))
        found_2R += torch.where(counts_RS, both_2RS, 0.0).sum(2)
    return found_2R


def _most_likely(logits_SRV: Tensor) -> Tensor:
    """The token of the largest logit over all ranks' parts of the vocabulary, [R, S]; of equals the first."""
    group = parallel_state.get_tensor_model_parallel_group()
    best_SR, ids_SR = logits_SRV.float().max(-1)
    ids_SR = ids_SR + group.rank() * logits_SRV.shape[-1]
    highest_SR = best_SR.clone()
    dist.all_reduce(highest_SR, dist.ReduceOp.MAX, group=group)
    ids_SR[best_SR < highest_SR] = torch.iinfo(ids_SR.dtype).max
    dist.all_reduce(ids_SR, dist.ReduceOp.MIN, group=group)
    return ids_SR.T


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
