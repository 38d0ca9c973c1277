"""Tiny runs of a script itself: on the CPU as two processes, and as two nodes of a cluster."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from examples.launcher import command
from megatron_patch.training.metrics import read_records
from tests.examples.conftest import CLUSTER
from tests.guards.imports import ROOT

SCRIPT = ROOT / "examples/llama2/run_pretrain_megatron_llama.sh"
CALL = "none {root} 7B 1 4 1e-3 1e-4 32 80 0 fp32 2 1 sel true true true 1000 data_text_document megatron 640 128 {out}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.training.runs import make_workplace

    return make_workplace(tmp_path_factory.mktemp("launchers"))


def started(place: Path, env: str, out: str, **environment: str) -> subprocess.Popen[str]:
    """The script, in an environment without a cluster but for what is given."""
    kept = {name: value for name, value in os.environ.items() if name not in (*command.ENVIRONMENT, *CLUSTER)}
    variables = {**kept, "VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    words = ["sh", str(SCRIPT), env, *CALL.format(root=ROOT, out=out).split()]
    return subprocess.Popen(
        words, cwd=place, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(place: Path, out: str) -> list[float]:
    (save,) = (place / out / "checkpoint").iterdir()
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "5"
    return [record["loss"] for record in read_records(save) if "loss" in record]


def test_a_script_trains_on_the_cpu_and_the_same_on_two_nodes(workplace: Path) -> None:
    alone = started(workplace, "cpu", "alone")
    said = alone.communicate(timeout=300)[0]
    assert alone.returncode == 0, said
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    cluster = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, KUBERNETES_CONTAINER_RESOURCE_GPU="1")
    nodes = [started(workplace, "dlc", "together", RANK=str(rank), **cluster) for rank in range(2)]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert losses(workplace, "alone") == losses(workplace, "together") and len(losses(workplace, "alone")) == 5
