"""Recipes: flags from a YAML file, typed ones over them, and calls by position written down as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.launcher import launch
from megatron_patch.launch import main as command
from megatron_patch.launch.processes import OPTION, split_option
from tests.examples.test_launchers import EVALUATE, GENERATE, PRETRAIN, SFT_MCORE
from tests.guards import readme
from tests.guards.cli_surface import parse
from tests.guards.imports import ROOT

RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))
WITH_RECIPES = [name for name, one in command.COMMANDS.items() if one.arguments]


def expanded(name: str, file: Path | str, *typed: str) -> list[str]:
    """The words that a command is run with."""
    return command.with_recipe(command.COMMANDS[name], [command.RECIPE_OPTION, str(file), *typed])


def parsed(name: str, file: Path | str, *typed: str) -> Any:
    return parse([name, command.RECIPE_OPTION, str(file), *typed])


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_every_command_of_models_takes_a_recipe_and_has_one() -> None:
    assert sorted(WITH_RECIPES) == ["choices", "evaluate", "finetune", "generate", "harness", "pretrain"]
    assert sorted(file.stem for file in RECIPES) == sorted(WITH_RECIPES)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_shipped_recipe_is_read_by_the_real_parser_word_for_word(file: Path) -> None:
    args = parsed(file.stem, file)
    assert f"megatron-patch {file.stem} --config examples/recipes/{file.name}" in file.read_text()
    for key, value in yaml.safe_load(file.read_text()).items():
        if key == "nproc-per-node":
            continue
        found = getattr(args, key.replace("-", "_"))
        if isinstance(value, list):
            assert list(found) == [str(one) for one in value], key
        else:
            assert found == (type(found)(value) if isinstance(value, str) else value), key


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_shipped_recipe_lacks_nothing_but_its_files(file: Path) -> None:
    try:
        parsed(file.stem, file).validate()
        problems = []
    except ValueError as error:
        problems = str(error).splitlines()
    assert [line for line in problems if "no such" not in line and "does not exist" not in line] == []


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_every_recipe_in_a_readme_is_one_that_is_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = readme.blocks((ROOT / "examples" / name).read_text())
    calls = [words for block in blocks for words in readme.commands(block)]
    assert len(calls) == 7 and all("--config" in words and parse(words) for words in calls)


def test_typed_flags_win_in_every_spelling(tmp_path: Path) -> None:
    file = write(tmp_path, "lr: 1e-5\ndata_path: [a, b]\nbf16: true\nmin-lr: 0\ntrain-iters: 5\nload: x\n")
    args = parsed("pretrain", file, "--lr=2e-5", "--data-path", "c", "--train_iters", "7")
    assert (args.lr, args.data_path, args.train_iters, args.bf16, args.load) == (2e-5, ("c",), 7, True, "x")


def test_switches_are_on_or_off_whatever_their_default(tmp_path: Path) -> None:
    file = write(tmp_path, "train-data: a\npacking: false\nbf16: no\nfp16: yes\n")
    args = parsed("finetune", file)
    assert (args.packing, args.bf16, args.fp16, args.train_data) == (False, False, True, ("a",))
    assert parsed("finetune", write(tmp_path, "packing: true")).packing is True
    assert parsed("finetune", write(tmp_path, "packing: true"), "--no-packing").packing is False


def test_prompts_are_repeated_and_may_begin_with_anything(tmp_path: Path) -> None:
    args = parsed("generate", write(tmp_path, 'load: x\nprompt: ["a b", "c: d"]\nseed: null\n'))
    assert args.prompt == ("a b", "c: d")
    assert parsed("generate", write(tmp_path, "load: x\nprompt: -1 is negative\n")).prompt == ("-1 is negative",)


def test_processes_are_part_of_a_recipe(tmp_path: Path) -> None:
    words = expanded("evaluate", write(tmp_path, "load: x\nnproc-per-node: 3\n"), "--data", "y")
    assert split_option(words, OPTION)[0] == "3"
    words = expanded("evaluate", write(tmp_path, "load: x\nnproc-per-node: 3\n"), OPTION, "2")
    assert split_option(words, OPTION) == ("2", ["--load=x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "load: x\nglobal-bacth-size: 4\n",
            "line 2: 'global-bacth-size' is no flag of this command; nearest: global-batch",
        ),
        ("xyzzy: 4\n", "line 1: 'xyzzy' is no flag of this command"),
        ("lr: 1\nmin-lr: 0\nlr: 2\n", "line 3: 'lr' is given twice"),
        ("bf16: maybe\n", "line 1: bf16: must be true or false"),
        ("bf16: 1\n", "line 1: bf16: must be true or false"),
        ("save: on\n", "line 1: save: on means yes or no in YAML; put it in quotes"),
        ("data-path: {a: 1}\n", "line 1: data-path: must be a value or a list of values"),
        ("data-path: [[a]]\n", "line 1: data-path: must be a value or a list of values"),
        ("- lr\n", "must hold keys and values"),
        ("", "must hold keys and values"),
        ("lr: [1\n", "is no YAML"),
    ],
)
def test_what_a_recipe_may_not_say_is_named_with_its_line(text: str, message: str, tmp_path: Path, capsys) -> None:
    assert command.main(["pretrain", "--config", str(write(tmp_path, text))]) == 2
    err = capsys.readouterr().err
    assert "megatron-patch pretrain: error: " in err and message in err


@pytest.mark.parametrize("words", [["--config"], ["--config", "gone.yaml"], ["--config=gone.yaml"]])
def test_a_recipe_that_is_not_there_is_named(words: list[str], capsys) -> None:
    assert command.main(["pretrain", *words]) == 2
    assert "no such file" in capsys.readouterr().err


def test_other_commands_take_none(capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(["merge", "--config", "recipe.yaml"])
    assert "--config" in capsys.readouterr().err


@pytest.mark.parametrize("name", WITH_RECIPES)
def test_help_tells_of_recipes(name: str, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main([name, "--help"])
    assert "  --config FILE " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("order", "values"),
    [("pretrain", PRETRAIN), ("mcore", SFT_MCORE), ("generate", GENERATE), ("evaluate", EVALUATE)],
)
def test_a_call_by_position_is_written_down_as_a_recipe_of_the_same_command(
    order: str, values: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("RECIPE", "mine.yaml")
    assert launch.main([order, *values.split(), "--dry-run"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("$ ")]
    _, program, name, *typed = line.split()
    assert program == "megatron-patch" and f"the same: megatron-patch {name} --config mine.yaml" in out
    assert parsed(name, "mine.yaml") == parse([name, *typed])
    words = expanded(name, "mine.yaml")
    assert split_option(words, OPTION)[0] == split_option(typed, OPTION)[0]
