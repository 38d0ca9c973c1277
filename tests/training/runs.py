"""Tiny training runs: a converted random Llama, a small indexed dataset, and a run of either kind in a worker."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_patch.training.arguments import FinetuneArgs, PretrainArgs
from megatron_patch.training.metrics import read_records

VOCAB = 300


def make_workplace(place: Path, model: Any = None) -> Path:
    """A directory with hf/ (model, a Llama unless given, and tokenizer), megatron/ (converted) and
    data_text_document.{bin,idx}."""
    from tests.tiny import hf_llama

    (model or hf_llama(vocab_size=VOCAB, tie_word_embeddings=True)).save_pretrained(place / "hf")
    _dataset(place / "data_text_document")
    return convert_workplace(place)


def convert_workplace(place: Path) -> Path:
    """Adds a tokenizer to hf/, and megatron/."""
    from megatron_patch.checkpoint.convert import convert

    make_tokenizer().save_pretrained(place / "hf")
    convert(str(place / "hf"), str(place / "megatron"))
    return place


def make_tokenizer() -> Any:
    """Bytes and a few merges, with </s> to end a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 4], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def _dataset(prefix: Path) -> None:
    # Counting up from a random start: something a tiny model learns within a few steps.
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    generator = random.Random(0)
    for _ in range(200):
        start, length = generator.randrange(200), generator.randrange(20, 60)
        builder.add_document([*((start + i) % 256 for i in range(length)), 0], [length + 1])
    builder.finalize(f"{prefix}.idx")


def arguments(place: Path, save: Path | None, **changes: Any) -> PretrainArgs:
    """20 iterations from the converted checkpoint."""
    base = PretrainArgs(
        load=str(place / "megatron"),
        save=save and str(save),
        data_path=(str(place / "data_text_document"),),
        split="90,10,0",
        seq_length=32,
        micro_batch_size=1,
        global_batch_size=4,
        train_iters=20,
        lr=1e-3,
        min_lr=1e-4,
        lr_warmup_iters=3,
        eval_interval=10,
        eval_iters=2,
        make_vocab_size_divisible_by=4,
    )
    return replace(base, **changes)


def train(rank: int, world_size: int, args: PretrainArgs | FinetuneArgs) -> int:
    """For the worker pool: `pretrain` or `finetune`, and the iteration it reached."""
    args.validate()
    return start(args)


def start(args: PretrainArgs | FinetuneArgs) -> int:
    """The run that the arguments are meant for."""
    from megatron_patch.training import loop

    return (loop.finetune if isinstance(args, FinetuneArgs) else loop.pretrain)(args).iteration


def curve(save: Path, name: str) -> list[float]:
    """One value of each record of a run that has it."""
    return [record[name] for record in read_records(save) if name in record]
