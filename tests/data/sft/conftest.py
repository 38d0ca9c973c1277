"""Tokenizers of chat models for the tests of this folder, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_patch.tokenizer import Tokenizer
from tests.data.sft import make


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """tokenizer(family, chat_template=None): the tokenizer of a family."""
    root: Path = tmp_path_factory.mktemp("chat_tokenizers")
    return lambda family, chat_template=None: make.tokenizer(root / family, family, chat_template)
