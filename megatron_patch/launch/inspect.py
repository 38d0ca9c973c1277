"""`megatron-patch inspect`: what an indexed dataset holds.

    megatron-patch inspect --data-path corpus_text_document --tokenizer-model MODEL_DIR --doc 0 17

Parses, validates, runs and prints the report; all else is in `megatron_patch.data.inspecting`.
"""

from __future__ import annotations

import tyro

from megatron_patch.data.tool_arguments import InspectArgs
from megatron_patch.launch.reports import write_json


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = tyro.cli(InspectArgs, args=argv, prog="megatron-patch inspect", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    from megatron_patch.data.inspecting import inspect
    from megatron_patch.data.tables import show_inspection

    report = inspect(args)
    show_inspection(report)
    write_json(report, args.json)
    return 0
