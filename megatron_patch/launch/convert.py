"""`megatron-patch convert`: Hugging Face, Megatron torch_dist and Megatron legacy checkpoints into one another.

    megatron-patch convert --source MODEL_DIR --target CHECKPOINT_DIR [--target-format legacy ...] [--verify]
    megatron-patch convert --source MODEL_DIR --target CHECKPOINT_DIR --dry-run

Parses, validates, runs and prints the reports; all else is in `megatron_patch.checkpoint`.
"""

from __future__ import annotations

import os

import tyro

from megatron_patch.checkpoint.arguments import ConvertArgs
from megatron_patch.checkpoint.startup import read_ahead, without_garbage_collection
from megatron_patch.launch import processes


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = tyro.cli(ConvertArgs, args=argv, prog="megatron-patch convert", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    if args.workers > 1 and "RANK" not in os.environ:
        processes.run_again(args.workers, ["convert", *(argv or [])])
    if not args.dry_run:
        read_ahead(args.source)
    with without_garbage_collection():
        from megatron_patch.checkpoint import console
        from megatron_patch.checkpoint.convert import convert, plan
        from megatron_patch.checkpoint.opening import wanted

    options = {"hf_config": args.hf_config, "trust_pickle": args.trust_pickle}
    if args.dry_run:
        console.show_plan(plan(args.source, wanted(args), dry_run=True, **options), args)
        return 0
    with console.ProgressBar() as progress:
        report = convert(
            args.source,
            args.target,
            wanted(args),
            overwrite=args.overwrite,
            resume=args.resume,
            progress=progress,
            **options,
        )
    if int(os.environ.get("RANK", 0)):
        return 0
    return console.finish_conversion(report, args)
