"""Every positional script of the converter: its own example is read, turned into a command that the real parser takes,
and each wrong value is named. Conversions themselves are tested in tests/checkpoint; a few run here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_patch.checkpoint.arguments import ConvertArgs, VerifyArgs
from tests.guards import readme
from tests.guards.cli_surface import parse
from tests.guards.imports import ROOT
from tests.tiny import hf_llama
from toolkits.model_checkpoints_convertor import command, convert, orders, sizes

FOLDER = ROOT / "toolkits/model_checkpoints_convertor"
SCRIPTS = sorted(path for path in FOLDER.rglob("*.sh") if path.name != "run_order.sh")
MOE = dict(num_local_experts=8, num_experts_per_tok=2)

Call = tuple[str, list[str]]


def name_of(script: Path) -> str:
    return script.relative_to(FOLDER).as_posix()


def order_of(script: Path) -> str:
    return re.search(r'run_order\.sh" (\S+) "\$@"', script.read_text())[1]


def examples(script: Path) -> list[list[str]]:
    """The calls in a script's own comment, without the script's name."""
    lines = (line.removeprefix("#").split() for line in script.read_text().splitlines() if line.startswith("#   "))
    return [words[2:] for words in lines if words[1:2] == [script.name]]


EXAMPLES = [(order_of(script), words) for script in SCRIPTS for words in examples(script)]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in command.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's Hugging Face directory."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    hf_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def place(model: Path, tmp_path: Path) -> Callable[[Call], None]:
    """Makes the directories that a call names, below the current one."""

    def made(call: Call) -> None:
        order = orders.closest(orders.ORDERS[call[0]], call[1])
        values = {one.role: value for one, value in zip(order.arguments, call[1], strict=False)}
        if values.get("megatron_lm", "none") != "none":
            (tmp_path / values["megatron_lm"] / "megatron").mkdir(parents=True, exist_ok=True)
        huggingface = [values[role] for role in ("config",) if role in values]
        if values.get("to_huggingface") == "true":
            checkpoint(tmp_path / values["source"].removesuffix("/release"))
        else:
            huggingface.append(values["source"])
        for name in huggingface:
            shutil.copytree(model, tmp_path / name, dirs_exist_ok=True)
            if int(values.get("num_experts", 0)) > 1:
                add_fields(tmp_path / name, MOE)
        if values.get("to_huggingface") == "true" and "config" not in values:
            shutil.copytree(model, tmp_path / values["source"].removesuffix("/release") / "huggingface")

    return made


def checkpoint(root: Path) -> Path:
    """The files by which a legacy Megatron checkpoint is known; no weights."""
    (root / "release/mp_rank_00").mkdir(parents=True)
    (root / "release/mp_rank_00/model_optim_rng.pt").touch()
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    return root


def add_fields(folder: Path, fields: dict[str, int]) -> None:
    text = (folder / "config.json").read_text()
    more = "".join(f'\n  "{name}": {value},' for name, value in fields.items())
    (folder / "config.json").write_text(text.replace("{", "{" + more, 1))


def planned(word: str, *values: str) -> list[str]:
    """The command for a call, as a list of words."""
    order, by_role = orders.read(word, values)
    return list(command.command(order, by_role, os.environ).argv)


# ------------------------------------------------------------------------------------------- every script and order


def test_every_order_has_a_script_and_every_script_an_order() -> None:
    assert {order_of(script) for script in SCRIPTS} == set(orders.ORDERS)


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_script_names_its_arguments_and_shows_both_directions(script: Path) -> None:
    order = orders.ORDERS[order_of(script)]
    comment = " ".join(line.removeprefix("#").strip() for line in script.read_text().splitlines() if line[0] == "#")
    names = re.sub(
        r"\[?\d+ (\w+)", lambda match: match[0].replace(match[0].strip("[").split()[0] + " ", ""), order.signature
    )
    assert names in comment and f"Order {order.word}, {order.counts} arguments" in comment
    both = any(one.role == "to_huggingface" for one in order.arguments)
    assert len(examples(script)) == (2 if both else 1)


@pytest.mark.parametrize(("word", "words"), EXAMPLES, ids=lambda value: value if isinstance(value, str) else value[-1])
def test_an_example_becomes_a_command_that_the_real_parser_takes(
    word: str, words: list[str], place: Callable[[Call], None], capsys: pytest.CaptureFixture[str]
) -> None:
    place((word, words))
    assert convert.main([word, *words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    (line,) = [line[2:] for line in out.splitlines() if line.startswith("$ ")]
    args = parse(shlex.split(line)[1:])
    args.validate()
    order, values = orders.read(word, words)
    back = values.get("to_huggingface") == "true"
    assert isinstance(args, ConvertArgs) and (args.source, args.target) == (values["source"], values["target"])
    assert args.target_format == ("huggingface" if back else "legacy" if order.naming else "torch_dist")
    if args.target_format == "legacy":
        assert args.naming == order.naming
        assert args.tensor_model_parallel_size == int(values["tp"])
        assert args.pipeline_model_parallel_size == int(values["pp"])
        assert args.expert_model_parallel_size == int(values.get("ep", 1))
        assert args.extra_vocab_size == (int(values["extra_vocab_size"]) if "extra_vocab_size" in values else None)
    assert args.dtype == ("bfloat16" if "dtype" in values else None)
    assert (args.hf_config is not None) == (back and "config" in values)


@pytest.mark.parametrize("order", orders.ORDERS.values(), ids=lambda order: order.word)
def test_a_call_with_an_argument_too_few_or_too_many_is_refused(order: orders.Order, capsys) -> None:
    words = ["x"] * len(order.arguments)
    assert convert.main([order.word, *words, "surplus"]) == 2
    assert f"takes {order.counts} arguments, not {len(words) + 1}; too many: surplus" in capsys.readouterr().err
    few = words[: len(words) - order.optional - 1 - bool(order.older)]
    assert convert.main([order.word, *few]) == 2
    last = order.arguments[len(few)]
    assert f"not {len(few)}; missing: {last.number} {last.name}" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- what is refused

LLAMA3_1 = ["8B", "hf", "out", "4", "2", "false", "true", "false", "bf16", "none"]
EXPERTS = ["7B", "hf", "none", "hf", "out", "1", "1", "0", "0", "0", "1", "0", "false"]


@pytest.mark.parametrize(
    ("word", "good", "number", "value", "message"),
    [
        ("mcore-llama3_1", LLAMA3_1, 1, "big", "argument 1 MODEL_SIZE='big': must have a size in it"),
        ("mcore-llama3_1", LLAMA3_1, 2, "gone", "argument 2 SOURCE_CKPT_PATH='gone': must be a directory that exists"),
        ("mcore-llama3_1", LLAMA3_1, 2, "empty", "argument 2 SOURCE_CKPT_PATH='empty': must be a Hugging Face"),
        (
            "mcore-llama3_1",
            LLAMA3_1,
            2,
            "mg",
            "argument 2 SOURCE_CKPT_PATH='mg': must be a Hugging Face directory, but it is",
        ),
        ("mcore-llama3_1", LLAMA3_1, 3, "file", "argument 3 TARGET_CKPT_PATH='file': must not be a file"),
        ("mcore-llama3_1", LLAMA3_1, 4, "0", "argument 4 TP='0': must be a whole number of at least 1"),
        ("mcore-llama3_1", LLAMA3_1, 5, "1.5", "argument 5 PP='1.5': must be a whole number of at least 1"),
        ("mcore-llama3_1", LLAMA3_1, 5, "²", "argument 5 PP='²': must be a whole number of at least 1"),
        ("mcore-llama3_1", LLAMA3_1, 6, "True", "argument 6 mg2hf='True': choose true or false"),
        ("mcore-llama3_1", LLAMA3_1, 6, "true", "argument 6 mg2hf=true wants a Megatron checkpoint"),
        ("mcore-llama3_1", LLAMA3_1, 7, "", "argument 7 CHECK='': is empty"),
        ("mcore-llama3_1", LLAMA3_1, 9, "fp8", "argument 9 PR='fp8': choose fp32, fp16 or bf16"),
        (
            "mcore-llama3_1",
            LLAMA3_1,
            10,
            "empty",
            "argument 10 HF_CKPT_PATH='empty': must be a directory with a config.json",
        ),
        ("mcore-experts", EXPERTS, 3, "gone", "argument 3 MEGATRON_PATH='gone': must be a directory with megatron/"),
        ("mcore-experts", EXPERTS, 3, "empty", "argument 3 MEGATRON_PATH='empty': must be a directory with megatron/"),
        ("mcore-experts", EXPERTS, 8, "-1", "argument 8 EXTRA_VOCAB_SIZE='-1': must be a whole number of at least 0"),
        ("mcore-experts", EXPERTS, 9, "8", "argument 9 NUM_EXPERTS=8: making a mixture of experts of a dense model"),
        ("mcore-experts", EXPERTS, 10, "2", "argument 10 EXPERTS_TOPK=2: changing how many experts a token meets"),
        ("mcore-experts", EXPERTS, 12, "2", "argument 12 NUM_EXPERT_SPLITS=2: splitting an MLP into parts"),
        (
            "mcore-llava",
            ["7B", "hf", "none", "out", "1", "1", "false", "bf16"],
            3,
            "hf",
            "argument 3 SOURCE_CLIP_CKPT_PATH='hf': must be none: merging a vision tower is not supported",
        ),
        (
            "mcore-upcycle",
            ["7B", "hf", "out", "1", "1", "1", "0", "1", "0"],
            9,
            "1408",
            "argument 9 MOE_INTERMEDIATE_SIZE=1408: changing the width of an expert is not supported",
        ),
    ],
)
def test_a_wrong_argument_is_named(
    word: str, good: list[str], number: int, value: str, message: str, model: Path, tmp_path: Path, capsys
) -> None:
    shutil.copytree(model, tmp_path / "hf")
    shutil.copytree(model, checkpoint(tmp_path / "mg") / "huggingface")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert convert.main([word, *good, "--dry-run"]) == 0
    capsys.readouterr()
    assert convert.main([word, *good[: number - 1], value, *good[number:], "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert f"convert.py {word}: error: " in captured.err and message in captured.err
    assert "$ megatron-patch" not in captured.out


def test_all_wrong_arguments_are_named_at_once_and_marked(capsys) -> None:
    assert convert.main(["2023", "none", ".", "out", "x", "1", "llama", "0", "flase"]) == 2
    err = capsys.readouterr().err
    assert re.findall(r"error: argument (\d+)", err) == ["4", "6", "8"] and err.count("<- wrong") == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CKPT_FORMAT", "zarr", "CKPT_FORMAT='zarr': choose torch_dist or legacy"),
        ("NAMING", "mcore", "NAMING='mcore': choose local, te or 2023"),
        ("DRY_RUN", "yes", "DRY_RUN='yes': choose 0 or 1"),
        ("MP_PP0_LAYERS", "none", "MP_PP0_LAYERS='none': must be a whole number"),
        ("MP_PP0_LAYERS", "3", "MP_PP0_LAYERS=3: needs more than one pipeline stage"),
        ("CONVERT_ARGS", "'", "CONVERT_ARGS: No closing quotation"),
    ],
)
def test_a_wrong_environment_variable_is_named(
    name: str, value: str, message: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv(name, value)
    assert convert.main(["2023", "none", str(model), "out", "1", "1", "llama-7b", "0", "false"]) == 2
    assert message in capsys.readouterr().err


def test_a_flag_that_the_command_does_not_have_is_refused_in_a_dry_run(model: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("CONVERT_ARGS", "--owerwrite")
    with pytest.raises(SystemExit) as stopped:
        convert.main(["2023-short", "none", str(model), "out", "1", "1", "false", "--dry-run"])
    assert stopped.value.code == 2 and "--owerwrite" in capsys.readouterr().err


def test_what_the_command_itself_refuses_is_refused_in_a_dry_run(model: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("CONVERT_ARGS", "--workers=-1")
    assert convert.main(["2023-short", "none", str(model), "out", "1", "1", "false", "--dry-run"]) == 2
    assert "error: --workers -1: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"), [([], "name an order"), (["hf2hf"], "unknown order 'hf2hf'; choose one of 2023")]
)
def test_without_an_order_the_orders_are_named(argv: list[str], message: str, capsys) -> None:
    assert convert.main(argv) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- what becomes of a call


def test_two_orders_of_one_script_are_told_apart_by_the_argument_that_differs(model: Path) -> None:
    head = ["A2.4B", str(model), "out", "1", "1", "4"]
    assert "--dtype" in planned("mcore-ep-pr", *head, "fp16", "false")
    assert "--dtype" not in planned("mcore-ep-pr", *head, "false")
    assert "--dtype" not in planned("mcore-ep-pr", *head, "false", str(model))


def test_use_te_chooses_the_names_and_the_environment_overrides_it(model: Path, monkeypatch) -> None:
    def naming(use_te: str) -> str:
        words = planned("mcore-pr-te", "7B", str(model), "out", "1", "1", "bf16", use_te, "false")
        return words[words.index("--naming") + 1]

    assert (naming("true"), naming("false")) == ("te", "local")
    monkeypatch.setenv("NAMING", "2023")
    assert naming("true") == "2023"


def test_the_environment_chooses_the_format_and_the_layout_of_a_distributed_call(model: Path, monkeypatch) -> None:
    call = ["distributed", "8B", str(model), "out", "false", "true", "fp32"]
    monkeypatch.setenv("MODEL_PARALLEL_ARGS", "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4")
    expected = f"convert --source {model} --target out --target-format torch_dist --dtype float32"
    assert planned(*call) == expected.split()
    monkeypatch.setenv("CKPT_FORMAT", "legacy")
    args = parse(planned(*call))
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.naming) == (2, 4, "te")
    monkeypatch.setenv("MODEL_PARALLEL_ARGS", "--context-parallel-size 2")
    with pytest.raises(ValueError, match="MODEL_PARALLEL_ARGS: unknown '--context-parallel-size'"):
        planned(*call)


def test_torch_dist_has_neither_layout_nor_padding(model: Path, monkeypatch) -> None:
    monkeypatch.setenv("CKPT_FORMAT", "torch_dist")
    words = planned("2023", "none", str(model), "out", "2", "2", "llama-7b", "5", "false")
    assert words == ["convert", "--source", str(model), "--target", "out", "--target-format", "torch_dist"]


def test_the_first_stage_may_have_its_own_number_of_layers(model: Path, monkeypatch) -> None:
    monkeypatch.setenv("MP_PP0_LAYERS", "1")
    args = parse(planned("mcore-etp-ep-pr", "A3B", str(model), "out", "2", "2", "1", "4", "bf16", "false"))
    assert args.decoder_first_pipeline_num_layers == 1
    assert (args.expert_tensor_parallel_size, args.expert_model_parallel_size) == (1, 4)


def test_check_verifies_afterwards_and_check_only_instead(model: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "mg")
    call = ["mcore-llama3_1", "8B", str(model), "mg", "1", "1", "false"]
    assert parse(planned(*call, "true", "false", "bf16")).verify
    assert not parse(planned(*call, "false", "false", "bf16")).verify
    args = parse(planned(*call, "true", "true", "bf16"))
    args.validate()
    assert args == VerifyArgs(source=str(model), target="mg")  # PR=bf16 is not the precision to compare in


def test_the_way_back_finds_the_config_wherever_it_is(model: Path, tmp_path: Path, monkeypatch) -> None:
    root = checkpoint(tmp_path / "mg")
    short = ["2023-short", "none", "mg/release", "out", "1", "1", "true"]
    with pytest.raises(ValueError, match=r"argument 2 .* does not carry .* give the environment variable HF_CONFIG"):
        planned(*short)
    with pytest.raises(ValueError, match="give argument 7 HF_CKPT_PATH, or the environment"):
        planned("mcore-dense", "7B", "mg", "out", "1", "1", "true")
    monkeypatch.setenv("HF_CONFIG", "gone")
    with pytest.raises(ValueError, match="HF_CONFIG='gone': must be a directory with a config.json"):
        planned(*short)
    monkeypatch.setenv("HF_CONFIG", str(model))
    assert parse(planned(*short)).hf_config == str(model)
    assert parse(planned("mcore-dense", "7B", "mg", "out", "1", "1", "true", str(model))).hf_config == str(model)
    monkeypatch.delenv("HF_CONFIG")
    shutil.copy(model / "config.json", root)  # where the predecessor put it
    assert parse(planned(*short)).hf_config == "mg"
    shutil.copytree(model, root / "huggingface")
    assert parse(planned(*short)).hf_config is None


def test_a_number_of_experts_that_the_model_has_is_no_change(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "moe")
    add_fields(tmp_path / "moe", MOE)
    call = ["mcore-mistral", "8x7B", "moe", "none", "moe", "out", "1", "1", "0"]
    assert "--expert-model-parallel-size" in planned(*call, "8", "2", "4", "false", "8")
    with pytest.raises(ValueError, match="NUM_EXPERTS=16: .* not supported; the model has 8"):
        planned(*call, "16", "2", "4", "false")


def test_a_size_that_does_not_fit_is_a_warning_and_no_error(model: Path, capsys) -> None:
    def said(name: str) -> str:
        assert convert.main(["2023", "none", str(model), "out", "1", "1", name, "0", "false", "--dry-run"]) == 0
        return capsys.readouterr().out

    count = sum(parameter.numel() for parameter in hf_llama().parameters())
    warning = re.search(
        r"warning: argument 6 MN='llama-7b' promises 7B parameters, .* about ([\d,]+);", said("llama-7b")
    )
    assert int(warning[1].replace(",", "")) == pytest.approx(count, rel=0.05)
    assert "warning" not in said(f"llama-{count / 1e6:.2f}M")


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [("llama2-13b", 13e9, False), ("qwen1.5-0.5b", 0.5e9, False), ("8x7B", 56e9, False), ("A2.4B", 2.4e9, True),
     ("Qwen3-30B-A3B", 3e9, True), ("bloom-560m", 560e6, False), ("llama7b", 7e9, False)],
)  # fmt: skip
def test_the_size_in_a_name_is_found(name: str, parameters: float, active: bool) -> None:
    assert sizes.promised(name) == sizes.Promise(pytest.approx(parameters), active)


def test_parameters_are_estimated_as_transformers_counts_them() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    small = dict(hidden_size=256, num_hidden_layers=3, num_attention_heads=8, vocab_size=1000)
    width, experts = dict(intermediate_size=512), dict(num_key_value_heads=4, moe_intermediate_size=64)
    end = dict(bos_token_id=1, eos_token_id=1)
    kinds = {
        "llama": dict(**width, num_key_value_heads=2),
        "mixtral": dict(**width, num_key_value_heads=2, num_local_experts=4),
        "qwen3_moe": dict(**width, **experts, num_experts=8, head_dim=32),
        "deepseek_v3": dict(**width, **experts, n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=1),
        "bloom": dict(n_layer=3, n_head=8),
        "falcon": {},
        "gpt_bigcode": dict(n_embd=256, n_layer=3, n_head=8, n_inner=512, n_positions=64, **end),
    }
    for kind, fields in kinds.items():
        config = AutoConfig.for_model(kind, **{**small, **fields})
        with torch.device("meta"):
            count = AutoModelForCausalLM.from_config(config).num_parameters()
        assert sizes.estimated(config.to_dict()) == pytest.approx(count, rel=0.15), kind


# ------------------------------------------------------------------------------------------------------- the real thing


def shell(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, **environment}
    return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("interpreter", "script", "words"),
    [
        ("sh", "llama/model_convertor.sh", "Megatron-LM hf out 1 1 llama-7b 0 false"),
        ("bash", "llama/model_convertor.sh", "Megatron-LM mg out 1 1 llama-7b 0 true"),
        ("bash", "bloom/model_convertor_huggingface_megatron.sh", "Megatron-LM mg out 1 1 true"),
        ("sh", "distributed_checkpoints_convertor/scripts/qwen3/run_8xH20.sh", "8B hf out false false bf16"),
    ],
)
def test_a_script_runs_from_anywhere_in_sh_and_bash(
    interpreter: str, script: str, words: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "Megatron-LM/megatron").mkdir(parents=True)
    shutil.copytree(model, tmp_path / "hf")
    shutil.copytree(model, checkpoint(tmp_path / "mg") / "huggingface")
    done = shell(interpreter, str(FOLDER / script), *words.split(), cwd=tmp_path, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert "$ megatron-patch convert --source" in done.stdout and "dry run" in done.stdout
    absolute = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in words.split()]
    beside = shell(interpreter, Path(script).name, *absolute, "--dry-run", cwd=(FOLDER / script).parent)
    assert beside.returncode == 0, beside.stderr
    assert not (tmp_path / "out").exists()


def test_a_script_passes_on_words_as_they_are_and_the_exit_code(tmp_path: Path) -> None:
    done = shell(
        "sh",
        str(FOLDER / "bloom/model_convertor_huggingface_megatron.sh"),
        "none",
        "a b",
        "*",
        "1",
        "1",
        "",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "argument 2 SOURCE_CKPT_PATH='a b'" in done.stderr and "argument 6 mg2hf=''" in done.stderr


@pytest.mark.parametrize(
    ("there", "back"),
    [
        ("distributed 7B hf mg false false fp32", "distributed 7B mg back true false fp32 hf"),
        ("2023 none hf mg 2 2 llama-7b 0 false", "2023 none mg/release back 1 1 llama-7b 0 true"),
        ("mcore-pr-te 7B hf mg 2 1 fp32 true false", "mcore-pr-te 7B mg back 1 1 fp32 true true hf"),
        ("mcore-pr-te 7B hf mg 1 2 fp32 false false", "mcore-pr-te 7B mg back 1 1 fp32 false true"),
    ],
)
def test_a_call_converts_there_and_back(there: str, back: str, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "hf")
    assert convert.main(there.split()) == 0
    assert convert.main(back.split()) == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


# --------------------------------------------------------------------------------------------------------- the READMEs

READMES = ["README.md", "README.zh-CN.md"]


def tables(name: str) -> dict[str, list[str]]:
    """First cell, without its backticks -> the other cells, of every row that starts with one."""
    rows = (
        line.strip("| ").split(" | ") for line in (FOLDER / name).read_text().splitlines() if line.startswith("| `")
    )
    return {cells[0].strip("`"): cells[1:] for cells in rows}


@pytest.mark.parametrize("name", READMES)
def test_the_table_of_orders_is_that_of_the_program(name: str) -> None:
    rows = tables(name)
    assert set(rows) == set(orders.ORDERS) | set(command.ENVIRONMENT)
    for order in orders.ORDERS.values():
        signature, written, scripts = rows[order.word]
        named = {
            path.removeprefix("distributed_checkpoints_convertor/scripts/") for path in map(name_of, scripts_of(order))
        }
        assert signature == order.signature
        assert written == (f"legacy, {order.naming}" if order.naming else "torch_dist")
        assert set(re.findall(r"`([^`]+)`", scripts)) == named


def scripts_of(order: orders.Order) -> list[Path]:
    return [script for script in SCRIPTS if order_of(script) == order.word]


@pytest.mark.parametrize("name", READMES)
def test_every_command_in_a_readme_is_one_that_is_accepted(
    name: str, place: Callable[[Call], None], tmp_path: Path
) -> None:
    text = (FOLDER / name).read_text()
    blocks = readme.blocks(text)
    for words in (words for block in blocks for words in readme.commands(block)):
        parse(words)
    calls = re.findall(r"sh model_convertor\.sh ([^#\n]+)", text)
    assert len(calls) == 6
    for call in calls:
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        os.chdir(tmp_path)
        words = call.replace("../", "").split()
        place(("2023", words))
        assert planned("2023", *words)


def test_both_languages_have_the_same_sections_and_code() -> None:
    english, chinese = ((FOLDER / name).read_text() for name in READMES)
    assert readme.headings(english) == readme.headings(chinese)
    code = [[readme.without_comments(block) for block in readme.blocks(text)] for text in (english, chinese)]
    assert code[0] == code[1]
