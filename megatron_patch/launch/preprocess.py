"""`megatron-patch preprocess`: text files to megatron-core's indexed dataset.

    megatron-patch preprocess --input corpus.jsonl --output-prefix corpus --tokenizer-model MODEL_DIR --append-eod

Parses, validates, runs and prints the report; all else is in `megatron_patch.data.preprocess`.
"""

from __future__ import annotations

import tyro

from megatron_patch.data.arguments import PreprocessArgs
from megatron_patch.launch.light import hide_torch
from megatron_patch.launch.reports import write_json


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = tyro.cli(PreprocessArgs, args=argv, prog="megatron-patch preprocess", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    if not args.trust_remote_code:  # which may be code that needs torch
        hide_torch()
    from megatron_patch.data.preprocess import preprocess
    from megatron_patch.data.tables import show_preprocess

    report = preprocess(args)
    show_preprocess(report)
    write_json(report, args.json)
    return 0
