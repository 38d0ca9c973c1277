"""`megatron-patch verify`: proof that two checkpoints are the same model.

    megatron-patch verify --source MODEL_DIR --target CHECKPOINT_DIR
    megatron-patch verify --nproc-per-node 2 --tensor-model-parallel-size 2 --source MODEL_DIR --target CHECKPOINT_DIR

Parses, validates, runs and prints the report; all else is in `megatron_patch.checkpoint`.
"""

from __future__ import annotations

import os

import tyro

from megatron_patch.checkpoint.arguments import VerifyArgs
from megatron_patch.launch.reports import write_json


def check(argv: list[str], num_processes: int) -> None:
    """Finds a user's mistakes before several processes are started; raises ValueError."""
    args = _parse(argv)
    if args.level in ("names", "checksums"):
        raise ValueError(f"--level {args.level} needs one process, not {num_processes}; several compare logits only")


def _parse(argv: list[str] | None) -> VerifyArgs:
    args = tyro.cli(VerifyArgs, args=argv, prog="megatron-patch verify", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = _parse(argv)
    import torch

    from megatron_patch.checkpoint import console
    from megatron_patch.checkpoint.verify import Bounds, compare, open_pair
    from megatron_patch.training.initialize import parallel

    pair = open_pair(args.source, args.target, args.level, hf_config=args.hf_config, trust_pickle=args.trust_pickle)
    if pair.level != "logits" and "RANK" in os.environ:
        raise ValueError(f"--level {pair.level} needs one process; only logits are compared by several")
    with parallel(args.tensor_model_parallel_size, args.pipeline_model_parallel_size):
        report = compare(
            pair,
            texts=args.texts(),
            max_tokens=args.max_tokens,
            dtype=getattr(torch, args.dtype),
            bounds=Bounds(args.max_abs, args.loss, args.top1),
        )
        is_first = torch.distributed.get_rank() == 0
    if is_first:
        console.show_verification(report)
        write_json(report, args.json)
    return 0 if report.ok else 1
