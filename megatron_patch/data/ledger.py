"""What a run of `preprocess` has come to: counts, messages, bad records, and a line or a bar that tells the user.

Reports of shards arrive here in the order of the input, whichever was finished first, so that what is said and where a
run stops do not depend on the number of workers. It does not know processes, tokens or datasets.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

from tqdm import tqdm

from megatron_patch.data.arguments import parse_limit
from megatron_patch.data.indexed import replacing
from megatron_patch.data.readers import DamagedInput
from megatron_patch.data.tokenizing import MESSAGES, Bad, ShardReport, quarantine_file

_ENOUGH = 1000
"""Records from which on a percentage of bad ones says something."""


class TooManyErrors(ValueError):
    """More bad records than --max-errors."""

    exit_code = 3


class NoDocuments(ValueError):
    """Everything was left out."""


class LedgerArgs(Protocol):
    """The arguments of a command that reads records."""

    input: tuple[str, ...]
    on_error: Literal["stop", "skip", "quarantine"]
    max_errors: str
    log_interval: int

    @property
    def json_keys(self) -> tuple[str, ...]: ...

    @property
    def quarantine_path(self) -> Path: ...


class Ledger:
    """Adds up the reports of shards. A context manager, for the bar."""

    def __init__(self, args: LedgerArgs, total_bytes: int, directory: Path, command: str = "preprocess") -> None:
        self._args, self._directory, self._command = args, directory, command
        self._limit = parse_limit(args.max_errors)
        self._total = total_bytes
        self.records = self.resumed = 0
        self.bad: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.shards: list[int] = []
        """Numbers of the shards that were taken, in order."""
        self._lines: Counter[str] = Counter()
        self._bases: dict[int, dict[str, int]] = {}
        self._messages = self._told = 0
        self._start = time.perf_counter()
        self._bar = tqdm(
            total=total_bytes or None, unit="B", unit_scale=True, desc=command, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def _named(self, key: str, counts: Counter[str]) -> Counter[str]:
        """Counts under their reasons, which name the key where there are several."""
        several = len(self._args.json_keys) > 1
        return Counter({f"{key}: {reason}" if several else reason: count for reason, count in counts.items()})

    def take(self, report: ShardReport) -> None:
        """Takes the next shard's report. Raises DamagedInput or TooManyErrors if the run must end here."""
        bases = {message.path: self._lines[message.path] for message in report.messages}
        # A run under another --on-error may have finished a shard with bad records in it.
        if report.bad and self._args.on_error == "stop":
            raise DamagedInput(
                f"{_moved(report.messages[0], bases)} (--on-error skip goes on without such records, quarantine also "
                "keeps them in a file; what is finished will not be done again)"
            )
        self.shards.append(report.number)
        self.records += report.records
        self.bad += report.bad
        for key, counts in zip(self._args.json_keys, report.keys, strict=True):
            self.skipped += self._named(key, counts.skipped)
            self.changed += self._named(key, counts.changed)
        self._tell(report.messages, bases)
        if report.bad:
            self._bases[report.number] = {path: self._lines[path] for path, _ in report.lines}
        for path, lines in report.lines:
            self._lines[path] += lines
        if self._limit.count is not None or self.records >= _ENOUGH:
            self.require_few_errors()

    def _tell(self, messages: Sequence[Bad], bases: dict[str, int]) -> None:
        for message in messages[: max(0, MESSAGES - self._messages)]:
            self._messages += 1
            tail = "; further records like it are only counted" if self._messages == MESSAGES else ""
            self._bar.write(f"skipped {_moved(message, bases)}{tail}", file=sys.stderr)

    def skip(self, key: str, reasons: Counter[str]) -> None:
        """Counts texts that were left out later."""
        self.skipped += self._named(key, reasons)

    def require_few_errors(self) -> None:
        """Raises TooManyErrors if more records are bad than --max-errors allows."""
        bad = self.bad.total()
        if self._limit.is_exceeded(bad, self.records):
            reasons = _listed(self.bad)
            path = self.publish_quarantine()
            raise TooManyErrors(
                f"{bad} of {self.records} records are bad, more than --max-errors {self._args.max_errors} "
                f"({reasons}){f'; they are in {path}' if path else ''}. Nothing is written; what was tokenized is "
                "kept: mend the input, or run again with a higher --max-errors"
            )

    def require_documents(self, key: str, documents: int) -> None:
        """Raises NoDocuments if there is none to write."""
        if not documents:
            reasons = _listed(self.skipped)
            of = f" with key {key!r}" if len(self._args.json_keys) > 1 else ""
            inputs = ", ".join(self._args.input)
            raise NoDocuments(f"no document{of} in {inputs} ({reasons or 'the files are empty'}): nothing written")

    def publish_quarantine(self) -> str | None:
        """Writes the bad records of all shards so far into one file, if that was asked for; returns its path."""
        path = self._args.quarantine_path
        if self._args.on_error != "quarantine":
            return None
        if not self._bases:
            path.unlink(missing_ok=True)  # an earlier run's, which the records of this one have nothing to do with
            return None
        with replacing(path) as file:
            for number, bases in self._bases.items():
                with open(quarantine_file(self._directory, number), encoding="utf-8") as lines:
                    for line in map(json.loads, lines):
                        line["line"] += bases.get(line["path"], 0)
                        file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        return str(path)

    # ------------------------------------------------------------------------------------------------------- progress

    def show(self, read_bytes: int, documents: int, tokens: int) -> None:
        """Tells how far all workers have come."""
        self._bar.n = read_bytes
        self._bar.set_postfix(docs=documents, tokens=tokens, skipped=self.skipped.total())
        if self._bar.disable and self._told // self._args.log_interval < documents // self._args.log_interval:
            self._told = documents
            seconds = time.perf_counter() - self._start
            share = f"{100 * read_bytes / self._total:.0f} % of the input, " if self._total else ""
            left = f", {seconds * (self._total - read_bytes) / read_bytes:.0f} s left" if share and read_bytes else ""
            counts = f"{documents} documents, {tokens} tokens, {self.skipped.total()} skipped"
            print(
                f"{self._command}: {share}{counts}, {tokens / seconds:.0f} tokens/s{left}", file=sys.stderr, flush=True
            )


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def _moved(message: Bad, bases: dict[str, int]) -> Bad:
    """The message with the line counted from the first of its file."""
    return replace(message, line=message.line + bases.get(message.path, 0))
