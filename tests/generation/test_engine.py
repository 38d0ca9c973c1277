"""The engine's tokens equal transformers' under every parallel layout, and its rules hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.generation.runs import LIMITS, NEW, PROMPTS, Request, answer, ours, theirs
from tests.model.layouts import LAYOUTS, Layout, load_tiny
from tests.tiny import tokens
from tests.workers import Pool

Tiny = Callable[[str], tuple[torch.nn.Module, str]]
PARALLEL = ("TP1", "TP2", "PP2", "TP2xPP2")
COMPARED = ("gqa", "mqa", "tied", "biases", "head_dim", "linear", "llama3", "yarn", "yarn_factor", "dynamic")


@pytest.fixture(scope="module")
def greedy(tiny: Tiny) -> dict[str, list[list[int]]]:
    """transformers' greedy answers of each variant."""
    return {name: theirs(tiny(name)[0], Request()) for name in COMPARED}


def agreed(results: list[Any]) -> Any:
    """What every rank answered."""
    assert all(result == results[0] for result in results)
    return results[0]


REFILLED = Request(max_new_tokens=LIMITS, options=dict(batch_size=3))


def cut(answers: list[list[int]]) -> list[list[int]]:
    """As far as `REFILLED` goes."""
    return [ids[:limit] for ids, limit in zip(answers, LIMITS, strict=True)]


@pytest.mark.parametrize("layout", PARALLEL)
def test_greedy_tokens_of_a_ragged_batch_equal_transformers(
    tiny: Tiny, pool: Pool, greedy: dict[str, list[list[int]]], layout: str
) -> None:
    roots = {name: tiny(name)[1] for name in COMPARED}
    found = agreed(pool.run(ours, LAYOUTS[layout].world_size, roots, LAYOUTS[layout], Request(), REFILLED))
    wrong = [name for name in COMPARED if found[name] != [greedy[name], cut(greedy[name])]]
    assert not wrong


def test_a_dynamic_rotary_is_tested_beyond_its_trained_length(tiny: Tiny, greedy: dict[str, list[list[int]]]) -> None:
    assert max(map(len, PROMPTS)) + NEW > tiny("dynamic")[0].config.max_position_embeddings == 20
    assert greedy["dynamic"] != greedy["gqa"]


@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2"])
def test_repetition_penalty_equals_transformers(tiny: Tiny, pool: Pool, layout: str) -> None:
    model, root = tiny("gqa")
    requests = [Request(params=dict(repetition_penalty=penalty)) for penalty in (1.3, 0.8)]
    found = agreed(pool.run(ours, LAYOUTS[layout].world_size, {"gqa": root}, LAYOUTS[layout], *requests))
    expected = [theirs(model, Request(), repetition_penalty=penalty) for penalty in (1.3, 0.8)]
    assert found["gqa"] == expected
    assert expected[0] != expected[1] != theirs(model, Request())


@pytest.mark.parametrize("layout", ["TP1", "PP2"])
def test_rows_stop_where_transformers_stops(tiny: Tiny, pool: Pool, layout: str) -> None:
    model, root = tiny("gqa")
    free = theirs(model, Request())
    eos = [free[0][4], free[3][9], free[6][1]]
    request = Request(options=dict(eos_token_ids=eos))
    found = agreed(pool.run(ours, LAYOUTS[layout].world_size, {"gqa": root}, LAYOUTS[layout], request))["gqa"][0]
    assert found == theirs(model, Request(), eos_token_id=eos)
    assert len({len(ids) for ids in found}) > 2


# ------------------------------------------------------------------------------------------------------------- sampling

DRAWN = Request(params=dict(temperature=1.5, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=7))


