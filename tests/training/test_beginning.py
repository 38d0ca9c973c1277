"""A run begins with the weights that it was given, in whatever format, and never with random ones by mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.opening import Wanted
from megatron_patch.checkpoint.sharding import Layout, Pipeline
from tests.training.runs import curve

SHORT = dict(train_iters=3, lr_warmup_iters=1)
FLAGS = (
    "--split 90,10,0 --seq-length 32 --micro-batch-size 1 --global-batch-size 4 --train-iters 3 --lr 1e-3 "
    "--min-lr 1e-4 --lr-warmup-iters 1 --eval-interval 10 --eval-iters 2 --make-vocab-size-divisible-by 4"
)
CASES: dict[str, tuple[str, int, dict[str, Any], str]] = {
    "hugging face": ("hf", 1, {}, ""),
    "hugging face TP2 SP": (
        "hf", 2, dict(tensor_model_parallel_size=2, sequence_parallel=True),
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "legacy PP2 bf16": (
        "legacy", 2, dict(pipeline_model_parallel_size=2, bf16=True), "--pipeline-model-parallel-size 2 --bf16",
    ),
}  # fmt: skip


def command(place: Path, source: Path, save: Path, processes: int, flags: str = "") -> subprocess.CompletedProcess[str]:
    """`pretrain` as a user starts it: only there is a source opened before the processes know of one another."""
    words = [
        *("--load", str(source), "--save", str(save), "--data-path", str(place / "data_text_document")),
        *(*FLAGS.split(), "--nproc-per-node", str(processes), *flags.split()),
    ]
    return subprocess.run([sys.executable, "-m", "megatron_patch", "pretrain", *words], capture_output=True, text=True)


@pytest.fixture(scope="module")
def sources(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    legacy = tmp_path_factory.mktemp("legacy") / "checkpoint"
    layout = Layout(tensor=2, pipeline=Pipeline(2))
    convert(str(workplace / "hf"), str(legacy), Wanted(format="legacy", naming="te", layout=layout))
    return {"hf": workplace / "hf", "legacy": legacy}


@pytest.mark.parametrize("name", CASES)
def test_a_run_from_any_format_is_the_run_from_torch_dist_bit_for_bit(name, run, workplace, sources, tmp_path):
    form, processes, changes, flags = CASES[name]
    ran = command(workplace, sources[form], tmp_path / "save", processes, flags)
    assert ran.returncode == 0, ran.stderr
    assert curve(tmp_path / "save", "loss") == curve(run(processes, **SHORT, **changes), "loss")
    assert (tmp_path / "save" / "huggingface" / "config.json").is_file()


def test_a_directory_without_weights_is_an_error_and_not_a_random_model(workplace, tmp_path):
    (tmp_path / "hf").mkdir()
    for file in (workplace / "hf").iterdir():
        if not file.name.startswith("model"):
            (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    ran = command(workplace, tmp_path / "hf", tmp_path / "save", 1)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr and "weights" in ran.stderr
    assert not (tmp_path / "save").exists()


def test_random_weights_are_for_those_who_ask_for_them(run, workplace):
    asked = run(1, load=None, hf_config=str(workplace / "hf"), **SHORT)
    assert curve(asked, "loss")[0] != curve(run(1, **SHORT), "loss")[0]
