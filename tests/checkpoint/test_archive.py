"""Skeletons with filled holes are what torch.save writes; archives are read like torch.load does; damage is named."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from isal.isal_zlib import crc32
from torch import Tensor

from megatron_patch.checkpoint.archive import Archive, MappedFile, Skeleton, pwrite, skeleton, write_crc
from megatron_patch.checkpoint.manifest import data_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2)


def leaves(value: Any) -> list[Tensor]:
    """The tensors of nested dicts and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for one in inner for tensor in leaves(one)]


def fill(file: Path, empty: Skeleton, tensors: list[Tensor], start: int = 0) -> None:
    """Write a skeleton, its holes from the last to the first, and the skeleton once more, as a resumed run does."""
    with open(file, "r+b" if file.exists() else "w+b", buffering=0) as stream:
        stream.truncate(start + empty.size)
        empty.write(stream, start)
        for hole, tensor in reversed(list(zip(empty.holes, tensors, strict=True))):
            assert hole.nbytes == tensor.nbytes
            pwrite(stream.fileno(), data_of(tensor), start + hole.offset)
            write_crc(stream, hole, start, crc32(data_of(tensor)))
        empty.write(stream, start)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


@pytest.fixture
def value() -> dict[str, Any]:
    """Tensors of every dtype, nested, among other things."""
    generator = torch.Generator().manual_seed(0)
    tensors = {str(d): (100 * torch.randn(3, 5, generator=generator)).to(d) for d in DTYPES}
    return {"model": {"layer": tensors, "none": None}, "iteration": 7, "text": "ü", "list": [torch.ones(1), 2.5, (1,)]}


@pytest.fixture
def written(value: dict[str, Any], tmp_path: Path) -> Path:
    fill(tmp_path / "file.pt", skeleton(value), leaves(value))
    return tmp_path / "file.pt"


def test_torch_loads_what_was_written_into_holes(value: dict[str, Any], written: Path) -> None:
    with zipfile.ZipFile(written) as archive:
        assert archive.testzip() is None
    for mapped in (False, True):
        loaded = torch.load(written, weights_only=True, mmap=mapped)
        assert_same(leaves(loaded), leaves(value))
        assert loaded["model"]["none"] is None and loaded["iteration"] == 7 and loaded["list"][1:] == [2.5, (1,)]


def test_it_has_the_length_and_the_checksums_of_what_torch_saves(
    value: dict[str, Any], written: Path, tmp_path: Path
) -> None:
    with open(tmp_path / "torch.pt", "wb") as file:
        torch.save(value, file)  # a path would give the archive the file's name
    assert written.stat().st_size == (tmp_path / "torch.pt").stat().st_size
    assert _crcs(written) == _crcs(tmp_path / "torch.pt")


def _crcs(file: Path) -> list[int]:
    """Of the tensors, in order."""
    with zipfile.ZipFile(file) as archive:
        return [one.CRC for one in archive.infolist() if "/data/" in one.filename]


