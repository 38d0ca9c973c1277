"""Megatron ``torch_dist`` checkpoints: filling a model at any layout, and reading tensor by tensor.

How a model's tensors map to checkpoint keys, layer axes and chunks is asked of the model itself (its
``sharded_state_dict``), so what is written by it is what megatron-core would have written. `load_weights` fills a model
through megatron-core's own ``dist_checkpointing.load``. `Reader` reads one internal tensor (see weights.py) at a time
for a whole model that lies on the meta device, whatever layout the checkpoint was saved with; torch_dist.py writes.
Nothing here knows Hugging Face names, families or process groups.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, ReadItem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_patch.checkpoint.archive import Archive, MappedFile
from megatron_patch.checkpoint.directory import is_legacy, locate

# Where newer versions of megatron-core keep what used to be in common.pt.
_COMMON_KEY = "common_state/shard_0_1"

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
        return self._keys[name]

    @cached_property
    def _keys(self) -> dict[str, str]:
        return {name: self.shards(name)[0].key for name in self.tensors}


def blueprint(model: torch.nn.Module, metadata: dict[str, Any] | None = None) -> Blueprint:
    """Ask a model for its blueprint; `metadata` is what the checkpoint says about its content."""
    entries = model.sharded_state_dict(metadata=metadata)
    objects = tuple(entry for entry in entries.values() if isinstance(entry, ShardedObject))
    return Blueprint({name: entry for name, entry in entries.items() if not isinstance(entry, ShardedObject)}, objects)


def _tensors(built: Any) -> list[ShardedTensor]:
    if isinstance(built, ShardedTensor):
        return [built]
    return [tensor for part in (built.values() if isinstance(built, dict) else built) for tensor in _tensors(part)]


def chunk_of(shard: ShardedTensor) -> ChunkStorageMetadata:
    """Where a shard stands in its whole tensor; axes that core prepends (layers, experts) count."""
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
    if is_legacy(directory):
        raise ValueError(
            f"{directory} is a legacy checkpoint (mp_rank_XX), which fits one layout only; make a torch_dist one of it:"
            " megatron-patch convert --target-format torch_dist"
        )
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
        # Core looks into it for a model with multi-token prediction on several stages, whether it is there or not.
        metadata = ensure_metadata_has_dp_cp_group(self.content())
        entries = model.sharded_state_dict(metadata=metadata)
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
        chunk, entry = chunk_of(shard), self._metadata.state_dict_metadata[shard.key]
        items = create_read_items_for_chunk_list(shard.key, entry, [chunk])
        if (have := sum(math.prod(item.lengths) for item in items)) != math.prod(chunk.sizes):
            raise ValueError(
                f"{self.directory}: {shard.key} at {tuple(chunk.offsets)} has {have} of {math.prod(chunk.sizes)} values"
            )
        return self._gather(chunk, items, entry.properties.dtype).reshape(shard.local_shape)

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
        """One stored chunk, mapped; its checksum is checked."""
        info = self._metadata.storage_data[index]
        try:
            archive = Archive(self._map(info.relative_path), info.offset, info.length)
            return archive.read(archive.value)
        except ValueError as error:
            place = f"{index.fqn} at {tuple(index.offset or ())}"
            raise ValueError(f"{self.directory}: {place} is damaged: {error}") from error

    @cached_property
    def _map(self) -> Callable[[str], MappedFile]:
        return lru_cache(maxsize=None)(lambda name: MappedFile(self.directory / name))

    def places(self, blueprint: Blueprint, name: str) -> list[str]:
        """Where an internal tensor lies: file and key of each stored chunk."""
        found = [f"{info.relative_path}: {key}" for key, info in self._stored(blueprint, name)]
        return list(dict.fromkeys(found))

    def expect(self, blueprint: Blueprint, name: str) -> None:
        """Have an internal tensor read from disk in the background: it is wanted soon."""
        for _, info in self._stored(blueprint, name):
            self._map(info.relative_path).expect(info.offset, info.offset + info.length)

    def _stored(self, blueprint: Blueprint, name: str) -> Iterator[tuple[str, _StorageInfo]]:
        """Key and place of each stored chunk that an internal tensor needs."""
        for shard in blueprint.shards(name):
            entry = self._metadata.state_dict_metadata[shard.key]
            for item in create_read_items_for_chunk_list(shard.key, entry, [chunk_of(shard)]):
                yield shard.key, self._metadata.storage_data[item.storage_index]

    @property
    def files(self) -> set[str]:
        """Names of the files with tensors."""
        kinds, storage = self._metadata.state_dict_metadata, self._metadata.storage_data
        return {
            info.relative_path for index, info in storage.items() if isinstance(kinds[index.fqn], TensorStorageMetadata)
        }
