"""Sums equal transformers' in every parallel layout and micro-batch size."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from megatron_patch.evaluation.windows import Row
from tests.evaluation.conftest import Tiny
from tests.evaluation.runs import documents, greedy, ours, scored, theirs, windows
from tests.workers import Pool

TP2, PP2 = dict(tensor_model_parallel_size=2), dict(pipeline_model_parallel_size=2)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, TP2),
    "TP2+SP": (2, dict(TP2, sequence_parallel=True)),
    "PP2": (2, PP2),
    "DP2": (2, {}),
    "TP2xPP2+SP": (4, dict(TP2, **PP2, sequence_parallel=True)),
    "PP2xDP2": (4, PP2),
}
SEQ_LENGTH, STRIDE = 24, 10


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> dict[str, list[float]]:
    """transformers' sums of each model."""
    names = ("gqa", "tied", "dynamic", "bloom", "mixtral", "deepseek")
    return {name: theirs(tiny(name)[0], documents(), SEQ_LENGTH, STRIDE) for name in names}


def found(
    tiny: Tiny, pool: Pool, layout: str, names: tuple[str, ...], sizes: tuple[int, ...], *most_logits: int
) -> dict[Any, np.ndarray]:
    """Our sums of each document, by (model, micro-batch size); every rank has them."""
    rows = windows(documents(), SEQ_LENGTH, STRIDE)
    flat = [row for one in rows for row in one]
    jobs = [(tiny(name)[1], flat, size) for name in names for size in sizes]
    world_size, places = {**LAYOUTS, **EXPERTS}[layout]
    answers = pool.run(ours, world_size, places, jobs, *most_logits)
    assert all(answer == answers[0] for answer in answers)
    ends = np.cumsum([0, *map(len, rows)])
    keys = [(name, size) for name in names for size in sizes]
    return {
        key: np.array([sum(answer[a:b]) for a, b in pairwise(ends)])
        for key, answer in zip(keys, answers[0], strict=True)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_equal_transformers(tiny: Tiny, pool: Pool, expected: dict[str, list[float]], layout: str) -> None:
    names = ("gqa", "tied", "dynamic", "bloom")
    for (name, _), sums in found(tiny, pool, layout, names, (1, 4)).items():
        np.testing.assert_allclose(sums, expected[name], rtol=1e-5)


@pytest.mark.parametrize("layout", ["TP1", "TP2+SP"])
def test_logits_of_a_few_positions_at_a_time_give_the_same(
    tiny: Tiny, pool: Pool, expected: dict[str, list[float]], layout: str
) -> None:
    for (name, _), sums in found(tiny, pool, layout, ("gqa", "tied"), (3,), 5 * 3 * 256).items():
        np.testing.assert_allclose(sums, expected[name], rtol=1e-5)


EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, dict(expert_model_parallel_size=2)),
    "TP2+SP, EP2": (2, dict(TP2, sequence_parallel=True, expert_model_parallel_size=2, expert_tensor_parallel_size=1)),
    "MoE TP1": (1, {}),
}


@pytest.mark.parametrize("layout", EXPERTS)
def test_experts_on_several_ranks_change_nothing(
    tiny: Tiny, pool: Pool, expected: dict[str, list[float]], layout: str
) -> None:
    for (name, _), sums in found(tiny, pool, layout, ("mixtral", "deepseek"), (1, 3)).items():
        np.testing.assert_allclose(sums, expected[name], rtol=1e-5)


def test_a_dynamic_rotary_is_tested_beyond_its_trained_length(tiny: Tiny) -> None:
    assert tiny("dynamic")[0].config.max_position_embeddings < SEQ_LENGTH


def test_a_stride_of_one_gives_every_token_all_the_context_there_is(tiny: Tiny, pool: Pool) -> None:
    import torch

    model, root = tiny("gqa")
    (ids,) = documents((40,))
    whole, total = [3, *ids], 0.0
    with torch.no_grad():
        for end in range(1, len(whole)):
            context = torch.tensor([whole[max(0, end - SEQ_LENGTH) : end]])
            total -= model(context).logits[0, -1].float().log_softmax(-1)[whole[end]].item()
    (answer,) = pool.run(ours, 1, {}, [(root, windows([ids], SEQ_LENGTH, 1)[0], 4)])[0]
    assert sum(answer) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("layout", ["TP1", "TP2", "TP2xPP2+SP", "PP2xDP2"])
def test_a_row_is_greedy_if_each_token_that_counts_is_the_likeliest(tiny: Tiny, pool: Pool, layout: str) -> None:
    model, root = tiny("gqa")
    rows, expected = [], []
    for ids in documents((9, 4, 17)):
        likely = greedy(model, ids, 3)
        for wrong in (None, 0, 1, 2):
            answer = [(token + 1) % 200 if index == wrong else token for index, token in enumerate(likely)]
            rows.append(Row(np.array([*ids, *answer]), 3))
            expected.append(wrong is None)
        rows.append(Row(np.array([*ids, *likely]), 4))  # one more counts, which is any token
        expected.append(False)
    world_size, places = LAYOUTS[layout]
    assert {tuple(found[1]) for found in pool.run(scored, world_size, places, root, rows, 2)} == {tuple(expected)}


@pytest.mark.parametrize("layout", ["TP1", "TP2xPP2+SP"])
def test_answers_of_one_token_to_the_same_question_cost_one_pass(tiny: Tiny, pool: Pool, layout: str) -> None:
    model, root = tiny("gqa")
    questions = documents((12, 30))
    endings = ([7], 1), ([8], 1), ([9], 2), ([5, 7], 2), ([6, 7], 2), ([5, 8], 2)
    rows = [Row(np.array([*ids, *ending]), counts) for ending, counts in endings for ids in questions]
    expected = [theirs(model, [row.ids[1:]], 99, 99, int(row.ids[0])) for row in rows]
    before = [theirs(model, [row.ids[1 : -row.counts]], 99, 99, int(row.ids[0])) for row in rows]
    world_size, places = LAYOUTS[layout]
    for sums, _, seen in pool.run(scored, world_size, places, root, rows, 1):
        np.testing.assert_allclose(sums, np.subtract(expected, before)[:, 0], rtol=1e-5)
        assert seen == 3 * len(questions)  # by what comes before the last token: nothing, 5, 6


def test_no_rows_are_no_work(tiny: Tiny, pool: Pool) -> None:
    assert pool.run(ours, 2, {}, [(tiny("gqa")[1], [], 4)]) == [[[]], [[]]]
