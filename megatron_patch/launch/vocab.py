"""`megatron-patch vocab train | analyze | merge | init | verify`: extend a tokenizer, and a model with it.

    megatron-patch vocab train --input corpus.jsonl --output new.model    # byte-level: new.json --base MODEL_DIR
    megatron-patch vocab merge --base MODEL_DIR --new new.model --output merged --corpus corpus.jsonl
    megatron-patch vocab analyze --base MODEL_DIR --new merged --held-out held_out.jsonl --png saving.png
    megatron-patch vocab init --base MODEL_DIR --tokenizer merged --output grown
    megatron-patch vocab verify --base MODEL_DIR --model grown

Parses, validates, runs and prints the report; all else is in `megatron_patch.vocab`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import tyro

from megatron_patch.launch.reports import write_json
from megatron_patch.vocab import arguments

_Command = (
    Annotated[arguments.VocabTrainArgs, tyro.conf.subcommand("train")]
    | Annotated[arguments.VocabAnalyzeArgs, tyro.conf.subcommand("analyze")]
    | Annotated[arguments.VocabMergeArgs, tyro.conf.subcommand("merge")]
    | Annotated[arguments.VocabInitArgs, tyro.conf.subcommand("init")]
    | Annotated[arguments.VocabVerifyArgs, tyro.conf.subcommand("verify")]
)
_FUNCTIONS = {
    arguments.VocabTrainArgs: "train.train",
    arguments.VocabAnalyzeArgs: "analyze.analyze",
    arguments.VocabMergeArgs: "merge.merge",
    arguments.VocabInitArgs: "initialise.initialise",
    arguments.VocabVerifyArgs: "verify.verify",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = tyro.cli(_Command, args=argv, prog="megatron-patch vocab", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    module, _, name = _FUNCTIONS[type(args)].partition(".")
    report = getattr(import_module(f"megatron_patch.vocab.{module}"), name)(args)
    show(name, report.table())
    write_json(report, getattr(args, "json", None))
    return 0 if getattr(report, "ok", True) else 1


def show(title: str, rows: Any) -> None:
    """Prints names and values as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"vocab {title}", show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)
