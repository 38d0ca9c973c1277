"""`megatron-patch harness`: tasks of EleutherAI's lm-evaluation-harness with a checkpoint.

    megatron-patch harness --load CHECKPOINT_DIR --tasks lambada_openai arc_easy --limit 200
    megatron-patch harness --nproc-per-node 2 --tensor-model-parallel-size 2 --load CHECKPOINT_DIR \\
        --include-path my_tasks --tasks my_task --json results.json --samples samples.jsonl

Parses, validates, runs and prints the harness's tables; all else is in `megatron_patch.evaluation`.
"""

from __future__ import annotations

import os

import tyro

from megatron_patch.evaluation.arguments import HarnessArgs


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = _parse(argv)
    args.check_world(int(os.environ.get("WORLD_SIZE", "1")))
    from megatron_patch.evaluation.harness import run, show

    results = run(args)
    if results is not None:
        show(results, args)
    return 0


def check(argv: list[str], num_processes: int) -> None:
    """Finds a user's mistakes before any process starts."""
    _parse(argv).check_world(num_processes)


def _parse(argv: list[str] | None) -> HarnessArgs:
    args = tyro.cli(HarnessArgs, args=argv, prog="megatron-patch harness", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    return args
