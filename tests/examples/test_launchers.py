"""Every script in examples/, in every order that it takes: which order is read, what the real parsers make of it under
a fake torchrun, and what is refused. Training itself is tested in tests/training; two tiny runs are in test_runs.py."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.launcher import launch, machines, scripts
from examples.launcher.command import ENVIRONMENT
from examples.launcher.orders import ORDERS, Order
from megatron_patch.launch.processes import OPTION, split_option
from tests.examples.conftest import checkpoint
from tests.guards import readme
from tests.guards.cli_surface import parse
from tests.guards.imports import ROOT

FOLDER = ROOT / "examples"
SCRIPTS = list(scripts.scripts())
CALLS = [(script, order) for script in SCRIPTS for order in script.orders]
Started = list[tuple[list[str], dict[str, str]]]

# Numbers of arguments as cluster users know them, written down from their scripts and not from our table.
COUNTS = {
    "pretrain-2023": 24, "pretrain-te-2023": 25, "pretrain-bloom-2023": 23, "pretrain-chatglm-2023": 25,
    "pretrain-glm130b-2023": 23, "pretrain-enwiki-2023": 21, "pretrain": 24, "pretrain-chatglm": 24,
    "pretrain-moe": 25, "pretrain-ep": 22, "pretrain-ep-te": 23, "mcore": 25, "mcore-ep": 26, "mcore-etp-ep": 27,
    "mcore-etp-emp": 26, "finetune-2023": 22, "finetune-chatglm-2023": 21, "finetune-wgbs-2023": 24,
    "finetune-wgbs-te-2023": 25, "finetune": 22, "finetune-ga": 25, "finetune-ga-moe": 26, "finetune-ga-moe-ep": 27,
    "finetune-ep": 23, "finetune-ep-te": 24, "generate-2023": 19, "generate-bloom-2023": 18,
    "generate-starcoder-2023": 18, "generate": 18, "evaluate-2023": 13, "evaluate-te-2023": 18,
    "evaluate-short-2023": 11, "evaluate-glm130b-2023": 12, "evaluate": 17,
}  # fmt: skip
PLACES = {
    "pretrain-2023": {4: "MODEL_SIZE", 12: "PR", 15: "AC", 16: "DO", 17: "FL", 18: "SP", 20: "DATASET_PATH"},
    "pretrain-te-2023": {18: "SP", 19: "TE", 20: "SAVE_INTERVAL", 25: "OUTPUT_BASEPATH"},
    "pretrain-glm130b-2023": {7: "SEQ_LEN", 8: "GEN_LEN", 9: "LR", 11: "PR", 17: "SP"},
    "pretrain": {3: "MODEL_SIZE", 11: "PR", 15: "DO", 16: "FL", 17: "SP", 18: "TE", 22: "TRAIN_TOKENS"},
    "pretrain-ep": {9: "PR", 12: "EP", 13: "AC", 16: "SP", 18: "DATASET_PATH", 22: "OUTPUT_BASEPATH"},
    "mcore": {12: "CP", 13: "SP", 14: "DO", 15: "FL", 16: "SFT", 17: "AC", 18: "OPTIMIZER_OFFLOAD"},
    "mcore-ep": {13: "EP", 14: "SP", 17: "SFT", 20: "SAVE_INTERVAL", 21: "DATASET_PATH", 22: "VALID_DATASET_PATH"},
    "mcore-etp-ep": {13: "ETP", 14: "EP", 15: "SP", 17: "FL", 18: "SFT", 27: "OUTPUT_BASEPATH"},
    "mcore-etp-emp": {13: "ETP", 14: "EMP", 15: "SP", 16: "DO", 17: "SFT", 26: "OUTPUT_BASEPATH"},
    "finetune-2023": {9: "PAD_LEN", 15: "DO", 16: "FL", 18: "TRAIN_DATASET_PATH", 21: "EPOCH", 22: "OUTPUT_BASEPATH"},
    "finetune-ga": {18: "TE", 19: "SAVE_INTERVAL", 23: "TRAIN_ITERS", 24: "LR_WARMUP_ITERS"},
    "finetune-ga-moe-ep": {19: "MOE", 20: "EP", 27: "OUTPUT_BASEPATH"},
    "generate-2023": {4: "CHECKPOINT_PATH", 12: "TOP_K", 15: "INPUT_FILE", 17: "TOP_P", 19: "REPETITION_PENALTY"},
    "generate-bloom-2023": {4: "TOKENIZER", 10: "PR", 11: "TOP_K", 16: "TOP_P"},
    "evaluate": {8: "PR", 15: "TE", 16: "DATASET_PATH", 17: "PRETRAIN_CHECKPOINT_PATH"},
}


@pytest.fixture
def started(place: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    """A fake torchrun, and a fake command where one process needs none: what would have been started, and with which
    environment."""
    calls: Started = []
    real = launch.megatron_patch

    def execve(path: str, argv: list[str], environment: dict[str, str]) -> None:
        calls.append((argv, dict(environment)))
        raise SystemExit(0)  # as if this process had become torchrun, and that had ended well

    def megatron_patch(argv: list[str]) -> int:
        if "--nproc-per-node" in argv:
            return real(argv)
        calls.append((["megatron-patch", *argv], dict(os.environ)))
        return 0

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(launch, "megatron_patch", megatron_patch)
    return calls


def call(words: str, values: str | list[str]) -> Any:
    """The exit code of a call."""
    try:
        return launch.main([words, *(values.split() if isinstance(values, str) else values)])
    except SystemExit as stopped:
        return stopped.code


def printed(text: str) -> list[str]:
    """The words of the command that was printed."""
    (line,) = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    return shlex.split(line)


def shown(text: str) -> Any:
    """What the real parser makes of the command that was printed."""
    words = printed(text)
    return parse(words[words.index("megatron_patch") + 1 :] if words[0] == "torchrun" else words[1:])


def planned(words: str, values: str | list[str], capsys: Any) -> Any:
    assert call(words, [*(values.split() if isinstance(values, str) else values), "--dry-run"]) == 0
    return shown(capsys.readouterr().out)


def changed(good: str, word: str = "pretrain", **values: str) -> list[str]:
    """A good call in an order with other values."""
    names = [one.name for one in ORDERS[word].arguments]
    words = good.split()
    for name, value in values.items():
        words[names.index(name)] = value
    return words


PRETRAIN = (
    "dsw ../.. 7B 1 16 1e-5 1e-6 2048 80 0 bf16 1 1 sel true true false false 1000"
    " datasets/wudao_text_document ckpts/llama2-7B 100000000 1000000 output"
)
MCORE = (
    "dsw 7B 1 16 1e-5 1e-6 2048 80 bf16 1 1 1 false true true {sft} sel false 1000"
    " {train} {valid} ckpts/llama2-7B {length} output"
)
PRETRAIN_MCORE = MCORE.format(
    sft="false", train="datasets/wudao_text_document", valid="none", length="100000000 1000000"
)
SFT_MCORE = MCORE.format(sft="true", train="datasets/train.json", valid="datasets/valid.json", length="1000 100")
PRETRAIN_MCORE_EP = PRETRAIN_MCORE.replace("1 1 1 false", "1 1 1 1 false")
PRETRAIN_MOE = PRETRAIN.replace("false false 1000", "false false false 1000")
GENERATE = "dsw none ckpts/llama2-7B 7B 1 1 1024 80 0 bf16 10 512 512 datasets/prompts.jsonl out.txt 0 1.0 1.2"
EVALUATE = "dsw none 7B 1 128 80 0 bf16 1 1 sel true true false false datasets/held_out.jsonl ckpts/llama2-7B"


# ----------------------------------------------------------------------------------------------- every script and order


def test_orders_have_the_numbers_and_places_that_their_users_know() -> None:
    assert {order.word: len(order.arguments) for order in ORDERS.values()} == COUNTS
    for word, places in PLACES.items():
        names = {one.number: one.name for one in ORDERS[word].arguments}
        assert {number: names[number] for number in places} == places, word


def test_every_order_has_a_script() -> None:
    assert {order.word for script in SCRIPTS for order in script.orders} == set(ORDERS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda one: f"{one.family.folder}/{one.name}")
def test_a_script_is_as_its_table_says_and_short(script: scripts.Script) -> None:
    assert script.path.read_text() == script.text
    assert len(script.text.splitlines()) <= 30 and os.access(script.path, os.X_OK)
    assert all(re.sub(r"^#   sh .*", "", line) == "" or len(line) <= 120 for line in script.text.splitlines())


def test_no_script_lies_around_that_is_in_no_table() -> None:
    assert set(FOLDER.glob("*/*.sh")) == {script.path for script in SCRIPTS}


@pytest.mark.parametrize(("script", "order"), CALLS, ids=lambda one: getattr(one, "word", None) or one.path.parent.name)
def test_a_script_in_an_order_is_started_as_it_should_be_under_a_fake_torchrun(
    script: scripts.Script, order: Order, started: Started, capsys: Any
) -> None:
    values = script.example(order).split()
    assert call(script.words, values) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"order {order.word}\n")
    by_role = {one.role: value for one, value in zip(order.arguments, values, strict=True)}
    ((argv, environment),) = started
    if order.kind == "generate":
        assert argv[:2] == ["megatron-patch", "generate"]  # one copy of the model is one process here
        args = parse(argv[1:])
    else:
        args = under_torchrun(argv, nodes=1, processes=8)
        assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    args.validate()
    _, flags = split_option(printed(out)[2:], OPTION)
    assert args.load == by_role["checkpoint"] and argv[-len(flags) :] == flags
    assert args.tensor_model_parallel_size == int(by_role["tp"])
    if order.kind in ("pretrain", "either"):
        iters = int(by_role.get("train_tokens") or by_role["train_length"])
        assert args.train_iters == iters // int(by_role["global_batch"]) // int(by_role["seq_len"])
        assert args.data_path == ("datasets/wudao_text_document",) and args.use_distributed_optimizer
    if order.kind == "finetune":
        assert args.train_data == ("datasets/train.json",) and args.packing is False
        assert (args.epochs, args.train_iters) == ((2, None) if "epochs" in by_role else (None, 1000))
    if order.kind in ("pretrain", "either", "finetune"):
        assert (args.lr, args.min_lr, args.bf16, args.weight_decay) == (1e-5, 1e-6, True, 0.1)
        assert args.recompute_granularity == "selective" and args.global_batch_size == (
            int(by_role["global_batch"]) if "global_batch" in by_role else None
        )


def under_torchrun(argv: list[str], nodes: int, processes: int) -> Any:
    """What torch's own parser, and then ours, make of a command; the latter's arguments."""
    from torch.distributed.run import parse_args

    assert argv[1:3] == ["-m", "megatron_patch.launch.torchrun"]
    arguments = parse_args(argv[3:])
    assert (int(arguments.nnodes.split(":")[-1]), int(arguments.nproc_per_node)) == (nodes, processes)
    assert arguments.module and arguments.training_script == "megatron_patch"
    return parse(arguments.training_script_args)


# --------------------------------------------------------------------------------------- the predecessor's own examples

EXAMPLES = {
    "pretrain": "dlc Megatron-LM ../.. 7B 1 16 1e-5 1e-6 2048 80 0 fp16 1 1 sel true false false 100000"
    " datasets/wudao_text_document ckpts/llama2-7B 100000000 10000 out",
    "finetune": "dlc Megatron-LM ../.. 7B 1 1e-5 1e-6 2048 80 0 fp16 1 1 sel true false false datasets/train.json"
    " datasets/valid.json ckpts/llama2-7B 2 out",
    "text_generation": "dsw Megatron-LM ../.. ckpts/llama2-7B 7B 1 1 1024 1024 0 fp16 10 512 512"
    " datasets/prompts.jsonl out.txt 0 1.0 1.2",
}


@pytest.mark.parametrize("folder", ["llama", "llama2"])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_documented_examples_work_as_written(
    folder: str, kind: str, started: Started, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = next(one.words for one in SCRIPTS if one.path.match(f"{folder}/run_{kind}_megatron_llama.sh"))
    cluster = dict(WORLD_SIZE="2", RANK="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="23456")
    for name, value in {**cluster, "KUBERNETES_CONTAINER_RESOURCE_GPU": "8"}.items():
        monkeypatch.setenv(name, value)
    assert call(words, EXAMPLES[kind]) == 0
    ((argv, environment),) = started
    if kind == "text_generation":
        args = parse(argv[1:])
        assert (args.max_new_tokens, args.top_k, args.top_p, args.repetition_penalty) == (512, 10, 1.0, 1.2)
        assert (args.prompts_file, args.prompt_key, args.output) == ("datasets/prompts.jsonl", "query", "out.txt")
        assert args.dtype == "float16" and "RANK" not in environment
        return
    args = under_torchrun(argv, nodes=2, processes=8)
    assert argv[argv.index("--node-rank") + 1] == "1" and argv[argv.index("--master-addr") + 1] == "10.0.0.1"
    assert args.fp16 and args.use_distributed_optimizer and not args.sequence_parallel
    if kind == "pretrain":
        assert (args.train_iters, args.lr_warmup_iters, args.seq_length) == (3051, 0, 2048)
        assert (args.lr_decay_style, args.split, args.save_interval) == ("linear", "98,2,0", 100000)
    else:
        assert (args.epochs, args.seq_length, args.valid_data) == (2, 80, ("datasets/valid.json",))


def test_the_documented_conversion_works_as_written_too(place: Path, capsys: Any) -> None:
    from toolkits.model_checkpoints_convertor import convert

    (place / "llama2-7b-hf").mkdir()
    (place / "llama2-7b-hf/config.json").write_text((place / "ckpts/llama2-7B/huggingface/config.json").read_text())
    words = "Megatron-LM llama2-7b-hf llama2-7b-hf-to-megatron-tp1-pp1 1 1 llama-7b 0 false --dry-run"
    assert convert.main(["2023", *words.split()]) == 0
    assert "$ megatron-patch convert --source llama2-7b-hf" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- which order a call is in


FINETUNE_2023 = EXAMPLES["finetune"].replace("dlc", "dsw")
FINETUNE = FINETUNE_2023.replace(" Megatron-LM", "").replace("false false", "false false false")


@pytest.mark.parametrize(
    ("words", "values", "order"),
    [
        ("pretrain,pretrain-2023", PRETRAIN, "pretrain"),
        ("pretrain-2023,pretrain", PRETRAIN, "pretrain"),
        ("pretrain,pretrain-2023", EXAMPLES["pretrain"].replace("dlc", "dsw"), "pretrain-2023"),
        ("finetune,finetune-2023", FINETUNE_2023, "finetune-2023"),
        ("finetune,finetune-2023", FINETUNE, "finetune"),
        ("generate,generate-2023", EXAMPLES["text_generation"], "generate-2023"),
        ("generate,generate-2023", EXAMPLES["text_generation"].replace(" Megatron-LM", ""), "generate"),
    ],
)
def test_orders_that_share_a_script_are_told_apart(words: str, values: str, order: str, place: Path, capsys) -> None:
    assert call(words, [*values.split(), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(f"order {order}\n")


@pytest.mark.parametrize("wrong", [{"PR": "bf61"}, {"MODEL_SIZE": "seven"}, {"LR": "fast"}, {"TP": "0", "PP": "0"}])
def test_a_wrong_value_does_not_turn_a_call_into_another_order(wrong: dict[str, str], place: Path, capsys) -> None:
    assert call("pretrain-2023,pretrain", changed(PRETRAIN, **wrong)) == 2
    err = capsys.readouterr().err
    assert err.startswith("order pretrain\n") and err.count("error: argument") == len(wrong)


def test_moonlights_two_orders_differ_by_an_argument(place: Path, capsys) -> None:
    shorter = "dsw A3B 1 8 1e-5 1e-6 128 128 bf16 1 1 1 1 1 false true false sel false 100"
    longer = shorter.replace("true false sel", "true true false sel")
    tail = "datasets/wudao_text_document none ckpts/moonlight-A3B 100000 1000 output"
    for head, word in ((shorter, "mcore-etp-emp"), (longer, "mcore-etp-ep")):
        assert call("mcore-etp-emp,mcore-etp-ep", f"{head} {tail} --dry-run") == 0
        assert capsys.readouterr().out.startswith(f"order {word}\n")


# ---------------------------------------------------------------------------------------------------- wrong invocations

AT_LEAST_1, AT_LEAST_0 = (f"must be a whole number of at least {least}" for least in (1, 0))
BOOL = "choose true or false"
WRONG_VALUES = [
    ("ENV", "k8s", "choose dsw, dlc, slurm or cpu"),
    ("MEGATRON_PATCH_PATH", "datasets", "must be a directory with megatron_patch/ in it, or none"),
    ("MODEL_SIZE", "big", "must have a size in it, such as 7B, 0.5B, 8x7B or A3B"),
    ("BATCH_SIZE", "0", AT_LEAST_1),
    ("GLOBAL_BATCH_SIZE", "1.5", AT_LEAST_1),
    ("GLOBAL_BATCH_SIZE", "12", "must be a multiple of argument 4 BATCH_SIZE x 8 data-parallel processes = 8"),
    ("LR", "1e-5x", "must be a number above 0"),
    ("LR", "nan", "must be a number above 0"),
    ("LR", "-1e-5", "must be a number above 0"),
    ("MIN_LR", "1e-4", "must not be above argument 6 LR=1e-5"),
    ("SEQ_LEN", "2k", AT_LEAST_1),
    ("PAD_LEN", "²", AT_LEAST_0),
    ("EXTRA_VOCAB_SIZE", "-1", AT_LEAST_0),
    ("PR", "bf61", "choose fp16, bf16, fp32 or fp8"),
    ("PR", "fp8", "FP8 takes Transformer Engine's layers, which are not used here yet; choose bf16"),
    ("TP", "three", AT_LEAST_1),
    ("AC", "select", "choose sel, full, none, false or offload"),
    ("AC", "offload", "activations on the CPU are not supported yet; choose full, sel or none"),
    ("DO", "yes", BOOL),
    ("FL", "True", BOOL),
    ("TE", "1", BOOL),
    ("SAVE_INTERVAL", "0", AT_LEAST_1),
    ("DATASET_PATH", "datasets/gone", "must be the prefix of a .bin and .idx (without either)"),
    ("DATASET_PATH", "datasets/wudao_text_document.bin", "must be the prefix of a .bin and .idx (without either)"),
    ("DATASET_PATH", "0.5 datasets/wudao_text_document datasets/english_text_document", "must be the prefix of"),
    ("PRETRAIN_CHECKPOINT_PATH", "gone", "must be a directory that exists, or none"),
    ("PRETRAIN_CHECKPOINT_PATH", "datasets", "no Megatron checkpoint (latest_checkpointed_iteration.txt is missing)"),
    ("PRETRAIN_CHECKPOINT_PATH", "legacy", "does not say what model it is: put config.json and the tokenizer into leg"),
    ("PRETRAIN_CHECKPOINT_PATH", "torn", "the checkpoint directory torn/iter_0000007 does not exist"),
    ("PRETRAIN_CHECKPOINT_PATH", "bare", "does not say what model it is: put config.json and the tokenizer into bare/"),
    ("PRETRAIN_CHECKPOINT_PATH", "none", "random weights need the environment variable HF_CONFIG: a directory with"),
    ("TRAIN_TOKENS", "1e9", AT_LEAST_1),
    ("TRAIN_TOKENS", "32767", "less than one iteration: GLOBAL_BATCH_SIZE x SEQ_LEN = 32768 tokens"),
    ("WARMUP_TOKENS", "100000000", "a warm-up of 3051 iterations must end before the last of 3051"),
    ("OUTPUT_BASEPATH", "datasets/train.json", "must not be a file"),
]
"""Of the order pretrain: name, value, rule."""


@pytest.mark.parametrize(("name", "value", "rule"), WRONG_VALUES)
def test_a_wrong_value_is_named_with_its_number_and_rule(
    name: str, value: str, rule: str, place: Path, capsys: Any
) -> None:
    (place / "legacy/release/mp_rank_00").mkdir(parents=True)
    (place / "legacy/latest_checkpointed_iteration.txt").write_text("release")
    (checkpoint(place / "torn") / "latest_checkpointed_iteration.txt").write_text("7")
    (checkpoint(place / "bare") / "huggingface/config.json").unlink()
    assert call("pretrain,pretrain-2023", PRETRAIN + " --dry-run") == 0
    capsys.readouterr()
    assert call("pretrain,pretrain-2023", [*changed(PRETRAIN, **{name: value}), "--dry-run"]) == 2
    captured = capsys.readouterr()
    (number,) = [one.number for one in ORDERS["pretrain"].arguments if one.name == name]
    message = f"launch.py pretrain,pretrain-2023: error: argument {number} {name}={value!r}: {rule}"
    assert message in captured.err and "$ megatron-patch" not in captured.out


@pytest.mark.parametrize("form", ["hugging face", "legacy"])
@pytest.mark.parametrize(
    ("word", "good", "name"),
    [("pretrain", PRETRAIN, "PRETRAIN_CHECKPOINT_PATH"), ("generate", GENERATE, "CHECKPOINT_PATH")],
)
def test_checkpoints_of_every_format_are_read(
    form: str, word: str, good: str, name: str, place: Path, capsys: Any
) -> None:
    source = checkpoint(place / "source")
    if form == "hugging face":
        source = source / "huggingface"
    else:
        shutil.rmtree(source / "release", ignore_errors=True)
        (source / "release/mp_rank_00").mkdir(parents=True)
    path = str(source.relative_to(place))
    assert call(word, [*changed(good, word, **{name: path}), "--dry-run"]) == 0
    assert f"--load {path} " in capsys.readouterr().out


WRONG_IN_OTHER_ORDERS = [
    ("mcore", PRETRAIN_MCORE, "CP", "2", "context parallelism is not supported yet; choose 1"),
    ("mcore", PRETRAIN_MCORE, "OPTIMIZER_OFFLOAD", "auto", "the optimizer on the CPU is not supported yet"),
    ("mcore", PRETRAIN_MCORE, "OPTIMIZER_OFFLOAD", "0.5", "the optimizer on the CPU is not supported yet"),
    ("mcore", PRETRAIN_MCORE, "OPTIMIZER_OFFLOAD", "maybe", "must be false, static, auto or a share between 0 and 1"),
    ("mcore", PRETRAIN_MCORE, "SFT", "1", BOOL),
    ("mcore", PRETRAIN_MCORE, "DATASET_PATH", "datasets/train.json", "pretraining reads indexed data: must be the"),
    ("mcore", PRETRAIN_MCORE, "VALID_DATASET_PATH", "datasets/valid.json", "pretraining reads indexed data: must be"),
    ("mcore", SFT_MCORE, "WARMUP_TOKENS_OR_ITERS", "1000", "a warm-up of 1000 iterations must end before the last of"),
    ("mcore-ep", PRETRAIN_MCORE_EP, "EP", "2", "the model has no experts; choose 1"),
    ("pretrain-moe", PRETRAIN_MOE, "MOE", "true", "making a mixture of experts of a dense model is not supported"),
    ("generate", GENERATE, "INPUT_FILE", "none", "a benchmark without prompts is not supported; give a .jsonl or .txt"),
    ("generate", GENERATE, "INPUT_FILE", "datasets/train.json", "must be a .jsonl or .txt file that exists"),
    ("generate", GENERATE, "INPUT_FILE", "misnamed.txt", "holds JSON objects with `query`; give it a name that ends"),
    ("generate", GENERATE, "OUTPUT_FILE", "datasets", "must not be a directory"),
    ("generate", GENERATE, "TOP_P", "1.5", "must be a number between 0 and 1"),
    ("generate", GENERATE, "TEMPERATURE", "-1", "must be a number of at least 0"),
    ("generate", GENERATE, "CHECKPOINT_PATH", "none", "`megatron-patch generate` needs a checkpoint"),
    ("evaluate", EVALUATE, "PRETRAIN_CHECKPOINT_PATH", "none", "`megatron-patch evaluate` needs a checkpoint"),
    ("evaluate", EVALUATE, "DATASET_PATH", "datasets/train.json", "its records have instruction, output; say which is"),
    ("evaluate", EVALUATE, "PR", "fp8", "FP8 takes Transformer Engine's layers"),
]


@pytest.mark.parametrize(("word", "good", "name", "value", "rule"), WRONG_IN_OTHER_ORDERS)
def test_a_wrong_value_is_named_in_other_orders_too(
    word: str, good: str, name: str, value: str, rule: str, place: Path, capsys: Any
) -> None:
    (place / "misnamed.txt").write_text('{"query": "a"}\n')
    assert call(word, good + " --dry-run") == 0
    capsys.readouterr()
    assert call(word, [*changed(good, word, **{name: value}), "--dry-run"]) == 2
    (number,) = [one.number for one in ORDERS[word].arguments if one.name == name]
    assert f"error: argument {number} {name}={value!r}: {rule}" in capsys.readouterr().err


SHORTER_BY_ONE = PRETRAIN.rpartition(" ")[0]
WRONG_COUNTS = [
    (
        "pretrain,pretrain-2023",
        SHORTER_BY_ONE,
        "order pretrain takes 24 arguments, not 23; missing: 24 OUTPUT_BASEPATH",
    ),
    ("pretrain,pretrain-2023", SHORTER_BY_ONE, "under the same name: order pretrain-2023 takes 24"),
    (
        "pretrain,pretrain-2023",
        EXAMPLES["pretrain"].rpartition(" ")[0],
        "order pretrain-2023 takes 24 arguments, not 23",
    ),
    ("pretrain,pretrain-te-2023", PRETRAIN + " x y", "takes 25 arguments, not 26; too many: y"),
    ("pretrain,pretrain-2023", "", "takes 24 arguments, not 0; missing: 1 ENV, 2 "),
    ("pretrain-3000", "", "unknown order 'pretrain-3000'; choose one of pretrain-2023, "),
    ("pretrain,pretrain-3000", "", "unknown order 'pretrain,pretrain-3000'"),
    (
        "pretrain",
        " ".join(changed(PRETRAIN, TP="3")),
        "8 processes: must be a multiple of --tensor-model-parallel-size 3",
    ),
    ("generate", GENERATE.replace("out.txt 0", "out.txt 0.9"), "argument 11 TOP_K='10': this or argument 16 TOP_P=0.9"),
]


@pytest.mark.parametrize(("words", "values", "message"), WRONG_COUNTS)
def test_a_wrong_number_of_arguments_is_named(words: str, values: str, message: str, place: Path, capsys: Any) -> None:
    assert call(words, values) == 2
    assert message in capsys.readouterr().err


def test_an_empty_value_is_named(place: Path, capsys: Any) -> None:
    assert call("pretrain", changed(PRETRAIN, SP="")) == 2
    assert "argument 17 SP='': is empty" in capsys.readouterr().err


def test_text_is_sent_to_preprocess(place: Path, capsys: Any) -> None:
    assert call("pretrain", changed(PRETRAIN, DATASET_PATH="datasets/train.json")) == 2
    assert "text goes through `megatron-patch preprocess` first" in capsys.readouterr().err


def test_all_wrong_arguments_are_named_at_once_and_marked(place: Path, capsys) -> None:
    assert call("pretrain", changed(PRETRAIN, PR="bf61", AC="select", TRAIN_TOKENS="1e9")) == 2
    err = capsys.readouterr().err
    assert re.findall(r"error: argument (\d+)", err) == ["11", "14", "22"] and err.count("<- wrong") == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("NPROC_PER_NODE", "two", "NPROC_PER_NODE='two': must be a whole number of at least 1"),
        ("MP_VP", "2", "MP_VP='2': virtual pipeline stages are not supported in training yet"),
        ("MP_PP0_LAYERS", "2", "MP_PP0_LAYERS='2': an uneven first stage is not supported in training yet"),
        ("MP_SAVE_SAFE_TENSORS", "true", "MP_SAVE_SAFE_TENSORS='true': `megatron-patch convert` writes them"),
        ("MP_SFT_PACKING", "yes", "MP_SFT_PACKING='yes': choose true or false"),
        ("MP_DATASET_TYPE", "mmap", "MP_DATASET_TYPE='mmap': choose idxmap or raw"),
        ("MP_DATASET_TYPE", "raw", "MP_DATASET_TYPE='raw': argument 20 DATASET_PATH is indexed data; unset it"),
        ("MP_AC_LAYERS", "0", "MP_AC_LAYERS='0': must be a whole number of at least 1"),
        ("LAUNCH_ARGS", "'", "LAUNCH_ARGS: No closing quotation"),
        ("DRY_RUN", "yes", "DRY_RUN='yes': choose 0 or 1"),
    ],
)
def test_a_wrong_environment_variable_is_named(name, value, message, place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv(name, value)
    assert call("pretrain", PRETRAIN) == 2
    assert f"environment variable {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "values"), [("pretrain", PRETRAIN), ("mcore", SFT_MCORE), ("generate", GENERATE), ("evaluate", EVALUATE)]
)
def test_what_becomes_of_every_environment_variable_is_said(word: str, values: str, place: Path, monkeypatch, capsys):
    given = {"NPROC_PER_NODE": "8", "HF_CONFIG": "x", "MP_AC_LAYERS": "2", "MP_SFT_PACKING": "true", "TEXT_KEY": "text"}
    given |= {
        "MP_SAVE_SAFE_TENSORS": "false",
        "CHAT_TEMPLATE": "chatml",
        "LAUNCH_ARGS": "--tensor-model-parallel-size=1",
    }
    given |= {"RECIPE": "r.yaml", "DRY_RUN": "1", "MP_DATASET_TYPE": "raw" if word == "mcore" else "idxmap"}
    assert set(given) | {"MP_VP", "MP_PP0_LAYERS"} == set(ENVIRONMENT)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert call(word, values) == 0
    assert set(re.findall(r"^  env +(\w+)", capsys.readouterr().out, re.MULTILINE)) == set(given)


def test_a_flag_that_the_command_does_not_have_is_refused(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("LAUNCH_ARGS", "--keep-lats 2")
    assert call("pretrain", PRETRAIN + " --dry-run") == 2
    assert "--keep-lats" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- where it runs

DLC = dict(WORLD_SIZE="4", RANK="3", MASTER_ADDR="m", MASTER_PORT="29500", KUBERNETES_CONTAINER_RESOURCE_GPU="8")
WUDAO, ENGLISH = "datasets/wudao_text_document", "datasets/english_text_document"
SLURM = dict(
    SLURM_NNODES="2", SLURM_NODEID="1", SLURM_JOB_NODELIST="gpu[003-006,9]", SLURM_JOB_ID="123456",
    SLURM_GPUS_ON_NODE="8", SLURM_LOCALID="0",
)  # fmt: skip


GPUS_BY_TYPE = {**SLURM, "SLURM_GPUS_ON_NODE": "", "SLURM_GPUS_PER_NODE": "a100:4"}


@pytest.mark.parametrize(
    ("place_word", "environment", "expected"),
    [
        ("dsw", {}, machines.Machines(8)),
        ("dsw", {"NPROC_PER_NODE": "3"}, machines.Machines(3)),
        ("cpu", {}, machines.Machines(4, gpus=False)),
        ("cpu", {"NPROC_PER_NODE": "8"}, machines.Machines(8, gpus=False)),
        ("dlc", DLC, machines.Machines(8, 4, 3, "m", 29500)),
        ("dlc", {**DLC, "NPROC_PER_NODE": "2"}, machines.Machines(2, 4, 3, "m", 29500)),
        ("dlc", dict(WORLD_SIZE="1", RANK="0", KUBERNETES_CONTAINER_RESOURCE_GPU="4"), machines.Machines(4)),
        ("slurm", SLURM, machines.Machines(8, 2, 1, "gpu003", 23456)),
        ("slurm", {**SLURM, "MASTER_ADDR": "m", "MASTER_PORT": "1"}, machines.Machines(8, 2, 1, "m", 1)),
        ("slurm", GPUS_BY_TYPE, machines.Machines(4, 2, 1, "gpu003", 23456)),
        ("slurm", dict(SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0", SLURM_GPUS_ON_NODE="2"), machines.Machines(2)),
    ],
)  # fmt: skip
def test_env_becomes_machines(place_word: str, environment: dict[str, str], expected, monkeypatch) -> None:
    monkeypatch.setattr(machines, "num_gpus", lambda environment: 8)
    assert replace(machines.machines(place_word, environment, 4), note="") == expected


@pytest.mark.parametrize(
    ("place_word", "environment", "messages"),
    [
        ("dlc", {}, [f"{name} is not set" for name in DLC]),
        ("dlc", {**DLC, "RANK": "4"}, ["RANK=4: must be less than WORLD_SIZE=4, the number of nodes"]),
        ("dlc", {**DLC, "MASTER_PORT": "x"}, ["MASTER_PORT='x': must be a whole number of at least 1"]),
        ("slurm", {}, ["SLURM_JOB_NUM_NODES is not set", "SLURM_NODEID is not set", "started by srun"]),
        ("slurm", {**SLURM, "SLURM_LOCALID": "1"}, ["SLURM_LOCALID=1: start one task on each node"]),
        ("slurm", {**SLURM, "SLURM_GPUS_ON_NODE": "many"}, ["SLURM_GPUS_ON_NODE='many': must be a whole number"]),
    ],
)  # fmt: skip
def test_what_a_cluster_does_not_say_is_named(place_word: str, environment: dict[str, str], messages) -> None:
    with pytest.raises(ValueError) as error:
        machines.machines(place_word, environment, 1)
    assert all(message in str(error.value) for message in messages)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[003-006,9],cpu1", "gpu003"), ("a1,b2", "a1"), ("n-1-[7,9]-ib", "n-1-7-ib"), ("login", "login")],
)  # fmt: skip
def test_the_first_host_of_a_list_is_that_of_slurm(nodes: str, first: str) -> None:
    assert machines.first_host(nodes) == first


def test_gpus_are_counted_by_what_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [Path(f"/dev/{name}") for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm")]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(devices))
    assert machines.num_gpus({}) == 3
    assert machines.num_gpus({"CUDA_VISIBLE_DEVICES": "0,2"}) == 2
    assert machines.num_gpus({"CUDA_VISIBLE_DEVICES": ""}) == machines.num_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == 0


def test_a_node_of_several_is_told_the_address_of_the_first(started: Started, monkeypatch, capsys) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert call("pretrain", changed(PRETRAIN, ENV="slurm")) == 0
    ((argv, environment),) = started
    args = under_torchrun(argv, nodes=2, processes=8)
    torchrun = argv[3 : argv.index("megatron_patch")]
    assert torchrun[-2:] == ["23456", "-m"] and "gpu003" in torchrun and "--standalone" not in torchrun
    assert args == shown(capsys.readouterr().out) and environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "600"


def test_on_the_cpu_no_gpu_is_seen_and_processes_share_the_cores(started: Started, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert call("pretrain", changed(PRETRAIN, ENV="cpu", TP="2", PP="2")) == 0
    ((argv, environment),) = started
    args = under_torchrun(argv, nodes=1, processes=4)
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("", "2")


def test_without_a_gpu_dsw_runs_on_the_cpu_and_says_so(started: Started, monkeypatch, capsys) -> None:
    monkeypatch.setattr(machines, "num_gpus", lambda environment: 0)
    assert call("pretrain", changed(PRETRAIN, TP="2", SP="true")) == 0
    assert "warning: ENV=dsw, but there is no GPU here: it runs on the CPU" in capsys.readouterr().out
    ((argv, _),) = started
    assert under_torchrun(argv, nodes=1, processes=2).sequence_parallel


def test_experts_need_processes_of_their_own_on_the_cpu(place: Path, capsys) -> None:
    checkpoint(place / "moe", model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    words = (
        PRETRAIN_MCORE.replace("1 1 1 false", "1 1 1 4 false").replace("dsw", "cpu").replace("ckpts/llama2-7B", "moe")
    )
    args = planned("mcore-ep", words, capsys)
    assert args.expert_model_parallel_size == 4
    assert call("mcore-ep", words + " --dry-run") == 0 and "--nproc-per-node 4" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- what becomes of a call


@pytest.mark.parametrize(
    ("tokens", "batch", "sequence"), [(100000000, 16, 2048), (10**12 - 1, 48, 4095), (70000, 8, 2048)]
)
def test_tokens_become_iterations_as_a_shell_computes_them(
    tokens: int, batch: int, sequence: int, place: Path, capsys: Any
) -> None:
    script = f"echo $(( {tokens} / {batch} / {sequence} ))"
    expected = int(subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout)
    words = changed(
        PRETRAIN, TRAIN_TOKENS=str(tokens), GLOBAL_BATCH_SIZE=str(batch), SEQ_LEN=str(sequence), WARMUP_TOKENS="0"
    )
    assert planned("pretrain", words, capsys).train_iters == expected


def test_sft_reads_the_lengths_as_iterations_and_ends_the_decay_early(place: Path, capsys) -> None:
    args = planned("mcore", SFT_MCORE, capsys)
    assert (args.train_iters, args.lr_warmup_iters, args.lr_decay_iters) == (1000, 100, 900)
    assert args.train_data == ("datasets/train.json",) and args.valid_data == ("datasets/valid.json",)
    assert planned("mcore", PRETRAIN_MCORE, capsys).train_iters == 100000000 // 16 // 2048


def test_records_stand_in_rows_of_pad_len_unless_they_are_packed(place: Path, monkeypatch, capsys) -> None:
    args = planned("mcore", SFT_MCORE, capsys)
    assert (args.seq_length, args.packing) == (80, False)
    monkeypatch.setenv("MP_SFT_PACKING", "true")
    args = planned("mcore", SFT_MCORE, capsys)
    assert (args.seq_length, args.packing) == (2048, True)
    for suffix in (".bin", ".idx"):
        (place / f"tokenized{suffix}").touch()
    monkeypatch.delenv("MP_SFT_PACKING")
    args = planned("mcore", SFT_MCORE.replace("datasets/train.json", "tokenized"), capsys)
    assert (args.seq_length, args.train_data) == (2048, ("tokenized",))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (WUDAO, [WUDAO]),
        (f"0.7 {WUDAO} 0.3 {ENGLISH}", ["0.7", WUDAO, "0.3", ENGLISH]),
        (f"{WUDAO} {ENGLISH}", [WUDAO, ENGLISH]),
        ("datasets", [ENGLISH, WUDAO]),
    ],
)  # fmt: skip
def test_data_is_a_prefix_a_blend_or_a_directory(given: str, expected: list[str], place: Path, capsys) -> None:
    (place / "datasets/wudao_text_document").mkdir()  # training keeps its cache there
    assert list(planned("pretrain", changed(PRETRAIN, DATASET_PATH=given), capsys).data_path) == expected


def test_records_take_the_tokenizers_own_template_or_the_predecessors_prompt(place: Path, monkeypatch, capsys) -> None:
    assert planned("mcore", SFT_MCORE, capsys).chat_template == "instruction"
    config = place / "ckpts/llama2-7B/huggingface/tokenizer_config.json"
    config.write_text('{"chat_template": "{{ messages }}"}')
    assert planned("mcore", SFT_MCORE, capsys).chat_template == "tokenizer"
    config.write_text("{}")
    (config.parent / "chat_template.json").touch()  # a processor's, which a tokenizer does not read
    assert planned("mcore", SFT_MCORE, capsys).chat_template == "instruction"
    (config.parent / "chat_template.jinja").touch()
    assert planned("mcore", SFT_MCORE, capsys).chat_template == "tokenizer"
    monkeypatch.setenv("CHAT_TEMPLATE", "chatml")
    assert planned("mcore", SFT_MCORE, capsys).chat_template == "chatml"


def test_records_may_be_a_blend_too(place: Path, capsys) -> None:
    words = SFT_MCORE.split()
    words[19] = "2 datasets/train.json 0.5 datasets/valid.json"
    assert planned("mcore", words, capsys).train_data == tuple(words[19].split())


def test_validation_data_of_its_own_is_used(place: Path, capsys) -> None:
    args = planned("mcore", PRETRAIN_MCORE.replace("none", "datasets/english_text_document"), capsys)
    assert args.valid_data_path == ("datasets/english_text_document",) and args.split is None
    args = planned("mcore", PRETRAIN_MCORE.replace("none", "datasets/wudao_text_document"), capsys)
    assert args.data_path == ("datasets/wudao_text_document",) and args.split == "99,1,0"


def test_random_weights_begin_with_a_config(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_CONFIG", "ckpts/llama2-7B/huggingface")
    args = planned("pretrain", changed(PRETRAIN, PRETRAIN_CHECKPOINT_PATH="none"), capsys)
    assert (args.hf_config, args.load) == ("ckpts/llama2-7B/huggingface", None)
    monkeypatch.setenv("HF_CONFIG", "datasets")
    assert call("pretrain", changed(PRETRAIN, PRETRAIN_CHECKPOINT_PATH="none")) == 2
    assert (
        "environment variable HF_CONFIG='datasets': must be a directory with a config.json" in capsys.readouterr().err
    )


def test_the_size_is_compared_and_never_used(place: Path, capsys) -> None:
    assert call("pretrain", PRETRAIN + " --dry-run") == 0
    fitting = capsys.readouterr().out
    assert "it makes about 6.74B" in fitting and "warning" not in fitting
    assert call("pretrain", [*changed(PRETRAIN, MODEL_SIZE="70B"), "--dry-run"]) == 0
    other = capsys.readouterr().out
    assert "warning: argument 3 MODEL_SIZE='70B' promises 70B parameters, but config.json makes about 6.74B" in other
    without_names = [re.sub(r"llama-\w+-lr", "llama-lr", text.partition("\n$")[2]) for text in (fitting, other)]
    assert without_names[0] == without_names[1]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("sel", ("selective", 1)), ("full", ("full", 3)), ("none", (None, 1)), ("false", (None, 1))],
)
def test_ac_chooses_what_is_recomputed(asked: str, expected, place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MP_AC_LAYERS", "3")
    args = planned("pretrain", changed(PRETRAIN, AC=asked), capsys)
    assert (args.recompute_granularity, args.recompute_num_layers) == expected


@pytest.mark.parametrize(
    ("asked", "expected"), [("fp16", (True, False)), ("bf16", (False, True)), ("fp32", (False, False))]
)
def test_pr_chooses_the_precision(asked: str, expected: tuple[bool, bool], place: Path, capsys) -> None:
    args = planned("pretrain", changed(PRETRAIN, PR=asked), capsys)
    assert (args.fp16, args.bf16) == expected


def test_sequence_parallelism_takes_tensor_parallelism(place: Path, capsys) -> None:
    assert not planned("pretrain", changed(PRETRAIN, SP="true"), capsys).sequence_parallel
    assert planned("pretrain", changed(PRETRAIN, SP="true", TP="2"), capsys).sequence_parallel
    assert not planned("pretrain", changed(PRETRAIN, DO="false"), capsys).use_distributed_optimizer


def test_transformer_engine_is_a_warning(place: Path, capsys) -> None:
    assert call("pretrain", [*changed(PRETRAIN, TE="true"), "--dry-run"]) == 0
    assert "warning: argument 18 TE=true: Transformer Engine's layers are not used yet" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_is_gone_on_from(place: Path, capsys) -> None:
    (place / "ckpts/llama2-7B/release").rename(place / "ckpts/llama2-7B/iter_0000500")
    (place / "ckpts/llama2-7B/latest_checkpointed_iteration.txt").write_text("500")
    assert call("pretrain", PRETRAIN + " --dry-run") == 0
    assert "--load ckpts/llama2-7B: goes on from its iteration 500, optimizer and all" in capsys.readouterr().out


def test_runs_with_other_arguments_do_not_meet(place: Path, capsys) -> None:
    changes = ({}, {"LR": "2e-5"}, {"TP": "2"}, {"PR": "fp16"}, {"TRAIN_TOKENS": "200000000"})
    saves = {planned("pretrain", changed(PRETRAIN, **change), capsys).save for change in changes}
    assert len(saves) == 5 and all(save.startswith("output/checkpoint/pretrain-llama-7B-lr-") for save in saves)


@pytest.mark.parametrize(
    ("record", "key", "expected"),
    [({"text": "a"}, "", "text"), ({"content": "a", "id": 1}, "", "content"), ({"body": "a"}, "body", "body")],
)
def test_evaluation_finds_the_text_or_is_told(
    record, key: str, expected: str, place: Path, monkeypatch, capsys
) -> None:
    (place / "datasets/held_out.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.setenv("TEXT_KEY", key)
    script = next(one for one in SCRIPTS if one.words.startswith("evaluate,"))
    args = planned("evaluate", script.example(ORDERS["evaluate"]), capsys)
    assert (args.text_key, args.data, args.dtype) == (expected, ("datasets/held_out.jsonl",), "bfloat16")


def test_more_flags_come_from_the_environment(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("LAUNCH_ARGS", "--keep-last 2 --weight-decay 0.01")
    args = planned("pretrain", PRETRAIN, capsys)
    assert (args.keep_last, args.weight_decay) == (2, 0.01)


# ------------------------------------------------------------------------------------------------------------ the shell


def shell(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, **environment}
    return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=60)


def test_a_script_runs_from_anywhere_in_sh_and_bash(place: Path) -> None:
    script = FOLDER / "llama2/run_pretrain_megatron_llama.sh"
    done = shell("sh", str(script), *PRETRAIN.split(), cwd=place, DRY_RUN="1", NPROC_PER_NODE="8")
    assert done.returncode == 0, done.stderr
    assert "$ megatron-patch pretrain --nproc-per-node" in done.stdout and "dry run" in done.stdout
    absolute = [str((place / word).resolve()) if "/" in word else word for word in PRETRAIN.split()]
    absolute[19] = str(place / "datasets/wudao_text_document")
    beside = shell("bash", script.name, *absolute, "--dry-run", cwd=script.parent)
    assert beside.returncode == 0, beside.stderr
    assert not (place / "output").exists()


def test_a_script_passes_on_words_as_they_are_and_the_exit_code(place: Path) -> None:
    done = shell("sh", str(FOLDER / "qwen3/run_mcore_qwen3.sh"), "a b", "*", "", cwd=place)
    assert done.returncode == 2
    assert "takes 27 arguments, not 3" in done.stderr and "ENV" in done.stderr and "a b" in done.stderr


def test_help_lists_the_orders_and_explains_one(capsys) -> None:
    assert launch.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {word} " in out for word in ORDERS)
    assert launch.main(["mcore-etp-ep", "--help"]) == 0
    assert "order mcore-etp-ep: 27 arguments" in capsys.readouterr().out
    assert launch.main([]) == 2 and "name an order" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the READMEs

READMES = ["README.md", "README.zh-CN.md"]


@pytest.mark.parametrize("name", READMES)
def test_the_tables_of_a_readme_are_those_of_the_program(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert scripts.with_tables(text) == text
    assert scripts.table_of_scripts() in text and scripts.table_of_orders() in text


@pytest.mark.parametrize("name", READMES)
def test_every_command_in_a_readme_is_one_that_is_accepted(name: str, place: Path, capsys) -> None:
    calls = re.findall(r"^sh (run_\w+\.sh) ([^#\n]+)", (FOLDER / name).read_text(), re.MULTILINE)
    assert len(calls) == 4
    for script, words in calls:
        (found,) = [one for one in SCRIPTS if one.path == FOLDER / "llama2" / script]
        assert call(found.words, words.strip() + " --dry-run") == 0, words


@pytest.mark.parametrize("name", READMES)
def test_what_a_readme_shows_is_what_is_printed(name: str, place: Path, capsys) -> None:
    words = EXAMPLES["pretrain"].replace("dlc Megatron-LM", "cpu none").replace(" out", " output")
    assert call("pretrain,pretrain-2023,pretrain-te-2023", words + " --dry-run") == 0
    text = (FOLDER / name).read_text()
    assert capsys.readouterr().out.partition("\ndry run")[0] in text
    assert call("pretrain,pretrain-2023,pretrain-te-2023", changed(PRETRAIN, PR="bf61", AC="select")) == 2
    assert capsys.readouterr().err.partition("\n\n")[2] in text


@pytest.mark.parametrize("name", READMES)
def test_a_readme_names_every_environment_variable(name: str) -> None:
    table = [line for line in (FOLDER / name).read_text().splitlines() if line.startswith("| `")]
    assert set(ENVIRONMENT) <= {word for line in table for word in re.findall(r"`([A-Z0-9_]+)`", line)}


def test_both_languages_have_the_same_sections_and_code() -> None:
    english, chinese = ((FOLDER / name).read_text() for name in READMES)
    assert readme.headings(english) == readme.headings(chinese)
    code = [[readme.without_comments(block) for block in readme.blocks(text)] for text in (english, chinese)]
    assert code[0] == code[1]
