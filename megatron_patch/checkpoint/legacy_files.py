"""The files of a legacy checkpoint that is there: found, opened safely, and recognised by the names in them.

`rank_files` finds them, `RankFile` opens one, `recognise` tells from the first whose names they are, and `check_grid`
that none is missing. It knows nothing of what a layout should look like; that is legacy_ranks.py.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from megatron.core.safe_globals import SAFE_GLOBALS
from torch import Tensor

from megatron_patch.checkpoint.archive import Archive, MappedFile
from megatron_patch.checkpoint.formats import some
from megatron_patch.checkpoint.legacy_ranks import Rank, folder_of, rank_pairs
from megatron_patch.checkpoint.naming import EXTRA_STATE, FILE, OLDER_FILE, READABLE, Naming, numbers_of
from megatron_patch.checkpoint.whole import WholeModel

_OLDEST = 2.0
"""Since this checkpoint_version queries, keys and values stand together head by head."""

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_MODEL = re.compile(r"model\d*")
_IGNORED = re.compile(rf"(.*[./])?({re.escape(EXTRA_STATE)}\d*|rotary_(pos_)?emb\.inv_freq)")
_LAYER = re.compile(r"model\d*/(?!mtp\.)(?:.*[./])?layers\.(\d+)\..*")
_UNSAFE = re.compile(r"GLOBAL ([\w.]+)")

# Numpy's random state, under the names of numpy 1 and 2.
_RECONSTRUCT = next(one for one in SAFE_GLOBALS if getattr(one, "__name__", "") == "_reconstruct")
_ALLOWED = (
    *SAFE_GLOBALS,
    *((_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    type(np.dtype(np.uint32)),
)


def flattened(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Everything in nested dicts, with its keys joined."""
    for key, one in value.items():
        if isinstance(one, Mapping):
            yield from flattened(one, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", one


# --------------------------------------------------------------------------------------------------- which files, whose


def rank_files(directory: Path) -> dict[tuple[int, ...], Path]:
    """Numbers in a directory's name -> the file in it, in order."""
    found = {}
    for folder in sorted(directory.glob("mp_rank_*")):
        if not (match := _RANK.fullmatch(folder.name)):
            raise ValueError(f"{folder} is not named like a rank: mp_rank_TT, mp_rank_TT_PPP or mp_rank_TT_PPP_EEE")
        file = next((folder / name for name in (FILE, OLDER_FILE) if (folder / name).is_file()), None)
        if file is None:
            raise ValueError(f"{folder} has no {FILE} (nor {OLDER_FILE}, as of old)")
        found[tuple(int(number) for number in match.groups() if number)] = file
    if len({len(numbers) for numbers in found}) != 1:
        raise ValueError(f"{directory} must have mp_rank directories, of one form: {some(map(str, found)) or 'none'}")
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Known:
    """What the files of the first rank, up to the one with the first layers, tell of a checkpoint."""

    path: Path
    """The first file."""

    naming: Naming
    tensors: Mapping[str, Tensor]
    """Internal name -> that rank's piece of it, without values."""

    model: WholeModel

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a piece.

        Raises:
            ValueError: it is not there.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no {name}, which the model needs")
        return tuple(self.tensors[name].shape)

    @cached_property
    def experts(self) -> list[str]:
        """The expert tensors of that rank."""
        return [name for name in self.tensors if self.model.splits[name].is_expert]

    @property
    def is_expert_parallel(self) -> bool:
        """Whether other files hold further experts of the same layers."""
        numbers = [numbers_of(name)[-1] for name in self.experts]
        return bool(numbers) and max(numbers) + 1 < self.model.architecture.config["num_moe_experts"]

    def expert_tensor(self, tensor: int) -> int:
        """Over how many of the tensor-parallel ranks each expert is split."""
        axes = ((name, self.model.splits[name].axis) for name in self.experts)
        name, axis = next((one for one in axes if one[1] is not None), (None, None))
        size = self.model.claims[name].shape[axis] // max(self.shape(name)[axis], 1) if name else tensor
        return size if size and tensor % size == 0 else tensor


def recognise(files: Sequence[RankFile], model: WholeModel) -> Known:
    """Find the naming scheme that knows most of the first rank's files.

    Raises:
        ValueError: none knows anything.
    """
    found = [Known(files[0].path, naming, _hits(naming, files, model), model) for naming in READABLE]
    best = max(found, key=lambda known: len(known.tensors))
    if not best.tensors:
        known = ", ".join(dict.fromkeys(one.name for one in READABLE))
        example = some(files[0].tensors, 1)
        raise ValueError(f"{best.path}: no parameter of it is known, such as {example}; namings: {known}")
    return best


def _hits(naming: Naming, files: Sequence[RankFile], model: WholeModel) -> dict[str, Tensor]:
    keys = {name: naming.key(name, numbers_of(name), model.claims) for name in model.claims if naming.has(name)}
    found = {}
    for file in files:
        slots = {name: f"{file.parts[0]}/{key}" for name, key in keys.items()}
        found |= {name: file.tensors[slot] for name, slot in slots.items() if slot in file.tensors}
    return found


def rank_of(numbers: tuple[int, ...], known: Known) -> Rank:
    """Whose file it is; of two numbers, the second may be a stage or an expert-parallel rank."""
    tensor, *rest = numbers
    if len(rest) == 1:
        rest = [0, *rest] if known.is_expert_parallel else [*rest, 0]
    return Rank(tensor, *(rest or (0, 0)))


def check_grid(directory: Path, paths: Mapping[Rank, Path], known: Known) -> tuple[tuple[int, int], ...]:
    """All ranks of the layout are there; returns the pairs of tensor- and expert-parallel ranks."""
    tensor, stages, expert = (max(rank[i] for rank in paths) + 1 for i in range(3))
    needed = set(rank_pairs(tensor, expert, known.expert_tensor(tensor)))
    pairs = needed | {(rank.tensor, rank.expert) for rank in paths}
    for stage in range(stages):
        if missing := [Rank(t, stage, e) for t, e in sorted(pairs) if Rank(t, stage, e) not in paths]:
            folder = folder_of(missing[0], stages, expert)
            raise ValueError(f"{directory} is incomplete: {folder} is missing, as the other directories show")
    return tuple(sorted(pairs))


# ------------------------------------------------------------------------------------------------------------ one file


class RankFile:
    """The model in one rank's file."""

    def __init__(self, path: Path, trusted: bool) -> None:
        self.path = path
        self._archive = _open(path, trusted)
        content, self._archive.value = self._archive.value, None  # what is no weight need not stay in memory
        self.parts = _parts(path, content)
        found = [(slot, value) for part in self.parts for slot, value in flattened(content[part], f"{part}/")]
        self.ignored = [slot for slot, value in found if _IGNORED.fullmatch(slot) and isinstance(value, Tensor)]
        self.tensors = {slot: value for slot, value in found if not _IGNORED.fullmatch(slot)}
        if odd := next((slot for slot, value in self.tensors.items() if not isinstance(value, Tensor)), None):
            raise ValueError(f"{path}: {odd} is no tensor")

    def layers(self, part: int) -> int:
        """Decoder layers of one chunk."""
        matches = (_LAYER.fullmatch(slot) for slot in self.tensors if slot.startswith(f"{self.parts[part]}/"))
        return max((int(match[1]) + 1 for match in matches if match), default=0)

    def expect(self, slot: str) -> None:
        self._archive.expect(self.tensors[slot])

    def read(self, slot: str) -> Tensor:
        return self._archive.read(self.tensors[slot])


def _parts(path: Path, content: Any) -> tuple[str, ...]:
    parts = sorted(filter(_MODEL.fullmatch, content), key=lambda part: (len(part), part)) if _is_dict(content) else []
    wanted = ["model"] if "model" in parts else [f"model{i}" for i in range(len(parts))]
    if not parts or parts != wanted or not all(_is_dict(content[part]) for part in parts):
        raise ValueError(f"{path} holds no model: neither 'model' nor 'model0', 'model1', ...")
    if (version := content.get("checkpoint_version", 0)) < _OLDEST:
        raise ValueError(f"{path} has checkpoint_version {version}; its order of heads is not known before {_OLDEST}")
    return tuple(parts)


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)


def _open(path: Path, trusted: bool) -> Archive:
    try:
        return Archive(MappedFile(path), allowed=_ALLOWED)
    except ValueError as error:
        if not isinstance(error.__cause__, UnpicklingError):
            raise
        if not trusted:
            unsafe = _UNSAFE.search(str(error.__cause__))
            what = unsafe[1] if unsafe else "something else than tensors"
            raise ValueError(
                f"{path} needs full unpickling, because of {what}; that can run any code. If you trust whoever made it,"
                " give --trust-pickle"
            ) from error
    return Archive(MappedFile(path), trusted=True, pickle_module=_TolerantPickle)


class _Unknown:
    """Stands for an object of a class that is not installed; nobody looks at it."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return _Unknown


class _TolerantPickle:
    """A pickle module, for torch.load, that does without what is not installed, such as Megatron-LM itself."""

    Unpickler = _Unpickler
