"""Hugging Face weight files: safetensors (one or sharded) read and written tensor by tensor; ``.bin`` read safely.

`HFReader` knows every tensor's file, shape and dtype from the headers, checks that the files are whole, and hands out
memory-mapped tensors. A `FilePlan` says which tensors stand in which file, `header` where in it each tensor belongs.
This module knows files, names and tensors: no families, no megatron.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_patch.checkpoint.archive import MappedFile, from_bytes
from megatron_patch.checkpoint.directory import read_json

INDEX = "model.safetensors.index.json"
ORIGIN = "weight_files.json"
DEFAULT_SHARD_SIZE = "5GB"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BIN_NAME = re.compile(r"^pytorch_model(.*)\.bin$")
_PT = MappingProxyType({"format": "pt"})


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FilePlan:
    """Which tensors stand in which safetensors file, in which order."""

    files: Mapping[str, tuple[str, ...]]
    """File name -> tensor names."""

    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: MappingProxyType({}))
    """File name -> what its header says besides; files not named here get ``format: pt``."""

    index: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What the index file says besides the weight map (its total size is counted anew)."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor, in order of the files."""
        return tuple(name for names in self.files.values() for name in names)

    def without(self, left_out: Iterable[str]) -> FilePlan:
        """The same plan less some tensors, and less the files that then are empty."""
        left_out = set(left_out)
        kept = {file: tuple(name for name in names if name not in left_out) for file, names in self.files.items()}
        return FilePlan({file: names for file, names in kept.items() if names}, self.metadata, self.index)


# ---------------------------------------------------------------------------------------------------------- reading


class HFReader:
    """The weights of a Hugging Face directory.

    Raises:
        ValueError: no weights, a file that is missing or truncated, a tensor in two files, or an index that does not
            agree with the files.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        weight_map, self._index = _weight_map(self.directory)
        names = weight_map and sorted(set(weight_map.values()))
        self._files = [_open(self.directory / name) for name in names or [_single_file(self.directory)]]
        self._where: dict[str, _SafetensorsFile | _BinFile] = {}
        for file in self._files:
            for name in file.infos:
                if name in self._where:
                    raise ValueError(f"tensor {name} is in both {self._where[name].path} and {file.path}")
                self._where[name] = file
        if weight_map is not None:
            self._check_index(weight_map)

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self._where or self._where[name].path.name != file:
                raise ValueError(f"the index of {self.directory} says that {file} holds {name}, but it does not")
        if unlisted := sorted(set(self._where) - set(weight_map)):
            raise ValueError(f"{self._where[unlisted[0]].path} holds {unlisted[0]}, which the index does not list")

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Name -> dtype and shape, of every tensor."""
        return {name: file.infos[name] for name, file in self._where.items()}

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files."""
        return tuple(file.path.name for file in self._files)

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from its file: it takes page cache, and is not to be written to."""
        return self._where[name].read(name)

    def expect(self, name: str) -> None:
        """Have the tensor read from disk in the background: it is wanted soon."""
        self._where[name].expect(name)

    @property
    def plan(self) -> FilePlan:
        """These files as safetensors files (``pytorch_model.bin`` becomes ``model.safetensors``)."""
        files = {_BIN_NAME.sub(r"model\1.safetensors", file.path.name): file for file in self._files}
        return FilePlan(
            {name: tuple(file.infos) for name, file in files.items()},
            {name: file.metadata for name, file in files.items()},
            self._index,
        )


def _weight_map(directory: Path) -> tuple[dict[str, str] | None, dict[str, Any]]:
    """Tensor -> file from the index, and what the index says besides; None where there is no index."""
    for name in (INDEX, "pytorch_model.bin.index.json"):
        # Like transformers: a single safetensors file comes before an index of .bin files.
        if (directory / name).is_file() and not (name != INDEX and (directory / "model.safetensors").is_file()):
            index = read_json(directory / name)
            if not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
                raise ValueError(f"{directory / name} has no weight_map")
            _check_files(directory, name, index["weight_map"])
            return index["weight_map"], index.get("metadata") or {}
    return None, {}


def _check_files(directory: Path, index: str, weight_map: Mapping[str, str]) -> None:
    for tensor, file in weight_map.items():
        if Path(file).name != file or not (directory / file).is_file():
            raise ValueError(f"{directory / index} says that {file} holds {tensor}, but there is no such file")


def has_weights(directory: str | Path) -> bool:
    """Whether there are weight files, complete or not."""
    return any(next(Path(directory).glob(pattern), None) for pattern in ("*.safetensors", "pytorch_model*.bin"))


def _single_file(directory: Path) -> str:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return name
    shards = sorted(path.name for path in directory.glob("*-of-*"))
    hint = f"; {shards[0]} is there, but its index is not" if shards else ""
    raise ValueError(f"{directory} has no weights: neither model.safetensors, {INDEX} nor pytorch_model.bin{hint}")


