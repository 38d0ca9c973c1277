"""What a user may say about data: the flags of `preprocess`, and the data flags of `pretrain`.

Each `validate` checks everything that can be known before heavy imports and reports all problems at once. This module
imports neither torch nor transformers. It does not know how any of it is done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SPLITS = ("train", "valid", "test")


def raise_problems(problems: list[str]) -> None:
    """Raises one ValueError that lists every problem, if there is any."""
    if problems:
        raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class PreprocessArgs:
    """Turn text into megatron-core's indexed dataset (.bin and .idx) with a Hugging Face tokenizer."""

    input: tuple[str, ...]
    """Files, directories or quoted globs: .jsonl, .json (one object per line) or .txt, each also as .gz or .zst."""
    output_prefix: str
    """Where to write: PREFIX_KEY_document.bin and .idx, KEY being --json-keys (so PREFIX_text_document by default)."""
    tokenizer_model: str
    """Hugging Face directory that holds the tokenizer."""
    json_keys: str = "text"
    """Key of the JSON objects whose string is the document."""
    txt_document: Literal["file", "line", "paragraph"] = "file"
    """What makes a document in a .txt file: the whole file, each line, or each block between blank lines."""
    workers: int = 1
    """Number of processes that tokenize. The output does not depend on it."""
    append_eod: bool = False
    """End every document with the tokenizer's end-of-sequence token. Wanted for nearly all pretraining: without it
    documents run into one another unmarked."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a line that is no document: stop, or report it, skip it and count it."""
    overwrite: bool = False
    """Replace an existing dataset of the same name."""
    log_interval: int = 10_000
    """Documents between two progress lines when the output is not a terminal."""
    trust_remote_code: bool = False
    """Let transformers run Python code that lies in the tokenizer's directory."""

    @property
    def dataset_prefix(self) -> str:
        """The prefix of the dataset to write, which is what --data-path of `pretrain` takes."""
        return f"{self.output_prefix}_{self.json_keys}_document"

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        from megatron_patch.data.readers import expand_inputs

        problems = []
        if self.workers < 1:
            problems.append(f"--workers {self.workers}: at least 1 process must tokenize")
        if self.log_interval < 1:
            problems.append(f"--log-interval {self.log_interval}: must be at least 1 document")
        if not self.json_keys or "/" in self.json_keys:
            problems.append(
                f"--json-keys {self.json_keys!r}: give one key, without '/' (it becomes part of a file name)"
            )
        if not Path(self.tokenizer_model).is_dir():
            problems.append(f"--tokenizer-model {self.tokenizer_model!r}: no such directory")
        problems += self._output_problems()
        try:
            expand_inputs(self.input)
        except ValueError as error:
            problems.append(f"--input: {error}")
        raise_problems(problems)

    def _output_problems(self) -> list[str]:
        if Path(self.output_prefix).name in ("", ".", "..") or self.output_prefix.endswith("/"):
            return [f"--output-prefix {self.output_prefix!r}: must end in the first part of a file name"]
        existing = [f"{self.dataset_prefix}{suffix}" for suffix in (".bin", ".idx")]
        existing = [path for path in existing if Path(path).exists()]
        if existing and not self.overwrite:
            return [f"--output-prefix: {' and '.join(existing)} already there; give --overwrite or another prefix"]
        return []


@dataclass(frozen=True)
class Blend:
    """Datasets to draw from, and how much of each."""

    prefixes: tuple[str, ...]
    """Paths without .bin or .idx."""
    weights: tuple[float, ...] | None = None
    """One weight per prefix; None: one pass over all of them, each as long as it is."""


def parse_blend(values: tuple[str, ...], flag: str) -> Blend | None:
    """Reads Megatron-LM's spelling of a blend: PREFIX..., or WEIGHT PREFIX WEIGHT PREFIX...; None for no values."""
    if not values:
        return None
    numbers = [_number(value) for value in values]
    if len(values) % 2 or None in numbers[0::2]:
        if len(values) > 1 and numbers[0] is not None:
            raise ValueError(f"{flag} {' '.join(values)}: give a weight before every prefix, or none at all")
        return Blend(values)
    weights = tuple(number for number in numbers[0::2] if number is not None)
    bad = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    if bad:
        raise ValueError(f"{flag}: weight {bad[0]:g} must be a positive number")
    # One dataset needs no blending, whatever its weight.
    return Blend(values[1::2], weights if len(weights) > 1 else None)


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


