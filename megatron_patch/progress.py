"""How far long work has come: a bar with rate and time left on a terminal, elsewhere a plain line every ten seconds.

    with Progress("verify-data", total, "B") as progress:
        for block in blocks:
            ...
            progress(len(block))

It does not know what is counted.
"""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A context manager that is told how much was done.

    Args:
        name: what a line begins with.
        total: of all the work; None where nobody knows.
        unit: of what is counted: ``B`` for bytes, else a word.
        quiet: say nothing, for every process but the first.
    """

    def __init__(self, name: str, total: int | None, unit: str, quiet: bool = False) -> None:
        self._name, self._unit, self.total, self.done = name, unit, total, 0
        self._in_lines = not quiet and not sys.stderr.isatty()
        is_bytes = unit == "B"
        self._bar = tqdm(
            total=total, unit=unit if is_bytes else f" {unit}", unit_scale=is_bytes, desc=name, leave=False,
            disable=quiet or self._in_lines,
        )  # fmt: skip
        self._start = self._last = time.monotonic()
        self._end: float | None = None

    @property
    def seconds(self) -> float:
        """Since the beginning, or until the end once that is there."""
        return (self._end or time.monotonic()) - self._start

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._end = time.monotonic()
        self._bar.close()

    def __call__(self, amount: int, note: str = "") -> None:
        """Moves on by so much; `note` says where that is."""
        self.done += amount
        self._bar.update(amount)
        now = time.monotonic()
        if self._in_lines and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            print(f"{self._name}: {self._line()}{note and f' ({note})'}", file=sys.stderr, flush=True)

    def reach(self, note: str, done: int, total: int) -> None:
        """The same for one who counts himself."""
        self.total = self._bar.total = total
        self(done - self.done, note)

    def _line(self) -> str:
        rate = self.done / self.seconds
        unit = "" if self._unit == "B" else f" {self._unit}"
        amounts, speed = self._amount(self.done), f"{self._amount(rate)}{unit}/s"
        if self.total is None:
            return f"{amounts}{unit}, {speed}"
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate else ""
        return f"{amounts} of {self._amount(self.total)}{unit}, {speed}{left}"

    def _amount(self, number: float) -> str:
        return tqdm.format_sizeof(number, "B") if self._unit == "B" else f"{number:,.0f}"
