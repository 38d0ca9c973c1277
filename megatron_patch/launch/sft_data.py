"""`megatron-patch sft-data`: conversations to tokenized samples for `finetune`.

    megatron-patch sft-data --input chats.jsonl --output-prefix chats --tokenizer-model MODEL_DIR --seq-length 4096

Parses, validates, runs and prints the report; all else is in `megatron_patch.data.sft`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import tyro

from megatron_patch.data.sft.arguments import SftDataArgs
from megatron_patch.launch.light import hide_torch


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = tyro.cli(SftDataArgs, args=argv, prog="megatron-patch sft-data", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    if not args.trust_remote_code:  # which may be code that needs torch
        hide_torch()
    from megatron_patch.checkpoint.directory import write_text
    from megatron_patch.data.ledger import TooManyErrors
    from megatron_patch.data.sft.building import build
    from megatron_patch.data.sft.tables import show_sft

    try:
        report = build(args)
    except TooManyErrors as error:
        print(f"megatron-patch sft-data: error: {error}", file=sys.stderr)
        return 3
    show_sft(report)
    if args.json:
        write_text(Path(args.json), json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n")
    return 0
