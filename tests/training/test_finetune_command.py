"""`megatron-patch finetune` as a user gives it: from files of conversations to a model that has learned their answers,
and what is wrong is said before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.data.sft.arguments import SftDataArgs
from megatron_patch.data.sft.building import build
from megatron_patch.launch import finetune
from megatron_patch.training.arguments import FinetuneArgs
from tests.guards.cli_surface import parse
from tests.training.runs import curve, make_workplace, train
from tests.workers import WorkerError

BASE = ("--load", "x", "--train-data", "chats.jsonl", "--epochs", "1")


def _conversations(file: Path, count: int, first: int = 0) -> str:
    records = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"the quick fox {i}"}]}
        for i in range(first, first + count)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_workplace(tmp_path_factory.mktemp("command"))
    _conversations(place / "train.jsonl", 40)
    _conversations(place / "valid.jsonl", 9, first=40)
    return place


def settings(place: Path, save: str, **changes: Any) -> FinetuneArgs:
    base: dict[str, Any] = dict(
        load=str(place / "megatron"),
        save=str(place / save),
        train_data=(str(place / "train.jsonl"),),
        valid_data=(str(place / "valid.jsonl"),),
        chat_template="instruction",
        seq_length=256,
        global_batch_size=4,
        epochs=2,
        lr=3e-3,
        make_vocab_size_divisible_by=4,
        data_workers=1,
    )
    return FinetuneArgs(**{**base, **changes})


def test_files_of_conversations_are_learned_by_two_processes(place: Path) -> None:
    args = settings(place, "command", tensor_model_parallel_size=2)
    flags = [
        *("--nproc-per-node", "2", "--tensor-model-parallel-size", "2", "--load", args.load, "--save", args.save),
        *("--train-data", *args.train_data, "--valid-data", *args.valid_data, "--chat-template", "instruction"),
        *("--seq-length", "256", "--global-batch-size", "4", "--epochs", "2", "--lr", "3e-3"),
        *("--make-vocab-size-divisible-by", "4"),
    ]
    command = [sys.executable, "-m", "megatron_patch", "finetune", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train data: 40 samples of 40 records" in done.stderr
    losses = curve(Path(args.save), "validation_loss")
    assert losses[-1] < losses[0] - 0.3


def test_sources_can_come_in_parts_and_more_than_once(place: Path, pool: Any) -> None:
    unpacked: dict[str, Any] = dict(packing=False, epochs=1, valid_data=())
    assert pool.run(train, 1, settings(place, "whole", **unpacked)) == [10]  # 40 samples
    mixed = ("2", str(place / "train.jsonl"), "0.5", str(place / "valid.jsonl"))
    assert pool.run(train, 1, settings(place, "mixed", train_data=mixed, **unpacked)) == [21]  # 2 x 40 + 4


def test_data_that_are_not_there_are_refused_on_every_process(place: Path, pool: Any) -> None:
    with pytest.raises(WorkerError, match=r"(?s)rank 0.*matches no file.*rank 1.*matches no file"):
        pool.run(train, 2, settings(place, "gone", train_data=(str(place / "gone.jsonl"),)))


def test_a_tokenized_set_of_longer_samples_is_refused(place: Path, pool: Any) -> None:
    prefix = str(place / "tokenized")
    build(
        SftDataArgs(
            input=(str(place / "train.jsonl"),),
            output_prefix=prefix,
            tokenizer_model=str(place / "hf"),
            seq_length=256,
            chat_template="instruction",
            overwrite=True,
        ),
        lambda line: None,
    )
    with pytest.raises(WorkerError, match="40 of 40 samples have more than --seq-length 16 tokens"):
        pool.run(train, 1, settings(place, "short", train_data=(prefix,), valid_data=(), seq_length=16))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--load", "x", "--train-data", "a.jsonl"), "how long to train: --train-iters or --epochs"),
        ((*BASE, "--train-iters", "3"), "how long to train: --train-iters or --epochs"),
        (("--load", "x", "--epochs", "1"), "give the training data: --train-data FILE"),
        ((*BASE, "--epochs", "0"), "--epochs 0: must be at least 1"),
        ((*BASE, "--data-workers", "0"), "--data-workers 0: must be at least 1"),
        ((*BASE, "--lr-warmup-fraction", "1"), "--lr-warmup-fraction 1: must lie in"),
        (
            (*BASE, "--lr-warmup-fraction", "0.1", "--lr-warmup-iters", "3"),
            "--lr-warmup-iters and --lr-warmup-fraction",
        ),
        ((*BASE, "--seq-length", "0"), "--seq-length 0: must be at least 1"),
        ((*BASE, "--chat-template", "gone"), "--chat-template 'gone'"),
        (("--load", "x", "--epochs", "1", "--train-data", "2", "a", "b"), "give a weight before every prefix"),
        ((*BASE, "--eval-iters", "-1"), "--eval-iters -1: must not be negative"),
        (("--train-data", "a", "--epochs", "1"), "give where to start: --load"),
    ],
)
def test_what_is_wrong_is_said_by_name(flags: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse(["finetune", *flags]).validate()


def test_batches_that_do_not_fit_are_refused_before_any_process_starts() -> None:
    with pytest.raises(ValueError, match="--global-batch-size 3: must be a multiple of --micro-batch-size 1 x data-p"):
        finetune.check([*BASE, "--global-batch-size", "3"], 2)
    with pytest.raises(ValueError, match="3 processes: must be a multiple of --tensor-model-parallel-size 2"):
        finetune.check([*BASE, "--tensor-model-parallel-size", "2"], 3)
