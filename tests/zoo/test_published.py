"""Every published checkpoint that tests/published describes: its config is understood, and each of its tensors has one
rule, which wants exactly its shape."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.checkpoint.whole import WholeModel, describe

PUBLISHED = {path.stem: path for path in sorted((Path(__file__).parents[1] / "published").glob("*.json"))}


@cache
def facts(name: str) -> dict[str, Any]:
    return json.loads(PUBLISHED[name].read_text())


@cache
def whole(name: str) -> WholeModel:
    return describe(facts(name)["config"])


def _tensors(name: str) -> dict[str, tuple[int, ...]]:
    """All tensors of the checkpoint: `*` counts layers, unless `ranges` says what it counts."""
    given = facts(name).get("ranges", {})
    layers = given.get("*", [[0, whole(name).architecture.num_layers]])
    found: dict[str, tuple[int, ...]] = {}
    for pattern, shape in facts(name)["tensors"].items():
        ranges = given.get(pattern, layers)[: pattern.count("*")]
        template = pattern.replace("*", "{}")
        for numbers in itertools.product(*(range(*bounds) for bounds in ranges)):
            found[template.format(*numbers)] = tuple(shape)
    return found


def test_there_are_published_checkpoints() -> None:
    assert len(PUBLISHED) >= 11


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_tensor_has_one_rule_and_its_shape(name: str) -> None:
    # That no tensor has two rules, and no parameter none, `claim` has seen to.
    model, tensors = whole(name), _tensors(name)
    repeats = {copy: original for copy, original in model.repeats.items() if copy in tensors}
    assert {copy: tensors[copy] for copy in repeats} == {copy: tensors[one] for copy, one in repeats.items()}
    assert {one: shape for one, shape in tensors.items() if one not in repeats} == model.hf_shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tensors_that_are_no_parameters_are_left_out(name: str) -> None:
    family = whole(name).architecture.family
    examples = [re.sub(r"\\d\+", "7", pattern).replace("\\.", ".") for pattern in facts(name)["ignored"]]
    assert [one for one in examples if not any(re.fullmatch(rule, one) for rule in family.ignored_weights)] == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_parameter_would_be_left_out(name: str) -> None:
    family = whole(name).architecture.family
    assert [one for one in _tensors(name) if any(re.fullmatch(rule, one) for rule in family.ignored_weights)] == []
