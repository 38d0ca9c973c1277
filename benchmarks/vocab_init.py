"""Which rows should new tokens begin with? The same small model, extended in each way, trained on for the same steps.

    python benchmarks/corpus.py --into DIR
    python benchmarks/vocab_init.py --train DIR/zh.train.jsonl --held-out DIR/zh.heldout.jsonl --png docs/vocab_init.png

A tokenizer of single characters and bytes (as Llama's is for Chinese) and a small Llama are made and trained on the
text; then the tokenizer is extended, as `megatron-patch vocab train` and `merge` do, and the model by each method.
Measured is what a user sees: bits per *character* of held-out text, which can be compared across tokenizers. Each seed
has its own order of the data and its own random rows; the model that is extended is one and the same.

mean, weighted, first, last and random are those of `megatron-patch vocab init`; mean of all puts the mean of the old
rows into each new one; hf is transformers' `resize_token_embeddings` with its default, random rows about that mean. The
old tokenizer, trained on for the same steps, shows what the text itself is worth. One thread; with the defaults about
ten minutes of a core. The figures are those of a toy: it is the order of the methods that is to be read.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import mean, stdev

import torch
import tyro
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from megatron_patch.vocab.corpus import Corpus
from megatron_patch.vocab.initialise import Recipe
from megatron_patch.vocab.subpieces import Growth, compare

METHODS = ("mean", "weighted", "first", "last", "random", "mean of all", "hf")
OLD = "old tokenizer"
EVERY = 20
"""Steps between two measurements."""
_LOOKS = {method: {"color": f"C{number}"} for number, method in enumerate(METHODS)} | {
    OLD: {"color": "0.5", "linestyle": "--"},
    "hf": {"color": "black", "linestyle": ":"},
}


@dataclass(frozen=True)
class Args:
    """Compare ways to initialise the rows of new tokens."""

    train: tuple[str, ...]
    """Text to train on: files that `megatron-patch preprocess` reads."""
    held_out: tuple[str, ...]
    """Text to measure on."""
    png: Path | None = None
    """Where to draw bits per character against steps."""
    json: Path | None = None
    """Where to write the figures."""
    seeds: int = 3
    """Runs of each method."""
    steps: int = 100
    """Steps with the new tokenizer."""
    first_steps: int = 800
    """Steps with the old one, before anything is extended."""
    documents: int = 6000
    """Documents to train on."""
    held_out_documents: int = 60
    """Documents to measure on, of each its beginning."""
    old_pieces: int = 3000
    """Of the old tokenizer: bytes and the most frequent characters."""
    new_pieces: int = 8000
    """Pieces to train for the new one; the characters among them the old one has already."""
    layers: int = 3
    """Of the model."""
    width: int = 192
    """Of the model."""
    length: int = 96
    """Tokens in a sample."""
    batch: int = 8
    """Samples in a step."""
    threads: int = 1
    """Threads of torch."""


# ------------------------------------------------------------------------------------------------------ the tokenizers


def make_tokenizers(args: Args, texts: Sequence[str], folder: Path) -> tuple[Tokenizer, Tokenizer]:
    """Single characters and bytes; and the same with pieces of several characters."""
    import sentencepiece

    from megatron_patch.vocab.arguments import VocabMergeArgs, VocabTrainArgs
    from megatron_patch.vocab.merge import merge
    from megatron_patch.vocab.train import train

    (folder / "old").mkdir()
    letters = Counter(letter for text in texts for letter in text if not letter.isspace())
    rare = set(letters) - {letter for letter, _ in letters.most_common(args.old_pieces - 264)}
    blanks = str.maketrans(dict.fromkeys(rare, " "))
    texts = [text.translate(blanks) for text in texts]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=chain.from_iterable(text.split("\n") for text in texts),
        model_prefix=str(folder / "old" / "tokenizer"),
        model_type="bpe",
        vocab_size=args.old_pieces,
        max_sentencepiece_length=1,
        character_coverage=1.0,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "old" / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train(VocabTrainArgs((str(corpus),), str(folder / "new.model"), vocab_size=args.new_pieces))
    old, new = str(folder / "old"), str(folder / "new")
    merge(VocabMergeArgs(old, str(folder / "new.model"), new, corpus=(str(corpus),), min_count=20, pad_multiple=1))
    return load_tokenizer(old), load_tokenizer(new)


# ----------------------------------------------------------------------------------------------------------- the model


def fresh_model(args: Args, rows: int) -> torch.nn.Module:
    """A small Llama with an output layer of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 48,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def extended(base: torch.nn.Module, method: str, growth: Growth, counts: Sequence[int], seed: int) -> torch.nn.Module:
    """A copy of the model with rows for the new tokens."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    old = [table.weight.detach().clone() for table in tables]
    model.resize_token_embeddings(growth.size)
    if method == "hf":
        return model
    recipe = Recipe(growth, growth.size, method, 1000 * seed, base.config.initializer_range, counts)
    if method == "mean of all":
        recipe = replace(recipe, growth=replace(growth, sources=dict.fromkeys(growth.sources, ())))
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for part, (table, before) in enumerate(zip(tables, old, strict=True)):
            table.weight.copy_(recipe.grow(before, part))
    return model


# ------------------------------------------------------------------------------------------------ training, measuring


def train(
    model: torch.nn.Module, stream: Tensor, args: Args, steps: int, rate: float, seed: int
) -> Iterator[tuple[int, torch.nn.Module]]:
    """Trains in place; yields the model before the first step and after every EVERY of them."""
    pick = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    yield 0, model
    for step in range(1, steps + 1):
        starts = torch.randint(len(stream) - args.length - 1, (args.batch,), generator=pick)
        tokens = torch.stack([stream[start : start + args.length + 1] for start in starts.tolist()])
        logits = model(tokens[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % EVERY == 0 or step == steps:
            yield step, model


@torch.no_grad()
def bits_per_character(model: torch.nn.Module, tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Of each text by itself, after a BOS."""
    total = 0.0
    for ids in tokenizer.encode_batch(texts):
        tokens = torch.tensor([ids])
        total += float(cross_entropy(model(tokens[:, :-1]).logits[0], tokens[0, 1:], reduction="sum"))
    return total / math.log(2) / sum(map(len, texts))


