"""A base, a file of new pieces, a corpus and the merged tokenizer, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_patch.vocab.arguments import VocabMergeArgs
from megatron_patch.vocab.merge import MergeReport, merge
from tests.vocab import make


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.base_directory(tmp_path_factory.mktemp("vocab") / "base")


@pytest.fixture(scope="session")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("vocab") / "new.model"
    file.write_bytes(make.new_proto().SerializeToString())
    return file


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make.jsonl(tmp_path_factory.mktemp("vocab") / "corpus.jsonl", make.mixed(600))


@pytest.fixture(scope="session")
def merging(tmp_path_factory: pytest.TempPathFactory, base: Path, new: Path, corpus: str) -> MergeReport:
    output = tmp_path_factory.mktemp("vocab") / "merged"
    return merge(VocabMergeArgs(str(base), str(new), str(output), corpus=(corpus,), pad_multiple=64))


@pytest.fixture(scope="session")
def merged(merging: MergeReport) -> Path:
    return Path(merging.output)
