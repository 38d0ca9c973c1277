"""A tokenizer and a way to write datasets, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_patch.data.indexed import indexed_writer
from tests.tokenizer import make


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a byte-level BPE of a few hundred ids."""
    return make.byte_bpe(tmp_path_factory.mktemp("tokenizers") / "bpe")


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[..., str]:
    """write_dataset(name, documents): a dataset of these documents (lists of ids); returns its prefix."""

    def write(name: str, documents: list[list[int]], dtype: type = np.uint16) -> str:
        with indexed_writer(str(tmp_path / name), np.dtype(dtype)) as writer:
            for document in documents:
                writer.add(np.array(document, dtype), np.array([len(document)], np.int32))
        return str(tmp_path / name)

    return write
