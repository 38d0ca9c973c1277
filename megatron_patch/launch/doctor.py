"""`megatron-patch doctor`: what is installed here, which kernels are used and why, the fix for what is missing.

Reads metadata and files only, torch is not imported. Exit code 0 where everything required is there, else 1.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

import orjson
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_patch.backend.capabilities import Capability, Kernel, capabilities, kernels

_WORDS = {True: "[green]yes[/]", False: "no", None: "[yellow]unknown[/]"}


@dataclass(frozen=True)
class DoctorArguments:
    """What is installed and usable on this machine, which kernels are used and why, the fix for what is missing."""

    json: bool = False
    """Print one JSON object instead of tables."""


def main(argv: list[str]) -> int:
    config = (tyro.conf.FlagCreatePairsOff,)
    arguments = tyro.cli(DoctorArguments, args=argv, prog="megatron-patch doctor", config=config)
    found = capabilities()
    used = kernels({capability.name: capability for capability in found})
    healthy = all(capability.usable for capability in found if capability.required)
    if arguments.json:
        report = {"ok": healthy, "capabilities": [*map(asdict, found)], "kernels": [*map(asdict, used)]}
        sys.stdout.buffer.write(orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    else:
        _print(found, used, healthy)
    return 0 if healthy else 1


def _print(found: tuple[Capability, ...], used: tuple[Kernel, ...], healthy: bool) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table("what is here", "version", "usable", "", box=SIMPLE_HEAD)
    for one in found:
        word = "[red]no[/]" if one.required and not one.usable else _WORDS[one.usable]
        table.add_row(one.name, one.version or "-", word, escape(one.note))
    console.print(table)
    table = Table("operation", "kernel used", "why", box=SIMPLE_HEAD)
    for kernel in used:
        table.add_row(kernel.operation, kernel.kernel, kernel.why)
    console.print(table)
    for one in (one for one in found if one.fix):
        urgency = "[red]required[/]" if one.required else "optional"
        console.print(f"{urgency}, {one.name}: {escape(one.fix)}", soft_wrap=True)
    console.print("doctor: OK" if healthy else "[red]doctor: something required is missing[/]")
