"""`megatron-patch verify-data`: is an indexed dataset sound.

    megatron-patch verify-data --data-path corpus_text_document --tokenizer-model MODEL_DIR

Parses, validates, runs and prints the report; all else is in `megatron_patch.data.checking`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import tyro

from megatron_patch.data.tool_arguments import VerifyDataArgs


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 1 if anything is wrong with the data."""
    config = (tyro.conf.FlagCreatePairsOff,)
    args = tyro.cli(VerifyDataArgs, args=argv, prog="megatron-patch verify-data", config=config)
    args.validate()
    from megatron_patch.checkpoint.directory import write_text
    from megatron_patch.data.checking import check
    from megatron_patch.data.tables import show_check

    report = check(args)
    show_check(report)
    if args.json:
        write_text(
            Path(args.json), json.dumps({"ok": report.ok, **asdict(report)}, indent=2, ensure_ascii=False) + "\n"
        )
    return 0 if report.ok else 1
