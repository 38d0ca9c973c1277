"""Tokenizer directories, made once a session."""

from __future__ import annotations

import pytest

from tests.tokenizer import make


@pytest.fixture(scope="session", params=["byte_bpe", "llama_sentencepiece", "byt5"])
def any_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every kind of tokenizer in turn."""
    return getattr(make, request.param)(tmp_path_factory.mktemp("tokenizers") / request.param)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The byte-level BPE."""
    return make.byte_bpe(tmp_path_factory.mktemp("tokenizers") / "bpe")
