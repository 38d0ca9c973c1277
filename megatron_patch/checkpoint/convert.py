"""Any checkpoint to any other, tensor by tensor: Hugging Face, Megatron torch_dist, Megatron legacy, any layout.

    convert("path/to/hf", "path/to/megatron")        and back:        convert("path/to/megatron", "path/to/hf")

A `Source` reads internal tensors, a `Target` says which bytes of which file each becomes; this engine moves them, a few
at a time, in threads and over processes. Everything (names, shapes, files, config fields) is checked before anything is
written, and the target appears whole or not at all. It knows no arguments and no training.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint.crew import Crew, assembled
from megatron_patch.checkpoint.formats import Source, Target
from megatron_patch.checkpoint.hf_format import HFSource, HFTarget
from megatron_patch.checkpoint.huggingface import ORIGIN, save_origin
from megatron_patch.checkpoint.manifest import (
    Entry,
    converted,
    dtype_name,
    journaled,
    read_manifest,
    remove_journals,
    versions,
    write_manifest,
)
from megatron_patch.checkpoint.moving import Mover, Progress
from megatron_patch.checkpoint.opening import Wanted, open_source, open_target
from megatron_patch.checkpoint.startup import without_garbage_collection


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    source: str
    target: str
    source_kind: str
    target_kind: str
    family: str
    tensors: int
    """Hugging Face tensors that the model has."""

    parameters: int
    nbytes: int
    """Bytes of tensors in the target's files."""

    dtypes: Mapping[str, int]
    """Dtype of the result -> number of internal tensors."""

    casts: Mapping[str, int]
    """Such as "float32 -> bfloat16" -> number of internal tensors that were cast so because it was asked for."""

    nonfinite: Mapping[str, int]
    """Tensor -> how many of its values are NaN or infinite."""

    ignored: tuple[str, ...]
    """Tensors of the source that are no parameters and were left out."""

    resumed: int
    """Tensors that an earlier, killed run had done."""

    not_needed: str
    """The layout that was asked for, where the target's format has none."""

    seconds: float


@dataclass(frozen=True)
class Plan:
    """One conversion, checked, before anything is read or written."""

    source: Source
    target: Target
    wanted: Wanted

    @property
    def nbytes(self) -> int:
        """Bytes of tensors in the target."""
        return sum(self.target.payload.values())

    @property
    def unused_layout(self) -> str:
        """The layout that was asked for, where the target's format has none and loads at any."""
        has_layout = self.wanted.format == "legacy" or self.wanted.layout == Wanted().layout
        return "" if has_layout else str(self.wanted.layout)

    def summary(self) -> dict[str, Any]:
        """What identifies it, as JSON: for the manifest, and to know on --resume that it is the same."""
        return {
            "source": str(self.source.path.resolve()),
            "source_kind": self.source.kind,
            "source_files": self.source.identity(),
            "config": layout.read_config(self.source.config_folder),
            "target_kind": self.target.kind,
            "family": self.source.model.architecture.family.name,
            "options": {one.name: str(getattr(self.wanted, one.name)) for one in fields(self.wanted)},
            "versions": versions(),
        }


