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

    Where the batch tells in `starts` where each token's text begins, attention keeps to that; it stays on the host.

    Returns:
        The model's output ([b, s] losses on the last pipeline stage, hidden states before), and the function that
        reduces it.
    """
    batch = next(batches)
    starts = batch.get("starts")
    on_device = {name: tensor.to(device(), non_blocking=True) for name, tensor in batch.items() if name != "starts"}
    mask, prefix = on_device["loss_mask"], getattr(unwrap_model(model), "prefix", None)
    # Multi-token prediction has losses of its own inside of the model, where else every token counts.
    own = {} if starts is None else {"loss_mask": mask}
    masking = starts if prefix is None else None  # a model that reads a prefix works its mask out by itself
    output = model(on_device["tokens"], on_device["position_ids"], masking, labels=on_device["labels"], **own)
    return output, partial(masked_loss, mask if prefix is None else mask * prefix.counts_BS)


def masked_loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the losses of the positions that count.

    megatron-core divides: once by the number of tokens of the whole global batch (``calculate_per_token_loss``), so
    that neither micro-batch size nor data parallelism changes what a token weighs; or, where every position counts,
    each micro-batch by its own, which then is the same.

    Args:
        mask: [b, s], 1 where a position counts. Or else weights, those of each text 1 together: then it is texts that
            are counted, and the sum is that of their means.
        losses: [b, s].

    Returns:
        The sum, the number of positions or texts (int32), and both as one fp32 vector for logging.
    """
    total, count = (losses.float() * mask).sum(), mask.sum().round()
    return total, count.to(torch.int32), torch.stack((total.detach(), count))
