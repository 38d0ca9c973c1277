"""How the report of `sft-data` looks on a console."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from megatron_patch.data.sft.building import SftReport


def show_sft(report: SftReport) -> None:
    """Prints what was written, what was not, and the first samples."""
    table = Table("sft-data", Column(Text(report.prefix)))
    share = report.supervised / max(1, report.tokens)
    packed = f" in {report.packs:,} packs" if report.packs < report.samples else ""
    table.add_row("samples", f"{report.samples:,} of {report.records:,} records{packed}")
    table.add_row("tokens", f"{report.tokens:,}, {report.supervised:,} of them to be learned ({share:.1%})")
    table.add_row("slots filled", f"{report.efficiency:.2%}")
    table.add_row("chat template", Text(report.template))
    table.add_row("cut to --seq-length", f"{report.truncated:,}")
    for reason, count in report.skipped:
        table.add_row(Text(f"left out: {reason}"), f"{count:,}")
    if report.quarantine:
        table.add_row("bad records", Text(report.quarantine))
    if report.resumed:
        table.add_row("taken from an earlier run", f"{report.resumed} of {report.shards} shards")
    table.add_row("time", f"{report.seconds:.1f} s, {report.tokens / report.seconds:,.0f} tokens/s")
    for note in report.notes:
        table.add_row("note", note)
    Console().print(table)
    for number, example in enumerate(report.examples):
        print(f"---- sample {number}, what is to be learned between [[ and ]]\n{example}")
