"""Tokenized samples on disk, and the predecessor's layout of them.

    write_samples("train", packs, StoreInfo(...))          # train_ids.{bin,idx}, train_mask.{bin,idx}, train.json
    store = open_samples("train")
    store.sample(17), store.pack(3), store.lengths

Both datasets are megatron-core's (indexed.py): int32 token ids, and a uint8 for each of them that is 1 where the token
is to be learned. A document is a pack, its sequences are the samples in it: where a sample ends needs no mark among the
ids. The .json comes last; without it nothing is a store. It does not know text or templates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_patch.data.index_file import IndexFile, joined, open_index, structure_problems
from megatron_patch.data.indexed import locked, publish, replacing, sync
from megatron_patch.data.manifest import index_digest
from megatron_patch.data.sft.samples import Sample

KIND = "sft-samples"
_IDS, _MASK = np.dtype(np.int32), np.dtype(np.uint8)
_IGNORED = -100
"""The predecessor's label of what is not to be learned."""


@dataclass(frozen=True)
class StoreInfo:
    """What made a store."""

    tokenizer: str
    """Digest of the tokenizer's files."""
    vocab_size: int
    """Number of the tokenizer's ids."""
    template: str
    """Name of the chat template."""
    template_sha256: str
    """Digest of its text."""
    seq_length: int
    """Most tokens of a sample and, if packed, of a pack."""
    truncation: str
    """What became of longer ones."""
    packing: bool
    """Whether packs hold several samples."""


def ids_prefix(prefix: str) -> str:
    """Where the ids of a store lie."""
    return f"{prefix}_ids"


def mask_prefix(prefix: str) -> str:
    """Where the masks of a store lie."""
    return f"{prefix}_mask"


def info_path(prefix: str) -> Path:
    """What makes two datasets a store."""
    return Path(f"{prefix}.json")


# ------------------------------------------------------------------------------------------------------------- writing


def write_samples(prefix: str, packs: Iterable[Iterable[Sample]], info: StoreInfo) -> int:
    """Writes a store; it appears when all of it is written, in place of any older one. Returns the number of samples.

    Raises ValueError if there is no sample, or if another process is writing here.
    """
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    names = (ids_prefix(prefix), mask_prefix(prefix))
    temporary = [(Path(f"{name}.bin.tmp"), Path(f"{name}.idx.tmp")) for name in names]
    with locked(temporary[0][0]) as ids_file, locked(temporary[1][0]) as mask_file:
        try:
            lengths, marks = _write_tokens(packs, ids_file, mask_file)
            if not len(lengths):
                raise ValueError(f"no sample to write to {prefix}")
            for (_, idx_tmp), dtype in zip(temporary, (_IDS, _MASK), strict=True):
                _write_index(idx_tmp, dtype, lengths, marks)
            info_path(prefix).unlink(missing_ok=True)
            for name, (bin_tmp, idx_tmp) in zip(names, temporary, strict=True):
                publish(name, bin_tmp, idx_tmp)
        except BaseException:
            for path in (path for pair in temporary for path in pair):
                path.unlink(missing_ok=True)
            raise
    _write_info(prefix, info)
    return len(lengths)


def _write_tokens(
    packs: Iterable[Iterable[Sample]], ids_file: IO[bytes], mask_file: IO[bytes]
) -> tuple[np.ndarray, np.ndarray]:
    lengths: list[int] = []
    marks = [0]
    for pack in packs:
        for ids, mask in pack:
            ids_file.write(ids.astype(_IDS, copy=False).tobytes())
            mask_file.write(mask.astype(_MASK).tobytes())
            lengths.append(len(ids))
        marks.append(len(lengths))
    sync(ids_file)
    sync(mask_file)
    return np.array(lengths, np.int32), np.array(marks, np.int64)


