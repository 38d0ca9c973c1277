"""The command line as users see it, one line per flag, taken from every sub-command's real `--help`.

    python -m tests.guards.cli_surface            print it
    python -m tests.guards.cli_surface --write    freeze it in cli_surface.txt, after a change that was meant

A flag that changes its name, type, choices or default breaks somebody's script; the test that compares makes that a
decision instead of an accident.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro

from megatron_patch.launch import main as command
from megatron_patch.launch import processes

FROZEN = Path(__file__).with_suffix(".txt")

_ENTRY = re.compile(r"(?P<flag>-\S+(?: \S+)*?)(?:\s{2,}(?P<text>.*))?$")
_VALUE = re.compile(r"\((?:default: (?P<default>[^()]*(?:\([^()]*\))*[^()]*)|(?P<required>required))\)\s*$")


class Parsed(Exception):
    """Carries what the real parser made of a command line, out of the middle of a sub-command."""

    def __init__(self, arguments: Any) -> None:
        super().__init__(arguments)
        self.arguments = arguments


def parse(argv: list[str]) -> Any:
    """What the sub-command's own parser makes of `argv`, without running it; ValueError where it refuses.

    Every sub-command begins with `tyro.cli`: that call is let through, and the sub-command stopped right after it.
    """
    name, *rest = argv
    if name not in command.COMMANDS:
        raise ValueError(f"unknown command {name!r}")
    rest = command.with_recipe(command.COMMANDS[name], rest)
    if command.COMMANDS[name].parallel:
        _, rest = processes.take_option(rest)
    original, complaint = tyro.cli, io.StringIO()

    def stop_after_parsing(*args: Any, **kwargs: Any) -> None:
        raise Parsed(original(*args, **kwargs))

    try:
        tyro.cli = stop_after_parsing
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            import_module(f"megatron_patch.launch.{name.replace('-', '_')}").main(rest)
    except Parsed as parsed:
        return parsed.arguments
    except SystemExit as stop:
        if stop.code:
            raise ValueError(f"megatron-patch {' '.join(argv)}\n{complaint.getvalue()}") from None
        return None
    finally:
        tyro.cli = original
    raise AssertionError(f"megatron-patch {name} does not begin with tyro.cli")


def help_text(*names: str) -> str:
    """What `megatron-patch NAME --help` prints on a terminal so wide that hardly a line wraps.

    names: a sub-command, and one of its own sub-commands.
    """
    text = io.StringIO()
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "400"
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            command.main([*names, "--help"])
    finally:
        os.environ.pop("COLUMNS") if width is None else os.environ.update(COLUMNS=width)
    return text.getvalue()


def flags(text: str) -> Iterator[str]:
    """`--flag TYPE = default` or `--flag TYPE (required)` for each entry of a help text."""
    entries: list[str] = []
    for line in text.splitlines():
        body = line.strip(" │")
        if re.match(r"--?\w", body):  # not the ruled line that closes a panel on a terminal without UTF-8
            entries.append(body)
        elif entries and line.startswith(("│", " ")) and body:
            entries[-1] += ("" if "  " in entries[-1] else "  ") + " " + body
        else:
            continue
    return (_flag(entry) for entry in entries)


def _flag(entry: str) -> str:
    match = _ENTRY.match(entry)
    value = _VALUE.search(match["text"] or "")
    if value is None:
        return match["flag"]
    return f"{match['flag']} (required)" if value["required"] else f"{match['flag']} = {value['default']}".rstrip()


def _commands() -> Iterator[tuple[str, ...]]:
    """Every sub-command, or its own sub-commands where it has some."""
    for name in command.COMMANDS:
        nested = re.search(r"^usage: .*\[-h\] \{([\w,-]+)\}$", help_text(name), re.MULTILINE)
        yield from ((name, one) for one in nested[1].split(",")) if nested else ((name,),)


def surface() -> str:
    """The whole command line as text, sub-commands in the order of their table."""
    lines = [f"{' '.join(names)} {flag}" for names in _commands() for flag in flags(help_text(*names))]
    return "\n".join(line for line in lines if "--help" not in line) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        FROZEN.write_text(surface())
    else:
        print(surface(), end="")
