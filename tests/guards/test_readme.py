"""The READMEs are held against the disk and against the real parser, and against each other; docs/ in test_docs.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guards import readme
from tests.guards.cli_surface import parse
from tests.guards.imports import ROOT

FILES = ["README.md", "README.zh-CN.md"]


def blocks(name: str) -> list[readme.Block]:
    return readme.blocks((ROOT / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_the_annotated_tree_names_only_what_exists(name: str) -> None:
    trees = [block for block in blocks(name) if readme.is_tree(block)]
    assert trees, "no annotated tree: a code block with a line that begins with megatron_patch/"
    assert [path for tree in trees for path in readme.missing_paths(tree, ROOT)] == []


@pytest.mark.parametrize("name", FILES)
def test_every_command_is_one_that_the_parser_accepts(name: str) -> None:
    commands = [command for block in blocks(name) for command in readme.commands(block)]
    assert commands, "no megatron-patch command in a ```bash block"
    for command in commands:
        parse(command)


@pytest.mark.parametrize("name", FILES)
def test_every_script_it_starts_exists(name: str) -> None:
    scripts = {script for block in blocks(name) for script in readme.scripts(block)}
    assert {"./quickstart.sh", "./run_tests.sh"} <= scripts
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def test_both_languages_have_the_same_sections_and_the_same_code() -> None:
    english, chinese = ((ROOT / name).read_text() for name in FILES)
    assert readme.headings(english) == readme.headings(chinese)
    code = [[readme.without_comments(block) for block in readme.blocks(text)] for text in (english, chinese)]
    assert code[0] == code[1]


# ---------------------------------------------------------------- the reader can fail

SAMPLE = """# One
text
## Two
```bash
# a comment
$ megatron-patch doctor --json  # why
./quickstart.sh --fast
megatron-patch convert \\
    --load x
```
```text
megatron_patch/
├── family.py weights.py   what they are
└── models/                data only
    └── gone.py            not there
run_tests.sh               the tests
```
"""


@pytest.mark.parametrize("name", FILES)
def test_the_table_of_families_is_the_one_that_the_command_prints(name: str) -> None:
    from megatron_patch.models.listing import markdown

    assert f"\n\n{markdown()}\n\n" in (ROOT / name).read_text()


def test_headings_inside_code_are_not_sections() -> None:
    assert readme.headings(SAMPLE) == [1, 2]


def test_commands_and_scripts_are_found() -> None:
    shell, tree = readme.blocks(SAMPLE)
    assert readme.commands(shell) == [["doctor", "--json"], ["convert", "--load", "x"]]
    assert readme.scripts(shell) == ["./quickstart.sh"]
    assert readme.commands(tree) == []


def test_a_path_that_is_not_on_the_disk_is_found(tmp_path: Path) -> None:
    tree = readme.blocks(SAMPLE)[1]
    (tmp_path / "megatron_patch/models").mkdir(parents=True)
    for name in ("megatron_patch/family.py", "megatron_patch/weights.py", "run_tests.sh"):
        (tmp_path / name).touch()
    assert readme.is_tree(tree)
    assert readme.missing_paths(tree, tmp_path) == ["megatron_patch/models/gone.py"]


def test_a_command_with_a_wrong_flag_is_refused() -> None:
    with pytest.raises(ValueError, match="--jsn"):
        parse(["doctor", "--jsn"])


def test_comments_may_differ_between_languages_and_code_may_not() -> None:
    lines = ("run --a 1  # why", "run --a 1  # 为什么", "run --a 2  # why")
    one, two, three = (readme.Block("bash", (line,)) for line in lines)
    assert readme.without_comments(one) == readme.without_comments(two) != readme.without_comments(three)
