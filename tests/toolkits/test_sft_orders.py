"""The positional script of fine-tuning data: its examples become a command that the real parser takes, wrong values are
named, a run makes samples. That they are right is tested in tests/data/sft."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_patch.data.sft.arguments import SftDataArgs, named_templates
from megatron_patch.data.sft.storage import open_samples
from tests.data.sft import make
from tests.guards import readme
from tests.guards.cli_surface import parse
from tests.guards.imports import ROOT
from toolkits.sft_data_preprocessing import command, make_samples

FOLDER = ROOT / "toolkits/sft_data_preprocessing"
SCRIPT = FOLDER / "run_build_idxmap_sft_dataset.sh"
COMMENT = [line.removeprefix("#").strip() for line in SCRIPT.read_text().splitlines() if line.startswith("#")]
EXAMPLES = [shlex.split(line)[2:] for line in COMMENT if line.startswith("bash ")]
ROWS = [{"instruction": "Hi", "input": "", "output": f"word {i}"} for i in range(6)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the control tokens of two families, that says nothing about its kind and has no template."""
    path = tmp_path_factory.mktemp("tokenizers") / "bpe"
    loaded = make.tokenizer(path, "llama3")
    loaded.hf.add_special_tokens({"additional_special_tokens": make.BYTE_LEVEL["chatml"].split()})
    loaded.hf.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def place(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: an empty one with what the examples name."""
    for name in command.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for name, kind in {"llama3-8b-hf": "llama", "qwen2-7b-hf": "qwen2", "gpt2-hf": "gpt2"}.items():
        shutil.copytree(directory, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "chats").mkdir()
    for file in ("alpaca_zh-train.json", "chats/a.jsonl"):
        lines = (json.dumps(row) + "\n" for row in ROWS)
        (tmp_path / file).write_text(json.dumps(ROWS) if file.endswith(".json") else "".join(lines))
    return tmp_path


def shown(text: str) -> SftDataArgs:
    """What the real parser makes of the command that was printed."""
    (line,) = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    return parse(shlex.split(line)[1:])


def test_the_script_names_its_arguments() -> None:
    (order,) = make_samples.ORDERS.values()
    names = " ".join(one.name for one in order.arguments)
    assert f"Order sft, {order.counts} arguments: {names}" in " ".join(COMMENT)
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize(
    ("words", "packing", "template"), zip(EXAMPLES, (False, True), ("qwen", "llama3"), strict=True)
)
def test_an_example_becomes_a_command_that_the_real_parser_takes(
    words: list[str], packing: bool, template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_samples.main(["sft", *words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    args = shown(out)
    args.validate()
    assert (args.input, args.output_prefix, args.tokenizer_model) == ((words[0],), words[3], words[4])
    assert (args.seq_length, args.packing, args.chat_template) == (int(words[2]), packing, template)
    assert args.workers == len(os.sched_getaffinity(0))
    assert "dry run: nothing is done" in out and not Path("datasets").exists()


def test_the_script_makes_samples(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKERS", "1")
    result = subprocess.run(["sh", str(SCRIPT), *EXAMPLES[1]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    store = open_samples(str(place / "datasets/chats"))
    assert (store.num_samples, store.num_packs) == (len(ROWS), 1)


def test_a_tokenizer_with_a_template_keeps_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "llama3-8b-hf/chat_template.jinja").write_text("{{ messages[0].content }}")
    assert make_samples.main(["sft", *EXAMPLES[1], "--dry-run"]) == 0
    assert shown(capsys.readouterr().out).chat_template == "tokenizer"


def test_environment_variables_change_a_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"CHAT_TEMPLATE": "chatml", "SFT_FORMAT": "alpaca", "WORKERS": "3", "SFT_DATA_ARGS": "--truncation drop"}
    for name, value in (settings | {"DRY_RUN": "1"}).items():
        monkeypatch.setenv(name, value)
    assert make_samples.main(["sft", *EXAMPLES[0]]) == 0
    args = shown(capsys.readouterr().out)
    assert (args.chat_template, args.sft_format, args.workers, args.truncation) == ("chatml", "alpaca", 3, "drop")


WRONG = {
    "nowhere Qwen2Tokenizer 2048 out qwen2-7b-hf": "argument 1 input_data_path='nowhere': must be a file or directory",
    "chats Qwen 2048 out qwen2-7b-hf": "argument 2 tokenizer='Qwen': choose Qwen2Tokenizer,",
    "chats Qwen2Tokenizer 2k out qwen2-7b-hf": "argument 3 seq_len='2k': must be a whole number of at least 2",
    "chats Qwen2Tokenizer 2048 chats qwen2-7b-hf": "argument 4 output_data_path='chats': must be a prefix",
    "chats Qwen2Tokenizer 2048 out chats": "argument 5 load_dir='chats': must be a directory with a tokenizer in it",
    "chats Qwen2Tokenizer 2048 out qwen2-7b-hf yes": "argument 6 default_packing='yes': choose true,",
    "chats Qwen2Tokenizer 2048 out": "order sft takes 5 or 6 arguments, not 4; missing: 5 load_dir",
    "chats Qwen2Tokenizer 2048 out qwen2-7b-hf true 8": "too many: 8",
    "chats LLama3Tokenizer 2048 out qwen2-7b-hf": "but qwen2-7b-hf holds the tokenizer of a qwen2 model",
    "chats GPT2BPETokenizer 2048 out gpt2-hf": "the tokenizer has no chat template, and GPT2BPETokenizer is of no",
}


@pytest.mark.parametrize("call", WRONG)
def test_a_wrong_call_is_told_what_is_wrong(call: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_samples.main(["sft", *call.split()]) == 2
    assert WRONG[call] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"), [("SFT_FORMAT", "csv"), ("WORKERS", "0"), ("DRY_RUN", "yes"), ("SFT_DATA_ARGS", "'open")]
)
def test_a_wrong_environment_variable_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert make_samples.main(["sft", *EXAMPLES[0]]) == 2
    assert f"environment variable {name}" in capsys.readouterr().err


def test_templates_of_families_are_there() -> None:
    assert set(command.TEMPLATES.values()) <= {*named_templates()}


def test_both_readmes_say_the_same() -> None:
    english, chinese = ((FOLDER / name).read_text() for name in ("README.md", "README.zh-CN.md"))
    assert readme.headings(english) == readme.headings(chinese)
    pairs = zip(readme.blocks(english), readme.blocks(chinese), strict=True)
    assert all(readme.without_comments(one) == readme.without_comments(other) for one, other in pairs)
    for text in (english, chinese):
        assert all(f"`{name}`" in text for name in (*command.ENVIRONMENT, *named_templates()))
        for words in (shlex.split(line)[2:] for line in text.splitlines() if line.startswith("bash run_build")):
            assert words in EXAMPLES
