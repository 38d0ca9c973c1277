"""`megatron-patch sft-data`: conversations to tokenized samples for `finetune`.

    megatron-patch sft-data --input chats.jsonl --output-prefix chats --tokenizer-model MODEL_DIR --seq-length 4096

Parses, validates, runs and prints the report; all else is in `megatron_patch.data.sft`.
"""

from __future__ import annotations

import tyro

from megatron_patch.data.sft.arguments import SftDataArgs
from megatron_patch.launch.light import hide_torch
from megatron_patch.launch.reports import write_json


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = tyro.cli(SftDataArgs, args=argv, prog="megatron-patch sft-data", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    if not args.trust_remote_code:  # which may be code that needs torch
        hide_torch()
    from megatron_patch.data.sft.building import build
    from megatron_patch.data.sft.tables import show_sft

    report = build(args)
    show_sft(report)
    write_json(report, args.json)
    return 0
