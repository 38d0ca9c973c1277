"""What the tests of evaluation share: transformers' own sums by a plain loop, and ours as functions for the pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from megatron_patch.evaluation.windows import Row, rolling

BEGIN = 3
SIZES = (5, 31, 1, 14, 77, 22, 9, 2, 40, 23, 41)


def documents(sizes: Sequence[int] = SIZES, vocab_size: int = 200) -> list[list[int]]:
    """Random token ids of different lengths, each token drawn from all."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab_size, (size,), generator=generator).tolist() for size in sizes]


@torch.no_grad()
def theirs(
    model: torch.nn.Module, found: Sequence[Sequence[int]], seq_length: int, stride: int, begin: int = BEGIN
) -> list[float]:
    """The sum of -log p of each document: one window at a time, no padding, log-softmax in fp32."""
    sums = []
    for ids in found:
        whole, scored, total = [begin, *ids], 1, 0.0
        while scored < len(whole):
            end = min(len(whole), seq_length + 1 if scored == 1 else scored + stride)
            window = torch.tensor(whole[max(0, end - seq_length - 1) : end])
            # A dynamic rotary embedding keeps the frequencies of the longest text so far until it sees a short one.
            model(torch.tensor([[0]]))
            log_p = model(window[None, :-1]).logits[0].float().log_softmax(-1)
            total -= log_p.gather(1, window[1:, None])[scored - end :].double().sum().item()
            scored = end
        sums.append(total)
    return sums


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: Sequence[int], number: int) -> list[int]:
    """transformers' next tokens, each the likeliest."""
    whole = list(ids)
    for _ in range(number):
        whole.append(model(torch.tensor([whole])).logits[0, -1].argmax().item())
    return whole[len(ids) :]


def windows(found: Sequence[Sequence[int]], seq_length: int, stride: int) -> list[list[Row]]:
    """The rows of each document."""
    return [list(rolling(np.array(ids), [BEGIN], seq_length, stride)) for ids in found]


def ours(
    rank: int,
    world_size: int,
    layout: dict[str, Any],
    jobs: Sequence[tuple[str, Sequence[Row], int]],
    most_logits: int = 1 << 24,
) -> list[list[float]]:
    """For each (checkpoint, rows, micro-batch size) the sum of each row, in one parallel layout."""
    from pathlib import Path

    from megatron_patch.checkpoint.logits import load_model
    from megatron_patch.evaluation import scoring
    from megatron_patch.training.initialize import initialize

    sequence_parallel = layout.pop("sequence_parallel", False)
    initialize(**layout)
    scoring._LOGITS = most_logits
    answers, models = [], {}
    for root, rows, micro_batch_size in jobs:
        if root not in models:
            options = dict(parallel_output=True, sequence_parallel=sequence_parallel)
            (models[root],) = load_model(Path(root), torch.float32, **options)
        told: list[int] = []
        found = scoring.score(models[root], rows, micro_batch_size=micro_batch_size, on_batch=told.append)
        assert sum(told) == sum(row.counts for row in rows)
        answers.append(found.negative_log_likelihood.tolist())
    return answers


def scored(
    rank: int, world_size: int, layout: dict[str, Any], root: str, rows: Sequence[Row], micro_batch_size: int
) -> tuple[list[float], list[bool], int]:
    """Sum and greediness of each row, and how many rows of input the model saw."""
    from pathlib import Path

    from megatron_patch.checkpoint.logits import load_model
    from megatron_patch.evaluation.scoring import score
    from megatron_patch.training.initialize import initialize

    sequence_parallel = layout.pop("sequence_parallel", False)
    initialize(**layout)
    options = dict(parallel_output=True, sequence_parallel=sequence_parallel)
    (model,) = load_model(Path(root), torch.float32, **options)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    found = score(model, rows, micro_batch_size=micro_batch_size)
    return found.negative_log_likelihood.tolist(), found.greedy.tolist(), sum(seen)


Asked = tuple[Sequence[tuple[str, str]], Sequence[str], Sequence[tuple[str, dict[str, Any]]]]
"""(context, continuation) pairs, whole texts, and (context, generation_kwargs) of texts to continue."""


def answers(lm: Any, asked: Asked) -> list[list[Any]]:
    """What a model of lm-evaluation-harness answers."""
    from lm_eval.api.instance import Instance

    methods = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    arguments = (asked[0], [(text,) for text in asked[1]], asked[2])
    return [
        getattr(lm, name)([Instance(name, {}, one, number) for number, one in enumerate(several)])
        for name, several in zip(methods, arguments, strict=True)
    ]


def check_equal(found: list[list[Any]], expected: list[list[Any]]) -> None:
    """The same log-likelihoods to 1e-4, or 1e-5 of them, the same greediness, and the same texts."""
    (pairs, texts, generated), (their_pairs, their_texts, their_generated) = found, expected
    near = [pytest.approx(log_p, rel=1e-5, abs=1e-4) for log_p, _ in their_pairs]
    assert [log_p for log_p, _ in pairs] == near
    assert [is_greedy for _, is_greedy in pairs] == [is_greedy for _, is_greedy in their_pairs]
    assert texts == pytest.approx(their_texts, rel=1e-5, abs=1e-4)
    assert generated == their_generated


def harnessed(rank: int, world_size: int, root: str, asked: Asked, options: dict[str, Any]) -> list[list[Any]]:
    """Our answers to the harness, for the pool: whose process group it must not take down."""
    from unittest import mock

    from megatron_patch.evaluation.harness import MegatronPatchLM
    from megatron_patch.training import initialize

    with mock.patch.object(initialize, "shut_down"):
        lm = MegatronPatchLM(load=root, **options)
        found = answers(lm, asked)
        lm.close()
    return found
