"""What a log shows of long work."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_patch import progress
from megatron_patch.progress import Progress
from megatron_patch.vocab.corpus import Corpus


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, as told by a clock that stands still unless a test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_plain_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("evaluate", 1200, "tokens") as told:
        for seconds, amount in ((4, 100), (4, 100), (2, 100), (10, 300), (9, 600)):
            clock[0] += seconds
            told(amount, note="here" if amount == 300 else "")
    assert capsys.readouterr().err.splitlines() == [
        "evaluate: 300 of 1,200 tokens, 30 tokens/s, 30 s left",
        "evaluate: 600 of 1,200 tokens, 30 tokens/s, 20 s left (here)",
    ]
    clock[0] += 1000
    assert told.seconds == 29


def test_bytes_are_shown_in_larger_units_and_a_counter_of_ones_own_will_do(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("convert", None, "B") as told:
        clock[0] += 10
        told(2_500_000)
        clock[0] += 10
        told.reach("lm_head", 20_000_000, 40_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "convert: 2.50MB, 250kB/s",
        "convert: 20.0MB of 40.0MB, 1.00MB/s, 20 s left (lm_head)",
    ]


def test_other_processes_say_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("evaluate", 10, "tokens", quiet=True) as told:
        clock[0] += 20
        told(10)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_pass_over_a_corpus_tells_of_all_its_bytes(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, told = tmp_path / f"a{suffix}", []
    if suffix == ".jsonl":
        file.write_text('{"text": "one"}\n' * 1000)
    else:
        from pyarrow import parquet, table

        parquet.write_table(table({"text": ["one"] * 1000}), file)
    monkeypatch.setattr(Progress, "__call__", lambda self, amount, note="": told.append((self.total, amount)))
    assert len(list(Corpus([str(file)], "text", name="vocab train"))) == 1000
    assert {total for total, _ in told} == {file.stat().st_size} and min(amount for _, amount in told) >= 0
    assert sum(amount for _, amount in told) == file.stat().st_size
