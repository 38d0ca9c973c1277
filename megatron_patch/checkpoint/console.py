"""How conversions, plans and verifications look on a console: reports as tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_patch.checkpoint.arguments import ConvertArgs
from megatron_patch.checkpoint.convert import Plan, Report
from megatron_patch.checkpoint.directory import write_text
from megatron_patch.checkpoint.dry_run import as_json, dry_run, rows
from megatron_patch.checkpoint.verify import VerifyReport

_PROBLEMS = 20
"""Differences, and tensors with values that are no numbers, that are printed."""

_ROWS = 12
"""Tensors of a plan that are printed; all of them are in the JSON file."""


def show_conversion(report: Report) -> None:
    """Print what a conversion did."""
    table = Table("convert", f"{report.source} -> {report.target}")
    table.add_row("formats", f"{report.source_kind} -> {report.target_kind}")
    table.add_row("family", report.family)
    table.add_row("parameters", f"{report.parameters:,} in {report.tensors} Hugging Face tensors")
    table.add_row("dtype", _count(report.dtypes))
    if report.casts:
        table.add_row("cast", _count(report.casts) + ", as asked for")
    if report.ignored:
        table.add_row("left out", f"{len(report.ignored)} that are no parameters, such as {report.ignored[0]}")
    for name, count in islice(report.nonfinite.items(), _PROBLEMS):
        table.add_row("[red]NaN or infinite", f"{count} values of {name}")
    if (left := len(report.nonfinite) - _PROBLEMS) > 0:
        table.add_row("[red]NaN or infinite", f"and values of {left:,} more tensors; all of them: --json FILE")
    if report.resumed:
        table.add_row("resumed", f"{report.resumed} tensors were done already")
    rate = report.nbytes / max(report.seconds, 1e-9) / 1e6
    table.add_row("size, time", f"{report.nbytes / 1e6:,.1f} MB in {report.seconds:.1f} s ({rate:,.1f} MB/s)")
    if report.not_needed:
        table.add_row("not needed", f"{report.not_needed}: {report.target_kind.split(',')[0]} has no layout")
    Console().print(table)


def show_plan(plan: Plan, args: ConvertArgs) -> None:
    """Print what a conversion would do; write all of it where that was asked for."""
    summary, console = dry_run(plan, args.disk_speed), Console()
    table = Table("dry run", f"{summary.source} -> {args.target}")
    table.add_row("formats", f"{summary.source_kind} -> {summary.target_kind}")
    table.add_row("family", summary.family + (f" (not for real: {summary.obstacle})" if summary.obstacle else ""))
    table.add_row("parameters", f"{summary.parameters:,} in {len(plan.target.infos):,} tensors")
    table.add_row("read, write", f"{summary.read_bytes / 1e9:,.1f} GB, {summary.write_bytes / 1e9:,.1f} GB")
    table.add_row("files", _span("file", summary.files))
    if summary.ranks:
        table.add_row("each rank", _span("rank", summary.ranks))
    table.add_row(
        "peak memory", f"{summary.peak_bytes / 2**20:,.0f} MiB a process, at most (largest: {summary.largest})"
    )
    table.add_row("time", f"{_duration(summary.seconds)} at {args.disk_speed}/s")
    console.print(table)
    for row in islice(rows(plan), _ROWS):
        more = f" and {len(row.parts) - 1} more" if len(row.parts) > 1 else ""
        print(f"{row.name}  {row.dtype} {list(row.shape)}  {row.nbytes:,} bytes")
        print(f"    {row.rule} of {row.source} -> {row.parts[0][0]}{more}")
    if (left := len(plan.target.infos) - _ROWS) > 0:
        print(f"... and {left:,} more; all of them: --json FILE")
    if args.json:
        write_text(Path(args.json), json.dumps(as_json(summary, plan), indent=1) + "\n")


def _span(what: str, sizes: Mapping[str, int]) -> str:
    low, high = min(sizes.values()), max(sizes.values())
    return f"{len(sizes):,}, {low / 1e9:,.2f} to {high / 1e9:,.2f} GB of tensors a {what}"


def _duration(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"


def _count(dtypes: Mapping[str, int]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return ", ".join(f"{name} ({count} tensors)" for name, count in sorted(dtypes.items()))


def show_verification(report: VerifyReport) -> bool:
    """Print what was compared and what broke a bound; returns whether nothing did."""
    console = Console()
    console.print(f"verify {report.first} against {report.second}")
    if report.texts:
        console.print(_texts(report))
    else:
        how = "bit by bit" if report.level == "checksums" else "by name and shape"
        wider = f" ({report.widened} of them in the wider of two dtypes)" if report.widened else ""
        console.print(f"{report.tensors} tensors compared {how}{wider}")
    for problem in report.problems[:_PROBLEMS]:
        console.print(f"differs: {problem}", style="red", markup=False)
    if (left := len(report.problems) - _PROBLEMS) > 0:
        console.print(f"and {left:,} more differences; all of them: --json FILE", style="red")
    console.print("verify: OK, the same model" if report.ok else "verify: FAILED")
    return report.ok


def _texts(report: VerifyReport) -> Table:
    table = Table("text", "tokens", "logits max diff", "HF loss", "our loss", "loss diff", "same top-1")
    for one in report.texts:
        difference = abs(one.hf_loss - one.megatron_loss)
        figures: tuple[Any, ...] = (f"{one.max_abs:.2e}", f"{one.hf_loss:.6f}", f"{one.megatron_loss:.6f}")
        table.add_row(one.name, str(one.tokens), *figures, f"{difference:.1e}", f"{one.top1:.2%}")
    return table
