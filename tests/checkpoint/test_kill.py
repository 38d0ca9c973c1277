"""kill -9 at any moment of a conversion leaves the former target or the new one, never something in between; and
resuming ends with the very same bytes, without doing again what was whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import hf_llama

Directory = Callable[[str], Path]

KILLS = {"pwrite": 7, "fsync": 4, "journal": 4, "rename": 3, "unlink": 2}
"""20 moments, by what is about to happen."""

_DIRECTIONS = {"torch_dist": "hf", "legacy": "hf", "huggingface": "megatron"}
"""What is written -> from which fixture."""


@pytest.fixture(scope="module")
def died(
    hf: Directory, megatron: Directory, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Name of a job -> what an undisturbed run did, and then what happened at each kill. See dying.py."""
    folder = tmp_path_factory.mktemp("died")
    sources = {"hf": hf("gqa"), "megatron": megatron("gqa")}
    jobs: dict[str, dict[str, Any]] = {
        wanted: {"source": sources[start], "target": folder / wanted, "format": wanted, "kills": KILLS}
        for wanted, start in _DIRECTIONS.items()
    }
    hf_llama(vocab_size=130).save_pretrained(folder / "other")
    jobs["replacement"] = {
        **jobs["torch_dist"],
        "source": folder / "other",
        "target": folder / "replacement",
        "former": sources["megatron"],
        "overwrite": True,
        "kills": {"pwrite": 1, "rename": 99, "unlink": 5},
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoint.dying", json.dumps(jobs, default=str)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("wanted", _DIRECTIONS)
def test_a_conversion_is_killed_at_20_moments_of_all_kinds(died: dict[str, Any], wanted: str) -> None:
    undisturbed, *kills = died[wanted]
    assert len(kills) == 20 and all(kill["killed"] for kill in kills)
    # Some before the first tensor was whole, some after the last one, the others in between.
    assert {0, undisturbed["moved"]} < {kill["left"]["whole"] for kill in kills}


@pytest.mark.parametrize("wanted", _DIRECTIONS)
def test_a_killed_conversion_leaves_nothing_half_that_a_loader_accepts(died: dict[str, Any], wanted: str) -> None:
    undisturbed, *kills = died[wanted]
    for kill in kills:
        left = kill["left"]
        assert left["accepted"] == [] or left["finished"], kill  # the rename is not the very last event
        # Nobody is to look into the hidden directory; but even there, weights are whole before anything loads.
        assert left["accepted_partial"] == [] or left["whole"] == undisturbed["moved"], kill


@pytest.mark.parametrize("wanted", _DIRECTIONS)
def test_resuming_ends_with_the_same_bytes_as_an_undisturbed_run(died: dict[str, Any], wanted: str) -> None:
    for kill in died[wanted][1:]:
        assert (kill["different"], kill["beside"]) == ([], []), kill


@pytest.mark.parametrize("wanted", _DIRECTIONS)
def test_resuming_does_nothing_again_that_is_whole(died: dict[str, Any], wanted: str) -> None:
    undisturbed, *kills = died[wanted]
    for kill in kills:
        whole = undisturbed["moved"] if kill["left"]["finished"] else kill["left"]["whole"]
        assert (kill["resumed"], kill["moved"]) == (whole, undisturbed["moved"] - whole), kill


def test_a_killed_replacement_leaves_the_old_or_the_new(died: dict[str, Any]) -> None:
    undisturbed, *kills = died["replacement"]
    assert {kill["left"]["vocab_size"] for kill in kills} == {200, 130}
    for kill in kills:
        assert "latest" in kill["left"]["accepted"] and kill["different"] == [], kill
        assert kill["left"]["finished"] == (kill["left"]["vocab_size"] == 130), kill
