"""Megatron ``torch_dist`` checkpoints: filling a model at any layout, and reading and writing tensor by tensor.

How a model's tensors map to checkpoint keys, layer axes and chunks is asked of the model itself (its
``sharded_state_dict``), so what is written here is what megatron-core would have written. `load_weights` fills a model
through megatron-core's own ``dist_checkpointing.load``. `Writer` and `Reader` handle one internal tensor (see
weights.py) at a time for a whole model that lies on the meta device: memory stays at a few tensors, whatever the model
and whatever layout the checkpoint was saved with. Nothing here knows Hugging Face names, families or process groups.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, ReadItem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_patch.checkpoint.directory import locate

FILE_BYTES = 4 * 2**30
"""Where a .distcp file ends and the next begins."""

_BLOCK = 4 * 2**20

# Where newer versions of megatron-core keep what used to be in common.pt.
_COMMON_KEY = "common_state/shard_0_1"

# What core's own loader expects of a checkpoint that Megatron-LM calls a release.
_COMMON = {"checkpoint_version": 3.0, "iteration": 0}


# ------------------------------------------------------------------------------------ one model <-> its checkpoint keys


@dataclass(frozen=True)
class Blueprint:
    """How a whole model (TP1 PP1, on the meta device) maps to checkpoint keys."""

    tensors: Mapping[str, ShardedTensor | ShardedTensorFactory]
    """Internal name -> megatron-core's description of it."""

    objects: tuple[ShardedObject, ...]
    """What else the model's state has: ``_extra_state`` entries, empty without FP8."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Internal name -> shape."""
        return {name: tuple(entry.data.shape) for name, entry in self.tensors.items()}

    def shards(self, name: str, tensor: Tensor | None = None) -> list[ShardedTensor]:
        """The pieces of an internal tensor that megatron-core saves, with their keys and places."""
        entry = self.tensors[name]
        if isinstance(entry, ShardedTensorFactory):
            return _tensors(entry.build() if tensor is None else replace(entry, data=tensor).build())
        return [entry if tensor is None else replace(entry, data=tensor, dtype=tensor.dtype)]

    def key(self, name: str) -> str:
        """The checkpoint key of an internal tensor; layers share one."""
        return self.shards(name)[0].key


def blueprint(model: torch.nn.Module, metadata: dict[str, Any] | None = None) -> Blueprint:
    """Ask a model for its blueprint; `metadata` is what the checkpoint says about its content."""
    entries = model.sharded_state_dict(metadata=metadata)
    objects = tuple(entry for entry in entries.values() if isinstance(entry, ShardedObject))
    return Blueprint({name: entry for name, entry in entries.items() if not isinstance(entry, ShardedObject)}, objects)


def _tensors(built: Any) -> list[ShardedTensor]:
    if isinstance(built, ShardedTensor):
        return [built]
    return [tensor for part in (built.values() if isinstance(built, dict) else built) for tensor in _tensors(part)]


def _chunk(shard: ShardedTensor) -> ChunkStorageMetadata:
    sizes = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return ChunkStorageMetadata(torch.Size(shard.global_offset), torch.Size(sizes))


# ------------------------------------------------------------------------------------------------- filling a model


def load_weights(model: Sequence[torch.nn.Module], root: str | Path, strict: bool = True) -> int | None:
    """Load a checkpoint's weights into this rank's model chunks, whatever layout it was saved with.

    Every rank calls it. Wrappers (DDP, Float16Module) are looked through; dtypes are cast to the model's.

    Args:
        model: this rank's model chunks.
        root: a checkpoint's root (its tracker decides), or the directory of one iteration.
        strict: also refuse a checkpoint that has weights this model does not have.

    Returns:
        The iteration; None for a converted release.

    Raises:
        ValueError: the checkpoint is missing, incomplete, or of another model. It is raised on every rank.
    """
    _, directory, iteration = locate(root)
    reader, chunks = Reader(directory), unwrap_model(list(model))
    sharded = {f"model{i}": reader.wanted_by(chunk) for i, chunk in enumerate(chunks)}
    _check_match(reader, sharded, strict)
    with warnings.catch_warnings():
        # What core and torch say about each other's deprecated names is nothing that a user could mend.
        warnings.simplefilter("ignore", FutureWarning)
        loaded = dist_checkpointing.load(sharded, str(directory))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"])
    return iteration


