"""What an evaluation found, as records and as tables.

With L the sum of -log p (natural) over the scored tokens of all documents, and N the number of tokens, bytes (UTF-8) or
characters (code points): loss is L / N per token, perplexity exp(L / N) per each of them, bits L / (N log 2). Per byte
and per character they compare models of different tokenizers; per token they do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True)
class Figures:
    """What was found on some text."""

    name: str
    """File, directory, glob or prefix, as it was named; or total."""
    documents: int
    """Documents scored."""
    tokens: int
    """Tokens scored."""
    characters: int
    """Characters of the text (of indexed data: of what its ids are decoded to)."""
    bytes: int
    """Bytes of the text in UTF-8."""
    negative_log_likelihood: float
    """Sum of -log p of all tokens, in nats."""
    loss_per_token: float
    perplexity_per_token: float
    perplexity_per_byte: float
    perplexity_per_character: float
    bits_per_byte: float
    bits_per_character: float
    left_out: tuple[tuple[str, int], ...] = ()
    """Why and how many documents were not read or have no token."""

    @classmethod
    def of(
        cls,
        name: str,
        sizes: Sequence[tuple[int, int, int]],
        negative_log_likelihood: float,
        left_out: Sequence[tuple[str, int]] = (),
    ) -> Figures:
        """Figures from (tokens, characters, bytes) of each document and the sum over all of them."""
        tokens, characters, in_bytes = (sum(column) for column in zip(*sizes, strict=True))
        token, byte, character = (_ratio(negative_log_likelihood, n) for n in (tokens, in_bytes, characters))
        return cls(
            name=name,
            documents=len(sizes),
            tokens=tokens,
            characters=characters,
            bytes=in_bytes,
            negative_log_likelihood=negative_log_likelihood,
            loss_per_token=token,
            perplexity_per_token=_exp(token),
            perplexity_per_byte=_exp(byte),
            perplexity_per_character=_exp(character),
            bits_per_byte=byte / math.log(2),
            bits_per_character=character / math.log(2),
            left_out=tuple(left_out),
        )


def _ratio(total: float, count: int) -> float:
    return total / count if count else math.nan


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


@dataclass(frozen=True)
class EvaluationReport:
    """What was scored, how, and what was found."""

    load: str
    """The checkpoint."""
    tokenizer: str
    """The tokenizer's directory."""
    seq_length: int
    """Most tokens that the model saw at once."""
    stride: int
    """Tokens by which the window moved on."""
    begin: tuple[int, ...]
    """Tokens that the first one of a document was given."""
    append_eod: bool
    """Whether the end-of-document token was scored after each document."""
    dtype: str
    """Of the computation."""
    processes: int
    """How many shared the work."""
    rows: tuple[Figures, ...]
    """For each name on the command line."""
    total: Figures
    """Over all of them."""
    windows: int
    """Passes of the model, each over one row."""
    seconds: float
    """Wall time of the scoring alone."""
    tokens_per_second: float
    """Scored tokens, likewise."""


_SIZES = ("documents", "tokens", "characters", "bytes")
_FOUND = {
    "loss_per_token": "loss",
    "perplexity_per_token": "ppl",
    "perplexity_per_byte": "ppl/byte",
    "perplexity_per_character": "ppl/char",
    "bits_per_byte": "bits/byte",
    "bits_per_character": "bits/char",
}
"""Fields and their headings, short ones: a table of full names is wider than a terminal."""


def show(report: EvaluationReport) -> None:
    """Print the report as two tables: what was scored, and what was found."""
    from rich.console import Console
    from rich.table import Column, Table

    rows = [*report.rows, *([report.total] if len(report.rows) > 1 else [])]
    sizes = Table(Column("evaluate", overflow="fold"), box=None, pad_edge=False)
    found = Table(Column("", overflow="fold"), box=None, pad_edge=False)
    for name in (*_SIZES, "left out"):
        sizes.add_column(name, justify="right", no_wrap=True)
    for heading in _FOUND.values():
        found.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        left_out = sum(count for _, count in row.left_out)
        sizes.add_row(_plain(row.name), *(f"{getattr(row, name):,}" for name in _SIZES), f"{left_out:,}")
        found.add_row(_plain(Path(row.name).name), *(_number(getattr(row, name)) for name in _FOUND))
    console = Console()
    console.print(sizes)
    print()
    console.print(found)
    print()
    for row in report.rows:
        for reason, count in row.left_out:
            print(f"left out of {row.name}: {count:,} x {reason}")
    eod = "scored, too" if report.append_eod else "not scored"
    print(f"windows of {report.seq_length} tokens, stride {report.stride}; end-of-document tokens {eod}")
    rate = f"{report.tokens_per_second:,.0f} tokens/s"
    print(f"{report.windows:,} windows in {report.seconds:.1f} s, {rate}, {report.processes} processes, {report.dtype}")


def _number(value: float) -> str:
    return f"{value:,.4f}" if value < 10_000 else f"{value:.4g}"


def _plain(name: str) -> Text:
    """A name with square brackets is no markup."""
    from rich.text import Text

    return Text(name)
