"""A place with everything that the examples of the scripts name: data sets, checkpoints without weights, checkouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.launcher import command, machines, scripts

LLAMA2_7B = dict(
    model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5, hidden_act="silu",
)  # fmt: skip
CLUSTER = (
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "KUBERNETES_CONTAINER_RESOURCE_GPU",
    "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_NODEID", "SLURM_LOCALID", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE",
    "SLURM_JOB_NODELIST", "SLURM_JOB_ID", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


def checkpoint(root: Path, **config: object) -> Path:
    """A torch_dist checkpoint as far as it can be told without reading weights."""
    (root / "release").mkdir(parents=True)
    (root / "huggingface").mkdir()
    for name in (".metadata", "metadata.json"):
        (root / "release" / name).touch()
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    (root / "huggingface/config.json").write_text(json.dumps({**LLAMA2_7B, **config}))
    return root


def fill(place: Path) -> None:
    """Makes what the examples name below a directory."""
    data = place / "datasets"
    data.mkdir()
    for name in ("wudao_text_document", "english_text_document"):
        (data / f"{name}.bin").touch()
        (data / f"{name}.idx").touch()
    for name in ("train.json", "valid.json"):
        (data / name).write_text('[{"instruction": "a", "output": "b"}]')
    (data / "held_out.jsonl").write_text('{"text": "hello"}\n')
    (data / "prompts.jsonl").write_text('{"query": "hello"}\n')
    checkpoint(place / "ckpts/llama2-7B")
    for family in scripts.FAMILIES:
        name = place / "ckpts" / f"{family.folder}-{family.size}"
        if not name.exists():
            name.symlink_to("llama2-7B")  # the same one under all names: no weights are read here


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: examples/llama2 of a checkout, as far as the examples go; no cluster around it."""
    for name in (*command.ENVIRONMENT, *CLUSTER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machines, "num_gpus", lambda environment: 8)
    here = tmp_path / "examples/llama2"
    here.mkdir(parents=True)
    (tmp_path / "megatron_patch").mkdir()
    (here / "Megatron-LM/megatron").mkdir(parents=True)
    fill(here)
    monkeypatch.chdir(here)
    return here