def test_an_archive_may_stand_in_a_larger_file(value: dict[str, Any], tmp_path: Path) -> None:
    file, empty, other = tmp_path / "file.distcp", skeleton(value), skeleton(torch.empty(9))
    fill(file, other, [torch.arange(9.0)])
    start = -(-other.size // 64) * 64
    fill(file, empty, leaves(value), start)
    archive = Archive(MappedFile(file), start, empty.size)
    assert_same([archive.read(one) for one in leaves(archive.value)], leaves(value))
    first = Archive(MappedFile(file), 0, other.size)
    assert torch.equal(first.read(first.value), torch.arange(9.0))


def test_offsets_beyond_4_gib_are_right(tmp_path: Path) -> None:
    """Sparse: only the last tensor and what stands around the holes takes space."""
    big, last = 5 * 2**30, torch.arange(1000.0)
    empty = skeleton({"big": torch.empty(big, dtype=torch.uint8), "next": torch.empty(big // 2), "last": last})
    assert empty.size > 3 * big and [hole.nbytes for hole in empty.holes] == [big, 2 * big, 4000]
    file = tmp_path / "file.pt"
    with open(file, "w+b", buffering=0) as stream:
        stream.truncate(empty.size)
        empty.write(stream)
        pwrite(stream.fileno(), data_of(last), empty.holes[-1].offset)
        write_crc(stream, empty.holes[-1], 0, crc32(data_of(last)))
    assert file.stat().st_blocks * 512 < 2**20
    loaded = torch.load(file, mmap=True, weights_only=True)
    assert torch.equal(loaded["last"], last) and loaded["big"].shape == (big,) and loaded["next"].nbytes == 2 * big
    archive = Archive(MappedFile(file))
    assert torch.equal(archive.read(archive.value["last"]), last)
    with zipfile.ZipFile(file) as zipped:
        name = next(one for one in zipped.namelist() if one.endswith("/data/2"))
        assert zipped.read(name) == bytes(data_of(last))  # checks the CRC
        assert zipped.getinfo(name).header_offset > 3 * big


# ------------------------------------------------------------------------------------------------------------ reading


def test_what_torch_saves_is_read(value: dict[str, Any], tmp_path: Path) -> None:
    torch.save(value, tmp_path / "file.pt")
    archive = Archive(MappedFile(tmp_path / "file.pt"))
    assert archive.value["iteration"] == 7 and archive.value["text"] == "ü"
    assert_same([archive.read(one) for one in leaves(archive.value)], leaves(value))


def test_views_of_one_storage_are_read(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {"rows": base[1:3], "transposed": base.T, "strided": base[:, ::2], "whole": base, "scalar": base[2, 3]}
    torch.save(views, tmp_path / "file.pt")
    archive = Archive(MappedFile(tmp_path / "file.pt"))
    for name, view in views.items():
        assert torch.equal(archive.read(archive.value[name]), view), name


def test_values_have_shapes_but_take_no_memory(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000, 1000)}, tmp_path / "file.pt")
    fake = Archive(MappedFile(tmp_path / "file.pt")).value["a"]
    assert fake.shape == (1000, 1000) and type(fake).__name__ == "FakeTensor"


def _cut(content: bytearray) -> None:
    del content[len(content) // 2 :]


def _cut_start(content: bytearray) -> None:
    del content[:100]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"file\.pt is damaged or no file of torch\.save: .*"),
        (_cut_start, r"file\.pt is damaged or no file of torch\.save \(since 1\.6\): it is no zip archive"),
        (
            lambda content: content.__setitem__(slice(None), b"\0" * 1000),
            r"file\.pt is damaged .*: it is no zip archive",
        ),
        (lambda content: content.clear(), r"file\.pt is empty"),
    ],
    ids=["cut", "without a start", "zeros", "empty"],
)
def test_a_damaged_file_is_named(
    value: dict[str, Any], tmp_path: Path, damage: Callable[[bytearray], object], message: str
) -> None:
    file = tmp_path / "file.pt"
    torch.save(value, file)
    content = bytearray(file.read_bytes())
    damage(content)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Archive(MappedFile(file))


def test_any_flipped_bit_of_a_tensor_is_found(written: Path, value: dict[str, Any]) -> None:
    holes, content = skeleton(value).holes, written.read_bytes()
    for i, hole in enumerate(holes):
        damaged = bytearray(content)
        damaged[hole.offset + hole.nbytes // 2] ^= 4
        written.write_bytes(damaged)
        archive = Archive(MappedFile(written))
        fakes = leaves(archive.value)
        with pytest.raises(ValueError, match=rf"file\.pt: bytes {hole.offset} and following do not match their CRC"):
            archive.read(fakes[i])
        others = [archive.read(fake) for j, fake in enumerate(fakes) if j != i]
        assert_same(others, [one for j, one in enumerate(leaves(value)) if j != i])


def test_a_hole_that_was_never_filled_is_found(value: dict[str, Any], tmp_path: Path) -> None:
    empty = skeleton(value)
    with open(tmp_path / "file.pt", "w+b", buffering=0) as stream:
        stream.truncate(empty.size)
        empty.write(stream)
    archive = Archive(MappedFile(tmp_path / "file.pt"))
    for fake in leaves(archive.value):
        assert math.prod(fake.shape)
        with pytest.raises(ValueError, match="do not match their CRC"):
            archive.read(fake)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"a": Evil()}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"file\.pt cannot be read safely: .*"):
        Archive(MappedFile(tmp_path / "file.pt"))
    assert not (tmp_path / "ran").exists()
