"""`megatron-patch finetune`: supervised fine-tuning, on what the assistant says in conversations.

    megatron-patch finetune --nproc-per-node 2 --load CKPT --save OUT --train-data chats.jsonl \\
        --valid-data others.jsonl --epochs 2 --seq-length 4096 --global-batch-size 32

Run it under torchrun or a cluster's launcher for several machines. It holds no logic of its own.
"""

from __future__ import annotations

import tyro

from megatron_patch.training.arguments import FinetuneArgs, batching_of


def main(argv: list[str] | None = None) -> int:
    """Parse, check, train."""
    args = _parse(argv)
    from megatron_patch.training.initialize import shut_down
    from megatron_patch.training.loop import finetune

    try:
        finetune(args)
    finally:
        shut_down()
    return 0


def check(argv: list[str], num_processes: int) -> None:
    """Find a user's mistakes before any process starts."""
    batching_of(_parse(argv), num_processes)


def _parse(argv: list[str] | None) -> FinetuneArgs:
    args = tyro.cli(FinetuneArgs, prog="megatron-patch finetune", args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    return args
