"""Scoring text beside a plain transformers loop: same model, windows, fp32, threads, one process.

    python benchmarks/evaluate.py --model HF_DIR --data TEXT.jsonl [--seq-length 512] [--threads 2]

The loop is that of transformers' perplexity guide: one window at a time, labels, the loss of the model's own forward
pass. Both score the same windows in turn, so that the machine's mood hits both alike. Printed are the medians and the
ratio transformers / ours: above 1, ours is faster. That the sums are equal is checked (fp32, 1e-5 relative).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from megatron_patch.evaluation.windows import Row

Score = Callable[[], float]


@dataclass(frozen=True)
class Args:
    """Time the scoring of text in turn."""

    model: str
    """Hugging Face directory of a model that fits into memory twice, with its tokenizer."""
    data: tuple[str, ...]
    """Text, as `megatron-patch evaluate` takes it."""
    text_key: str = "text"
    """Key of the JSON objects whose string is the document."""
    max_documents: int = 16
    """Documents of each name."""
    seq_length: int = 512
    """Most tokens of a window."""
    micro_batch_size: int = 1
    """Windows that ours computes at once; the loop takes one."""
    repeats: int = 5
    """Timed runs of each, after one that is not."""
    threads: int = 2
    """Threads of torch."""
    cpu_time: bool = False
    """Measure the process's CPU time instead of the wall clock, for a machine that others use too (with 1 thread)."""


def windows(args: Args) -> list[Row]:
    """What both score."""
    from megatron_patch.evaluation.documents import Reading, beginning, read_text
    from megatron_patch.evaluation.windows import rolling
    from megatron_patch.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    reading = Reading(tokenizer, beginning(tokenizer), limit=args.max_documents, text_key=args.text_key)
    found = [one for name in args.data for one in read_text(name, reading).documents]
    return [row for one in found for row in rolling(one.ids, reading.begin, args.seq_length, args.seq_length)]


def transformers_loop(args: Args, rows: Sequence[Row]) -> Score:
    """One window at a time, as in the guide."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    @torch.no_grad()
    def run() -> float:
        total = 0.0
        for row in rows:
            ids = torch.from_numpy(row.ids).long()[None]
            labels = ids.clone()
            labels[:, : -row.counts] = -100
            total += model(ids, labels=labels).loss.item() * row.counts
        return total

    return run


def measure(args: Args, rows: Sequence[Row], sides: dict[str, Score]) -> None:
    """Time both in turn and print what was found."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    sums = {name: run() for name, run in sides.items()}
    ours, theirs = sums.values()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, run in sides.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    tokens = sum(row.counts for row in rows)
    for name, seconds in times.items():
        print(f"{name:>15}: {tokens / median(seconds):,.0f} tokens/s (median of {args.repeats}, {tokens:,} tokens)")
    a, b = times.values()
    ratios = [theirs_s / ours_s for ours_s, theirs_s in zip(a, b, strict=True)]
    spread = f"min {min(ratios):.2f}, max {max(ratios):.2f}"
    print(f"{'ratio':>15}: median {median(ratios):.2f} ({spread}); sums {ours:.4f} and {theirs:.4f}", end=", ")
    print("equal" if abs(ours - theirs) <= 1e-5 * abs(theirs) else "NOT EQUAL")


def main() -> None:
    args = tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,))
    warnings.filterwarnings("ignore")
    import torch

    from megatron_patch.checkpoint.logits import load_model
    from megatron_patch.checkpoint.opening import open_source
    from megatron_patch.evaluation.scoring import score
    from megatron_patch.training.initialize import parallel

    torch.set_num_threads(args.threads)
    rows, source = windows(args), open_source(args.model)
    with parallel():
        (model,) = load_model(source, torch.float32, parallel_output=True)

        def ours() -> float:
            return float(score(model, rows, micro_batch_size=args.micro_batch_size).negative_log_likelihood.sum())

        measure(args, rows, {"megatron-patch": ours, "transformers": transformers_loop(args, rows)})


if __name__ == "__main__":
    main()
