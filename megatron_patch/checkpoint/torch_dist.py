"""Megatron ``torch_dist`` checkpoints as a `Source` and a `Target` of a conversion.

What is written is what megatron-core would have written for the model: the same keys, layer axes and chunks (see
`Blueprint`), so that it loads at any layout, into local and Transformer Engine layers alike. It knows no Hugging Face
names.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_patch.checkpoint.archive import ALIGNMENT, Skeleton, skeleton
from megatron_patch.checkpoint.directory import METADATA, RELEASE
from megatron_patch.checkpoint.formats import FileLayout, MegatronSource, Part, Slot, Target, count_files, file_states
from megatron_patch.checkpoint.huggingface import TensorInfo
from megatron_patch.checkpoint.megatron import Reader, chunk_of
from megatron_patch.checkpoint.whole import WholeModel

_FILE_BYTES = (2**29, 2**32)
"""Bounds of a .distcp file's size; between them, a checkpoint has 16, so that several processes can share the work."""

# What core's own loader expects of a checkpoint that Megatron-LM calls a release.
_COMMON = {"checkpoint_version": 3.0, "iteration": 0}


class TorchDistSource(MegatronSource):
    """Weights in one iteration's directory; training state in it is not touched."""

    def __init__(self, directory: Path, config_folder: Path, reader: Reader, model: WholeModel) -> None:
        self.path = self.weights_folder = directory
        self.config_folder, self.model, self._reader = config_folder, model, reader
        reader.check(model.blueprint)
        self.kind = f"torch_dist, {count_files(reader.files)}"
        key = model.blueprint.key
        self.infos = {one.name: TensorInfo(reader.dtype(key(one.name)), one.shape) for one in model.claims.values()}

    def read(self, name: str) -> Tensor:
        return self._reader.read(self.model.blueprint, name)

    def expect(self, name: str) -> None:
        self._reader.expect(self.model.blueprint, name)

    def origin(self, name: str) -> str:
        return " + ".join(self._reader.places(self.model.blueprint, name))

    def identity(self) -> Any:
        return file_states(self.path, self._reader.files)


class TorchDistTarget(Target):
    """A ``release`` to write.

    Args:
        model: what it is.
        dtypes: internal name -> dtype; tensors that share a key have the same.
    """

    def __init__(self, model: WholeModel, dtypes: Mapping[str, torch.dtype]) -> None:
        self._model = model
        self.infos = {one.name: TensorInfo(dtypes[one.name], one.shape) for one in model.claims.values()}
        self._entries: dict[str, TensorStorageMetadata] = {}
        self._files: list[_Distcp] = []
        limit = _file_limit(sum(info.nbytes for info in self.infos.values()))
        self._parts = {name: tuple(self._place(name, limit)) for name in self.infos}
        self.payload = {file.name: file.payload for file in self._files}
        self.kind = f"torch_dist, {count_files(self._files)}"

    def _place(self, name: str, limit: int) -> Iterator[Part]:
        dtype = self.infos[name].dtype
        for shard in self._shards(name, torch.empty(self.infos[name].shape, dtype=dtype, device="meta")):
            if not self._files or self._files[-1].size >= limit:
                self._files.append(_Distcp(f"{RELEASE}/__0_{len(self._files)}.distcp"))
            chunk = chunk_of(shard)
            if shard.key not in self._entries:
                properties = TensorProperties(dtype=dtype)
                self._entries[shard.key] = TensorStorageMetadata(properties, torch.Size(shard.global_shape), [])
            entry = self._entries[shard.key]
            assert entry.properties.dtype == dtype, f"{shard.key} has two dtypes"
            index = MetadataIndex(shard.key, chunk.offsets, len(entry.chunks))
            entry.chunks.append(chunk)
            slot = f"{shard.key} {tuple(chunk.offsets)}"
            yield Part(self._files[-1].name, slot, self._files[-1].add(slot, index, dtype, tuple(chunk.sizes)))

    def _shards(self, name: str, tensor: Tensor) -> list[ShardedTensor]:
        return self._model.blueprint.shards(name, tensor)

    def parts(self, name: str) -> tuple[Part, ...]:
        return self._parts[name]

    def split(self, name: str, tensor: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        return tuple((shard.data,) for shard in self._shards(name, tensor))

    def layout(self, file: str) -> FileLayout:
        return next(one for one in self._files if one.name == file)

    def finish(self, staged: Path) -> None:
        folder, metadata = staged / RELEASE, Metadata(state_dict_metadata=dict(self._entries), planner_data=None)
        results = [result for file in self._files for result in file.results]
        results += self._write_objects(folder, metadata)
        # As torch's FileSystemWriter does it, but without a random number and the name of a temporary directory.
        metadata.storage_data = {result.index: result.storage_data for result in results}
        (folder / METADATA).write_bytes(pickle.dumps(metadata))
        torch.save(_COMMON, folder / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))

    def _write_objects(self, folder: Path, metadata: Metadata) -> Iterator[WriteResult]:
        """What a model's state has besides tensors, in a file of its own."""
        name = f"__0_{len(self._files)}.distcp"
        with open(folder / name, "wb") as file:
            for entry in self._model.blueprint.objects:
                content, start = io.BytesIO(), file.tell()
                torch.save([entry.data], content)
                file.write(content.getbuffer())
                metadata.state_dict_metadata[entry.unique_key] = BytesStorageMetadata()
                length = file.tell() - start
                yield WriteResult(MetadataIndex(entry.unique_key), length, _StorageInfo(name, start, length))


def _file_limit(total: int) -> int:
    smallest, largest = _FILE_BYTES
    return min(max(total // 16, smallest), largest)


class _Distcp(FileLayout):
    """Archives of one tensor each, one after the other."""

    def __init__(self, name: str) -> None:
        self.name, self.size, self.payload = name, 0, 0
        self.slots: dict[str, Slot] = {}
        self.results: list[WriteResult] = []
        self._archives: list[tuple[int, Skeleton]] = []

    def add(self, slot: str, index: MetadataIndex, dtype: torch.dtype, sizes: tuple[int, ...]) -> int:
        """Append a tensor's archive; returns the tensor's size in bytes."""
        archive, start = _archive(dtype, sizes), -(-self.size // ALIGNMENT) * ALIGNMENT
        (hole,) = archive.holes
        self._archives.append((start, archive))
        self.slots[slot] = Slot(hole, start)
        self.results.append(WriteResult(index, archive.size, _StorageInfo(Path(self.name).name, start, archive.size)))
        self.size, self.payload = start + archive.size, self.payload + hole.nbytes
        return hole.nbytes

    def write(self, file: BinaryIO) -> None:
        for start, archive in self._archives:
            archive.write(file, start)


@cache
def _archive(dtype: torch.dtype, sizes: tuple[int, ...]) -> Skeleton:
    return skeleton(torch.empty(sizes, dtype=dtype))