def test_drawn_tokens_are_the_same_in_every_layout_and_batch_size(tiny: Tiny, pool: Pool) -> None:
    roots = {"gqa": tiny("gqa")[1]}
    requests = (DRAWN, DRAWN, replace(DRAWN, max_new_tokens=LIMITS, options=dict(batch_size=3)))
    results = [agreed(pool.run(ours, one.world_size, roots, one, *requests)) for one in map(LAYOUTS.get, PARALLEL)]
    first = results[0]["gqa"][0]
    assert all(result["gqa"] == [first, first, cut(first)] for result in results)


def test_another_seed_draws_other_tokens(tiny: Tiny, pool: Pool) -> None:
    other = replace(DRAWN, params={**DRAWN.params, "seed": 8})
    first, second = agreed(pool.run(ours, 1, {"gqa": tiny("gqa")[1]}, Layout(), DRAWN, other))["gqa"]
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_draws_of_a_prompt_are_its_seeds_whatever_else_is_generated(tiny: Tiny, pool: Pool) -> None:
    last = replace(DRAWN, prompts=PROMPTS[-1:], options=dict(seeds=[(7, len(PROMPTS) - 1)]))
    same = replace(DRAWN, prompts=[PROMPTS[0]] * 3, options=dict(seeds=[(5, 2), (5, 2), (5, 3)]))
    found = agreed(pool.run(ours, 1, {"gqa": tiny("gqa")[1]}, Layout(), DRAWN, last, same))["gqa"]
    assert found[1] == found[0][-1:]
    assert found[2][0] == found[2][1] != found[2][2]


def test_ids_that_pad_the_vocabulary_are_never_drawn(tiny: Tiny, pool: Pool) -> None:
    wild = Request(params=dict(temperature=100.0), max_new_tokens=45, prompts=[[1]] * 64)
    (drawn,) = agreed(pool.run(ours, 2, {"gqa": tiny("gqa")[1]}, LAYOUTS["TP2"], wild))["gqa"]
    ids = {token for row in drawn for token in row}
    assert max(ids) < 200  # of 224
    assert len(ids) > 190


# ------------------------------------------------------------------------------------------------------------ the cache


def _without_cache(rank: int, world_size: int, root: str) -> list[list[int]]:
    model = load_tiny(root, Layout()).eval()
    answers = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NEW):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), torch.arange(len(ids))[None], None)[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


@pytest.mark.parametrize("variant", ["gqa", "yarn"])
def test_the_cache_changes_nothing(tiny: Tiny, pool: Pool, variant: str) -> None:
    root = tiny(variant)[1]
    with_cache = pool.run(ours, 1, {variant: root}, Layout(), Request())[0][variant][0]
    assert with_cache == pool.run(_without_cache, 1, root)[0]


def _without_padding_mask(rank: int, world_size: int, root: str) -> list[list[int]]:
    from megatron_patch.layers.cache import KVCache

    original = KVCache._attention_mask
    try:
        KVCache._attention_mask = lambda self, num_new, window: None
        return answer(load_tiny(root, Layout()), Request())
    finally:
        KVCache._attention_mask = original


def test_without_its_padding_mask_the_engine_would_be_found_out(tiny: Tiny, pool: Pool) -> None:
    model, root = tiny("gqa")
    expected = theirs(model, Request())
    (found,) = pool.run(_without_padding_mask, 1, root)
    longest = max(range(len(PROMPTS)), key=lambda index: len(PROMPTS[index]))
    assert found[longest] == expected[longest]
    assert sum(a != b for a, b in zip(found, expected, strict=True)) >= len(PROMPTS) - 2


# ------------------------------------------------------------------------------------------------------ rows on the way


def _told(rank: int, world_size: int, root: str, layout: Layout, request: Request) -> list[tuple[Any, ...]]:
    """What `on_finish` is told, in the order in which it is."""
    told: list[tuple[Any, ...]] = []
    options = {**request.options, "on_finish": lambda *found: told.append(found)}
    answers = answer(load_tiny(root, layout), replace(request, options=options))
    assert {index: ids for index, ids, _ in told} == dict(enumerate(answers))
    return told


@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2"])
@pytest.mark.parametrize("params", [{}, dict(temperature=2.0, top_k=20, repetition_penalty=1.3)])
def test_log_probabilities_are_transformers_of_the_bare_logits(
    tiny: Tiny, pool: Pool, layout: str, params: dict[str, Any]
) -> None:
    model, root = tiny("gqa")
    request = Request(max_new_tokens=LIMITS, params=params, options=dict(batch_size=3, logprobs=True))
    for index, ids, found in agreed(pool.run(_told, LAYOUTS[layout].world_size, root, LAYOUTS[layout], request)):
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPTS[index], *ids]])).logits[0, len(PROMPTS[index]) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)


