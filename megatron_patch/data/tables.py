"""How the reports of `preprocess`, `merge`, `inspect` and `verify-data` look on a console."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from megatron_patch.data.checking import CheckReport
from megatron_patch.data.inspecting import Document, InspectReport, SpecialToken
from megatron_patch.data.merging import MergeReport
from megatron_patch.data.preprocess import PreprocessReport

_PROBLEMS = 20
"""Problems that are printed; all of them are in the JSON file."""

_CHARACTERS = 60
"""Characters of a sample that are printed."""


def show_preprocess(report: PreprocessReport) -> None:
    """Prints what was written, and what was not."""
    table = Table("preprocess", report.prefix if len(report.datasets) == 1 else "all datasets")
    for dataset in report.datasets if len(report.datasets) > 1 else ():
        table.add_row(dataset.prefix, f"{dataset.documents:,} documents, {dataset.tokens:,} tokens")
    table.add_row("documents", f"{report.documents:,}")
    table.add_row("tokens", f"{report.tokens:,} ({report.dtype})")
    table.add_row("engine", f"{report.engine}: {report.proof}")
    for reason, count in report.skipped:
        table.add_row(f"skipped: {reason}", f"{count:,}")
    for step, count in report.changed:
        table.add_row(f"changed by {step}", f"{count:,}")
    if report.quarantine:
        table.add_row("bad records", report.quarantine)
    if report.resumed:
        table.add_row("taken from an earlier run", f"{report.resumed} of {report.shards} shards")
    table.add_row("input, output bytes", f"{report.input_bytes:,}, {report.output_bytes:,}")
    table.add_row("time", f"{report.seconds:.1f} s, {report.tokens_per_second:,.0f} tokens/s")
    for note in report.notes:
        table.add_row("note", note)
    Console().print(table)


def show_merge(report: MergeReport) -> None:
    """Prints the sources as a table, and what they became."""
    table = Table("source", show_footer=True)
    for name in ("documents", "sequences", "tokens", "share", "dtype"):
        table.add_column(name, justify="right")
    for one in report.sources:
        counts = (f"{count:,}" for count in (one.documents, one.sequences, one.tokens))
        table.add_row(Text(one.prefix), *counts, f"{one.share:.2%}", one.dtype)
    totals = (f"{count:,}" for count in (report.documents, report.sequences, report.tokens))
    for column, footer in zip(table.columns, (Text(report.prefix), *totals, "", report.dtype), strict=True):
        column.footer = footer
    Console().print(table)
    rate = report.output_bytes / max(report.seconds, 1e-9) / 1e6
    print(f"{report.output_bytes:,} bytes in {report.seconds:.1f} s ({rate:,.0f} MB/s)")
    for note in report.notes:
        print(f"note: {note}")


# -------------------------------------------------------------------------------------------------------------- inspect


def show_inspection(report: InspectReport) -> None:
    """Prints what a dataset holds, and the documents that were asked for."""
    console, lengths = Console(), report.lengths
    table = Table("inspect", Column(Text(report.prefix)))
    split = "" if report.sequences == report.documents else f" in {report.sequences:,} sequences"
    table.add_row("documents", f"{report.documents:,}{split}")
    table.add_row("tokens", f"{report.tokens:,} ({report.dtype}), {report.nbytes:,} bytes with the index")
    shape = f"median {lengths.median:,.0f}, mean {lengths.mean:,.1f}, 99 % below {lengths.percentile_99:,.0f}"
    table.add_row("document length", f"{lengths.minimum:,} to {lengths.maximum:,}, {shape}")
    if report.compression:
        one = report.compression
        tail = f"over {one.documents:,} documents drawn at random"
        table.add_row("tokens per character", f"{one.tokens_per_character:.3f} {tail}")
    if report.ids_outside:
        table.add_row("[red]not the tokenizer's", f"{report.ids_outside:,} ids that it does not have")
    console.print(table)
    console.print(_histogram(report))
    if report.special:
        console.print(_special(report.special))
    for document in report.shown:
        _show_document(document)


def _histogram(report: InspectReport) -> Table:
    table = Table("document length", "")
    for name in ("documents", "tokens", "of all tokens"):
        table.add_column(name, justify="right")
    most = max(documents for _, _, documents, _ in report.lengths.histogram)
    shortest = next(i for i, row in enumerate(report.lengths.histogram) if row[2])
    for low, high, documents, tokens in report.lengths.histogram[shortest:]:
        bar = "#" * (documents and max(1, round(12 * documents / most)))
        share = f"{tokens / max(1, report.tokens):.1%}"
        table.add_row(f"{low:,}" if low == high else f"{low:,}-{high:,}", bar, f"{documents:,}", f"{tokens:,}", share)
    return table


def _special(special: tuple[SpecialToken, ...]) -> Table:
    table = Table("special token", "id")
    for name in ("begins a document", "ends one", "elsewhere"):
        table.add_column(name, justify="right")
    for one in special:
        counts = (f"{count:,}" for count in (one.at_start, one.at_end, one.elsewhere))
        table.add_row(Text(one.token), str(one.id), *counts)
    return table


def _show_document(document: Document) -> None:
    print(f"---- document {document.number}: {document.tokens:,} tokens from byte {document.offset:,}")
    print(" ".join(map(str, document.ids)) if document.text is None else document.text)
    if len(document.ids) < document.tokens:
        print(f"---- {document.tokens - len(document.ids):,} more tokens of it are not shown")


# ---------------------------------------------------------------------------------------------------------- verify-data


def show_check(report: CheckReport) -> None:
    """Prints what was checked and what is wrong."""
    size = f"{report.documents:,} documents, {report.tokens:,} tokens"
    print(f"verify-data {report.prefix}: {size} in {report.seconds:.1f} s")
    print(f"checked: {'; '.join(report.checked)}")
    if report.samples:
        table = Table("document", "tokens", "encoded again", Column("reads like", no_wrap=True))
        for one in report.samples:
            again = {True: "same", False: "differs", None: "not tried"}[one.same_again]
            table.add_row(f"{one.document:,}", f"{one.tokens:,}", again, Text(" ".join(one.text.split())[:_CHARACTERS]))
        Console().print(table)
    for problem in report.problems[:_PROBLEMS]:
        print(f"wrong: {problem}")
    if (left := len(report.problems) - _PROBLEMS) > 0:
        print(f"and {left:,} more problems; all of them: --json FILE")
    for note in report.notes:
        print(f"note: {note}")
    if report.stopped:
        print("there may be more: not everything was looked at")
    print("verify-data: OK" if report.ok else f"verify-data: FAILED, {len(report.problems):,} problems")
