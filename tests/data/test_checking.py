"""`verify-data`: sound data pass, and each kind of damage is found where it is."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import AutoTokenizer

from megatron_patch.data import index_file, scanning
from megatron_patch.data.arguments import PreprocessArgs
from megatron_patch.data.checking import CheckReport, check
from megatron_patch.data.manifest import write_manifest
from megatron_patch.data.preprocess import preprocess
from megatron_patch.data.tool_arguments import VerifyDataArgs
from megatron_patch.launch.main import main
from megatron_patch.tokenizer import load_tokenizer
from tests.tokenizer import make

EOS = 0
DOCUMENTS = [[9, 9, EOS], [5, 6, 7, 8, EOS], [EOS], [11] * 20 + [EOS]]
STARTS = [0, 3, 8, 9]


def verify(prefix: str, tokenizer: str | None = None, **changes: Any) -> CheckReport:
    return check(VerifyDataArgs(data_path=prefix, tokenizer_model=tokenizer, **changes))


def places(report: CheckReport) -> list[tuple[int | None, int | None]]:
    return [(problem.document, problem.offset) for problem in report.problems]


@pytest.fixture(params=[1 << 20, 3], ids=["whole", "chunked"], autouse=True)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at once, and so little at a time that the data are many chunks."""
    monkeypatch.setattr(index_file, "_CHUNK", request.param)
    monkeypatch.setattr(scanning, "_BLOCK", request.param)


# -------------------------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize("kind", ["byte_bpe", "llama_sentencepiece"])
def test_what_preprocess_writes_is_sound_and_encodes_the_same_again(kind, tmp_path):
    tokenizer = getattr(make, kind)(tmp_path / "tokenizer")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in [*make.corpus(10), *make.TEXTS])
    (tmp_path / "in.jsonl").write_text(rows)
    args = PreprocessArgs(
        input=(f"{tmp_path}/in.jsonl",), output_prefix=f"{tmp_path}/out", tokenizer_model=tokenizer, append_eod=True
    )
    report = verify(preprocess(args).prefix, tokenizer, samples=1000)
    assert report.ok and not report.stopped and len(report.samples) == report.documents == 18
    same = [sample.same_again for sample in report.samples]
    assert sum(same) >= 15  # SentencePiece loses a little of some of these texts


def test_what_megatron_core_writes_is_sound(tmp_path, bpe):
    builder = IndexedDatasetBuilder(f"{tmp_path}/core.bin", np.int32, multimodal=True)
    builder.add_document([1, 2, 3, EOS], [1, 3], [0, 1])
    builder.add_document([4, EOS], [2], [0])
    builder.finalize(f"{tmp_path}/core.idx")
    report = verify(f"{tmp_path}/core", bpe)
    assert report.ok and (report.documents, report.tokens) == (2, 6)


def test_without_a_tokenizer_index_and_ids_are_checked(write_dataset):
    report = verify(write_dataset("data", DOCUMENTS))
    assert report.ok and report.checked == ("index", "sizes", "ids not negative") and report.samples == ()


# ------------------------------------------------------------------------------------------------------------- tokens


def test_ids_beyond_the_vocabulary_are_named_with_document_and_byte(write_dataset):
    report = verify(write_dataset("data", [[1, 2], [3, 600, 4], [700]]), vocab_size=600)
    assert places(report) == [(1, 6), (2, 10)]
    assert str(report.problems[0]).startswith("document 1, byte 6 of ")
    assert report.problems[0].message == "token 1 of the document: id 600 is not in 0..599"


def test_the_tokenizers_size_is_the_bound_where_none_is_given(bpe, write_dataset):
    size = load_tokenizer(bpe).vocab_size
    assert size == len(AutoTokenizer.from_pretrained(bpe))
    prefix = write_dataset("data", [[size - 1, EOS], [size, EOS]])
    assert places(verify(prefix, bpe)) == [(1, 4)]


def test_negative_ids_are_found_without_a_tokenizer(write_dataset):
    report = verify(write_dataset("data", [[1, 2], [-100, 3]], np.int32))
    assert places(report) == [(1, 8)] and "id -100 is negative" in report.problems[0].message


