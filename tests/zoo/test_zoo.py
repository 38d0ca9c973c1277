"""Every family of the zoo equals its reference: logits, loss and gradients at every layout, generation, training; and
each of its weight rules matters."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.opening import Wanted
from megatron_patch.checkpoint.sharding import Layout as Ranks
from megatron_patch.checkpoint.sharding import Pipeline
from tests.generation.runs import Request, theirs
from tests.zoo import runs
from tests.zoo.cases import CASES, Case, logits_of, next_logits_of
from tests.zoo.runs import FOUR, LAYOUTS, MOE_LAYOUTS, Job

STEPS = 12
PROMPTS = (5, 14, 9)
"""Lengths of the prompts that are continued."""
LIMITS = (30, 22, 32)
"""By how many tokens: two rows at a time, so that the first prompt takes the place of the second beside the third."""

MAIN = {name for name, case in CASES.items() if case.is_main}


def _layouts(case: Case) -> list[str]:
    return [name for name in MOE_LAYOUTS if name in LAYOUTS or (case.is_moe and (case.is_main or name not in FOUR))]


def _names(layout: str) -> list[str]:
    return [name for name, case in CASES.items() if layout in _layouts(case)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a case: hf, megatron, and the gradients in the same two forms."""

    @cache
    def made(name: str) -> Path:
        case, folder = CASES[name], tmp_path_factory.mktemp(name)
        convert(case.save(case.model(), folder / "hf"), folder / "megatron")
        return folder

    return made


@cache
def reference_logits(name: str) -> torch.Tensor:
    case = CASES[name]
    with torch.no_grad():
        return logits_of(case.model(), case.ids())


@cache
def reference_loss(name: str) -> tuple[float, torch.nn.Module]:
    """The reference's masked loss, and a model that holds its gradients in place of weights."""
    case = CASES[name]
    # A plain module has no dropout; what it does otherwise in training, the model must do as well.
    model, ids = case.model().train(bool(case.reference)), case.ids()
    labels, mask = runs.labels_and_mask(ids)
    logits = logits_of(model, ids)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    if extra := getattr(model, "extra_loss", None):
        losses = losses + extra(logits).flatten()
    loss = (losses * mask.flatten()).sum() / mask.sum()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return loss.item(), model


@pytest.fixture(scope="module")
def logits_under(pool: Any, place: Callable[[str], Path]) -> Callable[[str], list[dict[str, torch.Tensor]]]:
    """Every model's logits under a layout, from each rank; each layout runs once."""

    @cache
    def computed(layout: str) -> list[dict[str, torch.Tensor]]:
        jobs = {name: Job(str(place(name) / "megatron"), CASES[name].ids()) for name in _names(layout)}
        return pool.run(runs.logits, MOE_LAYOUTS[layout].world_size, jobs, MOE_LAYOUTS[layout])

    return computed


@pytest.mark.parametrize(("name", "layout"), [(name, one) for name, case in CASES.items() for one in _layouts(case)])
def test_logits_equal_the_reference(name: str, layout: str, logits_under: Callable[[str], Any]) -> None:
    found = [result[name] for result in logits_under(layout) if name in result]
    assert found and max(float((one - reference_logits(name)).abs().max()) for one in found) <= CASES[name].bound


def _trains(name: str, layout: str) -> bool:
    case = CASES[name]
    if layout != "TP1" and not case.is_main:
        return False
    # megatron-core trains experts under tensor parallelism with sequence parallelism only.
    return layout in _layouts(case) and not (case.is_moe and layout == "TP2")


