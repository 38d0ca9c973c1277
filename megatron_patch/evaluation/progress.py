"""How far an evaluation has come: a bar on a terminal, elsewhere a plain line every ten seconds."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_SECONDS = 10.0


class Progress:
    """Counts scored tokens; a context manager."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._done = total, 0
        self._plain = not quiet and not sys.stderr.isatty()
        self._bar = tqdm(total=total, unit=" tokens", desc="evaluate", disable=quiet or self._plain, leave=False)
        self.seconds = 0.0
        """From the beginning to the end, once that is there."""

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.monotonic() - self._start
        self._bar.close()

    def __call__(self, num_tokens: int) -> None:
        """Moves on."""
        self._done += num_tokens
        self._bar.update(num_tokens)
        now = time.monotonic()
        if self._plain and now - self._last >= _SECONDS:
            self._last, rate = now, self._done / (now - self._start)
            left = f"{rate:,.0f} tokens/s, {(self._total - self._done) / rate:.0f} s left"
            print(f"evaluate: {self._done:,} of {self._total:,} tokens, {left}", file=sys.stderr, flush=True)
