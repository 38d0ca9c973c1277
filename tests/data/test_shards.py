"""Shards: every record once, in order, however the files are cut; and a document's worth of documents put together."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_patch.data import shards
from megatron_patch.data.readers import STDIN, DamagedInput, Record, expand_inputs, record_text
from megatron_patch.data.shards import Shard, ShardReader, plan, shard_bytes


def texts(count: int) -> list[str]:
    draw = random.Random(count)
    return [f"{i} " + "天气" * draw.randint(0, 60) + "\u2028 a" for i in range(count)]


def lines(documents: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in documents)


def everything(plan_: list[Shard], txt_document: str = "file") -> list[tuple[str, int, str]]:
    """(path, line counted on from shard to shard, text) of every record."""
    found, bases = [], {}
    for shard in plan_:
        reader = ShardReader(shard, txt_document)
        records: list[Record] = list(reader)
        found += [(r.path, r.line + bases.get(r.path, 0), record_text(r, "text")) for r in records]
        for piece, count in zip(shard.pieces, reader.lines, strict=True):
            bases[piece.path] = bases.get(piece.path, 0) + count
        assert reader.position == shard.disk_bytes
    return found


@pytest.mark.parametrize("size", [1, 50, 777, 5000, 10**6])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_every_line_is_in_one_shard_under_its_own_number(size, name, tmp_path):
    documents = texts(200)
    content = lines(documents[:90]) + b"\n\r\n" + lines(documents[90:])[:-1]
    packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(Path(name).suffix, bytes)(content)
    (tmp_path / name).write_bytes(packed)
    found = everything(list(plan([tmp_path / name], "file", size)))
    numbers = [*range(1, 91), *range(93, 203)]
    assert found == [(str(tmp_path / name), n, text) for n, text in zip(numbers, documents, strict=True)]


def test_the_parts_of_a_large_file_are_of_the_size_asked_for_and_none_is_read_by_the_planner(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(texts(2000)))
    found = list(plan([tmp_path / "a.jsonl"], "file", 10_000))
    sizes = [shard.disk_bytes for shard in found]
    assert sum(sizes) == (tmp_path / "a.jsonl").stat().st_size and max(sizes[:-1]) < 11_000 > min(sizes[:-1]) >= 10_000
    assert all(shard.lines is None for shard in found)
    assert [shard.number for shard in found] == list(range(len(found)))


def test_a_line_longer_than_a_shard_stays_whole(tmp_path):
    documents = ["a", "x" * 100_000, "b", "y" * 30_000, "c"]
    (tmp_path / "a.jsonl").write_bytes(lines(documents))
    assert [text for *_, text in everything(list(plan([tmp_path / "a.jsonl"], "file", 1000)))] == documents


def test_small_files_share_a_shard_and_large_ones_do_not(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.jsonl").write_bytes(lines([f"document {i}"]))
    (tmp_path / "a.txt").write_text("paragraph\n\n" * 400)
    files = expand_inputs([str(tmp_path)])
    found = list(plan(files, "paragraph", 100))
    assert [len(shard.pieces) for shard in found] == [4, 4, 2, 1]
    assert len(everything(found, "paragraph")) == 410


def test_arrays_and_paragraphs_are_never_cut_and_lines_of_text_are(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts(100)]))
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}" for i in range(1000)))
    for txt_document, count in (("paragraph", 1), ("line", 9)):
        assert len(list(plan([tmp_path / "a.txt"], txt_document, 1000))) == count
    found = list(plan([tmp_path / "a.json"], "file", 1000))
    assert len(found) == 1 and [text for *_, text in everything(found)] == texts(100)


def test_the_row_groups_of_a_parquet_file_are_shared_out(tmp_path):
    documents = texts(1000)
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet", row_group_size=64)
    total = (tmp_path / "a.parquet").stat().st_size
    found = list(plan([tmp_path / "a.parquet"], "file", total // 6))
    assert 4 <= len(found) <= 7
    assert everything(found) == [(f"{tmp_path}/a.parquet", i + 1, text) for i, text in enumerate(documents)]
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DamagedInput, match="a.parquet: cannot be read as parquet"):
        list(plan([tmp_path / "a.parquet"], "file", 100))


def test_standard_input_is_read_in_blocks_of_whole_lines(tmp_path, monkeypatch):
    class Pipe:
        buffer = io.BufferedReader(io.BytesIO(lines(texts(300))))

    monkeypatch.setattr(sys, "stdin", Pipe)
    assert expand_inputs(["-"], stdin=True) == (STDIN,)
    found = list(plan([STDIN], "file", 4000))
    assert len(found) > 5 and everything(found) == [("-", i + 1, text) for i, text in enumerate(texts(300))]
    with pytest.raises(ValueError, match="'-' matches no file"):
        expand_inputs(["-"])


def test_shards_grow_with_the_input_up_to_a_bound():
    assert [shard_bytes(total) for total in (0, 10**6, 10**9, 10**12)] == [1 << 20, 1 << 20, 10**9 // 64, 64 << 20]
    assert shards.MOST_BYTES == 64 << 20


def test_a_compressed_file_that_breaks_off_is_found_wherever_it_is_read(tmp_path):
    packed = zstandard.ZstdCompressor().compress(lines([str(np.random.RandomState(i).rand(30)) for i in range(500)]))
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-10])
    for size in (10**9, 1000):
        with pytest.raises(DamagedInput, match="a.jsonl.zst: cannot decompress"):
            everything(list(plan([tmp_path / "a.jsonl.zst"], "file", size)))