def _write_index(path: Path, dtype: np.dtype, lengths: np.ndarray, marks: np.ndarray) -> None:
    pointers = np.cumsum(lengths, dtype=np.int64) - lengths
    index = IndexFile("", dtype, lengths, pointers * dtype.itemsize, marks, None)
    with open(path, "wb") as file:
        file.writelines(joined([index], dtype))
        sync(file)


def _write_info(prefix: str, info: StoreInfo) -> None:
    content = {"kind": KIND, **asdict(info), "index_sha256": _digests(prefix)}
    with replacing(info_path(prefix)) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def _digests(prefix: str) -> str:
    both = index_digest(ids_prefix(prefix)) + index_digest(mask_prefix(prefix))
    return hashlib.sha256(both.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading


def is_sample_store(prefix: str) -> bool:
    """Whether a store lies here, of our layout or the predecessor's."""
    return _read_info(prefix) is not None or _is_predecessors(prefix)


def open_samples(prefix: str) -> Samples:
    """Opens a store of either layout.

    Raises ValueError if there is none, if its parts do not belong together, or if what it holds makes no sense.
    """
    if _read_info(prefix) is not None:
        return SampleStore(prefix)
    if Path(f"{prefix}.idx").is_file():
        return PredecessorStore(prefix)
    raise ValueError(f"{prefix}: no tokenized samples here; {info_path(prefix)} and {ids_prefix(prefix)}.idx make some")


def _read_info(prefix: str) -> dict[str, Any] | None:
    path = info_path(prefix)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError:
        return None
    return values if isinstance(values, dict) and values.get("kind") == KIND else None


def _sound_index(prefix: str) -> IndexFile:
    """The index of a dataset; ValueError if it makes no sense."""
    index = open_index(prefix)
    for problem in structure_problems(index):
        raise ValueError(str(problem))
    return index


class Samples:
    """Samples by number, and packs of them: what a store offers, whatever its layout.

    Args:
        lengths: int32 [samples]: tokens of each.
        marks: int64 [packs + 1]: the first sample of each pack, and the number of samples.
    """

    info: StoreInfo | None = None
    """What made it, where that is known."""

    def __init__(self, prefix: str, seq_length: int, lengths: np.ndarray, marks: np.ndarray) -> None:
        self.prefix, self.seq_length = prefix, seq_length
        self.lengths, self.marks = lengths, marks

    @property
    def num_samples(self) -> int:
        """Samples in all packs."""
        return len(self.lengths)

    @property
    def num_packs(self) -> int:
        """Packs; without packing, as many as samples."""
        return len(self.marks) - 1

    def sample(self, number: int) -> Sample:
        """One sample, as a copy."""
        raise NotImplementedError

    def pack(self, number: int) -> list[Sample]:
        """The samples of one pack."""
        return [self.sample(one) for one in range(int(self.marks[number]), int(self.marks[number + 1]))]


class SampleStore(Samples):
    """A store that `write_samples` wrote, memory-mapped."""

    def __init__(self, prefix: str) -> None:
        values = _read_info(prefix)
        if values is None:
            raise ValueError(f"{info_path(prefix)} is missing, or not that of tokenized samples")
        if values.pop("index_sha256", None) != _digests(prefix):
            raise ValueError(f"{info_path(prefix)} is not that of the files beside it: write the set again")
        self.info = StoreInfo(**{field.name: values[field.name] for field in fields(StoreInfo)})
        indices = [_sound_index(name) for name in (ids_prefix(prefix), mask_prefix(prefix))]
        if [index.dtype for index in indices] != [_IDS, _MASK]:
            raise ValueError(f"{prefix}: ids must be {_IDS} and masks {_MASK}")
        super().__init__(prefix, self.info.seq_length, indices[0].lengths, indices[0].marks)
        self._starts = indices[0].pointers // _IDS.itemsize

    @cached_property
    def _files(self) -> tuple[np.ndarray, np.ndarray]:
        names = ((ids_prefix(self.prefix), _IDS), (mask_prefix(self.prefix), _MASK))
        ids, mask = (np.memmap(f"{name}.bin", dtype, "r") for name, dtype in names)
        return ids, mask

    def sample(self, number: int) -> Sample:
        """One sample, as a copy."""
        start = int(self._starts[number])
        part = slice(start, start + int(self.lengths[number]))
        ids, mask = (np.array(file[part]) for file in self._files)
        return Sample(ids, mask.astype(bool))


# -------------------------------------------------------------------------------------------------- the predecessor's


class PredecessorStore(Samples):
    """Rows of 2 x seq_length int32: tokens, then the label of each. The last token of a sample is -1 - id.

    What follows the last sample of a row is padding; rows without a token, and samples without a label, are left out.
    """

    def __init__(self, prefix: str) -> None:
        index = _sound_index(prefix)
        if index.dtype != _IDS:
            raise ValueError(
                f"{prefix}: token ids are {index.dtype}; rows of tokens and labels need {_IDS}, which holds -100"
            )
        widths = np.unique(index.lengths[index.lengths > 0])
        if len(widths) != 1 or widths[0] % 2:
            raise ValueError(f"{prefix}: rows of {widths.tolist()[:5]} ids; they must be of one length, 2 x seq_length")
        self._tokens = np.memmap(f"{prefix}.bin", _IDS, "r").reshape(-1, 2, int(widths[0]) // 2)
        places = [_places(prefix, row, *self._tokens[row]) for row in range(len(self._tokens))]
        places = [one for one in places if len(one)]
        self._places = np.concatenate(places) if places else np.empty((0, 3), np.int64)
        if not len(self._places):
            raise ValueError(f"{prefix}: no row holds a sample with a label")
        marks = np.concatenate([[0], np.cumsum([len(one) for one in places])])
        lengths = (self._places[:, 2] - self._places[:, 1]).astype(np.int32)
        super().__init__(prefix, self._tokens.shape[2], lengths, marks)

    def sample(self, number: int) -> Sample:
        """One sample, as a copy."""
        row, start, end = map(int, self._places[number])
        tokens, labels = self._tokens[row]
        return _sample(tokens[start:end], labels[start:end])


def _sample(tokens: np.ndarray, labels: np.ndarray) -> Sample:
    ids = np.where(tokens < 0, -1 - tokens, tokens).astype(_IDS)
    mask = np.zeros(len(ids), bool)
    mask[1:] = labels[:-1] != _IGNORED  # a label stands with the token before
    return Sample(ids, mask)


def _places(prefix: str, row: int, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int64 [samples, 3]: row, start and end of each sample of a row that has something to learn."""
    ends = np.flatnonzero(tokens < 0) + 1
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)]
    labelled = np.flatnonzero(labels != _IGNORED)
    if len(labelled) and (not len(ends) or labelled[-1] >= ends[-1] - 1):
        raise ValueError(f"{prefix}: row {row} has a label behind its last sample; is it of 2 x seq_length ids?")
    following = tokens[labelled + 1]
    if (np.where(following < 0, -1 - following, following) != labels[labelled]).any():
        raise ValueError(f"{prefix}: row {row} has labels that are not the tokens that follow")
    useful = np.searchsorted(labelled, ends) > np.searchsorted(labelled, starts)
    return np.stack([np.full(len(ends), row), starts, ends], axis=1)[useful]


def _is_predecessors(prefix: str) -> bool:
    if not Path(f"{prefix}.idx").is_file():
        return False
    try:
        index = open_index(prefix)
    except ValueError:
        return False
    first = next((i for i in range(index.num_sequences) if index.lengths[i]), None)
    if index.dtype != _IDS or first is None or index.lengths[first] % 2:
        return False
    row = np.fromfile(f"{prefix}.bin", _IDS, int(index.lengths[first]), offset=int(index.pointers[first]))
    return bool((row[len(row) // 2 :] == _IGNORED).any() and (row[: len(row) // 2] < 0).any())
