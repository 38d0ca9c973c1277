"""The style budgets hold for the package; each checker is shown a sample that it must complain about."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guards import style
from tests.guards.imports import ROOT, package_modules

SOURCES = {name: path.read_text() for name, path in package_modules()}
FUNCTIONS = [(name, function) for name, source in SOURCES.items() for function in style.functions(source)]


def ruff(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--quiet",
        "--output-format=concise",
        "--config",
        str(ROOT / "pyproject.toml"),
    ]
    return subprocess.run([*command, *map(str, paths)], capture_output=True, text=True)


def text_files() -> list[Path]:
    """What git tracks or would track, as far as it is text that we wrote."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in names if Path(name).suffix in {".py", ".sh", ".md", ".toml", ".txt"}]


def test_ruff_has_nothing_to_say() -> None:
    result = ruff(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff_complains_about_an_unused_import(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import os\n")
    assert "F401" in ruff(tmp_path).stdout


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{name}.{function.name}: {style.body_lines(function)} lines"
        for name, function in FUNCTIONS
        if style.body_lines(function) > style.MAX_FUNCTION_LINES
    ]
    assert not long, long


def test_half_of_all_functions_are_short() -> None:
    lengths = [style.body_lines(function) for _, function in FUNCTIONS]
    assert statistics.median(lengths) <= style.MAX_MEDIAN_FUNCTION_LINES


def test_a_docstring_does_not_count_as_length() -> None:
    (short,) = style.functions('def f():\n    """One.\n\n    Two."""\n    return 1\n')
    (long,) = style.functions("def f():\n" + "    pass\n" * 51)
    assert (style.body_lines(short), style.body_lines(long)) == (2, 52)


def test_every_module_opens_with_a_docstring() -> None:
    bare = [name for name, source in SOURCES.items() if not ast.get_docstring(ast.parse(source))]
    assert not bare


def test_public_functions_are_annotated() -> None:
    public = [(name, function) for name, function in FUNCTIONS if style.is_public(function)]
    bare = [f"{name}.{function.name}" for name, function in public if not style.is_annotated(function)]
    assert len(bare) <= (1 - style.MIN_ANNOTATED) * len(public), bare


def test_a_missing_annotation_is_noticed() -> None:
    source = "def f(self, a: int, *, b) -> int: ...\ndef g(a: int): ...\ndef h(cls, *a: int, **b: str) -> None: ..."
    assert [style.is_annotated(function) for function in style.functions(source)] == [False, False, True]


def test_no_twenty_lines_stand_in_two_places() -> None:
    found = style.duplicates(SOURCES)
    assert not found, "\n".join(found)


def test_a_copy_is_found_whatever_its_indentation_and_comments() -> None:
    lines = [f"x{number} = {number}" for number in range(20)]
    copy = "def f():\n" + "\n".join(f"    {line}" for line in lines[:9] + ["# why", ""] + lines[9:])
    assert style.duplicates({"a": "\n".join(lines), "b": copy}) == ["a:1 = b:2"]
    assert not style.duplicates({"a": "\n".join(lines[:19]), "b": copy})


def test_launch_modules_are_thin() -> None:
    long = {
        name: len(source.splitlines())
        for name, source in SOURCES.items()
        if name.startswith("launch.") and name != "launch.main" and len(source.splitlines()) > style.MAX_LAUNCH_LINES
    }
    assert not long


def test_no_file_names_a_folder_of_somebodys_machine() -> None:
    found = {str(path): style.machine_paths(path.read_text()) for path in text_files()}
    assert not any(found.values()), {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize("folder", ["work", "home", "mnt"])
def test_a_machine_path_is_found(folder: str) -> None:
    assert style.machine_paths(f"a = 1\nload('/{folder}/me/model')") == [f"line 2: load('/{folder}/me/model')"]
    assert not style.machine_paths(f"see framework/{folder}/x, $HOME/{folder}, https://a.org/{folder}/b, ~/{folder}")


def test_models_are_told_apart_by_their_records_and_not_by_name() -> None:
    found = {
        name: style.name_comparisons(source)
        for name, source in SOURCES.items()
        if name != "models" and not name.startswith("models.")
    }
    assert not any(found.values()), {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
    "test", ["kind == 'llama'", "'qwen2' in name", "name.startswith('Bloom')", "kind in ('a', 'glm')", "'phi3' == x"]
)
def test_a_model_name_in_a_comparison_is_found(test: str) -> None:
    assert style.name_comparisons(f"if {test}:\n    pass")


@pytest.mark.parametrize("test", ["kind == 'rope'", "table['llama']", "'optional' == x", "name.startswith('model.')"])
def test_other_strings_are_not_taken_for_model_names(test: str) -> None:
    assert not style.name_comparisons(f"if {test}:\n    pass")
