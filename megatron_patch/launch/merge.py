"""`megatron-patch merge`: several indexed datasets into one.

    megatron-patch merge --inputs 'shards/*_text_document' --output-prefix corpus_text_document

Parses, validates, runs and prints the report; all else is in `megatron_patch.data.merging`.
"""

from __future__ import annotations

import tyro

from megatron_patch.data.tool_arguments import MergeArgs
from megatron_patch.launch.reports import write_json


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = tyro.cli(MergeArgs, args=argv, prog="megatron-patch merge", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    from megatron_patch.data.merging import merge
    from megatron_patch.data.tables import show_merge

    report = merge(args)
    show_merge(report)
    write_json(report, args.json)
    return 0
