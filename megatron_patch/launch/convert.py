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
from megatron_patch.launch.reports import write_json
from megatron_patch.progress import Progress


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = tyro.cli(ConvertArgs, args=argv, prog="megatron-patch convert", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    if args.workers > 1 and not args.dry_run and "RANK" not in os.environ:
        processes.run_again(args.workers, ["convert", *(argv or [])])
    if not args.dry_run:
        read_ahead(args.source)
    with without_garbage_collection():
        from megatron_patch.checkpoint import console
        from megatron_patch.checkpoint.convert import convert, plan
        from megatron_patch.checkpoint.opening import wanted
        from megatron_patch.checkpoint.verify import prove, why_no_logits

    options = {"hf_config": args.hf_config, "trust_pickle": args.trust_pickle}
    if args.dry_run:
        console.show_plan(plan(args.source, wanted(args), dry_run=True, **options), args)
        return 0
    is_first = os.environ.get("RANK", "0") == "0"
    how = {"overwrite": args.overwrite, "resume": args.resume}
    with Progress("convert", None, "B", quiet=not is_first) as progress:
        report = convert(args.source, args.target, wanted(args), progress=progress.reach, **how, **options)
    if not is_first:
        return 0
    console.show_conversion(report)
    write_json(report, args.json)
    if not args.verify:
        return 0
    proofs = prove(args.source, args.target, was_cast=bool(args.dtype), **options)
    is_same = all([console.show_verification(proof) for proof in proofs])
    if reason := why_no_logits(args.source, args.target, bool(args.dtype)):
        print(f"verify: logits are not compared: {reason}")
    return 0 if is_same else 1
