"""A training step beside the plain transformers + torch AdamW loop: same model, batch, precision, threads, one process.

    python benchmarks/training.py --model HF_DIR [--seq-length 512] [--steps 9] [--threads 2] [--bf16]

Both train the same weights on the same random tokens, step by step in turn, so that the machine's mood hits both alike.
Printed are the medians and the ratio transformers / ours: above 1, ours is faster.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro


@dataclass(frozen=True)
class Args:
    """Time training steps in turn."""

    model: str
    """Hugging Face directory of a model that fits into memory twice, with gradients and optimizer states."""
    seq_length: int = 512
    """Tokens in a sample."""
    micro_batch_size: int = 1
    """Samples in a micro-batch."""
    num_microbatches: int = 1
    """Micro-batches in a step."""
    steps: int = 9
    """Timed steps of each, after one that is not."""
    threads: int = 2
    """Threads of torch."""
    bf16: bool = False
    """Train in bfloat16 (ours with fp32 main weights; transformers in plain bfloat16)."""


def ours(args: Args, root: Path) -> Callable[[], float]:
    """One step of our loop; returns the loss."""
    from megatron_patch.training.arguments import PretrainArgs
    from megatron_patch.training.initialize import initialize
    from megatron_patch.training.loop import train_step
    from megatron_patch.training.pretraining import Pretraining
    from megatron_patch.training.setup import set_up

    initialize()
    settings = PretrainArgs(
        load=str(root),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.micro_batch_size * args.num_microbatches,
        train_iters=args.steps + 1,
        lr_decay_style="constant",
        bf16=args.bf16,
    )
    run = set_up(settings, Pretraining(settings))
    data = _batches(args, run.architecture.vocab_size)

    def step() -> float:
        sums = train_step(run, data).sums
        return (sums[0] / sums[1]).item()

    return step


def transformers_loop(args: Args) -> Callable[[], float]:
    """One step of the loop everybody writes; returns the loss."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01)
    data = _batches(args, model.config.vocab_size)

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for _ in range(args.num_microbatches):
            batch = next(data)
            logits = model(batch["tokens"]).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
            (loss / args.num_microbatches).backward()
            total += loss.item() / args.num_microbatches
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    return step


def _batches(args: Args, vocab_size: int) -> Iterator[dict]:
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (args.micro_batch_size, args.seq_length + 1)
    while True:
        tokens = torch.randint(vocab_size, shape, generator=generator)
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(shape[0], args.seq_length),
            "position_ids": torch.arange(args.seq_length)[None].expand(shape[0], -1).contiguous(),
        }


def main() -> None:
    args = tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,))
    warnings.filterwarnings("ignore")
    import torch

    from megatron_patch.checkpoint.convert import convert

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as place:
        convert(args.model, f"{place}/megatron")
        steps = {"megatron-patch": ours(args, Path(place) / "megatron"), "transformers": transformers_loop(args)}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for _ in range(args.steps + 1):
            losses = {}
            for name, step in steps.items():
                wall, cpu = time.perf_counter(), time.process_time()
                losses[name] = step()
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            print(" | ".join(f"{n} {times[n][-1][0]:.2f} s, loss {losses[n]:.5f}" for n in steps), flush=True)
    _report(args, {name: values[1:] for name, values in times.items()})


def _report(args: Args, times: dict[str, list[tuple[float, float]]]) -> None:
    tokens = args.micro_batch_size * args.num_microbatches * args.seq_length
    for name, values in times.items():
        wall, cpu = (median(column) for column in zip(*values, strict=True))
        print(f"{name:>15}: median {wall:.3f} s a step ({cpu:.3f} s of CPU), {tokens / wall:,.0f} tokens/s")
    for column, kind in enumerate(("wall", "CPU")):
        pairs = zip(times["transformers"], times["megatron-patch"], strict=True)
        ratios = [theirs[column] / ours[column] for theirs, ours in pairs]
        print(f"{'ratio, ' + kind:>15}: median {median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})")


if __name__ == "__main__":
    main()
