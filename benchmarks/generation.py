"""Greedy generation beside `transformers.generate`: same model, prompts, fp32, threads, one process, KV caches.

    python benchmarks/generation.py --model HF_DIR [--new-tokens 64] [--batch-sizes 1 8] [--repeats 7] [--threads 2]

Both continue the same prompts (of different lengths, padded on the left) in turn, so that the machine's mood hits both
alike. Printed are the medians and the ratio transformers / ours: above 1, ours is faster. That the tokens are equal is
checked (fp32).
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import tyro

Generate = Callable[[list[list[int]]], list[list[int]]]


@dataclass(frozen=True)
class Args:
    """Time generation in turn."""

    model: str
    """Hugging Face directory of a model that fits into memory twice."""
    new_tokens: int = 64
    """Tokens generated for each prompt."""
    prompt_length: int = 24
    """Tokens of the longest prompt; the others are shorter, down to a quarter."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Prompts in a batch, for each measurement."""
    repeats: int = 7
    """Timed runs of each, after one that is not."""
    threads: int = 2
    """Threads of torch."""
    cpu_time: bool = False
    """Measure the process's CPU time instead of the wall clock, for a machine that others use too (with 1 thread)."""


def ours(args: Args, root: str) -> Generate:
    """Our engine on a checkpoint converted from the model."""
    import torch

    from megatron_patch.checkpoint.logits import load_model
    from megatron_patch.generation.engine import generate

    (model,) = load_model(root, torch.float32)
    return lambda prompts: generate(model, prompts, max_new_tokens=args.new_tokens)


def transformers_generate(args: Args) -> Generate:
    """`generate` of transformers with its defaults: dynamic cache, SDPA attention."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        max_new_tokens=args.new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )

    def run(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return model.generate(ids, attention_mask=mask)[:, longest:].tolist()

    return run


def make_prompts(batch_size: int, longest: int) -> list[list[int]]:
    """Random ids, the first prompt the longest."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = [max(longest * (4 - index % 4) // 4, 1) for index in range(batch_size)]
    return [torch.randint(3, 200, (length,), generator=generator).tolist() for length in lengths]


def measure(args: Args, sides: dict[str, Generate], batch_size: int) -> None:
    """Time both sides in turn and print medians and ratio."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    prompts = make_prompts(batch_size, args.prompt_length)
    times: dict[str, list[float]] = {name: [] for name in sides}
    outputs = {}
    for _ in range(args.repeats + 1):
        for name, generate in sides.items():
            begin = clock()
            outputs[name] = generate(prompts)
            times[name].append(clock() - begin)
    first, second = (values[1:] for values in times.values())
    ratios = [theirs / own for own, theirs in zip(first, second, strict=True)]
    tokens, equal = batch_size * args.new_tokens, len({str(output) for output in outputs.values()}) == 1
    for name, values in times.items():
        middle = median(values[1:])
        print(f"batch {batch_size}, {name:>14}: median {middle:.3f} s, {tokens / middle:.1f} tokens/s")
    spread = f"min {min(ratios):.2f}, max {max(ratios):.2f}"
    print(
        f"batch {batch_size}, {'ratio':>14}: median {median(ratios):.2f} ({spread}); tokens equal: {equal}", flush=True
    )


def main() -> None:
    args = tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,))
    warnings.filterwarnings("ignore")
    import torch

    from megatron_patch.checkpoint.convert import convert
    from megatron_patch.training.initialize import parallel

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as place:
        convert(args.model, f"{place}/megatron")
        with parallel():
            sides = {"megatron-patch": ours(args, f"{place}/megatron"), "transformers": transformers_generate(args)}
            for batch_size in args.batch_sizes:
                measure(args, sides, batch_size)


if __name__ == "__main__":
    main()