@pytest.fixture(scope="module")
def gradients_under(
    pool: Any, place: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[dict[str, Any]]]:
    """Losses and gradient errors of every model under a layout, from each rank; each layout runs once."""

    @cache
    def expected(name: str) -> str:
        folder = tmp_path_factory.mktemp(f"{name}_gradients")
        convert(CASES[name].save(reference_loss(name)[1], folder / "hf"), folder / "megatron")
        return str(folder / "megatron")

    @cache
    def computed(layout: str) -> list[dict[str, Any]]:
        names = [name for name in CASES if _trains(name, layout)]
        jobs = {name: Job(str(place(name) / "megatron"), CASES[name].ids(), expected(name)) for name in names}
        return pool.run(runs.gradients, MOE_LAYOUTS[layout].world_size, jobs, MOE_LAYOUTS[layout])

    return computed


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name in CASES for layout in MOE_LAYOUTS if _trains(name, layout)]
)
def test_loss_and_gradients_equal_the_reference(name: str, layout: str, gradients_under: Callable[[str], Any]) -> None:
    results, loss = [result[name] for result in gradients_under(layout)], reference_loss(name)[0]
    sums = [one for found, _ in results for one in found]
    tensor = MOE_LAYOUTS[layout].tensor  # each of these ranks reports the same sums
    assert len(sums) == tensor * len(CASES[name].ids())
    assert abs(sum(s for s, _ in sums) / sum(n for _, n in sums) - loss) / loss <= 1e-5
    errors = {f"rank {rank} {key}": error for rank, (_, one) in enumerate(results) for key, error in one.items()}
    assert {key: error for key, error in errors.items() if not error <= 1e-4} == {}


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_bit_equal(name: str, place: Callable[[str], Path], tmp_path: Path) -> None:
    case, before = CASES[name], place(name) / "hf" / "model.safetensors"
    # Over two stages, the first one shorter where layers are odd.
    first = case.num_layers // 2 if case.num_layers % 2 else None
    legacy = Wanted(format="legacy", layout=Ranks(2, Pipeline(2, first=first)))
    convert(place(name) / "megatron", tmp_path / "legacy", legacy)
    convert(tmp_path / "legacy", tmp_path / "back")
    assert before.read_bytes() == (tmp_path / "back" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def continued(pool: Any, place: Callable[[str], Path]) -> dict[str, list[list[int]]]:
    jobs = {name: _prompts(case) for name, case in CASES.items()}
    roots = {name: str(place(name) / "megatron") for name in CASES}
    return pool.run(runs.generation, 1, jobs, roots, LIMITS)[0]


def _prompts(case: Case) -> list[list[int]]:
    return [case.ids(seed=5, batch=3, length=length)[row].tolist() for row, length in enumerate(PROMPTS)]


@pytest.mark.parametrize("name", CASES)
def test_greedy_generation_equals_the_reference_without_a_cache(name: str, continued: dict[str, Any]) -> None:
    model = CASES[name].model()
    if CASES[name].cached_keys_differ:
        expected = theirs(model, Request(_prompts(CASES[name]), max(LIMITS)))
        assert continued[name] == [ids[:limit] for ids, limit in zip(expected, LIMITS, strict=True)]
        return
    for prompt, found, limit in zip(_prompts(CASES[name]), continued[name], LIMITS, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + limit:
                ids.append(int(next_logits_of(model, torch.tensor([ids]), len(prompt)).argmax()))
        assert found == ids[len(prompt) :]


@pytest.fixture(scope="module")
def trained(pool: Any, place: Callable[[str], Path]) -> Callable[[str], dict[str, list[float]]]:
    @cache
    def losses(layout: str) -> dict[str, list[float]]:
        jobs = {name: Job(str(place(name) / "megatron"), CASES[name].ids()) for name in sorted(MAIN)}
        return pool.run(runs.training, LAYOUTS[layout].world_size, jobs, LAYOUTS[layout], STEPS)[-1]

    return losses


@pytest.mark.parametrize("name", sorted(MAIN))
def test_training_lowers_the_loss_and_tensor_parallelism_changes_nothing(
    name: str, trained: Callable[[str], Any]
) -> None:
    one, two = trained("TP1")[name], trained("TP2+SP")[name]
    assert len(one) == STEPS and one[-1] < one[0] - 0.3
    # Adam divides by the root of tiny second moments: rounding grows, step by step, until it sends a token to another
    # expert where there are several; from there on the runs part.
    same = STEPS // 2 if CASES[name].is_moe else STEPS
    assert max(abs(a - b) for a, b in zip(one[:same], two[:same], strict=True)) <= 1e-3


@pytest.fixture(scope="module")
def mutated(pool: Any, place: Callable[[str], Path]) -> dict[str, dict[str, float]]:
    jobs = {name: Job(str(place(name) / "megatron"), case.ids()) for name, case in CASES.items()}
    return pool.run(runs.mutants, 1, jobs)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_mutant_of_any_rule_changes_the_logits(name: str, mutated: dict[str, Any]) -> None:
    assert {rule: distance for rule, distance in mutated[name].items() if not distance > 20 * CASES[name].bound} == {}


PLANTED = (
    ("bloom", "slopes in the wrong order"),
    ("opt", "positions off by one"),
    ("mistral", "window off by one"),
    ("chatglm_base", "block positions off by one"),
    ("glm_blocks_base", "block positions off by one"),
    ("glm130b_base", "prefix read causally"),
)


@pytest.mark.parametrize(("name", "error"), [one for one in PLANTED if one[0] in CASES])
def test_an_error_beside_the_weights_changes_the_logits(
    name: str, error: str, pool: Any, place: Callable[[str], Path]
) -> None:
    job = Job(str(place(name) / "megatron"), CASES[name].ids())
    assert pool.run(runs.planted, 1, job, error)[0] > 1e-2


@pytest.fixture(scope="module")
def rounded(pool: Any, place: Callable[[str], Path]) -> dict[str, tuple[float, float, bool]]:
    jobs = {name: Job(str(place(name) / "megatron"), CASES[name].ids()) for name in sorted(MAIN)}
    return pool.run(runs.in_bf16, 1, jobs)[0]


@pytest.mark.parametrize("name", sorted(MAIN))
def test_bf16_gives_the_loss_of_fp32_to_rounding(name: str, rounded: dict[str, Any]) -> None:
    exact, coarse, has_gradients = rounded[name]
    assert has_gradients and abs(coarse - exact) <= 0.05 * exact


PREFIX = [name for name in ("chatglm_base", "glm_blocks_base", "glm130b_base") if name in CASES]


@pytest.mark.parametrize("name", PREFIX)
def test_no_position_that_sees_its_label_counts(name: str, pool: Any, place: Callable[[str], Path]) -> None:
    ids = CASES[name].ids(batch=3)
    start = CASES[name].config.get("sop_token_id", CASES[name].config.get("bos_token_id"))
    counts, counted, before, after = pool.run(runs.context_losses, 1, Job(str(place(name) / "megatron"), ids))[0]
    length = (ids == start).int().argmax(1)
    assert counted == counts.sum()
    assert (counts.sum(1) == ids.shape[1] - (length - 1).clamp(min=0)).all()
    sees_label = (before[:, 1] - after[:, 1]).abs().amax(-1) > 1e-6  # the label of position 1 is the token at 2
    assert sees_label.any() and not (sees_label & counts[:, 1]).any()
