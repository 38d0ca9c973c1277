"""What a training run says: console lines, a JSONL file, TensorBoard, and the loss curve as a PNG.

Only one process reports. A resumed run drops the records its checkpoint does not reach, so the file always describes
one uninterrupted run. It knows numbers and files; no model, no torch but TensorBoard's writer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

METRICS = "metrics.jsonl"
LOSS_CURVE = "loss.png"
Record = dict[str, Any]


def read_records(directory: str | Path) -> list[Record]:
    """Every record of a run's metrics file; none if there is no file."""
    file = Path(directory) / METRICS
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


class Reporter:
    """Collects records and shows them.

    Args:
        directory: where the metrics file and the curve go, or None to only print.
        tensorboard_dir: where events go (default: below `directory`).
        first, last: iterations of this run; `first` is where it resumes.
    """

    def __init__(self, directory: str | None, tensorboard_dir: str | None, first: int, last: int) -> None:
        self.directory = directory and Path(directory)
        self._file = self._open(first) if self.directory else None
        self._events = _event_writer(tensorboard_dir or (directory and f"{directory}/tensorboard"), first)
        self._first, self._last, self._begin = first, last, time.monotonic()
        self._bar = tqdm(total=last, initial=first, unit="it", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def _open(self, first: int) -> Any:
        self.directory.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_records(self.directory) if record["iteration"] <= first] if first else []
        file = self.directory / METRICS
        temporary = file.with_name(f"{METRICS}.tmp-{os.getpid()}")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.rename(file)
        return file.open("a", buffering=1)

    def step(self, iteration: int) -> None:
        """Move the progress bar."""
        self._bar.update(iteration - self._bar.n)

    def record(self, iteration: int, values: Mapping[str, float], line: str) -> None:
        """Keep `values` and print `line`."""
        if self._file:
            self._file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        if self._events:
            for name, value in values.items():
                self._events.add_scalar(name, value, iteration)
        self.say(f"iteration {iteration:>6}/{self._last} | {line}")

    def say(self, line: str) -> None:
        """Print without disturbing the bar."""
        tqdm.write(line, file=sys.stderr)

    def eta(self, iteration: int) -> str:
        """Time left at the average rate so far."""
        done = max(iteration - self._first, 1)
        seconds = (time.monotonic() - self._begin) / done * (self._last - iteration)
        return str(timedelta(seconds=round(seconds)))

    def close(self) -> None:
        """Flush everything and draw the curve."""
        self._bar.close()
        if self._events:
            self._events.close()
        if self._file:
            self._file.close()
            draw_losses(read_records(self.directory), self.directory / LOSS_CURVE)


def _event_writer(directory: str | None, first: int) -> Any:
    if directory is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(directory, purge_step=first + 1 if first else None)


def draw_losses(records: list[Record], file: Path) -> None:
    """Training and validation loss over the learning rate, as a PNG; nothing without records."""
    from matplotlib.figure import Figure

    series = {
        name: [(r["iteration"], r[name]) for r in records if name in r] for name in ("loss", "validation_loss", "lr")
    }
    if not series["loss"]:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.plot(*zip(*series["loss"], strict=True), linewidth=1, label="training")
    if series["validation_loss"]:
        upper.plot(*zip(*series["validation_loss"], strict=True), "o-", markersize=4, label="validation")
    upper.set(ylabel="loss (nats per token)")
    upper.legend()
    upper.grid(alpha=0.3)
    lower.plot(*zip(*series["lr"], strict=True), linewidth=1, color="tab:gray")
    lower.set(xlabel="iteration", ylabel="learning rate")
    lower.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
