"""Tiny models on disk, made once a session: their Hugging Face directories and the checkpoints converted from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_patch.checkpoint.convert import convert
from tests.tiny import MOE, VARIANTS, hf_llama, hf_moe

_VARIANTS = {
    **VARIANTS,
    "mha_biases": {**VARIANTS["mha"], **VARIANTS["biases"]},
    "few_groups": dict(num_key_value_heads=2),
}


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Hugging Face directory of a variant, in several safetensors files."""
    root = tmp_path_factory.mktemp("hf")

    def directory(variant: str) -> Path:
        if not (root / variant).exists():
            model = hf_moe(variant) if variant in MOE else hf_llama(**_VARIANTS[variant])
            model.save_pretrained(root / variant, max_shard_size="40KB")
            (root / variant / "LICENSE").write_text("travels along")
        return root / variant

    return directory


@pytest.fixture(scope="session")
def megatron(hf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Megatron checkpoint of a variant."""
    root = tmp_path_factory.mktemp("megatron")

    def directory(variant: str) -> Path:
        if not (root / variant).exists():
            convert(hf(variant), root / variant)
        return root / variant

    return directory


@pytest.fixture
def edit(tmp_path: Path) -> Callable[..., Path]:
    """Copy a Hugging Face directory into one file, with its tensors changed by a function that gets them as a dict."""

    def edited(source: Path, change: Callable[[dict[str, Any]], None]) -> Path:
        target = tmp_path / "edited"
        target.mkdir()
        (target / "config.json").write_bytes((source / "config.json").read_bytes())
        tensors = {name: t for file in sorted(source.glob("*.safetensors")) for name, t in load_file(file).items()}
        change(tensors)
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        return target

    return edited
