"""`megatron-patch generate`: continue prompts with a Megatron checkpoint.

    megatron-patch generate --load CHECKPOINT_DIR --prompt "The capital of France is"
    megatron-patch generate --nproc-per-node 2 --pipeline-model-parallel-size 2 --load CHECKPOINT_DIR \\
        --prompts-file prompts.jsonl --output completions.jsonl --temperature 0.8 --top-p 0.95

Parses, validates, runs and shows; all else is in `megatron_patch.generation`.
"""

from __future__ import annotations

import os

import tyro

from megatron_patch.generation.arguments import GenerateArgs


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; what goes wrong is raised, a user's mistake as ValueError."""
    args = check(argv, int(os.environ.get("WORLD_SIZE", "1")))
    import torch

    from megatron_patch.checkpoint.directory import huggingface_directory, locate
    from megatron_patch.checkpoint.logits import load_model
    from megatron_patch.generation import text
    from megatron_patch.tokenizer import load_tokenizer
    from megatron_patch.training.initialize import parallel

    prompts = text.read_prompts(args.prompt, args.prompts_file, args.prompt_key)
    tokenizer = load_tokenizer(huggingface_directory(locate(args.load)[0]))
    with parallel(args.tensor_model_parallel_size, args.pipeline_model_parallel_size):
        (model,) = load_model(args.load, getattr(torch, args.dtype))
        is_first = torch.distributed.get_rank() == 0
        progress = text.Progress(len(prompts) * args.max_new_tokens, quiet=not is_first)
        completions = text.generate_text(
            model,
            tokenizer,
            prompts,
            args.params,
            max_new_tokens=args.max_new_tokens,
            eos_token_ids=text.eos_token_ids(args.load, tokenizer),
            batch_size=args.batch_size,
            parse_special_tokens=args.parse_special_tokens,
            on_step=progress,
        )
    progress.close()
    if is_first:
        text.show(completions, args.output)
    return 0


def check(argv: list[str] | None, num_processes: int) -> GenerateArgs:
    """Parses, and finds a user's mistakes before any process starts."""
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction)
    args = tyro.cli(GenerateArgs, args=argv, prog="megatron-patch generate", config=config)
    args.validate()
    args.check_world(num_processes)
    return args
