"""`megatron-patch inspect`: what an indexed dataset holds.

    megatron-patch inspect --data-path corpus_text_document --tokenizer-model MODEL_DIR --doc 0 17

Parses, validates, runs and prints the report; all else is in `megatron_patch.data.inspecting`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import tyro

from megatron_patch.data.tool_arguments import InspectArgs


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = tyro.cli(InspectArgs, args=argv, prog="megatron-patch inspect", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    from megatron_patch.checkpoint.directory import write_text
    from megatron_patch.data.inspecting import inspect
    from megatron_patch.data.tables import show_inspection

    report = inspect(args)
    show_inspection(report)
    if args.json:
        write_text(Path(args.json), json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n")
    return 0