def stream_of(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """All texts, one after the other."""
    return torch.tensor(list(chain.from_iterable(tokenizer.encode_batch(texts))))


Curve = Mapping[int, float]
"""Steps -> bits per character."""


def run(args: Args, folder: Path) -> tuple[dict[str, list[Curve]], str]:
    """The curves of every method, one a seed; and in words what was compared."""
    texts, held = list(Corpus(args.train, "text", args.documents)), list(Corpus(args.held_out, "text"))
    held = [text[:100] for text in held[:: max(1, len(held) // args.held_out_documents)]]
    old, new = make_tokenizers(args, texts, folder)
    growth = compare(old, new, old.vocab_size)
    before, after = stream_of(old, texts), stream_of(new, texts)
    counts = torch.bincount(before, minlength=old.vocab_size).tolist()
    base = fresh_model(args, old.vocab_size)
    for step, model in train(base, before, args, args.first_steps, 1.5e-3, 0):
        if step % (10 * EVERY) == 0:
            print(f"first step {step}: {bits_per_character(model, old, held):.3f} bits per character", flush=True)
    curves: dict[str, list[Curve]] = {}
    for seed in range(1, args.seeds + 1):
        for method in (*METHODS, OLD):
            is_old = method == OLD
            grown = copy.deepcopy(base) if is_old else extended(base, method, growth, counts, seed)
            tokenizer, stream = (old, before) if is_old else (new, after)
            steps = train(grown, stream, args, args.steps, 5e-4, seed)
            curve = {step: bits_per_character(model, tokenizer, held) for step, model in steps}
            curves.setdefault(method, []).append(curve)
            print(f"seed {seed}, {method}: {', '.join(f'{bits:.3f}' for bits in curve.values())}", flush=True)
    rates = [len(stream) / sum(map(len, texts)) for stream in (before, after)]
    about = (
        f"{args.layers} layers of {args.width}, {args.first_steps} steps of {args.batch} x {args.length} tokens before;"
        f" {old.vocab_size:,} -> {new.vocab_size:,} ids, {rates[0]:.2f} -> {rates[1]:.2f} tokens per character;"
        f" {len(held)} held-out texts, {args.seeds} seeds"
    )
    return curves, about


# ---------------------------------------------------------------------------------------------------------- the results


def ranked(curves: Mapping[str, Sequence[Curve]]) -> list[tuple[str, float]]:
    """Each method with the mean of its curves' ends; the best first."""
    ends = {method: mean(curve[max(curve)] for curve in runs) for method, runs in curves.items()}
    return sorted(ends.items(), key=lambda item: item[1])


def print_table(curves: Mapping[str, Sequence[Curve]]) -> None:
    """Mean and standard deviation over seeds, as a table of Markdown; the best first."""
    steps = list(next(iter(curves.values()))[0])
    print(f"| rows | {' | '.join(f'{step} steps' for step in steps)} |\n|---|{'---|' * len(steps)}")
    for method, _ in ranked(curves):
        columns = [[curve[step] for curve in curves[method]] for step in steps]
        cells = [f"{mean(one):.3f} ± {stdev(one) if len(one) > 1 else 0:.3f}" for one in columns]
        print(f"| {method} | {' | '.join(cells)} |")


def draw(curves: Mapping[str, Sequence[Curve]], about: str, path: Path) -> None:
    """Mean and spread of each method against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    steps = list(next(iter(curves.values()))[0])
    whole, end = figure.subplots(1, 2)
    for axes, shown in ((whole, steps), (end, steps[len(steps) // 2 :])):
        for method, at_end in ranked(curves):
            values = [[curve[step] for curve in curves[method]] for step in shown]
            look = _LOOKS[method] | {"label": f"{method} ({at_end:.2f})"}
            axes.plot(shown, [mean(one) for one in values], **look)
            low, high = zip(*((min(one), max(one)) for one in values), strict=True)
            axes.fill_between(shown, low, high, color=look["color"], alpha=0.15)
        axes.set_xlabel("steps with the new tokenizer")
        axes.grid(alpha=0.3)
    whole.set_ylabel("bits per character, held out")
    whole.legend(title=f"rows (after {steps[-1]} steps)", fontsize=8)
    figure.suptitle(f"Rows of new tokens: mean and range over seeds; on the right the end alone\n{about}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")


def main() -> None:
    """Measures, prints and draws."""
    args, start = tyro.cli(Args, description=__doc__), time.perf_counter()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        curves, about = run(args, Path(folder))
    print(f"\n{about}\n")
    print_table(curves)
    print(f"\n{time.perf_counter() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"about": about, "curves": curves}, indent=1) + "\n")
    if args.png:
        draw(curves, about, args.png)


if __name__ == "__main__":
    main()
