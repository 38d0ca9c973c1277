"""Every shell script that ships is valid bash, stops at the first error where it runs, and is executable."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.guards.imports import ROOT


def scripts() -> list[Path]:
    """Files that git tracks or would track and that bash is to read."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in map(ROOT.joinpath, names) if path.is_file() and is_shell(path)]


def is_shell(path: Path) -> bool:
    if path.suffix == ".sh":
        return True
    with path.open("rb") as file:
        return file.read(64).startswith((b"#!/usr/bin/env bash", b"#!/bin/bash", b"#!/bin/sh"))


def complaint(path: Path) -> str:
    return subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr


def test_the_shipped_scripts_are_found() -> None:
    assert {"run_tests.sh", ".ci/run", ".ci/env.sh"} <= {path.relative_to(ROOT).as_posix() for path in scripts()}


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_script_is_valid_bash(path: Path) -> None:
    assert complaint(path) == ""


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_script_that_has_an_interpreter_is_executable(path: Path) -> None:
    assert os.access(path, os.X_OK) == path.read_text().startswith("#!")


def test_a_broken_script_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "bad.sh").write_text("if true; then\n")
    assert "syntax error" in complaint(tmp_path / "bad.sh")
