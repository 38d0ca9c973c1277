"""What a user may say about data: the flags of `preprocess`, and the data flags of `pretrain`.

Each `validate` checks everything that can be known before heavy imports and reports all problems at once. This module
imports neither torch nor transformers. It does not know how any of it is done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

SPLITS = ("train", "valid", "test")
SETTINGS = "settings.json"
"""What a begun run of `preprocess` keeps in PREFIX.partial beside its shards."""
CleaningStep = Literal[
    "nfc", "control", "zero-width", "opencc", "pai", "repeated-lines",
    "length", "cjk-ratio", "symbol-ratio", "repetition-ratio",
]  # fmt: skip
"""The steps of `--clean` in the order in which they run: those that change a document, then those that may drop it."""


def raise_problems(problems: list[str]) -> None:
    """Raises one ValueError that lists every problem, if there is any."""
    if problems:
        raise ValueError("\n".join(problems))


def are_shares(text: str) -> bool:
    """Whether a text is up to three shares, not all 0, as in 99,1,0."""
    parts = [part.strip() for part in text.split(",")]
    # Plain decimals only: megatron-core would read 1e-3 as two numbers.
    plain = all(part.replace(".", "", 1).isdecimal() for part in parts)
    return plain and len(parts) <= 3 and sum(map(float, parts)) > 0


def _shares_problem(text: str) -> str:
    return f"--split {text}: give up to three shares of train,valid,test, not all 0, as in 99,1,0"


@dataclass(frozen=True, kw_only=True)
class RecordArgs:
    """How a command goes through many records: in how many processes, past bad ones, and on from where it stopped."""

    output_prefix: str
    """Where to write."""
    workers: int = 1
    """Number of processes that tokenize. The output does not depend on it."""
    on_error: Literal["stop", "skip", "quarantine"] = "stop"
    """What to do at a record that is not what it should be: stop; leave it out and count it; or also keep it, with
    file, line and reason, in PREFIX.quarantine.jsonl."""
    max_errors: str = "1%"
    """With --on-error skip or quarantine: write nothing and exit with code 3 if more records than this are bad, a
    number or a percentage of all. What was tokenized is kept: run again with a higher limit."""
    resume: Literal["auto", "never"] = "auto"
    """Whether to go on from what a killed or failed run with the same settings left in PREFIX.partial."""
    overwrite: bool = False
    """Replace what is there under the same name."""
    log_interval: int = 10_000
    """Documents or samples between two progress lines when the output is not a terminal."""
    trust_remote_code: bool = False
    """Let transformers run Python code that lies in the tokenizer's directory."""
    json: str | None = None
    """Also write the report to this file."""

    @property
    def partial_directory(self) -> Path:
        """Where the finished part of a run lies until it is whole."""
        return Path(f"{self.output_prefix}.partial")

    @property
    def quarantine_path(self) -> Path:
        """Where bad records go."""
        return Path(f"{self.output_prefix}.quarantine.jsonl")

    @property
    def is_begun(self) -> bool:
        """Whether a run is to go on that had leave to write here; it may have got as far as the first of its files."""
        return self.resume == "auto" and (self.partial_directory / SETTINGS).is_file()

    def record_problems(self) -> list[str]:
        """Everything that is wrong with these arguments."""
        problems = [
            f"{_flag(name)} {getattr(self, name)}: must be at least 1"
            for name in ("workers", "log_interval")
            if getattr(self, name) < 1
        ]
        try:
            parse_limit(self.max_errors)
        except ValueError as error:
            problems.append(f"--max-errors {error}")
        if self.on_error == "stop" and self.max_errors != RecordArgs.max_errors:
            problems.append(f"--max-errors {self.max_errors} has no effect without --on-error skip or quarantine")
        if self.json and not Path(self.json).parent.is_dir():
            problems.append(f"--json {self.json}: there is no directory {Path(self.json).parent}")
        if Path(self.output_prefix).name in ("", ".", "..") or self.output_prefix.endswith("/"):
            problems.append(f"--output-prefix {self.output_prefix!r}: must end in the first part of a file name")
        return problems


@dataclass(frozen=True, kw_only=True)
class SourceArgs(RecordArgs):
    """Text, a tokenizer and a place to write."""

    input: tuple[str, ...]
    """Files, directories or quoted globs: .jsonl (an object a line), .json (lines, or one array), .txt, each also as
    .gz or .zst; .parquet; "-" for JSON lines from standard input."""
    output_prefix: str
    """Where to write: PREFIX_KEY_document.bin and .idx, KEY being --json-keys (so PREFIX_text_document by default)."""
    tokenizer_model: str
    """Hugging Face directory that holds the tokenizer."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys of the JSON objects whose strings are the documents; each makes a dataset of its own."""
    layout: Literal["records", "wudao"] = "records"
    """What the objects are: records with the text under --json-keys, or those of WuDao, whose text is title and content
    with a line end between them."""
    txt_document: Literal["file", "line", "paragraph"] = "file"
    """What makes a document in a .txt file: the whole file, each line, or each block between blank lines."""
    engine: Literal["auto", "fastokens", "gigatoken", "tiktoken", "sentencepiece", "hf"] = "auto"
    """What tokenizes. auto: the fastest that is installed and proves equal to transformers (hf) on this tokenizer, with
    the first documents and texts that are made to be hard; pip install megatron-patch[engines]."""
    append_eod: bool = False
    """End every document with the tokenizer's end-of-sequence token. Wanted for nearly all pretraining: without it
    documents run into one another unmarked."""
    max_doc_tokens: int | None = None
    """Cut longer documents into several of at most so many tokens, each with its own end under --append-eod."""

    def source_problems(self) -> list[str]:
        """Everything that is wrong with these arguments, as far as it can be known before reading."""
        from megatron_patch.data.readers import expand_inputs

        problems = self.record_problems()
        if self.max_doc_tokens is not None and self.max_doc_tokens < 2:
            problems.append(f"--max-doc-tokens {self.max_doc_tokens}: must be at least 2")
        for key in self.json_keys:
            if not key or "/" in key or self.json_keys.count(key) > 1:
                problems.append(
                    f"--json-keys {key!r}: give each key once, without '/' (it becomes part of a file name)"
                )
        if not self.json_keys:
            problems.append("--json-keys: give at least one key")
        if not Path(self.tokenizer_model).is_dir():
            problems.append(f"--tokenizer-model {self.tokenizer_model!r}: no such directory")
        try:
            expand_inputs(self.input, stdin=True)
        except ValueError as error:
            problems.append(f"--input: {error}")
        return problems


