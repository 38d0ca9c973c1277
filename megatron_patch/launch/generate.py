"""`megatron-patch generate`: continue prompts, or answer them, with a checkpoint.

    megatron-patch generate --load MODEL_DIR --prompt "The capital of France is"
    megatron-patch generate --nproc-per-node 2 --pipeline-model-parallel-size 2 --load CHECKPOINT_DIR --chat \\
        --prompts-file prompts.jsonl --output completions.jsonl --temperature 0.8 --top-p 0.95

Parses, validates and runs; all else is in `megatron_patch.generation`.
"""

from __future__ import annotations

import os

import tyro

from megatron_patch.generation.arguments import GenerateArgs


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = check(argv, int(os.environ.get("WORLD_SIZE", "1")))
    from megatron_patch.generation.job import answer

    answer(args)
    return 0


def check(argv: list[str] | None, num_processes: int) -> GenerateArgs:
    """Parses, and finds a user's mistakes before any process starts."""
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction)
    args = tyro.cli(GenerateArgs, args=argv, prog="megatron-patch generate", config=config)
    args.validate()
    args.check_world(num_processes)
    return args
