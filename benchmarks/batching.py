"""Continuous batching beside fixed batches and beside `transformers.generate`: same model, prompts, fp32 and threads.

    python benchmarks/batching.py --model HF_DIR [--prompts 200] [--batch-size 8] [--repeats 3] [--threads 2]

Prompts of mixed lengths get answers of mixed lengths: both are drawn from a long-tailed (log-normal) distribution with
a fixed seed, and each prompt has a limit of new tokens of its own, as answers that end by themselves would have. Four
ways take turns within each repeat, so that the machine's mood hits all alike:

    continuous            ours: rows that finish make room for the next prompts
    naive                 ours without that: batches in the order of the file, each until its longest answer is there
    transformers          its `generate`, padded on the left, in the same batches
    transformers, sorted  the same with prompts sorted by length, which spares padding

Printed are medians and the ratio of each to the first: above 1, continuous batching is faster. How many answers are
equal to those of transformers is counted.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import tyro


@dataclass(frozen=True)
class Args:
    """Time batching in turn."""

    model: str
    """Hugging Face directory of a model that fits into memory twice."""
    prompts: int = 200
    """How many."""
    batch_size: int = 8
    """Rows computed at a time, by each way."""
    prompt_length: float = 40
    """Median of the prompts' lengths in tokens; the longest have at most 5 times as many."""
    answer_length: float = 24
    """The same of the answers'."""
    repeats: int = 3
    """Timed runs of each, after a short one that is not."""
    threads: int = 2
    """Threads of torch."""
    cpu_time: bool = False
    """Measure the process's CPU time instead of the wall clock, for a machine that others use too (with 1 thread)."""


@dataclass(frozen=True)
class Task:
    """A prompt, and how many tokens its answer has."""

    ids: list[int]
    limit: int


Way = Callable[[list[Task]], list[list[int]]]


def make_tasks(args: Args) -> list[Task]:
    """Random ids of random lengths."""
    generator = np.random.default_rng(0)

    def lengths(middle: float, spread: float) -> list[int]:
        drawn = generator.lognormal(np.log(middle), spread, args.prompts)
        return np.clip(drawn, middle / 8, middle * 5).astype(int).clip(1).tolist()

    sizes = zip(lengths(args.prompt_length, 0.6), lengths(args.answer_length, 1.0), strict=True)
    return [Task(generator.integers(3, 200, length).tolist(), limit) for length, limit in sizes]


# ------------------------------------------------------------------------------------------------------------- the ways


def continuous(model: Any, size: int, tasks: list[Task]) -> list[list[int]]:
    """All prompts at once: the engine does the rest."""
    from megatron_patch.generation.engine import generate

    return generate(model, [one.ids for one in tasks], max_new_tokens=[one.limit for one in tasks], batch_size=size)


def naive(model: Any, size: int, tasks: list[Task]) -> list[list[int]]:
    """The same engine, a batch at a time, all of whose rows go on until the longest is done."""
    from megatron_patch.generation.engine import generate

    def run(batch: list[Task]) -> list[list[int]]:
        return generate(model, [one.ids for one in batch], max_new_tokens=max(one.limit for one in batch))

    return in_batches(run, size, tasks)


def transformers_generate(model: Any, size: int, tasks: list[Task], by_length: bool = False) -> list[list[int]]:
    """`generate` of transformers with its defaults: dynamic cache, SDPA attention."""
    import torch
    from transformers import GenerationConfig

    def run(batch: list[Task]) -> list[list[int]]:
        longest, new = max(len(one.ids) for one in batch), max(one.limit for one in batch)
        ids = torch.tensor([[0] * (longest - len(one.ids)) + one.ids for one in batch])
        mask = torch.tensor([[0] * (longest - len(one.ids)) + [1] * len(one.ids) for one in batch])
        # Not as an argument: what that leaves out, such as the end of text, would come from the model's own.
        model.generation_config = GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return model.generate(ids, attention_mask=mask)[:, longest:].tolist()

    return in_batches(run, size, tasks, by_length)


def in_batches(run: Way, size: int, tasks: list[Task], by_length: bool = False) -> list[list[int]]:
    """Run a batch at a time, and cut each answer to its length."""
    order = sorted(range(len(tasks)), key=lambda index: len(tasks[index].ids) if by_length else index)
    answers: dict[int, list[int]] = {}
    for rows in (order[start : start + size] for start in range(0, len(order), size)):
        answers |= zip(rows, run([tasks[row] for row in rows]), strict=True)
    return [answers[index][: task.limit] for index, task in enumerate(tasks)]


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(args: Args, ways: dict[str, Way], tasks: list[Task]) -> None:
    """Time all ways in turn and print medians and ratios."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(tasks[: args.batch_size])
    for number in range(args.repeats):
        outputs = {}
        for name, way in ways.items():
            begin = clock()
            outputs[name] = way(tasks)
            times[name].append(clock() - begin)
            print(f"run {number + 1}, {name}: {times[name][-1]:.1f} s", flush=True)
    tokens, first = sum(one.limit for one in tasks), times["continuous"]
    for name, values in times.items():
        ratios = [other / own for own, other in zip(first, values, strict=True)]
        equal = sum(a == b for a, b in zip(outputs[name], outputs["transformers"], strict=True))
        speed = f"median {median(values):6.1f} s, {tokens / median(values):6.1f} tokens/s"
        spread = f"ratio {median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})"
        print(f"{name:>20}: {speed}; {spread}; {equal} of {len(tasks)} answers equal", flush=True)


def main() -> None:
    args = tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,))
    warnings.filterwarnings("ignore")
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_patch.checkpoint.logits import load_model
    from megatron_patch.checkpoint.opening import open_weights
    from megatron_patch.training.initialize import parallel

    torch.set_num_threads(args.threads)
    tasks = make_tasks(args)
    prompts, answers = sorted(len(one.ids) for one in tasks), sorted(one.limit for one in tasks)
    for name, sizes in (("prompts", prompts), ("answers", answers)):
        spread = f"{sizes[0]} to {sizes[-1]} tokens, median {median(sizes):.0f}, mean {sum(sizes) / len(sizes):.0f}"
        print(f"{len(sizes)} {name}: {spread}", flush=True)
    source = open_weights(args.model)
    with parallel():
        (ours,) = load_model(source, torch.float32)
        theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        ways = {
            "continuous": partial(continuous, ours, args.batch_size),
            "naive": partial(naive, ours, args.batch_size),
            "transformers": partial(transformers_generate, theirs, args.batch_size),
            "transformers, sorted": partial(transformers_generate, theirs, args.batch_size, by_length=True),
        }
        measure(args, ways, tasks)


if __name__ == "__main__":
    main()