@pytest.mark.parametrize("document", range(4))
def test_a_missing_end_of_document_is_named_at_the_last_token(document, bpe, write_dataset):
    documents = [list(one) for one in DOCUMENTS]
    documents[document][-1] = 12
    report = verify(write_dataset("data", documents), bpe, samples=0)
    end = STARTS[document] + len(DOCUMENTS[document]) - 1
    assert places(report) == [(document, 2 * end)]
    assert "the document ends with id 12, not with 0" in report.problems[0].message
    assert report.notes == ()  # no hint that there may be none at all


def test_an_end_of_document_inside_a_document_is_named_where_it_is(bpe, write_dataset):
    documents = [[9, EOS, EOS], [EOS, 6, EOS], [7, EOS]]
    report = verify(write_dataset("data", documents), bpe)
    assert places(report) == [(0, 2), (1, 6)]
    assert "token 1 of the document: the end-of-document token 0 before" in report.problems[0].message


def test_two_things_wrong_with_one_token_are_both_told(bpe, write_dataset):
    report = verify(write_dataset("data", [[9, EOS], [9, 60_000]]), bpe)
    assert places(report) == [(1, 6), (1, 6)]


def test_an_empty_document_cannot_end_as_it_should(bpe, write_dataset):
    prefix = write_dataset("data", [[9, EOS], [], [EOS]])
    assert places(verify(prefix, bpe)) == [(1, 4)]
    loose = verify(prefix, bpe, eod="any")
    assert loose.ok and loose.notes[0] == "1 documents are empty"


def test_data_without_ends_are_sound_where_that_is_said_and_the_hint_says_how(bpe, write_dataset):
    prefix = write_dataset("data", [[9, 9], [5, 6]])
    report = verify(prefix, bpe)
    assert len(report.problems) == 2 and any("--eod none" in note for note in report.notes)
    assert verify(prefix, bpe, eod="none").ok
    assert places(verify(write_dataset("other", DOCUMENTS), bpe, eod="none")) == [(0, 4), (1, 14), (2, 16), (3, 58)]


def test_looking_ends_at_the_number_of_problems_asked_for(write_dataset):
    report = verify(write_dataset("data", [[9] * 100]), vocab_size=5, max_problems=7)
    assert len(report.problems) == 7 and report.stopped


# -------------------------------------------------------------------------------------------------------------- index


@pytest.fixture
def damaged(write_dataset: Callable[..., str]) -> Callable[[int, bytes], str]:
    """damaged(offset, data): the dataset of DOCUMENTS with bytes of its .idx file written over."""

    def damage(offset: int, data: bytes) -> str:
        prefix = write_dataset("data", DOCUMENTS)
        with open(f"{prefix}.idx", "r+b") as file:
            file.seek(offset)
            file.write(data)
        return prefix

    return damage


LENGTHS, POINTERS, MARKS = 34, 34 + 16, 34 + 48


def test_a_wrong_length_is_found_where_the_next_start_does_not_follow(damaged):
    report = verify(damaged(LENGTHS + 4, struct.pack("<i", 4)))
    assert places(report)[0] == (2, POINTERS + 16) and "starts at byte 16" in report.problems[0].message
    assert report.stopped and report.notes == ("no token was read",)


def test_a_negative_length_is_named(damaged):
    assert places(verify(damaged(LENGTHS + 12, struct.pack("<i", -1))))[0] == (3, LENGTHS + 12)


@pytest.mark.parametrize("sequence", range(4))
def test_a_wrong_start_is_named(sequence, damaged):
    report = verify(damaged(POINTERS + 8 * sequence, struct.pack("<q", 4)))
    assert places(report)[0] == (sequence, POINTERS + 8 * sequence)


@pytest.mark.parametrize(
    ("mark", "value", "document"), [(0, 1, 0), (2, 0, 1), (2, 5, 2), (4, 3, 3), (4, 9, 3)], ids=str
)
def test_document_marks_out_of_order_are_named(mark, value, document, damaged):
    report = verify(damaged(MARKS + 8 * mark, struct.pack("<q", value)))
    assert places(report)[0] == (document, MARKS + 8 * (mark if mark in (0, 4) else document))


@pytest.mark.parametrize(("size", "document"), [(0, 0), (5, 0), (6, 1), (17, 2), (59, 3)])
def test_a_truncated_bin_file_names_the_document_it_ends_in(size, document, write_dataset):
    prefix = write_dataset("data", DOCUMENTS)
    os.truncate(f"{prefix}.bin", size)
    report = verify(prefix)
    assert places(report) == [(document, size)]
    assert f"it has {size} bytes where the index says 60" in report.problems[0].message


