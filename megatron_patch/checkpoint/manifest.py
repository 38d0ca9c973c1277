"""What a conversion leaves behind to be trusted by: the manifest with a checksum per tensor; and, while it runs, the
journal from which a killed one goes on.

A checksum is the 128-bit xxh3 of an *internal* tensor (see weights.py) in the dtype in which it is read back, so it is
the same in every format and layout. A line enters the journal only when the bytes it speaks of are on disk. This
module knows tensors and files: no formats.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatron_patch.checkpoint.directory import MANIFEST, read_json, write_text

_JOURNAL = ".journal-{}.jsonl"


def data_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, copied only where they do not lie in order."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def checksum(tensor: Tensor) -> str:
    """The xxh3-128 of a tensor's bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data_of(tensor))


def nonfinite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # torch can neither add nor test what has 8 bits
    if not tensor.is_floating_point() or math.isfinite(tensor.sum().item()):
        return 0  # one pass; a sum that overflows merely leads to the count below
    return int((~tensor.isfinite()).sum())


def versions() -> dict[str, str]:
    """Of everything that had a hand in a conversion."""
    packages = ("megatron-patch", "megatron-core", "torch", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


@dataclass(frozen=True)
class Entry:
    """One internal tensor, converted."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str
    nonfinite: int
    """How many of its values are NaN or infinite."""

    files: tuple[str, ...]
    """Where it is in the target (for the journal: as far as this process wrote it)."""


class Journal:
    """The lines of one process; a context manager."""

    def __init__(self, staged: Path, rank: int) -> None:
        self._file = open(staged / _JOURNAL.format(rank), "a")  # noqa: SIM115  closed by __exit__
        if self._file.tell():
            self._file.write("\n")  # the last line may be half of one

    def __enter__(self) -> Journal:
        return self

    def add(self, entries: Iterable[Entry]) -> None:
        """Note tensors whose bytes are on disk; the note itself is too, on return."""
        self._file.writelines(json.dumps(asdict(entry)) + "\n" for entry in entries)
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, *error: object) -> None:
        self._file.close()


def journaled(staged: Path) -> dict[str, Entry]:
    """Internal name -> what all processes so far have done of it."""
    found: dict[str, Entry] = {}
    for path in sorted(staged.glob(_JOURNAL.format("*"))):
        for line in path.read_text().splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue  # the last line of a process that was killed while writing it
            known = found[values["name"]].files if values["name"] in found else ()
            found[values["name"]] = _entry({**values, "files": {*known, *values["files"]}})
    return found


def _entry(values: Mapping[str, Any]) -> Entry:
    return Entry(**{**values, "shape": tuple(values["shape"]), "files": tuple(sorted(values["files"]))})


def remove_journals(staged: Path) -> None:
    """Remove what only a running conversion needs."""
    for path in staged.glob(_JOURNAL.format("*")):
        path.unlink()


def write_manifest(folder: Path, plan: Mapping[str, Any], entries: Iterable[Entry]) -> None:
    """Write the manifest into the directory that holds the weights: all of it or nothing, and on disk on return."""
    tensors = {entry.name: {k: v for k, v in asdict(entry).items() if k != "name"} for entry in entries}
    content = {"versions": versions(), "plan": plan, "tensors": tensors}
    write_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a directory that holds weights, if a conversion made it."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    manifest = read_json(file)
    if not all(isinstance(manifest.get(key), dict) for key in ("plan", "tensors")):
        raise ValueError(f"{file} is no manifest of a conversion: it must hold a plan and tensors; remove it")
    return manifest


def converted(folder: Path) -> dict[str, Entry]:
    """Internal name -> what the manifest of a directory that holds weights says of it; empty where there is none."""
    manifest = read_manifest(folder)
    return {name: _entry({**values, "name": name}) for name, values in (manifest or {"tensors": {}})["tensors"].items()}


class Checker:
    """Compares what is read with the checksums of the conversion that wrote it."""

    def __init__(self, folder: Path) -> None:
        self._folder, manifest = folder, read_manifest(folder)
        self._tensors: dict[str, Any] = manifest["tensors"] if manifest else {}

    def check(self, name: str, tensor: Tensor, digest: str | None = None) -> None:
        """Raise a ValueError where a tensor is not what was written."""
        known = self._tensors.get(name)
        if known is None or known["dtype"] != dtype_name(tensor.dtype):
            return
        if (digest or checksum(tensor)) != known["xxh3_128"]:
            raise ValueError(
                f"{self._folder}: {name} does not match its checksum in {MANIFEST}: a file is damaged, or was changed"
                f" since; where the change was meant, remove {MANIFEST}"
            )


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without torch's prefix."""
    return str(dtype).removeprefix("torch.")
