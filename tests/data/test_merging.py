"""`merge` against megatron-core's builder, byte for byte, and under what goes wrong."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_patch.data import index_file, merging, scanning
from megatron_patch.data.manifest import encoding_digest, read_manifest, write_manifest
from megatron_patch.data.merging import merge
from megatron_patch.data.tool_arguments import MergeArgs
from megatron_patch.launch.main import main
from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer import make

# Documents of one sequence, of several, and an empty one.
PARTS = {
    "part_10": [[[1, 2, 3]], [[4, 5], [6], [7, 8, 9, 10]]],
    "part_2": [[[65000]], [[]], [list(range(300))], [[11], [12]]],
    "part_1": [[[7, 7]]],
}
NATURAL = ["part_1", "part_2", "part_10"]


def build(prefix: Path, documents: list[list[list[int]]], dtype: Any = np.uint16, multimodal: bool = False) -> str:
    """A dataset by megatron-core's builder; each document is a list of sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype, multimodal)
    for document in documents:
        modes = [len(sequence) % 3 for sequence in document] if multimodal else None
        builder.add_document(sum(document, []), [len(sequence) for sequence in document], modes)
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def contents(prefix: object) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """`add_index` collects garbage, all of torch's objects looked through for every part."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def added(prefix: Path, parts: list[str], dtype: Any = np.uint16, multimodal: bool = False) -> tuple[bytes, bytes]:
    """What `add_index` and `finalize` of megatron-core make of datasets."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype, multimodal)
    for part in parts:
        builder.add_index(part)
    builder.finalize(f"{prefix}.idx")
    return contents(prefix)


