"""Each sampling function equals transformers' processor of the same name; draws follow the distribution."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from megatron_patch.generation.params import SamplingParams
from megatron_patch.generation.sampling import (
    choose,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample,
    uniform_draws,
)

IDS = torch.tensor([[3, 3, 7], [0, 49, 1]])


def logits(rows: int = 2, vocabulary: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def seen(ids: torch.Tensor = IDS, vocabulary: int = 50) -> torch.Tensor:
    return torch.zeros(len(ids), vocabulary, dtype=torch.bool).scatter(1, ids, True)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    expected = RepetitionPenaltyLogitsProcessor(penalty)(IDS, logits())
    assert torch.equal(penalize_repetition(logits(), seen(), penalty), expected)


@pytest.mark.parametrize("k", [1, 5, 50, 80])
def test_top_k_equals_transformers(k: int) -> None:
    from transformers import TopKLogitsWarper

    assert torch.equal(keep_top_k(logits(), k), TopKLogitsWarper(k)(IDS, logits()))


def test_top_k_keeps_equals_as_transformers_does() -> None:
    from transformers import TopKLogitsWarper

    equals = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert torch.equal(keep_top_k(equals, 2), TopKLogitsWarper(2)(IDS, equals))
    assert keep_top_k(equals, 2).isfinite().sum() == 3


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_equals_transformers(p: float) -> None:
    from transformers import TopPLogitsWarper

    assert torch.equal(keep_top_p(logits(), p), TopPLogitsWarper(p)(IDS, logits()))


def test_the_whole_chain_has_transformers_order() -> None:
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    params = SamplingParams(temperature=0.7, top_k=9, top_p=0.8, repetition_penalty=1.4)
    chain = [
        RepetitionPenaltyLogitsProcessor(1.4),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(9),
        TopPLogitsWarper(0.8),
    ]
    processed = LogitsProcessorList(chain)(IDS, logits())
    for draw in torch.linspace(0, 0.999, 40):
        draws = draw.expand(2)
        assert torch.equal(choose(logits(), params, seen(), draws), sample(processed, draws))


def test_greedy_takes_the_largest_after_the_penalty() -> None:
    assert torch.equal(choose(logits(), SamplingParams(), None, None), logits().argmax(-1))
    top = logits().argmax(-1, keepdim=True)
    punished = choose(logits(), SamplingParams(repetition_penalty=1e6), seen(top), None)
    assert torch.equal(punished, logits().scatter(1, top, 0.0).argmax(-1))


def test_draws_follow_the_probabilities() -> None:
    row = logits(1, 8)
    draws = torch.tensor([*islice(uniform_draws(3, 0), 40_000)])
    counts = sample(row.expand(len(draws), -1), draws).bincount(minlength=8)
    expected = row.softmax(-1)[0] * len(draws)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # 99.9 % of all runs with 7 degrees of freedom


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_what_is_impossible_is_not_drawn_even_at_the_ends(draw: float) -> None:
    row = torch.tensor([[float("-inf"), 1.0, 2.0, torch.finfo(torch.float).min]])
    assert sample(row, torch.tensor([draw])).item() == (1 if draw == 0.0 else 2)


def test_draws_are_seeded_and_below_one() -> None:
    first, again, other_seed, other_stream = (
        [*islice(uniform_draws(*key), 100_000)] for key in ((1, 5), (1, 5), (2, 5), (1, 6))
    )
    assert first == again
    assert all(a != b for others in (other_seed, other_stream) for a, b in zip(first[:100], others[:100], strict=True))
    assert 0 <= min(first) < max(first) < 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(temperature=-1.0), r"temperature=-1.0 must lie in 0\.\.100; 0 is greedy"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=1.0, top_k=-2), "top_k=-2 must not be negative; choose 0"),
        (dict(temperature=1.0, top_p=0.0), "top_p=0.0 must lie above 0"),
        (dict(temperature=1.0, top_p=1.5), "top_p=1.5 .*choose 1"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0 must be positive"),
        (dict(seed=-1), "seed=-1 must lie in"),
        (dict(top_k=5), "temperature=0 is greedy: top_k=5"),
        (dict(top_p=0.5), "choose a temperature above 0"),
    ],
)
def test_wrong_parameters_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**wrong)
