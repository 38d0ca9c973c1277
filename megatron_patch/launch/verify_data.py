"""`megatron-patch verify-data`: is an indexed dataset sound.

    megatron-patch verify-data --data-path corpus_text_document --tokenizer-model MODEL_DIR

Parses, validates, runs and prints the report; all else is in `megatron_patch.data.checking`.
"""

from __future__ import annotations

import tyro

from megatron_patch.data.tool_arguments import VerifyDataArgs
from megatron_patch.launch.reports import write_json


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 1 if anything is wrong with the data."""
    config = (tyro.conf.FlagCreatePairsOff,)
    args = tyro.cli(VerifyDataArgs, args=argv, prog="megatron-patch verify-data", config=config)
    args.validate()
    from megatron_patch.data.checking import check
    from megatron_patch.data.tables import show_check

    report = check(args)
    show_check(report)
    write_json(report, args.json, ok=report.ok)
    return 0 if report.ok else 1
