"""The language-model step: one micro-batch through the model and its masked loss, as core's schedules want it.

It knows tensors and the model's call; no arguments, no data files.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_patch.training.initialize import device

Batch = dict[str, Tensor]


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, partial]:
    """Run one micro-batch.

    Returns:
        The model's output ([b, s] losses on the last pipeline stage, hidden states before), and the function that
        reduces it.
    """
    batch = {name: tensor.to(device(), non_blocking=True) for name, tensor in next(batches).items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    prefix = getattr(unwrap_model(model), "prefix", None)
    mask = batch["loss_mask"] if prefix is None else batch["loss_mask"] * prefix.counts_BS
    return output, partial(masked_loss, mask)


def masked_loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the losses of the positions that count.

    megatron-core divides: once by the number of tokens of the whole global batch (``calculate_per_token_loss``), so
    that neither micro-batch size nor data parallelism changes what a token weighs; or, where every position counts,
    each micro-batch by its own, which then is the same.

    Args:
        mask: [b, s], 1 where a position counts.
        losses: [b, s].

    Returns:
        The sum, the number of positions (int32), and both as one fp32 vector for logging.
    """
    total, count = (losses.float() * mask).sum(), mask.sum()
    return total, count.to(torch.int32), torch.stack((total.detach(), count.float()))
