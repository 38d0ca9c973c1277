"""`megatron-patch families`: which models there are, what is special about each, and what it was proven against."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class FamiliesArguments:
    """Families of models: what is special about each, at which parallelism it is proven, and against what."""

    markdown: bool = False
    """Print the table as README.md has it."""


def main(argv: list[str]) -> int:
    config = (tyro.conf.FlagCreatePairsOff,)
    arguments = tyro.cli(FamiliesArguments, args=argv, prog="megatron-patch families", config=config)
    from megatron_patch.models.listing import HEADER, markdown, rows

    if arguments.markdown:
        print(markdown())
        return 0
    table = Table(*HEADER, box=SIMPLE_HEAD)
    for row in rows():
        table.add_row(*row)
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
    return 0
