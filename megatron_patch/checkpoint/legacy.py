"""Megatron's ``legacy`` checkpoints, ``mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt``, as a `Source` and a `Target`.

Every file is one ``torch.save`` of a dict: ``args``, ``iteration`` and ``model`` (with virtual stages ``model0``,
``model1``, ...), for the ranks of one layout. Written files are what Megatron-LM loads as a release. Read are the
weights only, of any naming scheme, whatever else a training run put beside them. Which rank holds what is worked out in
legacy_ranks.py, names in naming.py. It knows no Hugging Face names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from torch import Tensor

from megatron_patch.checkpoint.archive import skeleton
from megatron_patch.checkpoint.directory import RELEASE
from megatron_patch.checkpoint.formats import FileLayout, MegatronSource, Part, Slot, Target, file_states, some
from megatron_patch.checkpoint.huggingface import TensorInfo
from megatron_patch.checkpoint.legacy_args import namespace
from megatron_patch.checkpoint.legacy_files import (
    Known,
    RankFile,
    check_grid,
    flattened,
    rank_files,
    rank_of,
    recognise,
)
from megatron_patch.checkpoint.legacy_ranks import Place, Rank, Ranks, rank_pairs
from megatron_patch.checkpoint.naming import Naming, naming_for
from megatron_patch.checkpoint.sharding import (
    Chunk,
    Layout,
    disagreeing_ranks,
    in_order,
    replicated_rows,
    same_bits,
)
from megatron_patch.checkpoint.whole import WholeModel
from megatron_patch.family import EMBEDDING, Architecture
from megatron_patch.model import check_layout, padded_vocab_size

VERSION = 3.0
"""Of the files that are written: since 2.0 queries, keys and values stand together head by head."""

_HEAD = "output_layer.weight"


# ------------------------------------------------------------------------------------------------------------- writing


class LegacyTarget(Target):
    """A ``release`` to write.

    Args:
        model: what it is.
        dtypes: internal name -> dtype.
        layout: over which ranks.
        naming: whose parameter names: local, te or 2023.
        expert_layout: with te, whether experts are modules of their own (sequential) or one grouped module.
        divisible_by: the vocabulary is padded to a multiple of this times the tensor parallel size.
        extra_vocab_size: or by exactly so many rows.
        replicate_kv: give each of more ranks than query groups a whole key and value head.

    Raises:
        ValueError: the layout does not fit the model, or the scheme has no name for a parameter.
    """

    def __init__(
        self,
        model: WholeModel,
        dtypes: Mapping[str, torch.dtype],
        layout: Layout,
        *,
        naming: str = "local",
        expert_layout: str | None = None,
        divisible_by: int = 128,
        extra_vocab_size: int | None = None,
        replicate_kv: bool = False,
    ) -> None:
        _check(model.architecture, layout, replicate_kv)
        _check_naming(model.architecture, naming)
        expert_tensor = layout.expert_tensor or layout.tensor
        self._ranks = Ranks(
            model,
            naming_for(naming, expert_layout),
            layout.pipeline.chunks(model.architecture.num_layers),
            layout.tensor,
            layout.expert,
            expert_tensor,
            _vocabulary(model.architecture.vocab_size, layout.tensor, divisible_by, extra_vocab_size),
            replicate_kv,
            rank_pairs(layout.tensor, layout.expert, expert_tensor),
        )
        _check_mtp(model.architecture, layout.pipeline.layout)
        self._divisible_by, self._string = divisible_by, layout.pipeline.layout
        self.kind = f"legacy {self._ranks}, {naming} naming"
        self.infos = {one.name: TensorInfo(dtypes[one.name], one.shape) for one in model.claims.values()}
        self._pieces = {name: TensorInfo(info.dtype, self._ranks.shape(name)) for name, info in self.infos.items()}
        self._rank_of = {self._file(rank): rank for rank in self._ranks}
        self.payload = self._count()

    def _file(self, rank: Rank) -> str:
        return f"{RELEASE}/{self._ranks.folder(rank)}/{self._ranks.naming.file}"

    def _count(self) -> dict[str, int]:
        sizes: Counter[tuple[int, int | None]] = Counter()
        for name, homes in self._ranks.homes.items():
            for home in homes:
                sizes[home.stage, home.expert] += self._pieces[name].nbytes
        return {file: sizes[rank.stage, None] + sizes[rank.stage, rank.expert] for file, rank in self._rank_of.items()}

    def parts(self, name: str) -> tuple[Part, ...]:
        nbytes = self._pieces[name].nbytes
        return tuple(Part(self._file(place.rank), place.slot, nbytes) for place in self._ranks.places(name))

    def split(self, name: str, tensor: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        pieces = self._ranks.blocks(name, tensor)
        return tuple(pieces[place.piece] for place in self._ranks.places(name))

    def layout(self, file: str) -> FileLayout:
        ranks, rank = self._ranks, self._rank_of[file]
        content = self._content()
        if rank.stage == ranks.stages - 1 and (state := ranks.naming.extra_state(_HEAD)):
            content[ranks.part(ranks.virtual - 1)][state] = None  # even where a tied model has no weight there
        return _File({slot: self._pieces[name] for slot, name in ranks.members(rank)}, content, ranks.naming)

    def _content(self) -> dict[str, Any]:
        """What a file holds besides the model."""
        most = Counter(info.dtype for info in self.infos.values()).most_common(1)[0][0]
        args = namespace(self._ranks, self._divisible_by, most, self._string)
        parts = {self._ranks.part(virtual): {} for virtual in range(self._ranks.virtual)}
        return {"args": args, "checkpoint_version": VERSION, "iteration": 0, **parts}

    def finish(self, staged: Path) -> None:
        """Nothing is missing: the files are the checkpoint."""


class _File(FileLayout):
    """One rank's file."""

    def __init__(self, members: Mapping[str, TensorInfo], content: dict[str, Any], naming: Naming) -> None:
        for slot, info in members.items():
            owner, key = _owner(content, slot)
            owner[key] = torch.empty(info.shape, dtype=info.dtype)  # memory that nobody touches
            if state := naming.extra_state(key):
                owner.setdefault(state, None)
        self._skeleton = skeleton(content)
        self.size = self._skeleton.size
        slots = [slot for slot, value in flattened(content, "") if isinstance(value, Tensor)]
        self.slots = {slot: Slot(hole) for slot, hole in zip(slots, self._skeleton.holes, strict=True)}

    def write(self, file: BinaryIO) -> None:
        self._skeleton.write(file)


