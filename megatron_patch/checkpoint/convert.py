"""Hugging Face directory <-> Megatron checkpoint, tensor by tensor.

    convert("path/to/hf", "path/to/megatron")        and back:        convert("path/to/megatron", "path/to/hf")

The family's weight rules say which tensors become which; everything is checked (names, shapes, files, config fields)
before anything is written, and the target appears whole or not at all. Weights pass through memory a few tensors at a
time. Dtypes and file names survive the round trip. It knows no arguments and no training.
"""

from __future__ import annotations

import json
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint.huggingface import (
    DEFAULT_SHARD_SIZE,
    ORIGIN,
    FilePlan,
    HFReader,
    HFWriter,
    TensorInfo,
    load_origin,
    plan_files,
    save_origin,
)
from megatron_patch.checkpoint.megatron import Blueprint, Reader, Writer, blueprint
from megatron_patch.family import Architecture
from megatron_patch.model import build_model, transformer_config
from megatron_patch.models import family_for
from megatron_patch.weights import Claim, claim

Progress = Callable[[str, int, int], None]
"""Called after each tensor with its name, the bytes done and the bytes in all."""

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    source: str
    target: str
    family: str
    tensors: int
    """Hugging Face tensors read or written."""

    parameters: int
    nbytes: int
    """Bytes of Hugging Face weights read or written."""

    dtypes: Mapping[str, int]
    """Dtype of the result -> number of tensors."""

    ignored: tuple[str, ...]
    """Tensors of the source that are no parameters and were left out."""

    seconds: float


