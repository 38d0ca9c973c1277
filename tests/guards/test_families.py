"""The zoo stays data: its files are small, and its table says what tests/zoo proves."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

from megatron_patch.models import FAMILIES
from tests.guards.imports import ROOT
from tests.zoo.cases import CASES

FILES = [path for path in (ROOT / "megatron_patch" / "models").glob("*.py") if path.stem not in ("__init__", "listing")]
MOST_LINES, MEDIAN_OF_CODE = 120, 40


def _code(path: Path) -> int:
    """Lines of a file but its docstring, imports, comments and empty lines."""
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text), clean=False) or ""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("from ", "import "))]
    return sum(not line.strip().startswith("#") for line in lines) - len(docstring.splitlines())


def test_no_family_file_is_long() -> None:
    assert {path.name: size for path in FILES if (size := len(path.read_text().splitlines())) > MOST_LINES} == {}


def test_half_of_the_family_files_are_short() -> None:
    assert statistics.median(map(_code, FILES)) <= MEDIAN_OF_CODE


def test_every_family_has_a_case_that_is_trained() -> None:
    assert {family.name for family in FAMILIES} == {case.family for case in CASES.values() if case.is_main}


def test_families_have_names_of_their_own() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