def plan(
    source: str | Path,
    wanted: Wanted | None = None,
    *,
    hf_config: str | Path | None = None,
    trust_pickle: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Check a conversion and lay out its result; see `convert`. For a dry run the source needs no weights."""
    with without_garbage_collection():
        opened = open_source(source, hf_config=hf_config, trust_pickle=trust_pickle, weightless=dry_run)
        return _laid_out(opened, wanted or Wanted())


def _laid_out(source: Source, wanted: Wanted) -> Plan:
    return Plan(source, open_target(source, wanted), wanted)


def convert(
    source: str | Path | Source,
    target: str | Path,
    wanted: Wanted | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    hf_config: str | Path | None = None,
    trust_pickle: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert a checkpoint; what the source is, is seen. Under torchrun, all its processes share the work.

    Args:
        source: a Hugging Face directory, or a Megatron checkpoint: its root, or the directory of one iteration. Or one
            that is opened already.
        target: a directory that does not exist yet (or is empty).
        wanted: the format, layout and dtype to write; by default torch_dist from Hugging Face, else Hugging Face.
        overwrite: replace a target that is a checkpoint.
        resume: go on with a conversion that was killed.
        hf_config: directory with the config.json of a Megatron checkpoint that does not carry it.
        trust_pickle: read legacy checkpoints that need full unpickling, which can run any code.
        progress: told of each tensor.

    Raises:
        ValueError: anything about source or target that cannot be converted faithfully; nothing is left then.
        OSError: the disk is full or refuses; what was done is kept for `resume`.
    """
    path, target, start = source.path if isinstance(source, Source) else Path(source), Path(target), time.perf_counter()
    _check_target(path, target, overwrite or resume)
    if isinstance(source, Source):
        planned = _laid_out(source, wanted or Wanted())
    else:
        planned = plan(source, wanted, hf_config=hf_config, trust_pickle=trust_pickle)
    planned.source.check_convertible()
    summary = planned.summary()
    with assembled() as crew:
        if resume and (done := _finished(target, planned, summary)):
            crew.wait()
            if crew.rank == 0:
                layout.clear_leftovers(target)
                layout.drop_partial(target)
            return _report(planned, target, done, len(done), start)
        _check_space(target, planned)
        entries, resumed = _run(planned, target, summary, crew, overwrite, resume, progress)
    return _report(planned, target, entries, resumed, start)


def _run(
    planned: Plan,
    target: Path,
    summary: Mapping[str, Any],
    crew: Crew,
    overwrite: bool,
    resume: bool,
    progress: Progress | None,
) -> tuple[dict[str, Entry], int]:
    """Do it, as one of a crew; the first process prepares and completes what the others share."""
    if crew.rank:
        crew.wait()
        staged = layout.partial_of(target)
        Mover(planned.source, planned.target, staged, crew, progress).run(_done(staged))
        crew.wait()
        crew.wait()
        return {}, 0
    with layout.resumable(target, summary, overwrite=overwrite, resume=resume) as staged:
        for folder in {(staged / file).parent for file in planned.target.payload}:
            folder.mkdir(parents=True, exist_ok=True)
        before = _done(staged)
        crew.wait()
        Mover(planned.source, planned.target, staged, crew, progress).run(before)
        crew.wait()
        entries = _done(staged)
        _complete(planned, staged, summary, entries)
    crew.wait()
    return entries, len(before)


def _complete(planned: Plan, staged: Path, summary: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Everything but tensors; what makes it a checkpoint comes last."""
    parts = {name: {part.file for part in planned.target.parts(name)} for name in planned.target.infos}
    assert {name: set(entry.files) for name, entry in entries.items()} == parts, "some tensors were not converted"
    source, is_hf = planned.source, isinstance(planned.target, HFTarget)
    companions = staged if is_hf else layout.huggingface_directory(staged)
    layout.copy_side_files(source.config_folder, companions)
    if is_hf:
        (staged / ORIGIN).unlink(missing_ok=True)
    elif isinstance(source, HFSource):
        save_origin(companions, source.view().plan, source.hf_infos)
    planned.target.finish(staged)
    write_manifest(_weights(staged), summary, [entries[name] for name in parts])
    remove_journals(staged)
    if not is_hf:
        layout.write_tracker(staged, None)


def _done(staged: Path) -> dict[str, Entry]:
    """Internal name -> what has been done of it: by the journals, or by the manifest, which is there once all is."""
    return converted(_weights(staged)) or journaled(staged)


def _weights(target: Path) -> Path:
    """Where the weights of a target lie."""
    release = layout.iteration_directory(target, None)
    return release if release.is_dir() else target


# ------------------------------------------------------------------------------------------------- checks and reports


def _check_target(source: Path, target: Path, may_exist: bool) -> None:
    layout.refuse_existing(target, may_exist)
    if obstacle := next((one for one in target.absolute().parents if one.exists() and not one.is_dir()), None):
        raise ValueError(f"{target} cannot be made: {obstacle} is a file")
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(f"source {source} and target {target} must not contain one another")
    if not target.exists() or not any(target.iterdir()):
        return
    if not layout.is_megatron(target) and not layout.is_huggingface(target):
        raise ValueError(f"{target} is not empty and holds no checkpoint: --overwrite replaces checkpoints only")
    if iterations := sorted(path.name for path in target.glob("iter_*")):
        raise ValueError(f"{target} holds a training run ({iterations[-1]}): --overwrite does not replace those")


def _finished(target: Path, planned: Plan, summary: Mapping[str, Any]) -> dict[str, Entry]:
    """The tensors of a target that this very conversion has made already."""
    manifest = read_manifest(_weights(target)) if target.is_dir() else None
    is_whole = all((target / file).is_file() for file in planned.target.payload)
    return converted(_weights(target)) if manifest and manifest["plan"] == summary and is_whole else {}


def _check_space(target: Path, planned: Plan) -> None:
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    staged = layout.partial_of(target)
    there = sum(file.stat().st_blocks * 512 for file in staged.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free + there
    if planned.nbytes > free:
        raise ValueError(f"{target} needs {planned.nbytes / 1e6:,.1f} MB; {folder} has {free / 1e6:,.1f} MB free")


def _report(planned: Plan, target: Path, entries: Mapping[str, Entry], resumed: int, start: float) -> Report:
    source, infos = planned.source, planned.target.infos
    pairs = [(dtype_name(source.infos[name].dtype), dtype_name(info.dtype)) for name, info in infos.items()]
    asked = planned.wanted.dtype is not None
    return Report(
        source=str(source.path),
        target=str(target),
        source_kind=source.kind,
        target_kind=planned.target.kind,
        family=source.model.architecture.family.name,
        tensors=len(source.view().dtypes),
        parameters=source.model.parameters,
        nbytes=planned.nbytes,
        dtypes=Counter(after for _, after in pairs),
        casts=Counter(f"{before} -> {after}" for before, after in pairs if asked and before != after),
        nonfinite={name: entry.nonfinite for name, entry in entries.items() if entry.nonfinite},
        ignored=source.ignored,
        resumed=resumed,
        not_needed=planned.unused_layout,
        seconds=time.perf_counter() - start,
    )