def convert(
    source: str | Path,
    target: str | Path,
    *,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert a checkpoint; which way is seen from the source.

    Args:
        source: a Hugging Face directory, or a Megatron checkpoint: its root, or the directory of one iteration.
        target: a directory that does not exist yet (or is empty).
        overwrite: replace a target that is a checkpoint.
        dtype: cast every tensor; by default each keeps its own.
        max_shard_size: size of the Hugging Face files to write, as in "5GB"; by default the original files' names and
            contents, or 5GB where there is no original.
        progress: told of each tensor.

    Raises:
        ValueError: anything about source or target that cannot be converted faithfully; nothing is written then.
    """
    source, target, start = Path(source), Path(target), time.perf_counter()
    _check_target(source, target, overwrite)
    if layout.is_megatron(source):
        job: _Job = _ToHuggingFace(source, dtype, max_shard_size)
    elif layout.is_huggingface(source):
        if max_shard_size:
            raise ValueError(
                f"max_shard_size={max_shard_size} is for writing Hugging Face files; {source} is one already"
            )
        job = _ToMegatron(source, dtype)
    else:
        kinds = f"a Hugging Face directory ({layout.CONFIG}) nor a Megatron checkpoint ({layout.TRACKER})"
        raise ValueError(f"{source} is neither {kinds}")
    with layout.staging(target, overwrite) as staged:
        job.write(staged, progress or (lambda name, done, total: None))
    infos = job.infos
    return Report(
        str(source),
        str(target),
        job.model.architecture.family.name,
        len(infos),
        sum(torch.Size(shape).numel() for shape in job.model.blueprint.shapes.values()),
        sum(info.nbytes for info in infos.values()),
        Counter(str(info.dtype).removeprefix("torch.") for info in infos.values()),
        job.ignored,
        time.perf_counter() - start,
    )


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    layout.refuse_existing(target, overwrite)
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(f"source {source} and target {target} must not contain one another")
    if not target.exists() or not any(target.iterdir()):
        return
    if not layout.is_megatron(target) and not layout.is_huggingface(target):
        raise ValueError(f"{target} is not empty and holds no checkpoint: --overwrite replaces checkpoints only")
    if iterations := sorted(path.name for path in target.glob("iter_*")):
        raise ValueError(f"{target} holds a training run ({iterations[-1]}): --overwrite does not replace those")


# ------------------------------------------------------------------------------------------- what both directions need


@dataclass(frozen=True)
class WholeModel:
    """A model as a conversion sees it: no values, one rank, no padding."""

    architecture: Architecture
    blueprint: Blueprint
    claims: tuple[Claim, ...]

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape, of every tensor that a parameter is made of."""
        pairs = ((one.hf, one.hf_shapes(self.architecture)) for one in self.claims)
        return {name: shape for names, shapes in pairs for name, shape in zip(names, shapes, strict=True)}

    def repeats_embedding(self, name: str) -> bool:
        """Whether a Hugging Face tensor can only be a copy of the embedding."""
        return self.architecture.tied and name in self.architecture.family.tied_weights

    @property
    def hf_embedding(self) -> str:
        """Hugging Face name of the embedding."""
        return next(one.hf[0] for one in self.claims if one.name == _EMBEDDING)

    def key_dtypes(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
        """Checkpoint key -> the narrowest dtype that holds all its Hugging Face tensors exactly."""
        by_key: dict[str, list[torch.dtype]] = {}
        for one in self.claims:
            by_key.setdefault(self.blueprint.key(one.name), []).extend(dtypes[name] for name in one.hf)
        return {key: reduce(torch.promote_types, found) for key, found in by_key.items()}


def describe(config: Mapping[str, Any], content: dict[str, Any] | None = None) -> WholeModel:
    """The model of a Hugging Face config, on the meta device; `content` is what a Megatron checkpoint says of itself.

    Raises:
        ValueError: no family knows this config.
    """
    architecture = family_for(config).describe(config)
    with world_of_one(), torch.device("meta"):
        model = build_model(
            architecture,
            transformer_config(architecture, use_cpu_initialization=True),
            make_vocab_size_divisible_by=1,
        )
        plan = blueprint(model, content)
    return WholeModel(architecture, plan, claim(architecture.family.weights, plan.shapes))


@contextmanager
def world_of_one() -> Iterator[None]:
    """The parallel state that megatron-core wants before it builds a model; a conversion talks to nobody."""
    if parallel_state.is_initialized() or dist.is_initialized():
        raise ValueError("a conversion runs in one process, outside of torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class _Job(ABC):
    """One direction: the constructor checks everything, `write` then moves the weights."""

    model: WholeModel
    infos: dict[str, TensorInfo]
    """The Hugging Face tensors of the result, or of the source."""

    ignored: tuple[str, ...] = ()

    @abstractmethod
    def write(self, staged: Path, progress: Progress) -> None:
        """Fill the staged directory."""


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and (cast.isinf() & tensor.isfinite()).any():
        raise ValueError(f"{name} has values that float16 cannot hold; choose bfloat16 or float32")
    return cast


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


# ------------------------------------------------------------------------------------------ Hugging Face -> Megatron


class _ToMegatron(_Job):
    def __init__(self, source: Path, dtype: torch.dtype | None) -> None:
        self._source = source
        self.model = describe(layout.read_config(source))
        self._reader = HFReader(source)
        self.infos = self._reader.infos
        self.ignored = self._check_tensors()
        originals = {name: info.dtype for name, info in self.infos.items()}
        self._dtypes = {key: dtype or found for key, found in self.model.key_dtypes(originals).items()}

    def _check_tensors(self) -> tuple[str, ...]:
        """Every tensor has its rule and its shape; returns those that are no parameters."""
        wanted, family = self.model.hf_shapes, self.model.architecture.family
        if missing := [name for name in wanted if name not in self.infos]:
            raise ValueError(f"{self._source} has no tensor {_some(missing)}, which family {family.name} needs")
        for name, shape in wanted.items():
            if (found := self.infos[name].shape) != shape:
                raise ValueError(f"{self._source}: {name} has shape {found}; by its config it must have {shape}")
        others = [name for name in self.infos if name not in wanted]
        repeats = [name for name in others if self.model.repeats_embedding(name)]
        ignored = [name for name in others if any(re.fullmatch(one, name) for one in family.ignored_weights)]
        if extra := [name for name in others if name not in repeats and name not in ignored]:
            raise ValueError(f"{self._source} has tensors that family {family.name} does not know: {_some(extra)}")
        self._check_repeats(repeats)
        return tuple(ignored)

    def _check_repeats(self, repeats: list[str]) -> None:
        for name in repeats:
            if not torch.equal(self._reader.read(name), self._reader.read(self.model.hf_embedding)):
                raise ValueError(
                    f"{self._source}: tie_word_embeddings is set, but {name} differs from {self.model.hf_embedding}"
                )

    def write(self, staged: Path, progress: Progress) -> None:
        companions, weights = layout.huggingface_directory(staged), layout.iteration_directory(staged, None)
        layout.copy_side_files(self._source, companions)
        save_origin(companions, self._reader.plan.without(self.ignored), self.infos)
        weights.mkdir()
        writer = Writer(weights, self.model.blueprint)
        done, total = 0, sum(self.infos[name].nbytes for one in self.model.claims for name in one.hf)
        for one in self.model.claims:
            dtype = self._dtypes[self.model.blueprint.key(one.name)]
            parts = [_cast(name, self._reader.read(name), dtype) for name in one.hf]
            writer.write(one.name, one.rule.to_internal(parts, self.model.architecture))
            done += sum(self.infos[name].nbytes for name in one.hf)
            progress(one.name, done, total)
        writer.finish()
        layout.write_tracker(staged, None)


# ------------------------------------------------------------------------------------------ Megatron -> Hugging Face


class _ToHuggingFace(_Job):
    def __init__(self, source: Path, dtype: torch.dtype | None, max_shard_size: str | None) -> None:
        root, weights, _ = layout.locate(source)
        self._companions = layout.huggingface_directory(root)
        self._reader = Reader(weights)
        self.model = describe(layout.read_config(root), self._reader.content())
        self._reader.check(self.model.blueprint)
        self._plan, self.infos = self._plan_files(dtype, max_shard_size)

    def _plan_files(
        self, dtype: torch.dtype | None, max_shard_size: str | None
    ) -> tuple[FilePlan, dict[str, TensorInfo]]:
        """Files and dtypes: those of the model that was converted once, as far as they still fit."""
        shapes, stored = self.model.hf_shapes, self._stored_dtypes()
        origin, originals = load_origin(self._companions) or (None, {})
        repeats = [name for name in originals if self.model.repeats_embedding(name)]
        shapes |= {name: shapes[self.model.hf_embedding] for name in repeats}
        stored |= {name: stored[self.model.hf_embedding] for name in repeats}
        if set(originals) != set(shapes):
            return self._fresh_plan(shapes, stored, dtype, max_shard_size)
        unchanged = self._unchanged(originals, stored)
        dtypes = {name: dtype or (originals[name] if name in unchanged else stored[name]) for name in shapes}
        infos = {name: TensorInfo(dtypes[name], shapes[name]) for name in originals}
        return (plan_files(infos, max_shard_size) if max_shard_size else origin), infos

    def _fresh_plan(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        stored: Mapping[str, torch.dtype],
        dtype: torch.dtype | None,
        max_shard_size: str | None,
    ) -> tuple[FilePlan, dict[str, TensorInfo]]:
        infos = {name: TensorInfo(dtype or stored[name], shape) for name, shape in shapes.items()}
        return plan_files(infos, max_shard_size or DEFAULT_SHARD_SIZE), infos

    def _stored_dtypes(self) -> dict[str, torch.dtype]:
        key = self.model.blueprint.key
        return {name: self._reader.dtype(key(one.name)) for one in self.model.claims for name in one.hf}

    def _unchanged(self, originals: Mapping[str, torch.dtype], stored: Mapping[str, torch.dtype]) -> set[str]:
        """Tensors stored as the conversion stored them, which may have been wider than they were."""
        converted, key = self.model.key_dtypes(originals), self.model.blueprint.key
        names = {name for one in self.model.claims for name in one.hf if stored[name] == converted[key(one.name)]}
        repeats = {name for name in originals if self.model.repeats_embedding(name)}
        return names | (repeats if self.model.hf_embedding in names else set())

    def write(self, staged: Path, progress: Progress) -> None:
        layout.copy_side_files(self._companions, staged)
        (staged / ORIGIN).unlink(missing_ok=True)
        _state_dtype(staged / layout.CONFIG, {info.dtype for info in self.infos.values()})
        done, total = 0, sum(info.nbytes for info in self.infos.values())
        with HFWriter(staged, self._plan, self.infos) as writer:
            for one in self.model.claims:
                for name, tensor in self._tensors(one):
                    writer.write(name, _cast(name, tensor, self.infos[name].dtype))
                    done += self.infos[name].nbytes
                progress(one.name, done, total)

    def _tensors(self, one: Claim) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors of one internal tensor, and the embedding's copies."""
        parts = one.rule.to_hf(self._reader.read(self.model.blueprint, one.name), self.model.architecture)
        yield from zip(one.hf, parts, strict=True)
        if one.name == _EMBEDDING:
            yield from ((name, parts[0]) for name in self.infos if self.model.repeats_embedding(name))


def _state_dtype(config: Path, dtypes: set[torch.dtype]) -> None:
    """Let config.json name the dtype of the weights, where it names another: transformers loads them in that one."""
    values = layout.read_json(config)
    if len(dtypes) != 1:
        return
    name = str(next(iter(dtypes))).removeprefix("torch.")
    fields = [key for key in ("dtype", "torch_dtype") if values.get(key) not in (None, name)]
    if fields:
        config.write_text(json.dumps({**values, **dict.fromkeys(fields, name)}, indent=2, ensure_ascii=False) + "\n")
