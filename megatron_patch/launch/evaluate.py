"""`megatron-patch evaluate`: loss and perplexity of a checkpoint on text or indexed data.

    megatron-patch evaluate --load MODEL_DIR --data held_out.jsonl
    megatron-patch evaluate --nproc-per-node 2 --tensor-model-parallel-size 2 --load CHECKPOINT_DIR \\
        --data english.txt chinese.txt --json evaluation.json

Parses, validates, runs and prints the report; all else is in `megatron_patch.evaluation`.
"""

from __future__ import annotations

import os

import tyro

from megatron_patch.evaluation.arguments import EvaluateArgs
from megatron_patch.launch.reports import write_json


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = _parse(argv)
    args.check_world(int(os.environ.get("WORLD_SIZE", "1")))
    from megatron_patch.evaluation.evaluate import evaluate
    from megatron_patch.evaluation.report import show

    report = evaluate(args)
    if report is not None:
        show(report)
        write_json(report, args.json)
    return 0


def check(argv: list[str], num_processes: int) -> None:
    """Finds a user's mistakes before any process starts."""
    _parse(argv).check_world(num_processes)


def _parse(argv: list[str] | None) -> EvaluateArgs:
    args = tyro.cli(EvaluateArgs, args=argv, prog="megatron-patch evaluate", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    return args
