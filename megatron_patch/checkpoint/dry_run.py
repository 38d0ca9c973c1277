"""What a conversion would do: tensors, files, bytes, memory and time. Reads and writes no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint.convert import Plan
from megatron_patch.checkpoint.huggingface import parse_size
from megatron_patch.checkpoint.manifest import dtype_name
from megatron_patch.checkpoint.moving import MEMORY
from megatron_patch.checkpoint.opening import Wanted, open_target
from megatron_patch.checkpoint.startup import without_garbage_collection

_PROCESS = 300 * 2**20
"""Anonymous memory of a process that has imported everything and does nothing."""


@dataclass(frozen=True)
class Row:
    """One internal tensor."""

    name: str
    source: str
    """Where it is read from."""

    rule: str
    """The weight rule that makes it from Hugging Face tensors."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    """Bytes it takes in the target, copies included."""

    parts: tuple[tuple[str, str, int], ...]
    """File, name in it and bytes, of each part."""


@dataclass(frozen=True)
class DryRun:
    """What a conversion would do."""

    source: str
    source_kind: str
    target_kind: str
    family: str
    parameters: int
    read_bytes: int
    write_bytes: int
    files: Mapping[str, int]
    """File of the target -> bytes of tensors."""

    ranks: Mapping[str, int]
    """Rank of the layout -> bytes that it will load."""

    largest: str
    """The largest tensor."""

    peak_bytes: int
    """Anonymous memory of one process, at most."""

    seconds: float
    """At the disk speed that was given."""

    obstacle: str
    """Why it could not be done for real, if so."""


def dry_run(plan: Plan, disk_speed: str) -> DryRun:
    """Sum up a plan; `disk_speed` is in bytes a second, such as "500MB"."""
    with without_garbage_collection():
        ranks = _ranks(plan)
    infos = plan.source.infos
    read, largest = sum(info.nbytes for info in infos.values()), max(infos, key=lambda name: infos[name].nbytes)
    model = plan.source.model
    return DryRun(
        source=str(plan.source.path),
        source_kind=plan.source.kind,
        target_kind=plan.target.kind,
        family=model.architecture.family.name,
        parameters=model.parameters,
        read_bytes=read,
        write_bytes=plan.nbytes,
        files=plan.target.payload,
        ranks=ranks,
        largest=largest,
        # A tensor that is merged of parts and cast is twice in memory; smaller ones share what is allowed.
        peak_bytes=_PROCESS + max(MEMORY, 2 * infos[largest].nbytes),
        seconds=(read + plan.nbytes) / parse_size(disk_speed),
        obstacle=model.architecture.plan_only,
    )


def _ranks(plan: Plan) -> dict[str, int]:
    """Bytes of each rank of the wanted layout: what a legacy checkpoint holds for it."""
    if plan.wanted.format == "legacy":
        files = plan.target.payload
    elif plan.wanted.layout == Wanted().layout:
        return {}
    else:
        files = open_target(plan.source, replace(plan.wanted, format="legacy", max_shard_size=None)).payload
    return {Path(file).parent.name: nbytes for file, nbytes in files.items()}


def rows(plan: Plan) -> Iterator[Row]:
    """Every internal tensor, in order."""
    for name, info in plan.target.infos.items():
        parts = tuple(plan.target.parts(name))
        rule = type(plan.source.model.claims[name].rule).__name__
        nbytes = sum(part.nbytes for part in parts)
        yield Row(name, plan.source.origin(name), rule, dtype_name(info.dtype), info.shape, nbytes, parts)


def as_json(summary: DryRun, plan: Plan) -> dict[str, Any]:
    """The whole plan."""
    return {**vars(summary), "tensors": [vars(row) for row in rows(plan)]}
