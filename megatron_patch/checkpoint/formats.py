"""What every checkpoint format offers a conversion: a `Source` to read internal tensors from, a `Target` to write to.

An internal tensor (see weights.py) is the common ground: whole, one rank, no padding. A source reads any of them; a
target says which bytes of which file each becomes, before a single one is written. So formats x layouts need no code
for their pairs. This module knows no format.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from megatron_patch.checkpoint.archive import Hole
from megatron_patch.checkpoint.huggingface import FilePlan, TensorInfo, load_origin
from megatron_patch.checkpoint.whole import WholeModel


class Part(NamedTuple):
    """Bytes of an internal tensor that stand together in a target."""

    file: str
    """Path below the target."""

    slot: str
    """Which tensor of that file."""

    nbytes: int


@dataclass(frozen=True)
class Slot:
    """Where a tensor's bytes belong in a file."""

    hole: Hole
    start: int = 0
    """Where the archive that holds it starts in the file."""


class FileLayout(ABC):
    """A file of a target before its tensors are in it."""

    size: int
    slots: Mapping[str, Slot]

    @abstractmethod
    def write(self, file: BinaryIO) -> None:
        """Put everything but tensors into the file, which has its size already. May be done again at any time."""


class Source(ABC):
    """A checkpoint to read. Its constructor checks all that can be known without reading weights."""

    kind: str
    """Its format and layout, for a person."""

    path: Path
    model: WholeModel
    infos: Mapping[str, TensorInfo]
    """Internal name -> stored dtype, shape."""

    config_folder: Path
    """Where config.json, the tokenizer and other files that are no weights lie."""

    weights_folder: Path
    """Where the weights lie, and the manifest of the conversion that made them, if one did."""

    ignored: tuple[str, ...] = ()
    """Tensors of it that are no parameters and are left out."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """An internal tensor, whole, in its stored dtype; maybe mapped: not to be written to. Thread-safe.

        Raises:
            ValueError: it is damaged, or copies of it disagree.
        """

    @abstractmethod
    def expect(self, name: str) -> None:
        """Have an internal tensor read from disk in the background: it is wanted soon."""

    @abstractmethod
    def origin(self, name: str) -> str:
        """Where an internal tensor comes from, for a person: files and names."""

    @abstractmethod
    def identity(self) -> Any:
        """What tells this state of the checkpoint from another, as JSON: files, sizes, times."""

    def check_convertible(self) -> None:
        """Raise a ValueError for a family that may be planned but is not proven yet."""
        if reason := self.model.architecture.plan_only:
            raise ValueError(f"{self.path} can be planned (--dry-run) but not converted: {reason}")

    @abstractmethod
    def view(self) -> View:
        """The checkpoint as the Hugging Face files that it is, or was made from."""


@dataclass(frozen=True)
class View:
    """A checkpoint as Hugging Face files."""

    plan: FilePlan | None
    """Which tensor stands in which file, where that is known."""

    dtypes: Mapping[str, torch.dtype]
    """Hugging Face name -> dtype, for every tensor, copies of the embedding included."""


class MegatronSource(Source):
    """A Megatron checkpoint: it may remember the Hugging Face files that it once was."""

    def view(self) -> View:
        plan, originals = load_origin(self.config_folder) or (None, {})
        self.model = self.model.as_named(originals)
        stored = {name: self.infos[one.name].dtype for one in self.model.claims.values() for name in one.hf}
        repeats = {name: one for name, one in self.model.repeats.items() if name in originals}
        if set(originals) != set(stored) | set(repeats):
            return View(None, stored)
        # A tensor that is stored as the conversion stored it, which may be wider than it was, gets its own dtype back.
        expected = self.model.stored_dtypes(originals)
        dtypes = {
            name: originals[name] if self.infos[one.name].dtype == expected[one.name] else stored[name]
            for one in self.model.claims.values()
            for name in one.hf
        }
        return View(plan, {name: dtypes[repeats.get(name, name)] for name in originals})


class Target(ABC):
    """A checkpoint to write."""

    kind: str
    """Its format and layout, for a person."""

    infos: Mapping[str, TensorInfo]
    """Internal name -> dtype and shape as it can be read back."""

    payload: Mapping[str, int]
    """File -> bytes of tensors in it."""

    @abstractmethod
    def parts(self, name: str) -> tuple[Part, ...]:
        """Where the bytes of an internal tensor go."""

    @abstractmethod
    def split(self, name: str, tensor: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """For each of `parts`, in that order, the tensors whose bytes it is, one after the other, in the final dtype.

        `tensor` is as `infos` says.
        """

    @abstractmethod
    def layout(self, file: str) -> FileLayout:
        """One file, laid out."""

    @abstractmethod
    def finish(self, staged: Path) -> None:
        """Write what makes the directory a checkpoint, once all tensors are in place; the manifest and side files are
        not its business."""


# ------------------------------------------------------------------------------------------------ what formats share


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype; a ValueError where float16 cannot hold its values."""
    converted = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and (converted.isinf() & tensor.isfinite()).any():
        raise ValueError(f"{name} has values that float16 cannot hold; choose bfloat16 or float32")
    return converted


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first of many names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def count_files(files: Sized) -> str:
    """How many files, for a person."""
    return f"{len(files)} file{'s' * (len(files) != 1)}"


def file_states(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """File -> size and time of the last change in nanoseconds."""
    states = {name: os.stat(folder / name) for name in sorted(names)}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
