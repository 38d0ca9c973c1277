"""kill -9 at any moment of a conversion leaves the former target or the new one, never something in between."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_patch.checkpoint.convert import convert
from tests.tiny import hf_llama

Directory = Callable[[str], Path]


def _die_often(source: Path, target: Path) -> list[str]:
    """What the target is after each kill; the last entry is after a run that nobody disturbed."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoint.dying", str(source), str(target), "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    states, verdicts = zip(*(line.split(" ", 1) for line in done.stdout.splitlines()), strict=True)
    assert states == ("killed",) * (len(states) - 1) + ("survived",) and len(states) > 10
    return list(verdicts)


@pytest.mark.parametrize(("start", "done"), [("hf", "megatron None 200"), ("megatron", "huggingface 200")])
def test_a_killed_conversion_leaves_nothing_that_looks_finished(
    hf: Directory, megatron: Directory, tmp_path: Path, start: str, done: str
) -> None:
    source = {"hf": hf, "megatron": megatron}[start]("tied")
    *killed, last, undisturbed = _die_often(source, tmp_path / "target")
    # Only the rename makes a target; the fsync of its parent is the one event after it.
    assert set(killed) == {"nothing"} and last == undisturbed == done
    assert sorted(os.listdir(tmp_path)) == ["target", "target.whole"]  # leftovers of the killed are cleared


def test_a_killed_replacement_leaves_the_old_or_the_new(hf: Directory, tmp_path: Path) -> None:
    hf_llama(vocab_size=130).save_pretrained(tmp_path / "other")
    convert(hf("tied"), tmp_path / "target")
    *killed, last, undisturbed = _die_often(tmp_path / "other", tmp_path / "target")
    assert set(killed) == {"megatron None 200"} and last == undisturbed == "megatron None 130"
    assert sorted(os.listdir(tmp_path)) == ["other", "target", "target.whole"]
