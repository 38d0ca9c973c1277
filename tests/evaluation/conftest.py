"""Models for the tests of evaluation, made once a session: tiny random ones, and one with a tokenizer and text."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny import VARIANTS, hf_llama, hf_moe
from tests.tokenizer import make

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # no test asks for the network

Tiny = Callable[[str], tuple[torch.nn.Module, str]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A model of tests.tiny by its name, and the Megatron checkpoint converted from it."""
    root, models = tmp_path_factory.mktemp("evaluation"), {}

    def made(name: str) -> torch.nn.Module:
        if name in VARIANTS:
            return hf_llama(**VARIANTS[name])
        return hf_bloom() if name == "bloom" else hf_moe(name)

    def get(name: str) -> tuple[torch.nn.Module, str]:
        from megatron_patch.checkpoint.convert import convert

        if name not in models:
            models[name] = made(name)
            models[name].save_pretrained(root / f"hf-{name}")
            convert(root / f"hf-{name}", root / name)
        return models[name], str(root / name)

    return get


def hf_bloom() -> torch.nn.Module:
    """A random BLOOM: no rotary positions, biases, tied embeddings."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=200, hidden_size=48, n_layer=4, n_head=8)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.12)
    return model


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face model with a byte-level tokenizer that has no BOS."""
    root = tmp_path_factory.mktemp("spoken") / "hf"
    hf_llama(vocab_size=640, max_position_embeddings=128).save_pretrained(root)
    make.byte_bpe(root)
    return root


@pytest.fixture(scope="session")
def spoken_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a SentencePiece tokenizer that puts BOS before every text."""
    root = tmp_path_factory.mktemp("spoken") / "llama"
    hf_llama(vocab_size=512, max_position_embeddings=128).save_pretrained(root)
    make.llama_sentencepiece(root)
    return root
