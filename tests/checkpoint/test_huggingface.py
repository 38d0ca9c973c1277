"""Weight files: what transformers and safetensors write is read, what we write they read, and damage is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_patch.checkpoint.huggingface import (
    FilePlan,
    HFReader,
    TensorInfo,
    header,
    load_origin,
    parse_size,
    plan_files,
    save_origin,
    write_index,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8]
TENSORS = {f"t.{i}": (torch.randn(3, i + 1) * 10).to(dtype) for i, dtype in enumerate(DTYPES)}
INFOS = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def _write(folder: Path, plan: FilePlan) -> None:
    for file, names in plan.files.items():
        start = header(names, INFOS)
        content = bytearray(start.content.ljust(start.size, b"\0"))
        for name in names:
            data = TENSORS[name].view(torch.uint8).numpy().tobytes()
            content[start.offsets[name] : start.offsets[name] + len(data)] = data
        assert len(content) == start.size
        (folder / file).write_bytes(content)
    write_index(folder, plan, INFOS)


def _shards(folder: Path, weight_map: dict[str, str]) -> None:
    """Two files of one tensor each, and an index that says what the test wants."""
    for i in (1, 2):
        save_file({f"t{i}": torch.ones(i)}, folder / f"model-0000{i}-of-00002.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    _write(tmp_path, plan_files(INFOS))
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].view(torch.uint8), tensor.view(torch.uint8))


def test_we_read_what_safetensors_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    reader = HFReader(tmp_path)
    assert reader.infos == INFOS
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name).view(torch.uint8), tensor.view(torch.uint8))


def test_sharded_files_carry_an_index_and_read_back(tmp_path: Path) -> None:
    plan = plan_files(INFOS, "100B")
    _write(tmp_path, plan)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in INFOS.values())
    assert set(index["weight_map"].values()) == set(plan.files) and len(plan.files) > 1
    assert HFReader(tmp_path).infos == INFOS


def test_no_weights_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no weights: neither model\.safetensors"):
        HFReader(tmp_path)


def test_shards_without_their_index_are_an_error(tmp_path: Path) -> None:
    _shards(tmp_path, {})
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors is there, but its index is not"):
        HFReader(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "has no weight_map"),
        ({"t1": "model-00003-of-00002.safetensors"}, "there is no such file"),
        ({"t1": "../model-00001-of-00002.safetensors"}, "there is no such file"),
        ({"t1": "model-00002-of-00002.safetensors"}, "holds t1, but it does not"),
        ({"t9": "model-00001-of-00002.safetensors"}, "holds t9, but it does not"),
    ],
)
def test_an_index_that_disagrees_with_the_files_is_an_error(
    tmp_path: Path, weight_map: dict[str, str], message: str
) -> None:
    _shards(tmp_path, weight_map)
    with pytest.raises(ValueError, match=message):
        HFReader(tmp_path)


def test_a_tensor_that_the_index_forgets_is_an_error(tmp_path: Path) -> None:
    _shards(tmp_path, {"t1": "model-00001-of-00002.safetensors"})
    save_file({"t1": torch.ones(1), "t2": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="holds t2, which the index does not list"):
        HFReader(tmp_path)


def test_a_tensor_in_two_files_is_an_error(tmp_path: Path) -> None:
    _shards(tmp_path, {f"t{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)})
    save_file({"t1": torch.ones(1), "t2": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="tensor t1 is in both"):
        HFReader(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_safetensors_file_is_named(tmp_path: Path, keep: int) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        HFReader(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_bin_file_is_named(tmp_path: Path, keep: int) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read safely"):
        HFReader(tmp_path)


class _Hostile:
    """Unpickles to a call of `Path(...).touch()`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_bin_file_never_runs(tmp_path: Path) -> None:
    torch.save({"t": _Hostile(tmp_path / "touched")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read safely"):
        HFReader(tmp_path)
    assert not (tmp_path / "touched").exists()
    pickle.loads(pickle.dumps(_Hostile(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()  # the trap was armed


def test_something_other_than_tensors_in_a_bin_file_is_an_error(tmp_path: Path) -> None:
    torch.save({"t": torch.ones(1), "step": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds something other than tensors: step"):
        HFReader(tmp_path)


def test_mapped_tensors_take_no_anonymous_memory(tmp_path: Path) -> None:
    save_file({"t": torch.ones(50_000_000)}, tmp_path / "model.safetensors")
    before = _anonymous_bytes()
    tensor = HFReader(tmp_path).read("t")
    assert tensor.sum() == 50_000_000
    assert _anonymous_bytes() - before < 50_000_000


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_the_origin_note_restores_files_order_and_dtypes(tmp_path: Path) -> None:
    plan = FilePlan(
        {"b.safetensors": ("t.1", "t.0"), "a.safetensors": ("t.2",)}, {"a.safetensors": {"x": "y"}}, {"n": 1}
    )
    save_origin(tmp_path, plan, INFOS)
    restored, dtypes = load_origin(tmp_path)
    assert (restored.files, restored.metadata["a.safetensors"], restored.index) == (plan.files, {"x": "y"}, {"n": 1})
    assert dtypes == {name: INFOS[name].dtype for name in plan.names}


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("2GiB", 2 * 2**30), ("500MB", 5 * 10**8), ("1.5KB", 1500), ("7", 7), ("7B", 7)],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "5XB", "-1", "0", "5 G B"])
def test_a_bad_size_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)
