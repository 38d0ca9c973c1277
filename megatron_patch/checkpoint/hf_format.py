"""Hugging Face directories as a `Source` and a `Target` of a conversion.

The family's rules turn the directory's tensors into internal ones and back; names, shapes and the copies that tied
models may carry are checked before anything is read. It knows no megatron checkpoint formats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_patch.checkpoint import directory
from megatron_patch.checkpoint.archive import Hole, pwrite
from megatron_patch.checkpoint.formats import (
    FileLayout,
    Part,
    Slot,
    Source,
    Target,
    View,
    cast,
    count_files,
    file_states,
    some,
)
from megatron_patch.checkpoint.huggingface import (
    DEFAULT_SHARD_SIZE,
    HFReader,
    TensorInfo,
    header,
    plan_files,
    write_index,
)
from megatron_patch.checkpoint.manifest import dtype_name
from megatron_patch.checkpoint.sharding import same_bits
from megatron_patch.checkpoint.whole import WholeModel


def _promoted(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)


# ------------------------------------------------------------------------------------------------------------- reading


class HFSource(Source):
    """The weights of a Hugging Face directory."""

    def __init__(self, path: Path, model: WholeModel) -> None:
        self.path, self.config_folder, self.weights_folder = path, path, path
        self._reader = HFReader(path)
        self._found = self._reader.infos
        self.model = model = model.as_named(self._found)
        self.ignored = self._check_tensors()
        self.kind = f"huggingface, {count_files(self._reader.plan.files)}"
        self.infos = {
            one.name: TensorInfo(_promoted(self._found[name].dtype for name in one.hf), one.shape)
            for one in model.claims.values()
        }

    def _check_tensors(self) -> tuple[str, ...]:
        """Every tensor has its rule and its shape; returns those that are no parameters."""
        wanted, family = self.model.hf_shapes, self.model.architecture.family
        if missing := [name for name in wanted if name not in self._found]:
            raise ValueError(f"{self.path} has no tensor {some(missing)}, which family {family.name} needs")
        for name, shape in wanted.items():
            if (found := self._found[name].shape) != shape:
                raise ValueError(f"{self.path}: {name} has shape {found}; by its config it must have {shape}")
        others = [name for name in self._found if name not in wanted]
        self._repeats = {name: one for name, one in self.model.repeats.items() if name in others}
        whole = {name: self.model.left_out + name for name in others}
        ignored = [name for name in others if any(re.fullmatch(one, whole[name]) for one in family.ignored_weights)]
        if extra := [name for name in others if name not in self._repeats and name not in ignored]:
            raise ValueError(f"{self.path} has tensors that family {family.name} does not know: {some(extra)}")
        return tuple(ignored)

    def read(self, name: str) -> Tensor:
        one, dtype = self.model.claims[name], self.infos[name].dtype
        self._check_repeats(one.hf)
        parts = [self._reader.read(part).to(dtype) for part in one.hf]
        return one.rule.to_internal(parts, self.model.architecture)

    def expect(self, name: str) -> None:
        for part in self.model.claims[name].hf:
            self._reader.expect(part)

    def _check_repeats(self, names: tuple[str, ...]) -> None:
        for copy, original in self._repeats.items():
            if original in names and not same_bits(self._reader.read(copy), self._reader.read(original)):
                raise ValueError(f"{self.path}: by its config {copy} repeats {original}, but it differs")

    def origin(self, name: str) -> str:
        return " + ".join(self.model.claims[name].hf)

    def identity(self) -> Any:
        return file_states(self.path, self._reader.files)

    @property
    def hf_infos(self) -> Mapping[str, TensorInfo]:
        """Hugging Face name -> dtype and shape, of all its tensors."""
        return self._found

    def view(self) -> View:
        plan = self._reader.plan.without(self.ignored)
        return View(plan, {name: self._found[name].dtype for name in plan.names})


class PlannedSource(Source):
    """A Hugging Face directory of which only config.json is looked at: enough for a plan."""

    def __init__(self, path: Path, model: WholeModel, config: Mapping[str, Any]) -> None:
        self.path = self.config_folder = self.weights_folder = path
        self.model, self.kind = model, "huggingface, by its config.json alone"
        name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        self._dtype = getattr(torch, str(name).removeprefix("torch."))
        self.infos = {one.name: TensorInfo(self._dtype, one.shape) for one in model.claims.values()}

    def read(self, name: str) -> Tensor:
        raise ValueError(f"{self.path} was opened for a plan: its weights are not read")

    def expect(self, name: str) -> None:
        pass

    def origin(self, name: str) -> str:
        return " + ".join(self.model.claims[name].hf)

    def identity(self) -> Any:
        return None

    def view(self) -> View:
        return View(None, dict.fromkeys(self.model.hf_shapes, self._dtype))


# ------------------------------------------------------------------------------------------------------------- writing


class HFTarget(Target):
    """A Hugging Face directory to write.

    Args:
        model: what it is.
        view: the files and dtypes of the model that was converted once, as far as known.
        dtype: of every tensor, instead.
        max_shard_size: size of the files, instead of the original ones (or 5GB where there are none).
    """

    def __init__(self, model: WholeModel, view: View, dtype: torch.dtype | None, max_shard_size: str | None) -> None:
        self._model, shapes = model, model.hf_shapes
        self._repeats = {name: one for name, one in model.repeats.items() if name in view.dtypes}
        dtypes = {name: dtype or view.dtypes[name] for name in view.dtypes}
        self.hf_infos = {
            name: TensorInfo(dtype, shapes[self._repeats.get(name, name)]) for name, dtype in dtypes.items()
        }
        fresh = max_shard_size or view.plan is None
        self._plan = plan_files(self.hf_infos, max_shard_size or DEFAULT_SHARD_SIZE) if fresh else view.plan
        self._file_of = {name: file for file, names in self._plan.files.items() for name in names}
        self.kind = f"huggingface, {count_files(self._plan.files)}"
        self.infos = {
            one.name: TensorInfo(_promoted(dtypes[name] for name in one.hf), one.shape) for one in model.claims.values()
        }
        self.payload = {
            file: sum(self.hf_infos[name].nbytes for name in names) for file, names in self._plan.files.items()
        }

    def _names(self, name: str) -> tuple[str, ...]:
        own = self._model.claims[name].hf
        return own + tuple(copy for copy, original in self._repeats.items() if original in own)

    def parts(self, name: str) -> tuple[Part, ...]:
        return tuple(Part(self._file_of[one], one, self.hf_infos[one].nbytes) for one in self._names(name))

    def split(self, name: str, tensor: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        one = self._model.claims[name]
        parts = dict(zip(one.hf, one.rule.to_hf(tensor, self._model.architecture), strict=True))
        return tuple(
            (cast(part, parts[self._repeats.get(part, part)], self.hf_infos[part].dtype),) for part in self._names(name)
        )

    def layout(self, file: str) -> FileLayout:
        return _Safetensors(self._plan.files[file], self.hf_infos, self._plan.metadata.get(file))

    def finish(self, staged: Path) -> None:
        write_index(staged, self._plan, self.hf_infos)
        _state_dtype(staged / directory.CONFIG, {info.dtype for info in self.hf_infos.values()})


class _Safetensors(FileLayout):
    def __init__(
        self, names: tuple[str, ...], infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None
    ) -> None:
        start = header(names, infos, metadata)
        self._content, self.size = start.content, start.size
        self.slots = {name: Slot(Hole(offset, infos[name].nbytes, ())) for name, offset in start.offsets.items()}

    def write(self, file: BinaryIO) -> None:
        pwrite(file.fileno(), self._content, 0)


def _state_dtype(config: Path, dtypes: set[torch.dtype]) -> None:
    """Let config.json name the dtype of the weights, where it names another: transformers loads them in that one."""
    values = directory.read_json(config)
    if len(dtypes) != 1:
        return
    name = dtype_name(next(iter(dtypes)))
    fields = [key for key in ("dtype", "torch_dtype") if values.get(key) not in (None, name)]
    if fields:
        config.write_text(json.dumps({**values, **dict.fromkeys(fields, name)}, indent=2, ensure_ascii=False) + "\n")
