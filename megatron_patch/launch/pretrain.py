"""`megatron-patch pretrain`: train, or continue training, a model on indexed datasets.

    megatron-patch pretrain --nproc-per-node 2 --tensor-model-parallel-size 2 --load CKPT --save OUT \\
        --data-path PREFIX_text_document --train-iters 100

Run it under torchrun or a cluster's launcher for several machines. It holds no logic of its own.
"""

from __future__ import annotations

import tyro

from megatron_patch.training.arguments import PretrainArgs


def main(argv: list[str] | None = None) -> int:
    """Parse, check, train."""
    args = _parse(argv)
    from megatron_patch.training.initialize import shut_down
    from megatron_patch.training.loop import pretrain

    try:
        pretrain(args)
    finally:
        shut_down()
    return 0


def check(argv: list[str], num_processes: int) -> None:
    """Find a user's mistakes before any process starts."""
    _parse(argv).plan(num_processes)


def _parse(argv: list[str] | None) -> PretrainArgs:
    args = tyro.cli(PretrainArgs, prog="megatron-patch pretrain", args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    return args
