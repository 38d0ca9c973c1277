"""Several indexed datasets joined into one: `megatron-patch merge`.

    report = merge(MergeArgs(inputs=("a_text_document", "b_text_document"), output_prefix="all"))

Bytes are copied by the kernel where it can; the index is computed with numpy, some MB at a time. Both files are byte
for byte those of megatron-core's `IndexedDatasetBuilder.add_index`, which checks neither the parts' files nor that they
are of one tokenizer. Weights are not its business: a blend (--data-path of `pretrain`) has those without copying.

It does not know tokenizers, only what the parts' manifests (PREFIX.json) say of them.
"""

from __future__ import annotations

import errno
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from typing import IO

import numpy as np

from megatron_patch.data.arguments import raise_problems
from megatron_patch.data.index_file import IndexFile, Problem, joined, open_index, structure_problems
from megatron_patch.data.indexed import pair
from megatron_patch.data.manifest import Manifest, merge_manifests, read_manifest
from megatron_patch.data.scanning import token_blocks
from megatron_patch.data.tool_arguments import MergeArgs
from megatron_patch.progress import Progress

_CHUNK = 64 << 20
_PROBLEMS = 3
"""Problems that are told of one damaged part."""

# What copy_file_range says where file systems or kernel cannot; see its manual page.
_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}

_UINT16_END = 65500
"""megatron-core stores vocabularies of this size and more as int32."""


@dataclass(frozen=True)
class Source:
    """One part of a merged dataset."""

    prefix: str
    """Where it lies."""
    documents: int
    """Its documents."""
    sequences: int
    """Its sequences: as many, unless documents were split."""
    tokens: int
    """Its tokens."""
    share: float
    """Its share of all tokens."""
    dtype: str
    """The type of its stored ids."""
    tokenizer: str | None
    """Digest of its tokenizer's files, where its manifest names one."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    prefix: str
    """The merged dataset."""
    documents: int
    """Documents of all sources."""
    sequences: int
    """Sequences of all sources."""
    tokens: int
    """Tokens of all sources."""
    dtype: str
    """Type of a stored id."""
    output_bytes: int
    """Size of the .bin and .idx files."""
    seconds: float
    """Wall time."""
    notes: tuple[str, ...]
    """What the user should know about this dataset."""
    sources: tuple[Source, ...]
    """The parts, in order."""


def merge(args: MergeArgs) -> MergeReport:
    """Joins datasets into one, with a manifest if all of them have one.

    Raises ValueError for what a user can mend: a damaged part, parts of different tokenizers, ids that do not fit the
    type asked for. Nothing is left behind then, and a dataset that was there is untouched.
    """
    start = time.perf_counter()
    args.validate()
    parts = [open_index(prefix) for prefix in args.prefixes()]
    raise_problems(_part_problems(parts))
    manifests = {part.prefix: read_manifest(part.prefix) for part in parts}
    notes = _tokenizer_notes(manifests)
    dtype = _dtype(parts, args.target_dtype)
    _write(parts, dtype, args.output_prefix)
    merge_manifests(list(manifests), args.output_prefix)
    tokens = sum(part.num_tokens for part in parts)
    return MergeReport(
        prefix=args.output_prefix,
        documents=sum(part.num_documents for part in parts),
        sequences=sum(part.num_sequences for part in parts),
        tokens=tokens,
        dtype=dtype.name,
        output_bytes=sum(os.path.getsize(f"{args.output_prefix}{suffix}") for suffix in (".bin", ".idx")),
        seconds=time.perf_counter() - start,
        notes=notes,
        sources=tuple(_source(part, manifests[part.prefix], tokens) for part in parts),
    )


def _source(part: IndexFile, manifest: Manifest | None, all_tokens: int) -> Source:
    tokens = part.num_tokens
    sizes = (part.num_documents, part.num_sequences, tokens, tokens / max(1, all_tokens))
    return Source(part.prefix, *sizes, part.dtype.name, manifest and manifest.tokenizer)


# --------------------------------------------------------------------------------------------------------- before it


def _part_problems(parts: list[IndexFile]) -> list[str]:
    """What forbids joining these parts."""
    problems = [str(problem) for part in parts for problem in islice(structure_problems(part), _PROBLEMS)]
    with_modes = [part.prefix for part in parts if part.modes is not None]
    if with_modes and len(with_modes) < len(parts):
        without = next(part.prefix for part in parts if part.modes is None)
        problems.append(f"{with_modes[0]} is multimodal (its sequences have modes), {without} is not")
    return problems


def _tokenizer_notes(manifests: dict[str, Manifest | None]) -> tuple[str, ...]:
    """What to say about the parts' tokenizers; ValueError if they are known to differ."""
    groups: dict[tuple[str, int, int | None], list[str]] = defaultdict(list)
    known = {prefix: manifest for prefix, manifest in manifests.items() if manifest is not None}
    for prefix, manifest in known.items():
        groups[manifest.encoding, manifest.vocab_size, manifest.eod].append(prefix)
    if len(groups) > 1:
        whose = "; ".join(
            f"digest {encoding[:12]}, {size} ids, end of document {eod}: {', '.join(prefixes)}"
            for (encoding, size, eod), prefixes in groups.items()
        )
        raise ValueError(f"the parts are of {len(groups)} tokenizers and cannot be one dataset: {whose}")
    notes = []
    unknown = [prefix for prefix in manifests if prefix not in known]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        notes.append(f"tokenizers not compared: no manifest says which made {unknown[0]}{more}")
    unmarked = [prefix for prefix, manifest in known.items() if not manifest.append_eod]
    if 0 < len(unmarked) < len(known):
        notes.append(f"{unmarked[0]} was made without --append-eod, others with it")
    return tuple(notes)


