"""Readers: what counts as a document, in every kind of file, and what is said about the rest."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_patch.data import readers
from megatron_patch.data.readers import (
    BadRecord,
    DamagedInput,
    Record,
    expand_inputs,
    open_stream,
    read_records,
    record_text,
)


def read(path: Path, txt_document: str = "file", key: str = "text") -> list[tuple[int, str]]:
    """(line, text) of every document of a file."""
    with open(path, "rb") as raw, open_stream(raw, path) as stream:
        return [(record.line, record_text(record, key)) for record in read_records(path, stream, txt_document)]


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


LINES = [json.dumps({"text": f"document {i} 天气"}).encode() + b"\n" for i in range(1000)]
DOCUMENTS = [(i + 1, f"document {i} 天气") for i in range(1000)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"".join(LINES)),
        ("a.json", b"".join(LINES)),
        ("a.jsonl", b"".join(LINES).replace(b"\n", b"\r\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + b"".join(LINES)[:-1]),
        ("a.jsonl.gz", gzip.compress(b"".join(LINES))),
        ("a.jsonl.gz", gzip.compress(b"".join(LINES[:400])) + gzip.compress(b"".join(LINES[400:]))),
        ("a.jsonl.zst", zstd(b"".join(LINES))),
        ("a.jsonl.zst", b"".join(zstd(line) for line in LINES)),
        ("a.jsonl.zst", zstd(b"".join(LINES)[:1234]) + zstd(b"") + zstd(b"".join(LINES)[1234:])),
    ],
    ids=["jsonl", "json", "crlf", "bom", "gz", "gz-members", "zst", "zst-frames", "zst-frames-in-a-line"],
)
def test_every_form_of_json_lines_gives_the_same_documents(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("kept", [0.3, 0.999])
def test_a_compressed_file_that_was_cut_off_is_an_error(name, kept, tmp_path):
    packed = gzip.compress(b"".join(LINES)) if name.endswith(".gz") else zstd(b"".join(LINES))
    (tmp_path / name).write_bytes(packed[: int(len(packed) * kept)])
    with pytest.raises(DamagedInput, match=f"{name}: cannot decompress, is the file complete"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_an_error(name, tmp_path):
    (tmp_path / name).write_text("plain text")
    with pytest.raises(DamagedInput, match=f"{name}: cannot decompress"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("txt_document", "documents"),
    [
        ("file", [(1, "\nOne, line 1.\n  line 2.\n\n \nTwo.\n")]),
        ("line", [(2, "One, line 1."), (3, "  line 2."), (6, "Two.")]),
        ("paragraph", [(2, "One, line 1.\n  line 2."), (6, "Two.")]),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_plain_text_is_divided_as_asked(txt_document, documents, suffix, tmp_path):
    content = b"\nOne, line 1.\n  line 2.\n\n \nTwo.\n"
    packed = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[suffix](content)
    (tmp_path / f"a.txt{suffix}").write_bytes(packed)
    assert read(tmp_path / f"a.txt{suffix}", txt_document) == documents


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"text": "x"', "broken JSON", "delimiter"),
        (b'["x"]', "not a JSON object", "this is a list"),
        (b'"x"', "not a JSON object", "this is a string"),
        (b'{"content": "x", "title": "y"}', "no key 'text'", "the keys are 'content', 'title'"),
        (b"{}", "no key 'text'", "the keys are none"),
        (b'{"text": null}', "key 'text' is no string", "it is null"),
        (b'{"text": ["x"]}', "key 'text' is no string", "it is a list"),
        (b'{"text": NaN}', "key 'text' is no string", "it is a number"),
        (b'{"text": "caf\xe9"}', "invalid UTF-8", "byte 14"),
        (b'{"text": ' + b"[" * 100_000, "broken JSON", "recursion"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_reason(line, reason, detail):
    with pytest.raises(BadRecord) as caught:
        record_text(Record("data/a.jsonl", 7, line), "text")
    assert caught.value.reason == reason
    assert str(caught.value).startswith(f"data/a.jsonl:7: {reason}: ") and detail in str(caught.value)


ARRAYS = {
    "plain": json.dumps([{"text": text} for _, text in DOCUMENTS]).encode(),
    "indented": b"\xef\xbb\xbf \n" + json.dumps([{"text": text} for _, text in DOCUMENTS], indent=2).encode(),
}


@pytest.mark.parametrize("form", ARRAYS)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_json_array_gives_the_documents_of_its_items(form, suffix, tmp_path):
    path = tmp_path / f"a.json{suffix}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstd}[suffix](ARRAYS[form]))
    assert read(path) == DOCUMENTS


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-20], lambda data: data.replace(b'{"text": "document 500', b'{"text" "document 500', 1)],
)
def test_a_json_array_that_breaks_off_is_an_error_and_not_a_short_file(damage, tmp_path):
    (tmp_path / "a.json").write_bytes(damage(ARRAYS["plain"]))
    with pytest.raises(DamagedInput, match=r"a.json: the JSON array breaks off behind item \d+"):
        read(tmp_path / "a.json")


def test_a_bad_item_is_named_with_its_number(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "fine"}, {"text": 3}]')
    with pytest.raises(BadRecord, match="a.json: item 2: key 'text' is no string: it is a number"):
        read(tmp_path / "a.json")


def write_parquet(path: Path, columns: dict[str, list[object]], rows: int) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)


def test_the_rows_of_a_parquet_file_are_documents(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": [text for _, text in DOCUMENTS], "n": list(range(1000))}, 300)
    assert read(tmp_path / "a.parquet") == DOCUMENTS
    with pytest.raises(BadRecord, match="a.parquet: row 1: no key 'body': the keys are 'text', 'n'"):
        read(tmp_path / "a.parquet", key="body")


def test_a_parquet_file_that_was_cut_off_is_an_error(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": [text for _, text in DOCUMENTS]}, 300)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    with pytest.raises(DamagedInput, match="a.parquet: cannot be read as parquet, is the file complete"):
        read(tmp_path / "a.parquet")


def test_half_a_character_becomes_the_replacement_character_and_is_counted():
    repaired: Counter[str] = Counter()
    line = rb'{"text": "half \ud83d, whole \ud83d\ude00, \udc00"}'
    text = record_text(Record("a.jsonl", 1, line), "text", repaired=repaired)
    assert text == "half \ufffd, whole 😀, \ufffd" and repaired == {"lone surrogate": 1}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"title": "天气", "content": "很好"}, "天气\n很好"),
        ({"title": "", "content": "x"}, "x"),
        ({"content": "x"}, "x"),
    ],
)
def test_the_text_of_wudao_is_title_and_content(value, text):
    assert record_text(Record("a.json", 1, value=value, unit="item"), "text", "wudao") == text
    assert record_text(Record("a.json", 1, value=value), "content", "wudao") == value["content"]
    with pytest.raises(BadRecord, match="no key 'content'"):
        record_text(Record("a.json", 1, value={"title": "x"}), "text", "wudao")


def test_bad_utf8_in_plain_text_is_named_with_its_own_line():
    with pytest.raises(BadRecord, match="a.txt:5: invalid UTF-8: byte 10, in line 6"):
        record_text(Record("a.txt", 5, b"fine\nthen\xff"), "text")


def test_values_that_only_the_lenient_parser_reads_do_no_harm():
    line = b'{"text": "fine \\ud83d\\ude00", "score": NaN, "big": 123456789012345678901234567890}'
    assert record_text(Record("a.jsonl", 1, line), "text") == "fine 😀"


def test_a_corpus_taken_for_one_document_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.txt").write_text("A line.\n" * 500)
    with pytest.raises(ValueError, match="a.txt:1: a single document of more than 1000 bytes.*--txt-document"):
        read(tmp_path / "a.txt")
    assert len(read(tmp_path / "a.txt", "line")) == 500


def test_directories_and_globs_expand_in_natural_order(tmp_path):
    for name in ("part10.jsonl", "part2.jsonl", "part1.jsonl.gz", "sub/part3.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [str(path.relative_to(tmp_path)) for path in expand_inputs([str(tmp_path)])]
    assert names == ["part1.jsonl.gz", "part2.jsonl", "part10.jsonl", "sub/part3.txt"]
    globbed = expand_inputs([f"{tmp_path}/part*.jsonl", f"{tmp_path}/sub/part3.txt"])
    assert [path.name for path in globbed] == ["part2.jsonl", "part10.jsonl", "part3.txt"]
    given = expand_inputs([f"{tmp_path}/part10.jsonl", f"{tmp_path}/part2.jsonl"])
    assert [path.name for path in given] == ["part10.jsonl", "part2.jsonl"]


def test_every_input_that_makes_no_sense_is_named(tmp_path):
    for name in ("a.csv", "a.txt"):
        (tmp_path / name).touch()
    inputs = [f"{tmp_path}/{name}" for name in ("no-*.jsonl", "a.csv", "a.txt", "../" + tmp_path.name + "/a.txt")]
    with pytest.raises(ValueError) as caught:
        expand_inputs(inputs)
    for part in ("no-*.jsonl' matches no file", "a.csv is none of .jsonl,", "a.txt is given 2 times"):
        assert part in str(caught.value)