def _owner(content: dict[str, Any], slot: str) -> tuple[dict[str, Any], str]:
    *path, key = slot.split("/")
    for one in path:
        content = content.setdefault(one, {})
    return content, key


def _check(architecture: Architecture, layout: Layout, replicate_kv: bool) -> None:
    tensor, expert_tensor = layout.tensor, layout.expert_tensor or layout.tensor
    if expert_tensor not in (1, tensor):
        choices = "1" if tensor == 1 else f"1 or {tensor}"
        raise ValueError(
            f"expert_tensor_parallel_size={expert_tensor} must be 1 or tensor_model_parallel_size={tensor} in legacy"
            f" files; choose {choices}"
        )
    check_layout(
        architecture,
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    groups = architecture.num_query_groups
    if replicate_kv and (tensor <= groups or architecture.config.get("multi_latent_attention")):
        raise ValueError(
            f"replicate_kv_heads needs more tensor-parallel ranks than key/value heads:"
            f" tensor_model_parallel_size={tensor}, num_query_groups={groups}"
        )


# Ours that compute what Megatron-LM's own layers of the same names compute.
_ALIKE = ("linear.", "norm.")


def _check_naming(architecture: Architecture, naming: str) -> None:
    others = [swap.layer for swap in architecture.swaps if not swap.layer.startswith(_ALIKE)]
    others += [function for function, _ in architecture.amendments if function != "embedding.without_dropout"]
    if others and naming != "local":
        raise ValueError(
            f"naming={naming!r} is for what Megatron-LM's own layers compute; family {architecture.family.name} has"
            f" {others[0]} instead, so they would load these files and compute something else; choose local"
        )


def _check_mtp(architecture: Architecture, layout: str | None) -> None:
    wanted = architecture.config.get("mtp_num_layers") or 0
    if layout is None:
        return
    found = [row.count(LayerType.mtp) for row in PipelineParallelLayerLayout.parse_str_to_list(layout)]
    if sum(found) != wanted or found[-1] != wanted:
        raise ValueError(
            f"pipeline_model_parallel_layout={layout!r} must have {wanted} layers of multi-token prediction (m), all in"
            " the last stage"
        )


def _vocabulary(vocab_size: int, tensor: int, divisible_by: int, extra: int | None) -> int:
    if extra is None:
        return padded_vocab_size(vocab_size, tensor, divisible_by)
    if (rows := vocab_size + extra) % tensor:
        raise ValueError(
            f"extra_vocab_size={extra} makes {rows} rows, which tensor_model_parallel_size={tensor} does not divide;"
            f" choose {extra + -rows % tensor}"
        )
    return rows


# ------------------------------------------------------------------------------------------------------------- reading


class LegacySource(MegatronSource):
    """The weights in one iteration's directory.

    Args:
        directory: which holds the mp_rank directories.
        config_folder: which holds config.json.
        model: what that describes.
        trust_pickle: unpickle files fully where that is needed. A pickle can run any code.

    Raises:
        ValueError: a file is missing or damaged, or the checkpoint is not of this model.
    """

    def __init__(self, directory: Path, config_folder: Path, model: WholeModel, *, trust_pickle: bool = False) -> None:
        self.path = self.weights_folder = Path(directory)
        self.config_folder, self.model = Path(config_folder), model
        paths = rank_files(self.path)
        opened = _open_first(paths, trust_pickle)
        known = recognise(list(opened.values()), model)
        by_rank = {rank_of(numbers, known): path for numbers, path in paths.items()}
        pairs = check_grid(self.path, by_rank, known)
        self._files = {rank: opened.get(path) or RankFile(path, trust_pickle) for rank, path in by_rank.items()}
        self._ranks = self._work_out(known, pairs)
        self.infos = self._check_files()
        self.ignored = tuple(sorted({slot for file in self._files.values() for slot in file.ignored}))
        self.kind = f"legacy {self._ranks}, {known.naming.name} naming"

    def _work_out(self, known: Known, pairs: tuple[tuple[int, int], ...]) -> Ranks:
        tensor, architecture = max(t for t, _ in pairs) + 1, self.model.architecture
        rows = known.shape(EMBEDDING)[0] * tensor
        if rows < architecture.vocab_size:
            raise ValueError(
                f"{self.path}: the embedding has {rows} rows; by its config it must have {architecture.vocab_size}"
            )
        qkv = next((name for name in known.tensors if self.model.splits[name].is_qkv), None)
        return Ranks(
            model=self.model,
            naming=known.naming,
            chunks=self._chunks(),
            tensor=tensor,
            expert=max(e for _, e in pairs) + 1,
            expert_tensor=known.expert_tensor(tensor),
            vocabulary=rows,
            replicate_kv=qkv is not None
            and tensor > architecture.num_query_groups
            and known.shape(qkv)[0] == replicated_rows(architecture, tensor),
            pairs=pairs,
        )

    def _chunks(self) -> tuple[Chunk, ...]:
        """The layers of each chunk, counted in the files."""
        stages = max(rank.stage for rank in self._files) + 1
        firsts = [self._files[Rank(0, stage, 0)] for stage in range(stages)]
        virtual = len(firsts[0].parts)
        if odd := next((file for file in firsts if len(file.parts) != virtual), None):
            raise ValueError(f"{odd.path} has {len(odd.parts)} model chunks; {firsts[0].path} has {virtual}")
        counts = [file.layers(part) for part in range(virtual) for file in firsts]
        if sum(counts) != (layers := self.model.architecture.num_layers):
            raise ValueError(f"{self.path} holds {sum(counts)} layers; by its config it must have {layers}")
        return in_order(counts, stages)

    def _check_files(self) -> dict[str, TensorInfo]:
        """Every file holds exactly what it should, in the right shapes and one dtype."""
        dtypes: dict[str, tuple[torch.dtype, RankFile]] = {}
        shapes = {name: self._ranks.shape(name) for name in self.model.claims}
        for rank, file in self._files.items():
            wanted = dict(self._ranks.members(rank))
            if missing := [slot for slot in wanted if slot not in file.tensors]:
                raise ValueError(f"{file.path} has no {some(missing)}, which the model needs")
            if extra := [slot for slot in file.tensors if slot not in wanted]:
                raise ValueError(f"{file.path} has {some(extra)}, which the model has not")
            for slot, name in wanted.items():
                _check_tensor(file, slot, shapes[name], dtypes.setdefault(name, (file.tensors[slot].dtype, file)))
        return {one.name: TensorInfo(dtypes[one.name][0], one.shape) for one in self.model.claims.values()}

    def read(self, name: str) -> Tensor:
        pieces: dict[int, tuple[Tensor, Place]] = {}
        for place in self._ranks.places(name):
            tensor = self._files[place.rank].read(place.slot)
            piece, other = pieces.setdefault(place.piece, (tensor, place))
            if piece is not tensor and not same_bits(piece, tensor):
                self._refuse_copies(name, other, place)
        tensors, places = zip(*(pieces[i] for i in sorted(pieces)), strict=True)
        if self._ranks.replicates(name) and (pair := disagreeing_ranks(tensors, self.model.architecture)):
            self._refuse_copies(name, *(places[i] for i in pair))
        return self._ranks.join(name, tensors)

    def expect(self, name: str) -> None:
        for place in self._ranks.places(name):
            self._files[place.rank].expect(place.slot)

    @property
    def ranks(self) -> Ranks:
        """Its layout, bound to its naming scheme."""
        return self._ranks

    def _refuse_copies(self, name: str, *places: Place) -> NoReturn:
        one, other = (f"{self._files[place.rank].path} ({place.slot})" for place in places)
        raise ValueError(f"copies of {name} differ: in {one} and in {other}")

    def origin(self, name: str) -> str:
        return " + ".join(f"{self._ranks.folder(place.rank)}/{place.slot}" for place in self._ranks.places(name))

    def identity(self) -> Any:
        return file_states(self.path, (str(file.path.relative_to(self.path)) for file in self._files.values()))


def _open_first(paths: Mapping[tuple[int, ...], Path], trusted: bool) -> dict[Path, RankFile]:
    """The first file, and those behind it up to the first with layers: a first stage may have none."""
    opened: dict[Path, RankFile] = {}
    for numbers, path in paths.items():
        if numbers[0] == 0 and not any(file.layers(0) for file in opened.values()):
            opened[path] = RankFile(path, trusted)
    return opened


def _check_tensor(file: RankFile, slot: str, shape: tuple[int, ...], like: tuple[torch.dtype, RankFile]) -> None:
    found, (dtype, other) = file.tensors[slot], like
    if tuple(found.shape) != shape:
        raise ValueError(f"{file.path}: {slot} has shape {tuple(found.shape)}; in this layout it must have {shape}")
    if found.dtype != dtype:
        raise ValueError(f"{file.path}: {slot} is {found.dtype}, but {dtype} in {other.path}")
