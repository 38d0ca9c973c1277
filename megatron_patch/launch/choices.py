"""`megatron-patch choices`: accuracy of a checkpoint on local questions.

    megatron-patch choices --load CHECKPOINT_DIR --data 'ceval/val/*.csv' --answer-cue 答案： \\
        --few-shot-data 'ceval/dev/*.csv' --num-fewshot 5
    megatron-patch choices --nproc-per-node 2 --tensor-model-parallel-size 2 --load CHECKPOINT_DIR \\
        --data lambada.jsonl --json accuracy.json

Parses, validates, runs and prints the report; all else is in `megatron_patch.evaluation`.
"""

from __future__ import annotations

import os

import tyro

from megatron_patch.evaluation.arguments import ChoicesArgs
from megatron_patch.launch.reports import write_json


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = _parse(argv)
    args.check_world(int(os.environ.get("WORLD_SIZE", "1")))
    from megatron_patch.evaluation.choices import ask, show, write_answers

    if (found := ask(args)) is not None:
        report, answers = found
        show(report)
        write_json(report, args.json)
        if args.output:
            write_answers(answers, args.output)
    return 0


def check(argv: list[str], num_processes: int) -> None:
    """Finds a user's mistakes before any process starts."""
    _parse(argv).check_world(num_processes)


def _parse(argv: list[str] | None) -> ChoicesArgs:
    args = tyro.cli(ChoicesArgs, args=argv, prog="megatron-patch choices", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    return args
