"""What a user may say about data: the flags of `preprocess`, and the data flags of `pretrain`.

Each `validate` checks everything that can be known before heavy imports and reports all problems at once. This module
imports neither torch nor transformers. It does not know how any of it is done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

SPLITS = ("train", "valid", "test")
CleaningStep = Literal[
    "nfc", "control", "zero-width", "opencc", "pai", "repeated-lines",
    "length", "cjk-ratio", "symbol-ratio", "repetition-ratio",
]  # fmt: skip
"""The steps of `--clean` in the order in which they run: those that change a document, then those that may drop it."""


def raise_problems(problems: list[str]) -> None:
    """Raises one ValueError that lists every problem, if there is any."""
    if problems:
        raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class SourceArgs:
    """Text, a tokenizer and a place to write."""

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
    json: str | None = None
    """Also write the report to this file."""

    @property
    def dataset_prefix(self) -> str:
        """The prefix of the dataset to write, which is what --data-path of `pretrain` takes."""
        return f"{self.output_prefix}_{self.json_keys}_document"

    def source_problems(self) -> list[str]:
        """Everything that is wrong with these arguments, as far as it can be known before reading."""
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
        if self.json and not Path(self.json).parent.is_dir():
            problems.append(f"--json {self.json}: there is no directory {Path(self.json).parent}")
        try:
            expand_inputs(self.input)
        except ValueError as error:
            problems.append(f"--input: {error}")
        return problems

    def _output_problems(self) -> list[str]:
        if Path(self.output_prefix).name in ("", ".", "..") or self.output_prefix.endswith("/"):
            return [f"--output-prefix {self.output_prefix!r}: must end in the first part of a file name"]
        existing = [f"{self.dataset_prefix}{suffix}" for suffix in (".bin", ".idx")]
        existing = [path for path in existing if Path(path).exists()]
        if existing and not self.overwrite:
            return [f"--output-prefix: {' and '.join(existing)} already there; give --overwrite or another prefix"]
        return []


@dataclass(frozen=True)
class CleaningArgs:
    """Which cleaning steps a document goes through, and their thresholds."""

    clean: tuple[CleaningStep, ...] = ()
    """Cleaning steps; they run in the order listed here. Changed: nfc (composed accents; full-width forms stay),
    control (control characters; line ends become newlines), zero-width (byte-order marks and invisible characters,
    except joiners that emoji, Arabic and Indic scripts need), opencc (see --opencc-config), pai (the whitelist of the
    predecessor, which also removes newlines and full-width digits), repeated-lines (a line like the one before it).
    Dropped, if beyond its threshold: length, cjk-ratio, symbol-ratio, repetition-ratio."""
    opencc_config: Literal["t2s", "tw2s", "tw2sp", "hk2s", "s2t"] = "t2s"
    """Conversion of opencc: from traditional (of Taiwan, of Taiwan with its words, of Hong Kong) to simplified
    Chinese, or back."""
    min_chars: int = 20
    """Step length: fewest characters of a document, not counting white space around it."""
    max_chars: int | None = None
    """Step length: most characters of a document; without it, no limit."""
    min_cjk_ratio: float = 0.3
    """Step cjk-ratio: least share of Chinese characters among those that are not white space."""
    max_symbol_ratio: float = 0.5
    """Step symbol-ratio: largest share of characters that are no letters, marks, digits or white space."""
    max_repetition_ratio: float = 0.5
    """Step repetition-ratio: largest share of 10-character pieces that the document has had before."""

    @property
    def cleaning(self) -> CleaningArgs:
        """These arguments without those of other parts."""
        return CleaningArgs(**{name: getattr(self, name) for name in CleaningArgs.__dataclass_fields__})

    def cleaning_problems(self) -> list[str]:
        """Everything that is wrong with these arguments."""
        problems = [*self._idle_thresholds()]
        for name in ("min_cjk_ratio", "max_symbol_ratio", "max_repetition_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{_flag(name)} {getattr(self, name):g}: a share lies in 0..1")
        if self.min_chars < 0:
            problems.append(f"--min-chars {self.min_chars}: must not be negative")
        if self.max_chars is not None and self.max_chars < max(1, self.min_chars):
            problems.append(f"--max-chars {self.max_chars}: must be at least 1 and --min-chars ({self.min_chars})")
        if "opencc" in self.clean and find_spec("opencc") is None:
            problems.append("--clean opencc: the package is not installed; pip install opencc")
        return problems

    def _idle_thresholds(self) -> list[str]:
        """A threshold whose step is not asked for would do nothing, unnoticed."""
        fields = CleaningArgs.__dataclass_fields__
        changed = {name for name, field in fields.items() if getattr(self, name) != field.default} - {"clean"}
        idle = sorted(name for name in changed if _STEP_OF[name] not in self.clean)
        return [f"{_flag(name)} {getattr(self, name)} has no effect without --clean {_STEP_OF[name]}" for name in idle]


_STEP_OF = {
    "opencc_config": "opencc",
    "min_chars": "length",
    "max_chars": "length",
    "min_cjk_ratio": "cjk-ratio",
    "max_symbol_ratio": "symbol-ratio",
    "max_repetition_ratio": "repetition-ratio",
}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class DedupArgs:
    """Which documents count as duplicates of earlier ones, and are left out."""

    dedup: Literal["none", "exact", "near"] = "none"
    """Leave out documents that came before: exact ones (equal but for white space and Unicode compatibility forms),
    or near ones too (estimated by MinHash). Memory per document kept: 20 bytes for exact, 0.4 KB for near."""
    dedup_threshold: float = 0.8
    """With --dedup near: share of common 5-character pieces (Jaccard) from which a document counts as a duplicate."""

    @property
    def deduplication(self) -> DedupArgs:
        """These arguments without those of other parts."""
        return DedupArgs(self.dedup, self.dedup_threshold)

    def dedup_problems(self) -> list[str]:
        """Everything that is wrong with these arguments."""
        if not 0 < self.dedup_threshold <= 1:
            return [f"--dedup-threshold {self.dedup_threshold:g}: a share above 0, at most 1"]
        if self.dedup != "near" and self.dedup_threshold != DedupArgs.dedup_threshold:
            return [f"--dedup-threshold {self.dedup_threshold:g} has no effect without --dedup near"]
        return []


@dataclass(frozen=True)
class PreprocessArgs(DedupArgs, CleaningArgs, SourceArgs):
    """Turn text into megatron-core's indexed dataset (.bin and .idx) with a Hugging Face tokenizer."""

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        raise_problems([*self.source_problems(), *self.cleaning_problems(), *self.dedup_problems()])


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
    """Count positions from 0 again after every end-of-document token."""
    reset_attention_mask: bool = False
    """Let no document of a sample see another. It costs no mask: each document attends by itself."""

    @property
    def document_flags(self) -> tuple[str, ...]:
        """Those of the flags given that go by the end-of-document token."""
        names = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
        return tuple(f"--{name.replace('_', '-')}" for name in names if getattr(self, name))

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
