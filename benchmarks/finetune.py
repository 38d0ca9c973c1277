"""Fine-tuning on real instructions: what a small model learns in minutes, and what packing is worth.

    python benchmarks/finetune.py --model HF_DIR [--only learn|speed] [--work DIR] [--samples 400] [--processes 2]

The instructions are made of what Python ships: what does this function of the standard library do? The answer is the
beginning of its docstring. One in eight is held out.

learn: converts the model (one with a chat template), asks it three of the held-out questions, fine-tunes it with
`megatron-patch finetune` on the others, and asks again. Fails unless the validation loss falls.
speed: the same model takes training steps in turn on rows into which samples are packed and on rows that hold one
each, padded; as many rows in both, so a step takes the same memory. Whole docstrings are the answers here: most are
short and some are long. Useful tokens are those of samples.
"""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import tyro

QUESTION = "What does {name} of Python's standard library do?"
NOT_IMPORTED = {"antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "lib2to3"}
"""Modules that do something when imported, or need a screen."""
ONE_IN_HELD_OUT = 8


@dataclass(frozen=True)
class Args:
    """Fine-tune a small model on questions about Python's standard library."""

    model: str
    """Hugging Face directory of a model with a chat template; it is trained in fp32 on this machine."""
    only: Literal["both", "learn", "speed"] = "both"
    """Which part."""
    work: str | None = None
    """Where everything is written (default: a temporary directory)."""
    samples: int = 400
    """Questions to learn."""
    processes: int = 2
    """Data-parallel processes of the training."""
    epochs: int = 1
    """Times to learn them all."""
    lr: float = 1e-4
    """Peak learning rate."""
    seq_length: int = 512
    """Slots of a row when speed is measured."""
    rows: int = 2
    """Rows of a micro-batch when speed is measured, and of a step."""
    steps: int = 6
    """Timed steps of each, after one that is not."""
    threads: int = 2
    """Threads of torch when speed is measured."""


# ----------------------------------------------------------------------------------------------------- the instructions


def docstrings() -> dict[str, str]:
    """Name -> docstring of the public functions and classes of the standard library, by name."""
    found: dict[str, str] = {}
    for module in sorted(set(sys.stdlib_module_names) - NOT_IMPORTED):
        if module.startswith("_"):
            continue
        try:
            values = vars(importlib.import_module(module))
        except ImportError:  # of another system
            continue
        for name, value in sorted(values.items()):
            text = _docstring(value, module)
            if text and not name.startswith("_"):
                found[f"{module}.{name}"] = text
    return found


def _docstring(value: Any, module: str) -> str | None:
    if not callable(value) or getattr(value, "__module__", None) != module:
        return None
    text = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
    return inspect.cleandoc(text) if isinstance(text, str) and len(text) > 30 else None


def _write(file: Path, pairs: list[tuple[str, str]]) -> str:
    records = [{"instruction": QUESTION.format(name=name), "output": text} for name, text in pairs]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def _beginnings(samples: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Questions to learn and held-out ones, spread over the whole library."""
    paragraphs = {name: " ".join(text.split("\n\n")[0].split()) for name, text in docstrings().items()}
    fit = [(name, text) for name, text in paragraphs.items() if 30 <= len(text) <= 300 and ">>>" not in text]
    total = samples * ONE_IN_HELD_OUT // (ONE_IN_HELD_OUT - 1)
    chosen = fit[:: max(1, len(fit) // total)][:total]
    held_out = chosen[::ONE_IN_HELD_OUT]
    return [pair for pair in chosen if pair not in held_out], held_out


# ---------------------------------------------------------------------------------------------------------------- learn


def learn(args: Args, work: Path) -> None:
    """The whole story by commands, as a user would give them."""
    train, held_out = _beginnings(args.samples)
    files = [_write(work / f"{name}.jsonl", pairs) for name, pairs in (("train", train), ("valid", held_out))]
    print(f"{len(train)} questions to learn, {len(held_out)} held out", flush=True)
    if not (work / "megatron").exists():
        _run("convert", "--source", args.model, "--target", f"{work}/megatron")
    asked = [held_out[len(held_out) * i // 3] for i in range(3)]
    before = _answers(args, work, asked, "megatron")
    began = time.perf_counter()
    _run(
        "finetune", "--nproc-per-node", str(args.processes), "--load", f"{work}/megatron", "--save", f"{work}/tuned",
        "--train-data", files[0], "--valid-data", files[1], "--seq-length", "256", "--global-batch-size", "8",
        "--epochs", str(args.epochs), "--lr", str(args.lr), "--lr-warmup-fraction", "0.1", "--eval-interval", "1000",
    )  # fmt: skip
    seconds = time.perf_counter() - began
    after = _answers(args, work, asked, "tuned")
    for (name, text), one, other in zip(asked, before, after, strict=True):
        print(f"\n{QUESTION.format(name=name)}\n  before     {one}\n  after      {other}\n  docstring  {text}")
    records = [json.loads(line) for line in (work / "tuned" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["validation_loss"] for record in records if "validation_loss" in record]
    iterations = records[-1]["iteration"]
    print(f"\nvalidation loss {losses[0]:.4f} -> {losses[-1]:.4f} in {iterations} iterations, {seconds:.0f} s")
    if not losses[-1] < losses[0]:
        sys.exit("the validation loss did not fall")


def _answers(args: Args, work: Path, asked: list[tuple[str, str]], checkpoint: str) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer, file = AutoTokenizer.from_pretrained(args.model), work / f"{checkpoint}-prompts.jsonl"
    with file.open("w") as stream:
        for name, _ in asked:
            message = [{"role": "user", "content": QUESTION.format(name=name)}]
            prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            stream.write(json.dumps({"prompt": prompt}) + "\n")
    output = work / f"{checkpoint}-answers.jsonl"
    _run(
        "generate", "--load", f"{work}/{checkpoint}", "--prompts-file", str(file), "--output", str(output),
        "--overwrite", "--max-new-tokens", "48", "--parse-special-tokens",
    )  # fmt: skip
    return [" ".join(json.loads(line)["completion"].split()) for line in output.read_text().splitlines()]


def _run(*command: str) -> None:
    print("$ megatron-patch", *command, flush=True)
    subprocess.run([sys.executable, "-m", "megatron_patch", *command], check=True)


# ---------------------------------------------------------------------------------------------------------------- speed


def speed(args: Args, work: Path) -> None:
    """Steps in turn, so that the machine's mood hits both alike."""
    import torch

    from megatron_patch.data.sft.arguments import SftDataArgs
    from megatron_patch.data.sft.building import build
    from megatron_patch.data.sft.rows import Rows, RowSpec
    from megatron_patch.data.sft.storage import open_samples
    from megatron_patch.training.loop import train_step

    torch.set_num_threads(args.threads)
    whole = _write(work / "docstrings.jsonl", list(docstrings().items()))
    prefix, options = f"{work}/docstrings", dict(seq_length=args.seq_length, examples=0, overwrite=True)
    build(SftDataArgs(input=(whole,), output_prefix=prefix, tokenizer_model=args.model, **options))
    store, run = open_samples(prefix), _set_up(args, work)
    count = args.rows * (args.steps + 1)
    counted = {}
    for name, packing in (("packed", True), ("padded", False)):
        rows = Rows(store, RowSpec(args.seq_length, packing))
        print(f"{name}: {rows.summary()}", flush=True)
        counted[name] = _Counted(rows.extended(count), args.rows, run.architecture.vocab_size)
    rates: dict[str, list[float]] = {name: [] for name in counted}
    for _ in range(args.steps + 1):
        for name, data in counted.items():
            began, before = time.perf_counter(), data.tokens
            train_step(run, data)
            rates[name].append((data.tokens - before) / (time.perf_counter() - began))
        print(" | ".join(f"{name} {values[-1]:,.0f} useful tokens/s" for name, values in rates.items()), flush=True)
    medians = {name: median(values[1:]) for name, values in rates.items()}
    print(f"useful tokens/s: packed {medians['packed']:,.0f}, padded {medians['padded']:,.0f} (medians)")
    print(f"packing is worth {medians['packed'] / medians['padded']:.2f} x")


def _set_up(args: Args, work: Path) -> Any:
    from megatron_patch.checkpoint.convert import convert
    from megatron_patch.training.arguments import FinetuneArgs
    from megatron_patch.training.finetuning import Finetuning
    from megatron_patch.training.initialize import initialize
    from megatron_patch.training.setup import set_up

    if not (work / "megatron").exists():
        convert(args.model, f"{work}/megatron")
    initialize()
    settings = FinetuneArgs(
        load=f"{work}/megatron",
        train_data=(f"{work}/docstrings",),
        seq_length=args.seq_length,
        micro_batch_size=args.rows,
        train_iters=2 * (args.steps + 1),
        lr_decay_style="constant",
    )
    return set_up(settings, Finetuning(settings))


class _Counted:
    """Batches, and how many tokens of samples they held."""

    def __init__(self, rows: Any, size: int, vocab_size: int) -> None:
        from megatron_patch.data.datasets import batches

        self.tokens, self._batches = 0, batches(rows, 0, size, vocab_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        self.tokens += int((batch["starts"] >= 0).sum())
        return batch


def main() -> None:
    args = tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,))
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as place:
        work = Path(args.work or place)
        work.mkdir(parents=True, exist_ok=True)
        if args.only != "speed":
            learn(args, work)
        if args.only != "learn":
            speed(args, work)


if __name__ == "__main__":
    main()