def _dtype(parts: list[IndexFile], target: str) -> np.dtype:
    if target != "auto":
        return np.dtype(target)
    return np.result_type(*(part.dtype for part in parts))


# ---------------------------------------------------------------------------------------------------------- writing


def _write(parts: list[IndexFile], dtype: np.dtype, prefix: str) -> None:
    total = sum(part.num_tokens * part.dtype.itemsize for part in parts)
    # The .bin is opened again: the kernel copies into no file that was opened for appending.
    with (
        pair(prefix) as files,
        Progress("merge", total, "B") as progress,
        open(files.bin.name, "r+b", buffering=0) as bin_file,
    ):
        for part in parts:
            _append(part, dtype, bin_file, progress)
        files.idx.writelines(joined(parts, dtype))


def _append(part: IndexFile, dtype: np.dtype, target: IO[bytes], progress: Progress) -> None:
    end = target.tell() + part.num_tokens * dtype.itemsize
    if part.dtype == dtype:
        copy(f"{part.prefix}.bin", target, progress)
    else:
        for first, block in token_blocks(part, progress):
            _require_fit(part, dtype, first, block)
            _write_all(target, block.astype(dtype).tobytes())
    if target.tell() != end:
        raise OSError(f"{part.prefix}.bin changed while it was copied")


def copy(path: str, target: IO[bytes], progress: Progress) -> None:
    """Appends a file to an unbuffered one, inside the kernel if it can: some file systems then share the blocks."""
    with open(path, "rb", buffering=0) as source:
        try:
            while count := os.copy_file_range(source.fileno(), target.fileno(), _CHUNK):
                progress(count)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
        # What the kernel would not copy; both files stand where it stopped.
        while block := source.read(_CHUNK):
            _write_all(target, block)
            progress(len(block))


def _write_all(target: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[target.write(view) :]


def _require_fit(part: IndexFile, dtype: np.dtype, first: int, block: np.ndarray) -> None:
    """Raises ValueError if an id of a block does not fit the type that it is to be stored as."""
    if np.can_cast(part.dtype, dtype):
        return
    low, high = np.iinfo(dtype).min, _UINT16_END - 1 if dtype == np.uint16 else np.iinfo(dtype).max
    bad = np.flatnonzero((block < low) | (block > high))
    if bad.size:
        token = first + int(bad[0])
        document = int(np.searchsorted(part.bounds(), token, "right")) - 1
        message = f"id {block[bad[0]]} cannot be stored as {dtype.name} ({low}..{high}); choose a wider --target-dtype"
        raise ValueError(Problem(message, f"{part.prefix}.bin", document, token * part.dtype.itemsize))
