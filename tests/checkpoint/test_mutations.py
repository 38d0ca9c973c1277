"""Every weight rule matters: change any one and logits leave transformers'. (A round trip would stay bit-exact.)"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_patch.checkpoint import whole
from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.verify import Bounds, verify
from megatron_patch.models.llama import LLAMA
from megatron_patch.weights import QKV, Copy, Heads, Rule, Stack

Directory = Callable[[str], Path]


class Reversed(Copy):
    """The right tensor with its rows in the wrong order."""

    def to_internal(self, tensors: Sequence[Tensor], heads: Heads) -> Tensor:
        return tensors[0].flip(0)


class Transposed(Copy):
    """A square matrix turned over."""

    def to_internal(self, tensors: Sequence[Tensor], heads: Heads) -> Tensor:
        return tensors[0].T


class NotInterleaved(QKV):
    """All queries, then all keys, then all values."""

    def to_internal(self, tensors: Sequence[Tensor], heads: Heads) -> Tensor:
        return torch.cat(list(tensors))


class HeadInterleaved(QKV):
    """Rows of query heads dealt to the groups in turn, rather than group by group."""

    def to_internal(self, tensors: Sequence[Tensor], heads: Heads) -> Tensor:
        query, *others = tensors
        dealt = query.reshape(-1, heads.num_query_groups, heads.kv_channels, *query.shape[1:]).transpose(0, 1)
        return super().to_internal([dealt.reshape(query.shape), *others], heads)


def _swapped(rule: Rule, one: int, other: int) -> Rule:
    names = list(rule.hf)
    names[one], names[other] = names[other], names[one]
    return type(rule)(rule.internal, *names)


def _mutants() -> list[tuple[str, Rule, Rule]]:
    """(what was done, rule, wrong rule) for every rule of the family."""
    mutants = []
    for rule in LLAMA.weights:
        if isinstance(rule, Stack):
            mutants.append(("gate and up swapped", rule, _swapped(rule, 0, 1)))
        elif isinstance(rule, QKV):
            mutants.append(("q and k swapped", rule, _swapped(rule, 0, 1)))
            mutants.append(("k and v swapped", rule, _swapped(rule, 1, 2)))
            mutants.append(("not interleaved", rule, NotInterleaved(rule.internal, *rule.hf)))
            mutants.append(("interleaved by head", rule, HeadInterleaved(rule.internal, *rule.hf)))
        else:
            mutants.append(("rows reversed", rule, Reversed(rule.internal, *rule.hf)))
            if rule.internal.endswith("linear_proj.weight"):
                mutants.append(("transposed", rule, Transposed(rule.internal, *rule.hf)))
    return mutants


MUTANTS = _mutants()


def _convert_with(monkeypatch: pytest.MonkeyPatch, rules: tuple[Rule, ...], source: Path, target: Path) -> None:
    monkeypatch.setattr(whole, "family_for", lambda config: dataclasses.replace(LLAMA, weights=rules))
    convert(source, target)
    monkeypatch.undo()


def test_there_is_a_mutant_of_every_rule() -> None:
    assert {rule.internal for _, rule, _ in MUTANTS} == {rule.internal for rule in LLAMA.weights}


@pytest.mark.parametrize(
    ("what", "rule", "wrong"), MUTANTS, ids=[f"{rule.internal}-{what}" for what, rule, _ in MUTANTS]
)
def test_a_wrong_rule_changes_the_logits(
    hf: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, rule: Rule, wrong: Rule
) -> None:
    # Swapping queries and keys needs as many of both; dealing heads to groups needs groups of several.
    source = hf("mha_biases" if what == "q and k swapped" else "biases")
    rules = tuple(wrong if one is rule else one for one in LLAMA.weights)
    _convert_with(monkeypatch, rules, source, tmp_path / "megatron")
    report = verify(source, tmp_path / "megatron", max_tokens=24, bounds=Bounds())
    assert not report.ok and report.texts[0].max_abs > 1e-2


def test_norms_exchanged_change_the_logits(hf: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hf = {rule.hf: rule for rule in LLAMA.weights}
    first = by_hf[("model.layers.*.input_layernorm.weight",)]
    second = by_hf[("model.layers.*.post_attention_layernorm.weight",)]
    exchanged = {first: Copy(first.internal, *second.hf), second: Copy(second.internal, *first.hf)}
    rules = tuple(exchanged.get(rule, rule) for rule in LLAMA.weights)
    _convert_with(monkeypatch, rules, hf("biases"), tmp_path / "megatron")
    assert verify(hf("biases"), tmp_path / "megatron").texts[0].max_abs > 1e-2


@pytest.mark.parametrize("variant", ["biases", "mha_biases"])
def test_the_right_rules_do_not(hf: Directory, megatron: Directory, variant: str) -> None:
    report = verify(hf(variant), megatron(variant), max_tokens=24)
    assert report.ok and report.texts[0].max_abs <= 1e-5
