"""The guides in docs/ are held against the real parsers, the disk and the source, and against each other.

The names in their commands are those of one imaginary folder, which `place` makes: what they call by position is
rehearsed there. That a command does what the text says is not known here; tests of its own part do.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from examples.launcher import command, launch, machines
from megatron_patch.training.arguments import TrainingArgs, batching_of
from tests.examples.conftest import CLUSTER, LLAMA2_7B, fill
from tests.guards import readme
from tests.guards.cli_surface import FROZEN, parse
from tests.guards.imports import ROOT
from tests.tokenizer import make

DOCS = sorted(path for path in (ROOT / "docs").glob("*.md") if not path.name.endswith(".zh-CN.md"))
WITHOUT_TWIN = {"gpu.md"}
PAIRS = [path for path in DOCS if path.name not in WITHOUT_TWIN]
BOTH = sorted((ROOT / "docs").glob("*.md"))
ALL = [*BOTH, *(path for pattern in ("", "examples/", "toolkits/*/") for path in ROOT.glob(f"{pattern}README*.md"))]
TROUBLE = ROOT / "docs/troubleshooting.md"
MIGRATION = ROOT / "docs/migration.md"
MESSAGES, THEIR_FLAGS = ("message", "消息"), "there"
"""What the first column of a table is called whose code is ours to say, or a flag of Megatron-LM."""

FOREIGN = {
    *("--compat", "--logdir", "--no-build-isolation", "--shm-size"),
    *("--dataset-impl", "--ntasks-per-node", "--nnodes", "--rdzv-endpoint"),
}
"""Flags of run_tests.sh, tensorboard, pip, docker; of the predecessor, Slurm and torchrun."""

FOLDERS = ("benchmarks/", "docs/", "examples/", "megatron_patch/", "tests/", "toolkits/")
PROGRAMS = {
    "model_checkpoints_convertor": "convert",
    "pretrain_data_preprocessing": "make_dataset",
    "sft_data_preprocessing": "make_samples",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def twin(path: Path) -> Path:
    """The Chinese text of an English one."""
    return path.with_name(f"{path.stem}.zh-CN.md")


def calls(path: Path) -> list[readme.Call]:
    return [call for block in readme.blocks(path.read_text()) for call in readme.calls(block)]


# ------------------------------------------------------------------------------------------------------- two languages


@pytest.mark.parametrize("path", PAIRS, ids=name_of)
def test_both_languages_have_the_same_sections_and_the_same_code(path: Path) -> None:
    english, chinese = path.read_text(), twin(path).read_text()
    assert readme.headings(english) == readme.headings(chinese)
    for one, other in zip(readme.blocks(english), readme.blocks(chinese), strict=True):
        assert one.language == other.language
        assert readme.without_comments(one) == readme.without_comments(other) or is_translated(other)


def is_translated(block: readme.Block) -> bool:
    """Whether it is a drawing with words in it."""
    return block.language == "text" and any("\u4e00" <= letter <= "\u9fff" for line in block.lines for letter in line)


@pytest.mark.parametrize("path", PAIRS, ids=name_of)
def test_each_language_leads_to_the_other_and_then_stays_with_itself(path: Path) -> None:
    assert f"[中文]({twin(path).name})" in path.read_text()
    first, *targets = readme.links(twin(path).read_text())
    assert first == path.name
    for target in (target.partition("#")[0] for target in targets):
        assert not (target.endswith(".md") and twin(path.parent / target).is_file()), f"{target} has a Chinese twin"


def test_the_index_names_every_guide() -> None:
    others = {path.name for path in DOCS} - {"README.md"}
    assert others <= set(readme.links((ROOT / "docs/README.md").read_text()))


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_every_command_is_one_that_the_parser_accepts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where the recipes are
    for call in calls(path):
        words = readme.arguments(call.words)
        arguments = None if words is None else parse(words)
        if isinstance(arguments, TrainingArgs):
            batching_of(arguments, num_processes(call.words))


def num_processes(words: list[str]) -> int:
    """What a call says, or its recipe."""
    after = dict(zip(words, words[1:], strict=False))
    recipe = (ROOT / after["--config"]).read_text() if "--config" in after else "nproc-per-node: 1"
    nodes, given = after.get("--nnodes", "1"), re.search(r"nproc-per-node: (\d+)", recipe)[1]
    return int(nodes) * int(after.get("--nproc-per-node", given))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: the root of a checkout, with what the calls by position name; no cluster around it."""
    for name in (*command.ENVIRONMENT, *CLUSTER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machines, "num_gpus", lambda environment: 8)
    fill(tmp_path)
    (tmp_path / "megatron_patch").mkdir()
    make.byte_bpe(tmp_path / "llama2-7b-hf")
    (tmp_path / "llama2-7b-hf/config.json").write_text(json.dumps(LLAMA2_7B))
    (tmp_path / "wudao").mkdir()
    (tmp_path / "wudao/part.jsonl").write_text('{"content": "hello"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rehearsals(path: Path) -> list[readme.Call]:
    """The calls by position that stop after printing."""
    return [call for call in calls(path) if call.words[0] in ("sh", "bash") and call.words[-1] == "--dry-run"]


@pytest.mark.parametrize("path", filter(rehearsals, DOCS), ids=name_of)
def test_every_call_by_position_is_understood(path: Path, place: Path, monkeypatch, capsys) -> None:
    for call in rehearsals(path):
        with monkeypatch.context() as patch:
            for name, value in call.variables.items():
                patch.setenv(name, value)
            assert rehearse(call.words[1], call.words[2:]) == 0, capsys.readouterr().err


def rehearse(script: str, words: list[str]) -> int:
    """The exit code of a script's call, without processes for it."""
    folder, text = script.split("/")[1], (ROOT / script).read_text()
    if found := re.search(r'^launch (\S+) "\$@"', text, re.MULTILINE):
        return launch.main([found[1], *words])
    order = re.search(r'run_order\.sh" (\S+) "\$@"', text)[1]
    return import_module(f"toolkits.{folder}.{PROGRAMS[folder]}").main([order, *words])


def test_the_calls_of_those_who_migrate_are_rehearsed(place: Path, capsys) -> None:
    assert len(rehearsals(MIGRATION)) >= 10
    assert rehearse("examples/llama2/run_evaluate_megatron_llama.sh", ["dsw", "7B", "--dry-run"]) == 2


# ------------------------------------------------------------------------------------------------- links, paths, flags


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in readme.links(path.read_text()):
        if not target.startswith(("http://", "https://")):
            name, _, section = target.partition("#")
            there = path.parent / name if name else path
            assert there.exists(), target
            assert not section or section in readme.anchors(there.read_text()), target


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_path_that_is_named_is_there(path: Path) -> None:
    spans = (word for span in readme.spans(path.read_text()) for word in span.split()[:1])
    words = (word for call in calls(path) for word in call.words)
    for name in filter(lambda word: word.startswith(FOLDERS), (*spans, *words)):
        assert any(ROOT.glob(re.sub(r"<\w+>", "*", name.rstrip("/")))), name


@pytest.mark.parametrize("path", BOTH, ids=name_of)
def test_every_flag_that_the_text_names_is_one_of_ours(path: Path) -> None:
    theirs = readme.first_cells(MIGRATION.read_text(), THEIR_FLAGS)
    known = {*flags(FROZEN.read_text()), "--help", *FOREIGN, *(flag for cell in theirs for flag in cell)}
    assert {flag for span in readme.spans(path.read_text()) for flag in flags(span)} - known == set()


def flags(text: str) -> list[str]:
    return re.findall(r"(?<!\S)--[a-z][\w-]*", text)


# --------------------------------------------------------------------------------------------------------- its messages


@cache
def strings() -> list[str]:
    """Every string that the source uses, with a line break for each value in it."""
    folders = ("megatron_patch", "examples/launcher", "toolkits")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return [text for file in files for text in strings_of(file.read_text())]


def strings_of(source: str) -> Iterator[str]:
    """Without docstrings."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in (node for node in ast.walk(tree) if id(node) not in docstrings):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\n" for part in node.values)


def is_said(message: str) -> bool:
    """Whether the parts of a message between `...` stand in one string of the source, in this order."""
    parts = (re.escape(part.strip(" ")) for part in message.split("..."))
    pattern = re.compile(".*?".join(parts), re.DOTALL)
    return any(pattern.search(text) for text in strings())


def messages(path: Path) -> list[str]:
    text = path.read_text()
    return [span for header in MESSAGES for spans in readme.first_cells(text, header) for span in spans]


@pytest.mark.parametrize("path", BOTH, ids=name_of)
def test_every_message_of_ours_is_one_that_the_source_says(path: Path) -> None:
    assert [message for message in messages(path) if not is_said(message)] == []


def test_both_languages_explain_the_same_messages() -> None:
    assert len(messages(TROUBLE)) > 50
    assert messages(TROUBLE) == messages(twin(TROUBLE))


def test_a_message_that_nobody_says_is_noticed() -> None:
    assert is_said("... processes: must be a multiple of ...")
    assert not is_said("... processes: must be a product of ...")
    assert not is_said("must be a multiple of ... processes:")