@dataclass(frozen=True)
class DataSpec:
    """The datasets of a training run."""

    data_path: tuple[str, ...] = ()
    """Dataset prefixes (without .bin/.idx) that --split divides: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX..."""
    split: str | None = None
    """Shares of train, validation and test, cut from --data-path in file order (default: 99,1,0)."""
    train_data_path: tuple[str, ...] = ()
    """Dataset prefixes for training alone, instead of --data-path; spelled like it."""
    valid_data_path: tuple[str, ...] = ()
    """Dataset prefixes for validation, with --train-data-path."""
    test_data_path: tuple[str, ...] = ()
    """Dataset prefixes for the test, with --train-data-path."""
    data_cache_path: str | None = None
    """Where to keep the sample indices (default: beside the first dataset, in PREFIX/cache)."""
    seq_length: int = 1024
    """Tokens in a training sample."""
    seed: int = 1234
    """Seed of the order in which samples are drawn."""
    eod_mask_loss: bool = False
    """Leave positions whose input is the end-of-document token out of the loss."""
    reset_position_ids: bool = False
    """Megatron-LM's flag to restart positions after every document; not supported yet."""
    reset_attention_mask: bool = False
    """Megatron-LM's flag to hide earlier documents of a sample; not supported yet."""

    @property
    def split_shares(self) -> str:
        """--split, or its default."""
        return self.split or "99,1,0"

    @property
    def per_split_paths(self) -> tuple[tuple[str, ...], ...]:
        """What --train-data-path, --valid-data-path and --test-data-path say."""
        return (self.train_data_path, self.valid_data_path, self.test_data_path)

    def blend(self) -> Blend | None:
        """The blend of --data-path, or None."""
        return parse_blend(self.data_path, "--data-path")

    def blend_per_split(self) -> tuple[Blend | None, ...]:
        """The blends of --train-data-path, --valid-data-path and --test-data-path."""
        return tuple(
            parse_blend(paths, f"--{split}-data-path")
            for split, paths in zip(SPLITS, self.per_split_paths, strict=True)
        )

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments; missing files among it."""
        problems = [*self._source_problems(), *self._split_problems()]
        if self.seq_length < 1:
            problems.append(f"--seq-length {self.seq_length}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            problems.append(f"--seed {self.seed}: must lie in 0..2^32-1, the range of numpy's generator")
        for name in ("reset_position_ids", "reset_attention_mask"):
            if getattr(self, name):
                problems.append(f"--{name.replace('_', '-')}: not supported yet; leave it out")
        problems += self._file_problems()
        raise_problems(problems)

    def _source_problems(self) -> list[str]:
        if self.data_path and any(self.per_split_paths):
            return ["give --data-path (with --split) or --train-data-path and its companions, not both"]
        if not self.data_path and not self.train_data_path:
            return ["give the training data: --data-path PREFIX, or --train-data-path PREFIX"]
        if self.split is not None and not self.data_path:
            return [f"--split {self.split} divides --data-path; it has no meaning with --train-data-path"]
        return []

    def _split_problems(self) -> list[str]:
        # Plain decimals only: megatron-core would read 1e-3 as two numbers.
        parts = [part.strip() for part in self.split_shares.split(",")]
        plain = all(part.replace(".", "", 1).isdecimal() for part in parts)
        if plain and len(parts) <= 3 and sum(map(float, parts)) > 0:
            return []
        return [f"--split {self.split}: give up to three shares of train,valid,test, not all 0, as in 99,1,0"]

    def _file_problems(self) -> list[str]:
        try:
            blends = (self.blend(), *self.blend_per_split())
        except ValueError as error:
            return [str(error)]
        prefixes = [prefix for blend in blends if blend for prefix in blend.prefixes]
        missing = [f"{prefix}{suffix}" for prefix in prefixes for suffix in (".idx", ".bin")]
        return [_missing(path) for path in missing if not Path(path).is_file()]


def _missing(path: str) -> str:
    hint = ""
    if path[:-4].endswith((".bin", ".idx")):
        hint = "; give the prefix without .bin or .idx"
    elif Path(f"{path[:-4]}_text_document{path[-4:]}").is_file():
        hint = f"; did you mean {path[:-4]}_text_document?"
    return f"dataset file {path} does not exist{hint}"
