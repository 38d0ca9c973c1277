"""The family that docs/adding_a_family.md writes out works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_patch import models
from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.verify import verify
from tests.guards.imports import ROOT
from tests.zoo.cases import _LLAMA, Case


def _code(guide: str) -> str:
    return re.search(r"```python\n(.*?)```", (ROOT / "docs" / guide).read_text(), re.S)[1]


CODE = _code("adding_a_family.md")


def test_it_takes_less_than_forty_lines() -> None:
    assert sum(bool(line.strip()) for line in CODE.splitlines()) <= 40


@pytest.mark.parametrize("change", [{}, {"use_qkv_bias": True, "partial_rotary_factor": 0.5}])
def test_it_equals_transformers(change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    exec(compile(CODE, "docs/adding_a_family.md", "exec"), names)
    monkeypatch.setattr(models, "FAMILIES", (*models.FAMILIES, names["STABLELM"]))
    config = {"model_type": "stablelm", "vocab_size": 200, **_LLAMA, "num_attention_heads": 3, "num_key_value_heads": 3}
    case = Case({**config, **change})
    hf = case.save(case.model(), tmp_path / "hf")
    convert(hf, tmp_path / "megatron")
    report = verify(hf, tmp_path / "megatron", ids=case.ids().tolist())
    assert report.ok and max(one.max_abs for one in report.texts) <= 1e-5


def test_both_languages_show_the_same_code() -> None:
    assert _code("adding_a_family.zh-CN.md") == CODE
