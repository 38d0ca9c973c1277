"""`megatron-patch convert`: Hugging Face checkpoint -> Megatron checkpoint, and back.

    megatron-patch convert --source MODEL_DIR --target CHECKPOINT_DIR [--verify]

Parses, validates, runs and prints the reports; all else is in `megatron_patch.checkpoint`.
"""

from __future__ import annotations

import tyro

from megatron_patch.checkpoint.arguments import ConvertArgs


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = tyro.cli(ConvertArgs, args=argv, prog="megatron-patch convert", config=(tyro.conf.FlagCreatePairsOff,))
    args.validate()
    import torch

    from megatron_patch.checkpoint import console
    from megatron_patch.checkpoint.convert import convert
    from megatron_patch.checkpoint.verify import verify

    with console.ProgressBar() as progress:
        report = convert(
            args.source,
            args.target,
            overwrite=args.overwrite,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            max_shard_size=args.max_shard_size,
            progress=progress,
        )
    console.show_conversion(report)
    if not args.verify:
        return 0
    verification = verify(args.source, args.target)
    console.show_verification(verification)
    return 0 if verification.ok else 1