class Limit(NamedTuple):
    """How many records may be bad."""

    count: int | None
    """So many."""
    share: float
    """Or this share of all."""

    def is_exceeded(self, bad: int, records: int) -> bool:
        """Whether so many of so many are too many."""
        return bad > (self.share * records if self.count is None else self.count)


def parse_limit(text: str) -> Limit:
    """Reads 100 or 0.1%; ValueError for anything else."""
    number = _number(text.removesuffix("%"))
    if number is None or not 0 <= number < math.inf or (text.endswith("%") and number > 100):
        raise ValueError(f"{text!r}: give a number of records, or a percentage of them such as 0.1%")
    if text.endswith("%"):
        return Limit(None, number / 100)
    if number != int(number):
        raise ValueError(f"{text!r}: a number of records is a whole number; for a share write {text}%")
    return Limit(int(number), 0.0)


@dataclass(frozen=True)
class OrderArgs:
    """In which order documents are written, and into how many datasets."""

    shuffle: int | None = None
    """Shuffle the documents, with this seed. Wanted where `pretrain --split` is to cut validation from the same data:
    it cuts the end off, which would be the last source alone."""
    split: str | None = None
    """Divide the documents, drawn at random, into datasets of their own: shares of train, valid and test, as in 98,1,1.
    They are named PREFIX_KEY_train_document and so on, for --train-data-path and its companions."""

    @property
    def shares(self) -> tuple[float, ...]:
        """The numbers of --split; none without it."""
        return tuple(map(float, self.split.split(","))) if self.split and are_shares(self.split) else ()

    def order_problems(self) -> list[str]:
        """Everything that is wrong with these arguments."""
        problems = []
        if self.shuffle is not None and not 0 <= self.shuffle < 2**32:
            problems.append(f"--shuffle {self.shuffle}: a seed lies in 0..2^32-1, the range of numpy's generator")
        if self.split is not None and not are_shares(self.split):
            problems.append(_shares_problem(self.split))
        return problems


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


@dataclass(frozen=True, kw_only=True)
class PreprocessArgs(DedupArgs, CleaningArgs, OrderArgs, SourceArgs):
    """Turn text into megatron-core's indexed dataset (.bin and .idx) with a Hugging Face tokenizer.

    Exit codes: 0 done; 1 failed (what was finished is kept, run it again to go on); 2 wrong arguments; 3 more bad
    records than --max-errors.
    """

    def dataset_prefix(self, key: str, split: str = "") -> str:
        """The prefix of a dataset to write, which is what --data-path of `pretrain` takes."""
        return f"{self.output_prefix}_{key}_{split + '_' if split else ''}document"

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = [*self.source_problems(), *self.order_problems(), *self.cleaning_problems(), *self.dedup_problems()]
        raise_problems([*problems, *self._output_problems()])

    def _output_problems(self) -> list[str]:
        if self.is_begun:
            return []
        splits = [name for name, share in zip(SPLITS, self.shares, strict=False) if share] or [""]
        prefixes = [self.dataset_prefix(key, split) for key in self.json_keys for split in splits]
        paths = [f"{prefix}{suffix}" for prefix in prefixes for suffix in (".bin", ".idx")]
        existing = [path for path in paths if Path(path).exists()]
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
class RowArgs:
    """The rows of a batch, and their order."""

    seq_length: int = 1024
    """Tokens in a training sample."""
    seed: int = 1234
    """Seed of the order in which samples are drawn."""

    def row_problems(self) -> list[str]:
        """Everything that is wrong with these values."""
        found = []
        if self.seq_length < 1:
            found.append(f"--seq-length {self.seq_length}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            found.append(f"--seed {self.seed}: must lie in 0..2^32-1, the range of numpy's generator")
        return found


@dataclass(frozen=True)
class DataSpec(RowArgs):
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
        raise_problems(
            [*self._source_problems(), *self._split_problems(), *self.row_problems(), *self._file_problems()]
        )

    def _source_problems(self) -> list[str]:
        if self.data_path and any(self.per_split_paths):
            return ["give --data-path (with --split) or --train-data-path and its companions, not both"]
        if not self.data_path and not self.train_data_path:
            return ["give the training data: --data-path PREFIX, or --train-data-path PREFIX"]
        if self.split is not None and not self.data_path:
            return [f"--split {self.split} divides --data-path; it has no meaning with --train-data-path"]
        return []

    def _split_problems(self) -> list[str]:
        return [] if are_shares(self.split_shares) else [_shares_problem(self.split_shares)]

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
