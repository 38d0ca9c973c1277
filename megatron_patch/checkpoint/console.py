"""How a conversion and a verification look on a console: progress, and reports as tables. It decides nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from megatron_patch.checkpoint.convert import Report
from megatron_patch.checkpoint.directory import write_text
from megatron_patch.checkpoint.verify import VerifyReport

_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """A bar with rate and time left on a terminal; elsewhere a plain line every ten seconds. A context manager."""

    def __enter__(self) -> ProgressBar:
        self._bar = tqdm(unit="B", unit_scale=True, desc="convert", disable=not sys.stderr.isatty())
        self._start = self._last = time.monotonic()
        return self

    def __call__(self, name: str, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last, rate = now, done / (now - self._start)
            left = (total - done) / rate
            line = (
                f"convert: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left ({name})"
            )
            print(line, file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def show_conversion(report: Report) -> None:
    """Print what a conversion did."""
    table = Table("convert", f"{report.source} -> {report.target}")
    table.add_row("family", report.family)
    table.add_row("parameters", f"{report.parameters:,} in {report.tensors} Hugging Face tensors")
    table.add_row("dtype", _count(report.dtypes))
    if report.ignored:
        table.add_row("left out", f"{len(report.ignored)} that are no parameters, such as {report.ignored[0]}")
    rate = report.nbytes / max(report.seconds, 1e-9) / 1e6
    table.add_row("size, time", f"{report.nbytes / 1e6:,.1f} MB in {report.seconds:.1f} s ({rate:,.0f} MB/s)")
    Console().print(table)


def _count(dtypes: Mapping[str, int]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return ", ".join(f"{name} ({count} tensors)" for name, count in sorted(dtypes.items()))


def show_verification(report: VerifyReport) -> None:
    """Print what was compared and what broke a bound."""
    console = Console()
    console.print(f"verify {report.first} against {report.second}")
    if report.texts:
        console.print(_texts(report))
    else:
        console.print(f"{report.tensors} tensors compared bit by bit")
    for problem in report.problems:
        console.print(f"differs: {problem}", style="red", markup=False)
    console.print("verify: OK, the same model" if report.ok else "verify: FAILED")


def _texts(report: VerifyReport) -> Table:
    table = Table("text", "tokens", "logits max diff", "HF loss", "our loss", "loss diff", "same top-1")
    for one in report.texts:
        difference = abs(one.hf_loss - one.megatron_loss)
        figures: tuple[Any, ...] = (f"{one.max_abs:.2e}", f"{one.hf_loss:.6f}", f"{one.megatron_loss:.6f}")
        table.add_row(one.name, str(one.tokens), *figures, f"{difference:.1e}", f"{one.top1:.2%}")
    return table


def write_json(report: Report | VerifyReport, path: str) -> None:
    """Write a report to a file."""
    write_text(Path(path), json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n")
