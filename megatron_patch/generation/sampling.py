"""Choosing the next token from logits: pure functions with the definitions that transformers has.

They know logits and token ids only: no model, no text, no processes. Nothing here depends on how far the vocabulary is
padded, so every parallel layout chooses the same tokens. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megatron_patch.generation.params import SamplingParams

_DRAWS = 64
"""Made at a time."""


def choose(logits_BV: Tensor, params: SamplingParams, seen_BV: Tensor | None, draws_B: Tensor | None) -> Tensor:
    """The next token of each row [B].

    Args:
        seen_BV: which tokens the row holds already (True); needed for a repetition penalty only.
        draws_B: uniform random numbers in [0, 1), one a row; needed for sampling only.
    """
    logits = logits_BV.float()
    if seen_BV is not None and params.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen_BV, params.repetition_penalty)
    if params.greedy or draws_B is None:
        return logits.max(-1).indices  # on CPU several times faster than argmax
    logits = logits / params.temperature
    if params.top_k:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1.0:
        logits = keep_top_p(logits, params.top_p)
    return sample(logits, draws_B)


def penalize_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make what a row holds already less likely (Keskar et al. 2019, section 4.1; transformers' treatment of signs)."""
    penalized = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, penalized, logits_BV)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """All but the k largest logits become -inf; equals of the k-th stay."""
    kth = logits_BV.topk(min(k, logits_BV.shape[-1])).values[..., -1:]
    return logits_BV.masked_fill(logits_BV < kth, float("-inf"))


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities sum to at least p (Holtzman et al. 2020)."""
    ascending, order = logits_BV.sort(dim=-1)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p
    drop[..., -1] = False
    return logits_BV.masked_fill(drop.scatter(-1, order, drop), float("-inf"))


def sample(logits_BV: Tensor, draws_B: Tensor) -> Tensor:
    """One token a row [B], by the inverse of the cumulative distribution at each row's draw."""
    # A single number a row, rather than torch.multinomial's one a token: the width of the vocabulary has no say.
    cumulative = logits_BV.softmax(-1).cumsum(-1, dtype=torch.double)
    target = draws_B.to(cumulative) * cumulative[:, -1]
    return torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)


def uniform_draws(seed: int, stream: int) -> Iterator[float]:
    """The draws of one text: the same on every rank and device, whatever else is generated (Salmon et al. 2011)."""
    generator = np.random.Generator(np.random.Philox(key=(seed, stream)))
    while True:
        # Single precision keeps the largest draw clear of 1 when it is multiplied in double precision.
        yield from generator.random(_DRAWS, dtype=np.float32).tolist()