def _open(path: Path) -> _SafetensorsFile | _BinFile:
    return _BinFile(path) if path.suffix == ".bin" else _SafetensorsFile(path)


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._opened = safe_open(path, "pt")  # checks the header, and that the file is as long as it says
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from error
        self.metadata: dict[str, str] = self._opened.metadata() or {}
        self.infos = {name: self._info(name) for name in self._opened.offset_keys()}
        self._mapped, sizes = MappedFile(path), [info.nbytes for info in self.infos.values()]
        # Tensors stand one after the other, up to the end of the file: safe_open has checked that.
        starts = accumulate(sizes, initial=self._mapped.size - sum(sizes))
        self._places = {
            name: (start, start + size) for name, start, size in zip(self.infos, starts, sizes, strict=False)
        }

    def _info(self, name: str) -> TensorInfo:
        entry = self._opened.get_slice(name)
        if entry.get_dtype() not in _DTYPES:
            raise ValueError(f"{self.path}: {name} has dtype {entry.get_dtype()}; known are {', '.join(_DTYPES)}")
        return TensorInfo(_DTYPES[entry.get_dtype()], tuple(entry.get_shape()))

    def expect(self, name: str) -> None:
        self._mapped.expect(*self._places[name])

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        return from_bytes(self._mapped.view(*self._places[name]), info.dtype, 0, info.shape)


class _BinFile:
    """A ``pytorch_model.bin``: unpickled with ``weights_only``, so that no code in it can run."""

    metadata = _PT

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises anything from RuntimeError to UnicodeDecodeError for a damaged file
            raise ValueError(f"{path} cannot be read safely (torch.load, weights_only, mmap): {error}") from error
        self._state: dict[str, Tensor] = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
            raise ValueError(f"{path} holds something other than tensors: {', '.join(map(str, other[:5]))}")
        self.infos = {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in self._state.items()}

    def expect(self, name: str) -> None:
        pass  # torch maps the file, and does not say where

    def read(self, name: str) -> Tensor:
        return self._state[name]


# -------------------------------------------------------------------------- where the tensors of a conversion came from


def save_origin(folder: Path, plan: FilePlan, infos: Mapping[str, TensorInfo]) -> None:
    """Note a model's files and dtypes beside its config, so that the way back restores them."""
    files = {
        file: {
            "metadata": dict(plan.metadata.get(file) or _PT),
            "tensors": {name: _DTYPE_NAMES[infos[name].dtype] for name in names},
        }
        for file, names in plan.files.items()
    }
    (folder / ORIGIN).write_text(json.dumps({"files": files, "index": dict(plan.index)}, indent=1) + "\n")


def load_origin(folder: Path) -> tuple[FilePlan, dict[str, torch.dtype]] | None:
    """What `save_origin` noted: the files, and each tensor's dtype."""
    if not (folder / ORIGIN).is_file():
        return None
    content = read_json(folder / ORIGIN)
    files = content["files"]
    plan = FilePlan(
        {file: tuple(one["tensors"]) for file, one in files.items()},
        {file: one["metadata"] for file, one in files.items()},
        content["index"],
    )
    return plan, {name: _DTYPES[dtype] for one in files.values() for name, dtype in one["tensors"].items()}


# ---------------------------------------------------------------------------------------------------------- writing


def plan_files(infos: Mapping[str, TensorInfo], max_shard_size: str = DEFAULT_SHARD_SIZE) -> FilePlan:
    """Spread tensors over files no larger than `max_shard_size`, in their order, named as Hugging Face names them."""
    limit, shards, filled = parse_size(max_shard_size), [[]], 0
    for name, info in infos.items():
        if shards[-1] and filled + info.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    if len(shards) == 1:
        return FilePlan({"model.safetensors": tuple(shards[0])})
    count = len(shards)
    return FilePlan({f"model-{i:05d}-of-{count:05d}.safetensors": tuple(names) for i, names in enumerate(shards, 1)})


def parse_size(text: str) -> int:
    """Bytes from "5GB" (powers of 1000), "5GiB" (powers of 1024) or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B|B)?", text.strip())
    size = match and int(float(match[1]) * (1024 if match[3] else 1000) ** (" KMGT".index(match[2]) if match[2] else 0))
    if not size:
        raise ValueError(f"{text!r} is no size; write a number of bytes, or one with a unit such as 500MB, 5GB or 2GiB")
    return size


@dataclass(frozen=True)
class Header:
    """The start of a safetensors file, and where in the file each tensor belongs."""

    content: bytes
    offsets: Mapping[str, int]
    size: int
    """Of the whole file."""


def header(names: Sequence[str], infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> Header:
    """Lay out a safetensors file of these tensors, in this order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata or _PT)}
    starts, end = {}, 0
    for name in names:
        info, starts[name] = infos[name], end
        end += info.nbytes
        offsets = [starts[name], end]
        entries[name] = {"dtype": _DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    content = struct.pack("<Q", len(text)) + text
    return Header(content, {name: len(content) + start for name, start in starts.items()}, len(content) + end)


def write_index(directory: Path, plan: FilePlan, infos: Mapping[str, TensorInfo]) -> None:
    """Write the index that several files need; nothing for a single model.safetensors."""
    if set(plan.files) == {"model.safetensors"}:
        return
    total = sum(infos[name].nbytes for name in plan.names)
    weight_map = {name: file for file, names in plan.files.items() for name in names}
    index = {"metadata": {**plan.index, "total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