def test_bytes_that_the_index_does_not_know_are_named(write_dataset):
    prefix = write_dataset("data", DOCUMENTS)
    with open(f"{prefix}.bin", "ab") as file:
        file.write(b"more")
    report = verify(prefix)
    assert places(report) == [(None, 60)]


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"X", "not the index of a megatron-core dataset"),
        (9, b"\2", "version 2 and token type 8"),
        (17, b"\7", "token type 7"),
        (18, b"\5", "has 122 bytes where 5 sequences and 4 documents need"),
        (18, b"\0", "holds no document"),
    ],
)
def test_a_header_that_cannot_be_read_is_a_problem_and_not_a_crash(offset, data, message, damaged, capsys):
    prefix = damaged(offset, data)
    report = verify(prefix)
    assert message in report.problems[0].message and not report.ok
    assert main(["verify-data", "--data-path", prefix]) == 1
    assert "verify-data: FAILED" in capsys.readouterr().out


def test_a_truncated_index_is_found(write_dataset):
    prefix = write_dataset("data", DOCUMENTS)
    os.truncate(f"{prefix}.idx", 60)
    assert "has 60 bytes where 4 sequences and 4 documents need 122" in verify(prefix).problems[0].message


# ---------------------------------------------------------------------------------------------------------- tokenizers


def test_another_tokenizer_than_the_manifest_names_is_a_problem(bpe, tmp_path, write_dataset):
    prefix = write_dataset("data", DOCUMENTS)
    write_manifest(prefix, load_tokenizer(bpe), append_eod=True)
    assert verify(prefix, bpe).ok
    other = make.byte_bpe(tmp_path / "other", eos_token="<|im_end|>")
    write_manifest(prefix, load_tokenizer(other), append_eod=True)
    problem = verify(prefix, bpe).problems[0]
    assert problem.file == f"{prefix}.json" and "its end-of-document id is 1, the run's is 0" in problem.message


def test_a_file_that_is_no_manifest_is_a_problem(bpe, write_dataset):
    prefix = write_dataset("data", DOCUMENTS)
    Path(f"{prefix}.json").write_text("{}")
    assert "is not the manifest of a dataset" in verify(prefix, bpe).problems[0].message


def test_documents_of_another_tokenizer_are_noted(bpe, tmp_path, write_dataset):
    other = AutoTokenizer.from_pretrained(make.byt5(tmp_path / "byt5"))
    prefix = write_dataset("data", [other(text)["input_ids"] for text in make.TEXTS[:3]])
    report = verify(prefix, bpe, eod="any")
    assert [sample.same_again for sample in report.samples] == [False] * 3
    assert any("3 of 3 documents, decoded and encoded again, have other ids" in note for note in report.notes)


def test_a_tokenizer_without_an_end_needs_to_be_told(tmp_path, write_dataset):
    tokenizer = make.byte_bpe(tmp_path / "no_eos", pad_token="<|pad|>")
    prefix = write_dataset("data", DOCUMENTS)
    with pytest.raises(ValueError, match="no end-of-sequence token; give --eod any"):
        verify(prefix, tokenizer)
    assert verify(prefix, tokenizer, eod="any").ok


# ------------------------------------------------------------------------------------------------------------- command


def test_the_exit_code_and_the_json_file_say_what_is_wrong(bpe, write_dataset, tmp_path, capsys):
    prefix = write_dataset("data", DOCUMENTS)
    command = ["verify-data", "--data-path", prefix, "--tokenizer-model", bpe, "--json", f"{tmp_path}/report.json"]
    assert main(command) == 0
    assert "verify-data: OK" in capsys.readouterr().out
    assert json.loads(Path(f"{tmp_path}/report.json").read_text())["ok"] is True
    assert main([*command, "--vocab-size", "9"]) == 1
    shown = capsys.readouterr().out
    assert "wrong: document 0, byte 0 of" in shown and "and 2 more problems" in shown and "FAILED, 22 problems" in shown
    report = json.loads(Path(f"{tmp_path}/report.json").read_text())
    assert report["ok"] is False and len(report["problems"]) == 22
    assert (report["problems"][0]["document"], report["problems"][0]["offset"]) == (0, 0)


def test_wrong_arguments_end_with_exit_code_2(tmp_path, capsys):
    assert main(["verify-data", "--data-path", f"{tmp_path}/none", "--eod", "none"]) == 2
    error = capsys.readouterr().err
    assert "there is no" in error and "--eod none: which token that is" in error
