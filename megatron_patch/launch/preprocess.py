"""`megatron-patch preprocess`: text files to megatron-core's indexed dataset.

    megatron-patch preprocess --input corpus.jsonl --output-prefix corpus --tokenizer-model MODEL_DIR --append-eod

Parses, validates, runs and prints the report; all else is in `megatron_patch.data.preprocess`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from megatron_patch.data.arguments import PreprocessArgs

if TYPE_CHECKING:
    from megatron_patch.data.preprocess import PreprocessReport


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = tyro.cli(PreprocessArgs, args=argv, prog="megatron-patch preprocess", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    from megatron_patch.checkpoint.directory import write_text
    from megatron_patch.data.preprocess import preprocess

    report = preprocess(args)
    show(report)
    if args.json:
        write_text(Path(args.json), json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n")
    return 0


def show(report: PreprocessReport) -> None:
    """Prints the report as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("preprocess", report.prefix)
    table.add_row("documents", f"{report.documents:,}")
    table.add_row("tokens", f"{report.tokens:,} ({report.dtype})")
    for reason, count in report.skipped:
        table.add_row(f"skipped: {reason}", f"{count:,}")
    for step, count in report.changed:
        table.add_row(f"changed by {step}", f"{count:,}")
    table.add_row("input, output bytes", f"{report.input_bytes:,}, {report.output_bytes:,}")
    table.add_row("time", f"{report.seconds:.1f} s, {report.tokens_per_second:,.0f} tokens/s")
    for note in report.notes:
        table.add_row("note", note)
    Console().print(table)