def _check_match(reader: Reader, sharded: dict[str, Any], strict: bool) -> None:
    """Compare the keys and shapes of all ranks with the checkpoint's."""
    wanted = {}
    for entries in sharded.values():
        for entry in entries.values():
            shards = _tensors(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
            wanted.update({shard.key: shard for shard in shards if isinstance(shard, ShardedTensor)})
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (reader.mismatch(wanted.values()), set(wanted)))
    if problem := next((problem for problem, _ in reports if problem), None):
        raise ValueError(problem)
    if strict and (extra := reader.extra(set().union(*(keys for _, keys in reports)))):
        raise ValueError(f"{reader.directory} has weights that the model has not: {', '.join(extra)}")


# --------------------------------------------------------------------------------------------------- tensor by tensor


class Writer:
    """Writes a checkpoint into an empty directory, one internal tensor after the other, in any order."""

    def __init__(self, directory: Path, blueprint: Blueprint, file_bytes: int = FILE_BYTES) -> None:
        self._directory, self._blueprint, self._file_bytes = directory, blueprint, file_bytes
        self._metadata = Metadata(state_dict_metadata={}, planner_data=None, storage_data=None)
        self._results: list[WriteResult] = []
        self._file: BinaryIO | None = None
        self._files = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Store an internal tensor; tensors that share a key must have one dtype."""
        for shard in self._blueprint.shards(name, tensor):
            chunk = _chunk(shard)
            entry = self._entry(shard)
            index = MetadataIndex(shard.key, chunk.offsets, len(entry.chunks))
            entry.chunks.append(chunk)
            data = shard.data.detach().reshape(chunk.sizes).contiguous()
            # torch.save stores the whole storage behind a view.
            data = data if data.untyped_storage().nbytes() == data.nbytes else data.clone()
            self._append(index, lambda file, data=data: torch.save(data, file))

    def _entry(self, shard: ShardedTensor) -> TensorStorageMetadata:
        entries = self._metadata.state_dict_metadata
        if shard.key not in entries:
            properties = TensorProperties(dtype=shard.data.dtype)
            entries[shard.key] = TensorStorageMetadata(properties, torch.Size(shard.global_shape), [])
        assert entries[shard.key].properties.dtype == shard.data.dtype, f"{shard.key} has two dtypes"
        return entries[shard.key]

    def _append(self, index: MetadataIndex, write: Any) -> None:
        if self._file is None or self._file.tell() >= self._file_bytes:
            self._close_file()
            self._file = open(self._directory / f"__0_{self._files}.distcp", "wb")  # noqa: SIM115  stays open for many
            self._files += 1
        start, name = self._file.tell(), Path(self._file.name).name
        write(self._file)
        length = self._file.tell() - start
        self._results.append(WriteResult(index, length, _StorageInfo(name, start, length)))

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    def finish(self) -> None:
        """Write what makes the directory a checkpoint: objects, metadata, and megatron-core's two small files."""
        for entry in self._blueprint.objects:
            content = io.BytesIO()
            torch.save([entry.data], content)
            self._metadata.state_dict_metadata[entry.unique_key] = BytesStorageMetadata()
            self._append(MetadataIndex(entry.unique_key), lambda file, content=content: file.write(content.getbuffer()))
        self._close_file()
        FileSystemWriter(self._directory).finish(self._metadata, [self._results])
        torch.save(_COMMON, self._directory / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist", 1), str(self._directory))


class Reader:
    """Reads a checkpoint, saved with any layout, one internal tensor at a time; training state in it is not touched."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self._metadata = FileSystemReader(directory).read_metadata()
        except (UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise ValueError(f"{directory / '.metadata'} cannot be read: {error}") from error
        self._check_files()

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            file = self.directory / name
            if not file.is_file():
                raise ValueError(f"{file} is missing, although the checkpoint's metadata names it")
            if (size := file.stat().st_size) < end:
                raise ValueError(f"{file} is truncated: {size} bytes where the checkpoint's metadata needs {end}")

    def content(self) -> dict[str, Any] | None:
        """What the checkpoint says about its content, for `blueprint`."""
        file = self.directory / COMMON_STATE_FNAME
        if not file.is_file() and _COMMON_KEY not in self._metadata.state_dict_metadata:
            raise ValueError(f"{self.directory} is incomplete: {COMMON_STATE_FNAME} missing")
        try:
            return dist_checkpointing.load_content_metadata(str(self.directory))
        except (CheckpointingException, AttributeError) as error:  # the latter: core 0.16 trips over a missing file
            raise ValueError(f"{self.directory} was saved by a newer megatron-core than the installed one") from error
        except (RuntimeError, UnpicklingError, EOFError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error

    def wanted_by(self, model: torch.nn.Module) -> dict[str, Any]:
        """The model's sharded state dict, without ``_extra_state`` entries that this checkpoint does not have."""
        entries = model.sharded_state_dict(metadata=self.content())
        return {
            name: entry
            for name, entry in entries.items()
            if not isinstance(entry, ShardedObject) or entry.unique_key in self._metadata.state_dict_metadata
        }

    def dtype(self, key: str) -> torch.dtype:
        """The dtype a key is stored in."""
        return self._metadata.state_dict_metadata[key].properties.dtype

    def check(self, blueprint: Blueprint) -> None:
        """Raise a ValueError naming the tensors that are missing, mis-shaped or too many for this model."""
        shards = [shard for name in blueprint.tensors for shard in blueprint.shards(name)]
        if problem := self.mismatch(shards):
            raise ValueError(problem)
        if extra := self.extra({shard.key for shard in shards}):
            raise ValueError(f"{self.directory} has weights that the model has not: {', '.join(extra)}")

    def mismatch(self, shards: Iterable[ShardedTensor]) -> str | None:
        """What is wrong with this checkpoint for a model of these shards, or None."""
        stored = self._metadata.state_dict_metadata
        for shard in shards:
            entry = stored.get(shard.key)
            if not isinstance(entry, TensorStorageMetadata):
                return f"{self.directory} has no weight {shard.key}, which the model needs"
            have, want = tuple(entry.size), tuple(shard.global_shape)
            if have != want and not (shard.allow_shape_mismatch and have[1:] == want[1:]):
                return f"{self.directory}: {shard.key} has shape {have}; the model needs {want}"
        return None

    def extra(self, keys: set[str]) -> list[str]:
        """Weights of a model in this checkpoint that are not among `keys`."""
        parts = {key.split(".")[0] for key in keys} | {"output_layer"}
        stored = self._metadata.state_dict_metadata
        tensors = [key for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)]
        return sorted(key for key in tensors if key.split(".")[0] in parts and key not in keys)

    def read(self, blueprint: Blueprint, name: str) -> Tensor:
        """An internal tensor, whole, in its stored dtype. Padded rows of the vocabulary are left out.

        Raises:
            ValueError: the checkpoint does not hold all of it, or its file is damaged.
        """
        parts = [self._read_shard(shard) for shard in blueprint.shards(name)]
        entry = blueprint.tensors[name]
        return entry.merge_fn(parts) if isinstance(entry, ShardedTensorFactory) else parts[0]

    def _read_shard(self, shard: ShardedTensor) -> Tensor:
        chunk, entry = _chunk(shard), self._metadata.state_dict_metadata[shard.key]
        items = create_read_items_for_chunk_list(shard.key, entry, [chunk])
        if (have := sum(math.prod(item.lengths) for item in items)) != math.prod(chunk.sizes):
            raise ValueError(
                f"{self.directory}: {shard.key} at {tuple(chunk.offsets)} has {have} of {math.prod(chunk.sizes)} values"
            )
        try:
            return self._gather(chunk, items, entry.properties.dtype).reshape(shard.local_shape)
        except (RuntimeError, UnpicklingError, EOFError, BadZipFile, StopIteration) as error:
            raise ValueError(f"{self.directory}: {shard.key} at {tuple(chunk.offsets)} is damaged: {error}") from error

    def _gather(self, chunk: ChunkStorageMetadata, items: Sequence[ReadItem], dtype: torch.dtype) -> Tensor:
        """Put together what lies in several stored chunks; a chunk that is stored just so is not copied."""
        if len(items) == 1 and (whole := self._load(items[0].storage_index)).shape == chunk.sizes:
            return whole
        target = torch.empty(chunk.sizes, dtype=dtype)
        for item in items:
            stored = narrow_tensor_by_index(self._load(item.storage_index), item.storage_offsets, item.lengths)
            narrow_tensor_by_index(target, item.dest_offsets, item.lengths).copy_(stored)
        return target

    def _load(self, index: MetadataIndex) -> Tensor:
        """One stored chunk. Unlike torch.load, it checks the checksum and holds the data in memory only once."""
        info = self._metadata.storage_data[index]
        with open(self.directory / info.relative_path, "rb") as file:
            view = io.BufferedReader(_Window(file, info.offset, info.length))
            like = torch.load(view, map_location="meta", weights_only=True)
            with ZipFile(view) as archive:
                record = next(one for one in archive.infolist() if one.filename.endswith("/data/0"))
                storage = torch.UntypedStorage(record.file_size)
                buffer = memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
                with archive.open(record) as content:
                    for start in range(0, len(buffer), _BLOCK):
                        content.readinto(buffer[start : start + _BLOCK])
        return torch.empty(0, dtype=like.dtype).set_(storage, like.storage_offset(), like.size(), like.stride())


class _Window(io.RawIOBase):
    """Part of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        count = os.preadv(self._file.fileno(), [view], self._start + self._position)
        self._position += count
        return count
