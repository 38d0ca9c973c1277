"""The templates for clusters name scripts that are there, with arguments that they take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.launcher import launch, scripts
from tests.examples.conftest import checkpoint
from tests.examples.test_launchers import SLURM, shown
from tests.guards.imports import ROOT

FOLDER = ROOT / "examples/cluster"


def orders_of(path: str) -> str:
    (script,) = [one for one in scripts.scripts() if one.path == ROOT / path]
    return script.words


@pytest.fixture
def checkout(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: the root of a checkout with data and checkpoints in it."""
    for name in ("data", "checkpoints"):
        (tmp_path / name).mkdir()
    for suffix in (".bin", ".idx"):
        (tmp_path / f"data/wudao_text_document{suffix}").touch()
    checkpoint(tmp_path / "checkpoints/llama2-7b")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_slurm_job_starts_one_task_a_node_with_a_call_that_is_accepted(checkout: Path, monkeypatch, capsys) -> None:
    text = (FOLDER / "pretrain.sbatch").read_text()
    values = dict(re.findall(r"^([A-Z_]+)=(\S+)$", text, re.MULTILINE))
    command = re.sub(r'"\$(\w+)"', lambda match: values[match[1]], text[text.index("exec srun") :])
    words = shlex.split(command.replace("\\\n", " "))
    start = words.index("sh")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert launch.main([orders_of(words[start + 1]), *words[start + 2 :], "--dry-run"]) == 0
    args = shown(capsys.readouterr().out)
    assert (args.tensor_model_parallel_size, args.load) == (4, "checkpoints/llama2-7b")
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    assert (directives["ntasks-per-node"], directives["signal"]) == ("1", "TERM@600")


def job() -> Any:
    return yaml.safe_load((FOLDER / "pytorchjob.yaml").read_text())


def test_the_kubernetes_job_is_a_call_that_is_accepted(checkout: Path, monkeypatch, capsys) -> None:
    replicas = job()["spec"]["pytorchReplicaSpecs"]
    (container,) = replicas["Master"]["template"]["spec"]["containers"]
    nodes = sum(one["replicas"] for one in replicas.values())
    cluster = {"WORLD_SIZE": str(nodes), "RANK": "0", "MASTER_ADDR": "master-0", "MASTER_PORT": "23456"}
    for name, value in {**cluster, **{one["name"]: one["value"] for one in container["env"]}}.items():
        monkeypatch.setenv(name, value)
    places = {"/data/wudao_text_document": "data/wudao_text_document", "/data/llama2-7b": "checkpoints/llama2-7b"}
    _, script, *words = container["command"]
    assert launch.main([orders_of(script), *(places.get(word, word) for word in words), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "--nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr master-0 --master-port 23456" in out
    assert shown(out).sequence_parallel


def test_every_replica_of_the_kubernetes_job_is_alike_and_asks_for_as_many_gpus_as_processes() -> None:
    spec = job()["spec"]
    assert "nprocPerNode" not in spec  # with it WORLD_SIZE would count processes
    templates = [one["template"] for one in spec["pytorchReplicaSpecs"].values()]
    assert templates[0] == templates[1]
    (container,) = templates[0]["spec"]["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    environment = {one["name"]: one["value"] for one in container["env"]}
    limits = container["resources"]["limits"]
    assert environment == {"KUBERNETES_CONTAINER_RESOURCE_GPU": str(limits["nvidia.com/gpu"])}
