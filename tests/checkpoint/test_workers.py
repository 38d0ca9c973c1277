"""Several processes that share a conversion make the same bytes as one; their shares are complete, disjoint and fair.

As a module it is `megatron-patch` with .distcp files small enough for a tiny model to have several.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint import torch_dist
from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.crew import Crew
from megatron_patch.checkpoint.manifest import read_manifest
from megatron_patch.checkpoint.opening import Wanted
from megatron_patch.checkpoint.sharding import Layout
from megatron_patch.launch.main import main
from tests.checkpoint.dying import differences

Directory = Callable[[str], Path]

SMALL = (0, 60_000)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 50])
def test_every_file_is_one_process_s_and_shares_are_fair(size: int) -> None:
    chance = random.Random(size)
    for _ in range(50):
        files = {f"{i}": chance.choice([0, 1, 10**9, chance.randrange(10**12)]) for i in range(chance.randrange(1, 60))}
        shares = [Crew(rank, size).share(files) for rank in range(size)]
        assert sorted(file for share in shares for file in share) == sorted(files)
        for share in shares:
            # Only whole files can be given, so a share is off by at most the larger half of two.
            assert sum(files[file] for file in share) <= sum(files.values()) / size + max(files.values())


def test_equal_files_are_shared_equally() -> None:
    files = {f"{i}": 5 * 2**30 for i in range(16)}
    assert [len(Crew(rank, 4).share(files)) for rank in range(4)] == [4] * 4


def test_files_without_tensors_have_somebody_to_make_them() -> None:
    files = {"a": 10, "b": 0}
    assert [Crew(rank, 2).share(files) for rank in range(2)] in ([{"a"}, {"b"}], [set(), {"a", "b"}])
    assert set.union(*(Crew(rank, 2).share({"a": 0}) for rank in range(2))) == {"a"}


def _together(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *command],
        capture_output=True,
        text=True,
        timeout=200,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("huggingface, 10 files ->") == 1  # one process reports


def _assert_same(target: Path, alone: Path) -> None:
    assert differences(target, alone) == []
    assert read_manifest(target / "release")["tensors"] == read_manifest(alone / "release")["tensors"]
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(f".{target.name}")] == []


def test_two_workers_make_the_same_legacy_checkpoint_as_one(hf: Directory, tmp_path: Path) -> None:
    options = ["--target-format", "legacy", "--tensor-model-parallel-size", "2", "--workers", "2"]
    _together(
        ["megatron_patch", "convert", "--source", str(hf("gqa")), "--target", str(tmp_path / "together"), *options]
    )
    convert(hf("gqa"), tmp_path / "alone", Wanted(format="legacy", layout=Layout(2)))
    _assert_same(tmp_path / "together", tmp_path / "alone")


def test_two_ranks_of_torchrun_make_the_same_torch_dist_checkpoint_as_one(
    hf: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", __name__, "convert"]
    _together([*command, "--source", str(hf("gqa")), "--target", str(tmp_path / "together")])
    monkeypatch.setattr(torch_dist, "_FILE_BYTES", SMALL)
    convert(hf("gqa"), tmp_path / "alone")
    files = list((layout.iteration_directory(tmp_path / "alone", None)).glob("*.distcp"))
    assert len(files) > 4
    _assert_same(tmp_path / "together", tmp_path / "alone")


if __name__ == "__main__":
    torch_dist._FILE_BYTES = SMALL
    sys.exit(main())