@pytest.fixture
def parts(tmp_path: Path) -> list[str]:
    """The datasets of PARTS, in natural order."""
    (tmp_path / "parts").mkdir()
    built = {name: build(tmp_path / "parts" / name, documents) for name, documents in PARTS.items()}
    return [built[name] for name in NATURAL]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few entries and tokens at a time that even these datasets are many chunks."""
    monkeypatch.setattr(index_file, "_CHUNK", 2)
    monkeypatch.setattr(scanning, "_BLOCK", 7)
    monkeypatch.setattr(merging, "_CHUNK", 11)


def arguments(tmp_path: Path, inputs: list[str], **changes: Any) -> MergeArgs:
    return MergeArgs(**({"inputs": tuple(inputs), "output_prefix": f"{tmp_path}/all"} | changes))


# ------------------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("multimodal", [False, True])
def test_both_files_are_those_of_megatron_core_byte_for_byte(dtype, multimodal, tmp_path, small_chunks):
    documents = [[[[id % 200 for id in sequence] for sequence in one] for one in part] for part in PARTS.values()]
    parts = [build(tmp_path / f"{i}", one, dtype, multimodal) for i, one in enumerate(documents)]
    merge(arguments(tmp_path, parts, order="given"))
    assert contents(tmp_path / "all") == added(tmp_path / "core", parts, dtype, multimodal)


@pytest.mark.parametrize("seed", range(5))
def test_random_datasets_are_merged_as_megatron_core_merges_them(seed, tmp_path):
    generator = np.random.default_rng(seed)
    parts = []
    for name in map(str, range(generator.integers(1, 6))):
        shapes = [generator.integers(0, 50, generator.integers(1, 5)) for _ in range(generator.integers(1, 80))]
        documents = [[generator.integers(0, 65500, n).tolist() for n in shape] for shape in shapes]
        parts.append(build(tmp_path / name, documents))
    merge(arguments(tmp_path, parts))
    assert contents(tmp_path / "all") == added(tmp_path / "core", parts)


def test_a_wider_type_gives_what_megatron_core_writes_in_it(tmp_path, parts, small_chunks):
    wide = build(tmp_path / "wide", [[[150_000, 1]], [[2]]], np.int32)
    report = merge(arguments(tmp_path, [*parts, wide], order="given"))
    documents = [document for name in NATURAL for document in PARTS[name]] + [[[150_000, 1]], [[2]]]
    assert contents(tmp_path / "all") == contents(build(tmp_path / "core", documents, np.int32))
    assert report.dtype == "int32" and [one.dtype for one in report.sources] == ["uint16"] * 3 + ["int32"]


def test_a_narrower_type_is_given_where_every_id_fits(tmp_path):
    wide = build(tmp_path / "wide", [[[65499, 0]], [[2]]], np.int32)
    merge(arguments(tmp_path, [wide], target_dtype="uint16"))
    assert contents(tmp_path / "all") == contents(build(tmp_path / "core", [[[65499, 0]], [[2]]], np.uint16))


@pytest.mark.parametrize("id", [65500, 70_000, -100])
def test_an_id_that_does_not_fit_is_named_with_its_document_and_byte(id, tmp_path, small_chunks):
    wide = build(tmp_path / "wide", [[[1] * 20], [[2, id]]], np.int32)
    with pytest.raises(ValueError, match=rf"document 1, byte 84 of .*wide.bin: id {id} cannot be stored as uint16"):
        merge(arguments(tmp_path, [wide], target_dtype="uint16"))
    assert sorted(os.listdir(tmp_path)) == ["wide.bin", "wide.idx"]


@pytest.mark.parametrize("error", [errno.EXDEV, errno.ENOSYS, errno.EINVAL])
@pytest.mark.parametrize("calls", [0, 2])
def test_where_the_kernel_cannot_copy_or_gives_up_midway_the_bytes_are_the_same(
    error, calls, tmp_path, parts, monkeypatch, small_chunks
):
    made, original = [], os.copy_file_range

    def refuse(*arguments: int) -> int:
        if len(made) >= calls:
            raise OSError(error, os.strerror(error))
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(os, "copy_file_range", refuse)
    merge(arguments(tmp_path, parts))
    assert contents(tmp_path / "all") == added(tmp_path / "core", parts)
    assert len(made) == calls


# --------------------------------------------------------------------------------------------------- inputs, in order


@pytest.mark.parametrize("names", ["{}/part_*", "{}", "{0}/part_10.idx {0}/part_2.bin {0}/part_1"])
def test_globs_directories_and_names_of_files_stand_for_prefixes_in_natural_order(names, tmp_path, parts):
    args = arguments(tmp_path, names.format(f"{tmp_path}/parts").split())
    assert args.prefixes() == tuple(parts)


def test_the_order_given_is_kept_where_it_is_asked_for(tmp_path, parts):
    merge(arguments(tmp_path, parts[::-1], order="given"))
    assert contents(tmp_path / "all") == added(tmp_path / "core", parts[::-1])
    assert contents(tmp_path / "all") != added(tmp_path / "core", parts)


def test_a_prefix_with_a_cache_directory_of_the_same_name_is_still_the_dataset(tmp_path, parts):
    Path(parts[0], "cache").mkdir(parents=True)
    assert arguments(tmp_path, parts[:1]).prefixes() == (parts[0],)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_half_a_dataset_in_a_directory_is_an_error_and_not_left_out(suffix, tmp_path, parts):
    os.unlink(f"{parts[1]}{suffix}")
    with pytest.raises(ValueError, match=f"part_2 is no whole dataset: .*part_2{suffix} is missing"):
        merge(arguments(tmp_path, [f"{tmp_path}/parts"]))


def test_everything_wrong_with_the_arguments_is_told_at_once(tmp_path, parts):
    wrong = arguments(tmp_path, [parts[0], parts[0], f"{tmp_path}/none"], output_prefix=parts[0])
    with pytest.raises(ValueError) as error:
        merge(wrong)
    for message in (
        "given 2 times",
        "none' names no dataset",
        "is among the inputs",
        "already there; give --overwrite",
    ):
        assert message in str(error.value)


# ------------------------------------------------------------------------------------------------------- damaged parts


def test_a_truncated_bin_file_is_refused_with_the_document_it_ends_in(tmp_path, parts):
    os.truncate(f"{parts[1]}.bin", 100)
    with pytest.raises(ValueError, match=r"document 2, byte 100 of .*part_2.bin: the file ends in this document"):
        merge(arguments(tmp_path, parts))
    assert not list(tmp_path.glob("all*"))


def test_sequences_that_do_not_lie_end_to_end_are_refused(tmp_path, parts):
    idx = bytearray(Path(f"{parts[1]}.idx").read_bytes())
    idx[34 + 4 * 5 + 8 : 34 + 4 * 5 + 16] = (4).to_bytes(8, "little")
    Path(f"{parts[1]}.idx").write_bytes(idx)
    with pytest.raises(ValueError, match=r"sequence 1 starts at byte 4 of the .bin file, the one before ends at 2"):
        merge(arguments(tmp_path, parts))


def test_data_with_and_without_modes_are_not_mixed(tmp_path, parts):
    multimodal = build(tmp_path / "modes", [[[1, 2]]], multimodal=True)
    with pytest.raises(ValueError, match="modes is multimodal .*part_1 is not"):
        merge(arguments(tmp_path, [*parts, multimodal]))


def test_a_part_that_changes_while_it_is_copied_fails_the_run(tmp_path, parts, monkeypatch):
    original = merging.copy

    def grow(path: str, *rest: Any) -> None:
        with open(path, "ab") as file:
            file.write(b"more")
        original(path, *rest)

    monkeypatch.setattr(merging, "copy", grow)
    with pytest.raises(OSError, match="part_1.bin changed while it was copied"):
        merge(arguments(tmp_path, parts))
    assert os.listdir(tmp_path) == ["parts"]


def test_a_full_disk_leaves_nothing_and_spares_the_old_dataset(tmp_path, parts, monkeypatch):
    old = contents(build(tmp_path / "all", [[[5]]]))

    def full(*arguments: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        merge(arguments(tmp_path, parts, overwrite=True))
    assert contents(tmp_path / "all") == old
    assert sorted(os.listdir(tmp_path)) == ["all.bin", "all.idx", "parts"]


def test_replacing_a_dataset_drops_megatron_cores_cache_of_the_old_one(tmp_path, parts):
    prefix = build(tmp_path / "all", [[[5]]])
    Path(prefix, "cache", "GPTDataset_indices").mkdir(parents=True)
    merge(arguments(tmp_path, parts, overwrite=True))
    assert not Path(prefix, "cache").exists()
    assert len(IndexedDataset(prefix)) == 10


# ---------------------------------------------------------------------------------------------- tokenizers and reports


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """Two tokenizers, and the first again with another chat template."""
    folder = tmp_path_factory.mktemp("tokenizers")
    first, second = make.byte_bpe(folder / "bpe"), make.llama_sentencepiece(folder / "llama")
    again = shutil.copytree(first, folder / "again")
    config = json.loads((again / "tokenizer_config.json").read_text())
    (again / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    return [load_tokenizer(directory) for directory in (first, second, again)]


def test_parts_of_different_tokenizers_are_refused_before_anything_is_written(tmp_path, parts, tokenizers):
    write_manifest(parts[0], tokenizers[0], append_eod=True)
    write_manifest(parts[2], tokenizers[1], append_eod=True)
    with pytest.raises(
        ValueError, match=r"of 2 tokenizers .* end of document 0: .*part_1; .* of document 2: .*part_10"
    ):
        merge(arguments(tmp_path, parts))
    assert os.listdir(tmp_path) == ["parts"]


def test_a_merged_dataset_names_the_tokenizer_so_that_it_can_be_compared_again(tmp_path, parts, tokenizers):
    for part, tokenizer in zip(parts, tokenizers[::2] + tokenizers[:1], strict=True):
        write_manifest(part, tokenizer, append_eod=True)
    report = merge(arguments(tmp_path, parts))
    manifest = read_manifest(f"{tmp_path}/all")
    assert manifest.encoding == encoding_digest(tokenizers[0]) and manifest.append_eod and report.notes == ()
    assert [one.tokenizer for one in report.sources] == [tokenizers[i].fingerprint for i in (0, 2, 0)]
    write_manifest(build(tmp_path / "other", [[[1]]]), tokenizers[1], append_eod=True)
    with pytest.raises(ValueError, match="of 2 tokenizers"):
        merge(arguments(tmp_path, [f"{tmp_path}/all", f"{tmp_path}/other"], output_prefix=f"{tmp_path}/more"))


def test_without_every_manifest_there_is_none_and_a_note_says_so(tmp_path, parts, tokenizers):
    write_manifest(parts[0], tokenizers[0], append_eod=True)
    build(tmp_path / "all", [[[5]]])
    write_manifest(f"{tmp_path}/all", tokenizers[1], append_eod=True)
    report = merge(arguments(tmp_path, parts, overwrite=True))
    assert not Path(f"{tmp_path}/all.json").exists()
    assert "no manifest says which made" in report.notes[0] and "part_2 and 1 more" in report.notes[0]


def test_parts_with_and_without_ends_of_documents_are_noted(tmp_path, parts, tokenizers):
    for part in parts:
        write_manifest(part, tokenizers[0], append_eod=part != parts[1])
    report = merge(arguments(tmp_path, parts))
    assert report.notes == (f"{parts[1]} was made without --append-eod, others with it",)
    assert not read_manifest(f"{tmp_path}/all").append_eod


def test_tokens_of_each_source_are_told_as_a_table_and_as_json(tmp_path, parts, capsys):
    command = ["merge", "--inputs", *parts, "--output-prefix", f"{tmp_path}/all", "--json", f"{tmp_path}/report.json"]
    assert main(command) == 0
    report = json.loads(Path(f"{tmp_path}/report.json").read_text())
    sources = [(one["prefix"], one["documents"], one["sequences"], one["tokens"]) for one in report["sources"]]
    assert sources == [(parts[0], 1, 1, 2), (parts[1], 4, 5, 303), (parts[2], 2, 4, 10)]
    assert (report["documents"], report["sequences"], report["tokens"], report["dtype"]) == (7, 10, 315, "uint16")
    assert sum(one["share"] for one in report["sources"]) == pytest.approx(1)
    shown = capsys.readouterr().out
    assert "303" in shown and "96.19%" in shown and "315" in shown


def test_wrong_arguments_end_with_exit_code_2(tmp_path, capsys):
    assert main(["merge", "--inputs", f"{tmp_path}/none", "--output-prefix", f"{tmp_path}/all"]) == 2
    assert "names no dataset" in capsys.readouterr().err
