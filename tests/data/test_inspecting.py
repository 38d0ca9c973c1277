"""`inspect` against figures worked out from the documents themselves, and against transformers' own decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import AutoTokenizer

from megatron_patch.data import scanning
from megatron_patch.data.arguments import PreprocessArgs
from megatron_patch.data.inspecting import inspect, length_statistics
from megatron_patch.data.preprocess import preprocess
from megatron_patch.data.tool_arguments import InspectArgs
from megatron_patch.launch.main import main
from tests.tokenizer import make

EOS, IM_END, PAD = range(3)


def look(prefix: str, **changes: Any) -> Any:
    return inspect(InspectArgs(data_path=prefix, **changes))


def test_sizes_and_lengths_are_those_of_the_documents(write_dataset):
    documents = [[9] * length for length in (1, 3, 4, 4, 7, 8, 100)]
    report = look(write_dataset("data", documents))
    assert (report.documents, report.sequences, report.tokens, report.dtype) == (7, 7, 127, "uint16")
    assert report.nbytes == 2 * 127 + 34 + 12 * 7 + 8 * 8
    lengths = report.lengths
    assert (lengths.minimum, lengths.median, lengths.maximum) == (1, 4, 100)
    assert lengths.mean == pytest.approx(127 / 7)
    assert lengths.histogram == (
        (1, 1, 1, 1), (2, 3, 1, 3), (4, 7, 3, 15), (8, 15, 1, 8), (16, 31, 0, 0), (32, 63, 0, 0), (64, 127, 1, 100),
    )  # fmt: skip
    assert report.compression is None and report.ids_outside is None and report.special == ()


@pytest.mark.parametrize("seed", range(3))
def test_every_document_is_in_the_row_of_its_length(seed):
    lengths = np.random.default_rng(seed).integers(0, 300, 200)
    histogram = length_statistics(lengths).histogram
    for low, high, documents, tokens in histogram:
        inside = lengths[(lengths >= low) & (lengths <= high)]
        assert (documents, tokens) == (len(inside), inside.sum())
    assert sum(documents for _, _, documents, _ in histogram) == 200


def test_a_document_of_several_sequences_counts_as_one(tmp_path):
    builder = IndexedDatasetBuilder(f"{tmp_path}/split.bin", np.int32)
    builder.add_document([1, 2, 3, 4, 5], [2, 3])
    builder.add_document([], [])
    builder.add_document([6], [1])
    builder.finalize(f"{tmp_path}/split.idx")
    report = look(f"{tmp_path}/split", doc=(0, 1, 2))
    assert (report.documents, report.sequences, report.lengths.maximum) == (3, 3, 5)
    assert [document.ids for document in report.shown] == [(1, 2, 3, 4, 5), (), (6,)]
    assert [document.offset for document in report.shown] == [0, 20, 20]


@pytest.mark.parametrize("kind", ["byte_bpe", "llama_sentencepiece"])
def test_a_document_reads_as_the_text_it_was_made_from(kind, tmp_path):
    tokenizer = getattr(make, kind)(tmp_path / "tokenizer")
    texts = [text for text in make.TEXTS if "\ufeff" not in text]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "in.jsonl").write_text(rows)
    args = PreprocessArgs(
        input=(f"{tmp_path}/in.jsonl",), output_prefix=f"{tmp_path}/out", tokenizer_model=tokenizer, append_eod=True
    )
    report = look(preprocess(args).prefix, tokenizer_model=tokenizer, doc=tuple(range(len(texts))))
    hf = AutoTokenizer.from_pretrained(tokenizer)
    for document, text in zip(report.shown, texts, strict=True):
        assert hf.decode(document.ids, clean_up_tokenization_spaces=False) == document.text
        assert document.text.removeprefix(hf.bos_token or "").strip() == f"{text}{hf.eos_token}".strip()


def test_tokens_per_character_leave_special_tokens_out(bpe, write_dataset):
    hf = AutoTokenizer.from_pretrained(bpe)
    texts = make.corpus(30)
    ids = [hf(text, split_special_tokens=True)["input_ids"] for text in texts]
    prefix = write_dataset("data", [[*one, EOS] for one in ids])
    compression = look(prefix, tokenizer_model=bpe, samples=1000).compression
    assert (compression.documents, compression.tokens) == (30, sum(map(len, ids)))
    assert compression.characters == sum(map(len, texts))
    assert compression.tokens_per_character == compression.tokens / compression.characters


def test_the_same_seed_draws_the_same_documents(bpe, write_dataset):
    prefix = write_dataset("data", [[5 + i] * (i + 1) for i in range(50)])
    draws = [look(prefix, tokenizer_model=bpe, samples=5, seed=seed).compression.tokens for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_leaked_special_tokens_are_counted_apart_from_those_at_the_edges(bpe, write_dataset, monkeypatch):
    monkeypatch.setattr(scanning, "_BLOCK", 3)
    documents = [[9, 9, EOS], [IM_END, 9, EOS, 9, IM_END, IM_END, EOS], [EOS], [9, 9], [PAD, PAD], []]
    special = look(write_dataset("data", documents), tokenizer_model=bpe).special
    found = {one.token: (one.id, one.at_start, one.at_end, one.elsewhere) for one in special}
    assert found == {
        "<|endoftext|>": (EOS, 0, 3, 1), "<|im_end|>": (IM_END, 1, 0, 2), "<|pad|>": (PAD, 1, 1, 0),
    }  # fmt: skip


def test_ids_that_the_tokenizer_does_not_have_are_counted(bpe, write_dataset):
    size = len(AutoTokenizer.from_pretrained(bpe))
    prefix = write_dataset("data", [[9, size, 9], [size - 1, -1]], np.int32)
    report = look(prefix, tokenizer_model=bpe, doc=(0,))
    assert report.ids_outside == 2 and report.shown[0].ids == (9, size, 9)
    assert report.special == ()  # not even the token with id 0


def test_a_document_that_is_not_there_and_damaged_data_are_errors(write_dataset):
    prefix = write_dataset("data", [[1], [2]])
    with pytest.raises(ValueError, match="--doc 2: the documents are 0..1"):
        look(prefix, doc=(2,))
    with pytest.raises(ValueError, match="--doc -1: documents are counted from 0"):
        look(prefix, doc=(-1,))
    Path(f"{prefix}.bin").write_bytes(b"\0\0\0")
    with pytest.raises(ValueError, match="document 1, byte 3 of .*verify-data"):
        look(prefix)


def test_the_command_shows_the_document_and_writes_the_report(bpe, write_dataset, tmp_path, capsys):
    ids = AutoTokenizer.from_pretrained(bpe)("今天天气很好 [red] text")["input_ids"]
    prefix = write_dataset("data", [[9, EOS], [*ids, EOS]])
    command = ["inspect", "--data-path", f"{prefix}.idx", "--json", f"{tmp_path}/report.json"]
    assert main([*command, "--tokenizer-model", bpe, "--doc", "1"]) == 0
    shown = capsys.readouterr().out
    assert "今天天气很好 [red] text<|endoftext|>" in shown and "tokens per character" in shown
    report = json.loads(Path(f"{tmp_path}/report.json").read_text())
    assert report["documents"] == 2 and report["shown"][0]["ids"] == [*ids, EOS]


def test_without_a_tokenizer_the_ids_are_shown(write_dataset, capsys):
    assert main(["inspect", "--data-path", write_dataset("data", [[9, 8, 7]]), "--doc", "0"]) == 0
    assert "\n9 8 7\n" in capsys.readouterr().out


def test_a_dataset_that_is_not_there_is_a_users_mistake(tmp_path, capsys):
    assert main(["inspect", "--data-path", f"{tmp_path}/none", "--tokenizer-model", f"{tmp_path}/no"]) == 2
    error = capsys.readouterr().err
    assert "there is no" in error and "none.idx" in error and "no such directory" in error
