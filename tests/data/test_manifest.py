"""A dataset that another tokenizer made is refused by name; one that says nothing of its tokenizer is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_patch.data.arguments import DataSpec
from megatron_patch.data.datasets import build_datasets
from megatron_patch.data.indexed import read_index
from megatron_patch.data.manifest import (
    SAMPLE_TOKENS,
    check_fit,
    manifest_path,
    merge_manifests,
    read_manifest,
    sample_ids,
    write_manifest,
)
from megatron_patch.tokenizer import Tokenizer, load_tokenizer

DOCUMENTS = [[5, 6, 7, 0], [8, 9, 0]] * 30
Write = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer(bpe: str) -> Tokenizer:
    return load_tokenizer(bpe)


@pytest.fixture
def dataset(write_dataset: Write, tokenizer: Tokenizer) -> str:
    prefix = write_dataset("data", DOCUMENTS)
    write_manifest(prefix, tokenizer, append_eod=True, max_id=9)
    return prefix


def build(prefix: str, tokenizer: Tokenizer, **changes: Any) -> list[str]:
    """Builds the training set; returns what the user is told."""
    lines: list[str] = []
    spec = DataSpec(data_path=(prefix,), seq_length=16, **changes)
    build_datasets(spec, tokenizer, (4, 0, 0), vocab_size=600, say=lines.append)
    return [line for line in lines if not line.startswith("train: ")]  # how much is read of each source


def test_a_dataset_of_the_same_tokenizer_passes_without_a_word(dataset: str, tokenizer: Tokenizer) -> None:
    assert build(dataset, tokenizer) == build(dataset, tokenizer, reset_attention_mask=True) == []


def test_what_is_written_is_read_back(dataset: str, tokenizer: Tokenizer) -> None:
    found = read_manifest(dataset)
    assert (found.tokenizer, found.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)
    assert (found.eod, found.append_eod, found.max_id) == (0, True, 9)
    assert list(Path(dataset).parent.glob(".*")) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fingerprint": "f" * 64}, r"data: made with another tokenizer \(digest \w{12}, the run's is f{12}\)"),
        ({"vocab_size": 700}, r"data: made with another tokenizer, of a vocabulary of \d+, the run's has 700"),
        ({"eos": 3}, "data: its end-of-document id is 0, the run's is 3"),
    ],
)
def test_a_dataset_of_another_tokenizer_is_refused_by_name(
    changes: dict[str, Any], problem: str, dataset: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "fingerprint" in changes:  # files that differ and encode differently
        monkeypatch.setattr("megatron_patch.data.manifest.encoding_digest", lambda tokenizer: tokenizer.fingerprint)
    with pytest.raises(ValueError, match=problem) as caught:
        build(dataset, replace(tokenizer, **changes))
    assert f"remove {dataset}.json" in str(caught.value)
    manifest_path(dataset).unlink()
    build(dataset, replace(tokenizer, **changes))


def test_every_dataset_of_a_blend_that_does_not_fit_is_named(
    dataset: str, write_dataset: Write, tokenizer: Tokenizer
) -> None:
    other = write_dataset("other", DOCUMENTS)
    write_manifest(other, tokenizer, append_eod=True)
    spec = DataSpec(data_path=("1", dataset, "1", other), seq_length=16)
    with pytest.raises(ValueError, match=r"data: its end.*\n.*other: its end"):
        build_datasets(spec, replace(tokenizer, eos=3), (4, 0, 0))


def test_a_chat_template_makes_no_other_tokenizer(dataset: str, tokenizer: Tokenizer, bpe: str, tmp_path: Path) -> None:
    shutil.copytree(bpe, tmp_path / "chat")
    path = tmp_path / "chat" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{{ messages }}"}))
    other = load_tokenizer(tmp_path / "chat")
    assert other.fingerprint != tokenizer.fingerprint
    assert build(dataset, other) == []


def test_a_merge_more_makes_another_tokenizer(dataset: str, bpe: str, tmp_path: Path) -> None:
    shutil.copytree(bpe, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"].pop()
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"data: made with another tokenizer \(digest"):
        build(dataset, load_tokenizer(tmp_path / "other"))


def test_a_dataset_without_a_manifest_is_taken_with_a_note(write_dataset: Write, tokenizer: Tokenizer) -> None:
    (note,) = build(write_dataset("data", DOCUMENTS), tokenizer)
    assert note.endswith("data: data.json is missing, so which tokenizer made it is taken on trust")


def test_the_manifest_of_an_earlier_dataset_says_nothing(
    dataset: str, write_dataset: Write, tokenizer: Tokenizer
) -> None:
    write_dataset("data", DOCUMENTS[1:])
    assert read_manifest(dataset) is None
    (note,) = build(dataset, replace(tokenizer, eos=3))
    assert "data.json is of an earlier dataset" in note


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_a_file_that_is_no_manifest_is_named(content: str, dataset: str, tokenizer: Tokenizer) -> None:
    manifest_path(dataset).write_text(content)
    with pytest.raises(ValueError, match=r"data\.json is not the manifest of a dataset"):
        build(dataset, tokenizer)


@pytest.mark.parametrize("flag", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_flags_that_go_by_ends_of_documents_need_some(flag: str, write_dataset: Write, tokenizer: Tokenizer) -> None:
    prefix = write_dataset("data", [[5, 6, 7]] * 30)
    notes = build(prefix, tokenizer, **{flag: True})
    name = f"--{flag.replace('_', '-')}"
    assert f"no end-of-document id 0 in a sample of it: {name} may do nothing" in notes[1]
    write_manifest(prefix, tokenizer, append_eod=False)
    assert build(prefix, tokenizer) == []
    with pytest.raises(ValueError, match=f"made without --append-eod.*; leave out {name}"):
        build(prefix, tokenizer, **{flag: True})
    with pytest.raises(ValueError, match=f"{name}: the tokenizer in .* has no end-of-sequence token"):
        build(prefix, replace(tokenizer, eos=None), **{flag: True})


# ------------------------------------------------------------------------------------------------------- ids that exist


def test_an_id_beyond_the_vocabulary_is_found_in_a_sample(write_dataset: Write, tokenizer: Tokenizer) -> None:
    prefix = write_dataset("data", [*DOCUMENTS, [700]])
    with pytest.raises(ValueError, match=r"data: holds token id 700, the vocabulary ends at 599"):
        build(prefix, tokenizer)
    assert check_fit(prefix, read_index(prefix), tokenizer, vocab_size=701).problems == ()


def test_an_id_that_the_manifest_counted_needs_no_luck(dataset: str, tokenizer: Tokenizer) -> None:
    write_manifest(dataset, tokenizer, append_eod=True, max_id=600)
    with pytest.raises(ValueError, match="holds token id 600, the vocabulary ends at 599"):
        build(dataset, tokenizer)


@pytest.mark.parametrize("total", [3, SAMPLE_TOKENS, SAMPLE_TOKENS + 1, 5 * SAMPLE_TOKENS])
def test_a_sample_spans_the_dataset_and_stays_small(total: int, write_dataset: Write) -> None:
    tokens = np.arange(total) // -(-total // 60_000)  # ids rise from the first to the last token
    prefix = write_dataset("data", [tokens.astype(np.uint16)])
    found = sample_ids(prefix, read_index(prefix))
    assert found[0] == tokens[0] and found[-1] == tokens[-1]
    assert len(found) == len(np.unique(tokens)) if total <= SAMPLE_TOKENS else len(found) < 60_000


# -------------------------------------------------------------------------------------------------------------- merging


def test_merged_datasets_keep_what_they_agree_on(dataset: str, write_dataset: Write, tokenizer: Tokenizer) -> None:
    other, merged = write_dataset("other", DOCUMENTS[:3]), write_dataset("merged", [*DOCUMENTS, *DOCUMENTS[:3]])
    assert merge_manifests([dataset, other], merged) is None and read_manifest(merged) is None
    for append_eod, max_id, largest in ((True, 11, 11), (False, 3, 9), (True, None, None)):
        write_manifest(other, tokenizer, append_eod=append_eod, max_id=max_id)
        merge_manifests([dataset, other], merged)
        found = read_manifest(merged)
        assert (found.append_eod, found.max_id, found.eod) == (append_eod, largest, 0)


def test_datasets_of_different_tokenizers_do_not_merge(
    dataset: str, write_dataset: Write, tokenizer: Tokenizer
) -> None:
    other = write_dataset("other", DOCUMENTS)
    write_manifest(other, replace(tokenizer, eos=3), append_eod=True)
    with pytest.raises(ValueError, match=r"eod differs \(.*data: 0, .*other: 3\)"):
        merge_manifests([dataset, other], write_dataset("merged", DOCUMENTS))