def test_greedy_log_probabilities_are_transformers_transition_scores(tiny: Tiny, pool: Pool) -> None:
    model, root = tiny("gqa")
    theirs(model, Request(prompts=()))  # sets what is generated
    ids = torch.tensor([PROMPTS[3]])
    options = dict(attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True)
    expected = model.generate(ids, **options)
    scores = model.compute_transition_scores(expected.sequences, expected.logits, normalize_logits=True)[0]
    request = Request(prompts=[PROMPTS[3]], options=dict(logprobs=True))
    ((_, new, found),) = pool.run(_told, 1, root, Layout(), request)[0]
    assert new == expected.sequences[0, ids.shape[1] :].tolist()
    torch.testing.assert_close(torch.tensor(found), scores, atol=1e-4, rtol=0)


def _ended(rank: int, world_size: int, root: str, layout: Layout) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Rows that end after as many tokens as `LIMITS` says, and when that was asked."""
    asked: list[tuple[int, int]] = []

    def is_finished(index: int, ids: list[int]) -> bool:
        asked.append((index, len(ids)))
        return len(ids) == LIMITS[index]

    request = Request(max_new_tokens=20, options=dict(batch_size=3, is_finished=is_finished))
    return answer(load_tiny(root, layout), request), asked


@pytest.mark.parametrize("layout", ["TP1", "PP2"])
def test_rows_end_where_the_caller_says(
    tiny: Tiny, pool: Pool, greedy: dict[str, list[list[int]]], layout: str
) -> None:
    found, asked = agreed(pool.run(_ended, LAYOUTS[layout].world_size, tiny("gqa")[1], LAYOUTS[layout]))
    assert found == cut(greedy["gqa"])
    assert sorted(asked) == [(row, count) for row, limit in enumerate(LIMITS) for count in range(1, limit + 1)]


def _after_an_error(rank: int, world_size: int, root: str) -> list[bool]:
    """Whether the model is as before, while the error is still known."""
    model = load_tiny(root, Layout())

    def fail(*told: Any) -> None:
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError) as error:
        answer(model, replace(REFILLED, options=dict(batch_size=3, on_finish=fail)))
    caches = [getattr(module, "kv_cache", None) for module in model.modules()]
    return [error is not None, model.training, not any(caches), not model.output_layer._forward_pre_hooks]


def test_an_error_of_the_caller_leaves_the_model_as_it_was(tiny: Tiny, pool: Pool) -> None:
    assert all(pool.run(_after_an_error, 1, tiny("gqa")[1])[0])


# --------------------------------------------------------------------------------------------------- what is not wasted


def _observed(rank: int, world_size: int, root: str, eos: list[int]) -> dict[str, list[Any]]:
    model = load_tiny(root, Layout())
    seen: dict[str, list[Any]] = {"rows": [], "positions": [], "told": []}
    model.embedding.register_forward_pre_hook(
        lambda _, args, kw: seen["rows"].append(len(kw["input_ids"])), with_kwargs=True
    )
    model.output_layer.register_forward_hook(lambda _, args, out: seen["positions"].append(out[0].shape[0]))
    answer(model, Request(options=dict(eos_token_ids=eos, on_step=seen["told"].append)))
    assert model.training  # as it was before
    return seen


def test_finished_rows_leave_and_only_the_last_position_has_logits(tiny: Tiny, pool: Pool) -> None:
    model, root = tiny("gqa")
    free = theirs(model, Request())
    eos = sorted({ids[3] for ids in free[:6]})
    lengths = [len(ids) for ids in theirs(model, Request(), eos_token_id=eos)]
    (seen,) = pool.run(_observed, 1, root, eos)
    assert set(seen["positions"]) == {1}
    assert seen["told"] == [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert seen["rows"][0] == 8
    assert seen["rows"][-1] <= 4
    assert all(rows < 2 * told for rows, told in zip(seen["rows"][1:], seen["told"][1:], strict=True))


def _steps(rank: int, world_size: int, root: str, request: Request) -> list[tuple[int, int]]:
    """New tokens of each row, and rows that were not finished, for each pass of the model."""
    model, lengths, told = load_tiny(root, Layout()), [], []
    model.embedding.register_forward_pre_hook(
        lambda _, args, kw: lengths.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    answer(model, replace(request, options={**request.options, "on_step": told.append}))
    return list(zip(lengths, told, strict=True))


def test_a_place_that_is_free_is_taken_at_once(tiny: Tiny, pool: Pool) -> None:
    limits = {index: limit for index, limit in enumerate(LIMITS) if len(PROMPTS[index]) > 1}
    request = replace(REFILLED, prompts=[PROMPTS[index] for index in limits], max_new_tokens=list(limits.values()))
    (steps,) = pool.run(_steps, 1, tiny("gqa")[1], request)
    passes = [number for number, (length, _) in enumerate(steps) if length > 1]  # over prompts
    assert sum(steps[number][1] for number in passes) == len(limits)
    assert steps[0][1] == 3 and len(passes) > 3
    assert all(rows == 3 for length, rows in steps[: passes[-1]] if length == 1)


# ------------------------------------------------------------------------------------------------------------- refusals


def _refusal(rank: int, world_size: int, root: str, layout: Layout, request: Request) -> str:
    with pytest.raises(ValueError) as error:
        answer(load_tiny(root, layout), request)
    return str(error.value)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompts=[[1], []]), "prompt 1 is empty"),
        (Request(prompts=[[1, 500]]), r"prompt 0 has ids 1\.\.500; the model's are 0\.\.207"),
        (Request(prompts=[[-1]]), r"prompt 0 has ids -1\.\.-1"),
        (Request(prompts=[[1]] * 2 + [tokens(1, 30)[0].tolist()]), "prompt 2 has 30 tokens.* the 64 positions"),
        (Request(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (Request(options=dict(batch_size=0)), "batch_size=0 must be at least 1"),
        (Request(max_new_tokens=[1, 2]), "max_new_tokens has 2 numbers for 8 prompts; give one for each"),
        (Request(max_new_tokens=[1] * 7 + [0]), r"max_new_tokens\[7\]=0 must be at least 1"),
    ],
)
def test_an_impossible_request_is_refused(tiny: Tiny, pool: Pool, request_: Request, message: str) -> None:
    (found,) = pool.run(_refusal, 1, tiny("gqa")[1], Layout(), request_)
    assert re.search(message, found), found


def test_sequence_parallelism_is_refused(tiny: Tiny, pool: Pool) -> None:
    found = agreed(pool.run(_refusal, 2, tiny("gqa")[1], LAYOUTS["TP2+SP"], Request()))
    assert "sequence_parallel=True" in found


def test_stretched_positions_count(tiny: Tiny, pool: Pool) -> None:
    request = Request(prompts=[[1, 2]], max_new_tokens=79)  # dynamic: 20 trained positions, stretched fourfold
    assert "80 positions" in pool.run(_refusal, 1, tiny("dynamic")[1], Layout(), request)[0]


def test_no_prompts_are_no_work(tiny: Tiny, pool: Pool) -> None:
    assert pool.run(ours, 1, {"gqa": tiny("gqa")[1]}, Layout(), Request(prompts=[]))[0] == {"gqa": [[]]}
