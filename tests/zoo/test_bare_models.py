"""Checkpoints of models without their head, as GPT-2 and BLOOM are published: names lack what the whole model adds."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.verify import verify
from tests.zoo.cases import CASES


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_a_bare_model_converts_there_and_back(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    whole = case.save(case.model(), tmp_path / "whole")
    bare = tmp_path / "bare"
    bare.mkdir()
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(whole / "model.safetensors").items()}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    (bare / "config.json").write_bytes((whole / "config.json").read_bytes())

    convert(bare, tmp_path / "megatron")
    report = verify(whole, tmp_path / "megatron", "logits", ids=case.ids().tolist())
    assert report.ok and max(one.max_abs for one in report.texts) <= 1e-5
    convert(tmp_path / "megatron", tmp_path / "back")
    assert (bare / "model.safetensors").read_bytes() == (tmp_path / "back" / "model.safetensors").read_bytes()
