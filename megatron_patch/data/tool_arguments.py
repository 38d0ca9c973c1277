"""What a user may say to the tools for finished datasets: the flags of `merge`, `inspect` and `verify-data`.

Each `validate` checks everything that can be known before heavy imports and reports all problems at once. This module
imports neither torch nor numpy. It does not know how any of it is done.
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_patch.data.arguments import raise_problems


@dataclass(frozen=True)
class MergeArgs:
    """Join indexed datasets into one: documents in order, byte for byte as megatron-core's builder would."""

    inputs: tuple[str, ...]
    """Dataset prefixes (paths without .bin or .idx), quoted globs of prefixes, or directories of datasets."""
    output_prefix: str
    """Where to write: PREFIX.bin, PREFIX.idx, and PREFIX.json if every part has one."""
    order: Literal["natural", "given"] = "natural"
    """natural: sorted with numbers as numbers (part_2 before part_10). given: as the command line names them; what one
    directory or glob expands to is sorted naturally."""
    target_dtype: Literal["auto", "uint16", "int32"] = "auto"
    """Type of a stored id; auto: one that holds every part's. A narrower type than a part's is refused if an id does
    not fit it; for uint16 ids must be below 65500, beyond which megatron-core stores int32."""
    overwrite: bool = False
    """Replace an existing dataset of the same name."""
    json: str | None = None
    """Also write the report, with the tokens of each source, to this file."""

    def prefixes(self) -> tuple[str, ...]:
        """The datasets to join, in order; ValueError naming every input that is none."""
        found, problems = [], []
        for name in self.inputs:
            prefixes, complaints = _expand(name)
            found += prefixes
            problems += complaints
        if not self.inputs:
            problems.append("--inputs: give at least one dataset prefix")
        again = Counter(Path(prefix).resolve() for prefix in found)
        problems += [f"--inputs: dataset {path} is given {n} times" for path, n in again.items() if n > 1]
        if Path(self.output_prefix).resolve() in again:
            problems.append(f"--output-prefix {self.output_prefix!r} is among the inputs")
        raise_problems(problems)
        return tuple(sorted(found, key=_natural) if self.order == "natural" else found)

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = []
        if Path(self.output_prefix).name in ("", ".", "..") or self.output_prefix.endswith("/"):
            problems.append(f"--output-prefix {self.output_prefix!r}: must end in the first part of a file name")
        existing = [path for suffix in (".bin", ".idx") if Path(path := f"{self.output_prefix}{suffix}").exists()]
        if existing and not self.overwrite:
            there = " and ".join(existing)
            problems.append(f"--output-prefix: {there} already there; give --overwrite or another prefix")
        problems += _json_problems(self.json)
        try:
            self.prefixes()
        except ValueError as error:
            problems.append(str(error))
        raise_problems(problems)


@dataclass(frozen=True)
class _OneDataset:
    """What `inspect` and `verify-data` have in common."""

    data_path: str
    """The dataset's prefix (its path without .bin or .idx), as for --data-path of `pretrain`."""
    tokenizer_model: str | None = None
    """Hugging Face directory of the tokenizer that the data were made with."""
    trust_remote_code: bool = False
    """Let transformers run Python code that lies in the tokenizer's directory."""
    samples: int = 20
    """Documents, drawn at random, to decode; needs --tokenizer-model."""
    seed: int = 1234
    """Seed of that draw."""
    json: str | None = None
    """Also write the whole report to this file."""

    @property
    def prefix(self) -> str:
        """--data-path without an .idx or .bin that a shell completed."""
        return without_suffix(self.data_path)

    def _problems(self) -> list[str]:
        missing = [path for suffix in (".idx", ".bin") if not Path(path := f"{self.prefix}{suffix}").is_file()]
        problems = [f"--data-path {self.data_path}: there is no {path}" for path in missing]
        if self.tokenizer_model is not None and not Path(self.tokenizer_model).is_dir():
            problems.append(f"--tokenizer-model {self.tokenizer_model!r}: no such directory")
        if self.samples < 0:
            problems.append(f"--samples {self.samples}: must be 0 or more")
        if self.seed < 0:
            problems.append(f"--seed {self.seed}: must be 0 or more")
        return problems + _json_problems(self.json)


@dataclass(frozen=True)
class InspectArgs(_OneDataset):
    """Show what an indexed dataset holds: sizes, lengths of documents, and with a tokenizer what they read like."""

    doc: tuple[int, ...] = ()
    """Numbers of documents (from 0) to show: their text with --tokenizer-model, otherwise their ids."""

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = self._problems()
        problems += [f"--doc {number}: documents are counted from 0" for number in self.doc if number < 0]
        raise_problems(problems)


@dataclass(frozen=True)
class VerifyDataArgs(_OneDataset):
    """Prove an indexed dataset sound: index, sizes, ids, ends of documents. Exit code 1 if it is not."""

    vocab_size: int | None = None
    """Every id must be below it (default: the size of the tokenizer given)."""
    eod: Literal["each", "none", "any"] = "each"
    """each: every document must end with the tokenizer's end-of-document token and hold it nowhere else. none: no
    document may hold it (data made without --append-eod). any: not looked at. Needs --tokenizer-model."""
    max_problems: int = 1000
    """Stop looking once this many problems are found."""

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = self._problems()
        if self.vocab_size is not None and self.vocab_size < 1:
            problems.append(f"--vocab-size {self.vocab_size}: must be at least 1")
        if self.eod == "none" and self.tokenizer_model is None:
            problems.append("--eod none: which token that is, --tokenizer-model must say")
        if self.max_problems < 1:
            problems.append(f"--max-problems {self.max_problems}: must be at least 1")
        raise_problems(problems)


def _json_problems(path: str | None) -> list[str]:
    if path and not Path(path).parent.is_dir():
        return [f"--json {path}: there is no directory {Path(path).parent}"]
    return []


def without_suffix(name: str) -> str:
    """A dataset's prefix from that or from the name of one of its files."""
    return name[:-4] if name.endswith((".idx", ".bin")) and Path(name).is_file() else name


def _expand(name: str) -> tuple[list[str], list[str]]:
    """The prefixes that one input stands for, and what is wrong with it."""
    prefix = without_suffix(name)
    if Path(f"{prefix}.idx").is_file() or Path(f"{prefix}.bin").is_file():
        found = {prefix}
    elif Path(name).is_dir():
        found = {str(path)[:-4] for suffix in (".idx", ".bin") for path in Path(name).glob(f"*{suffix}")}
    else:
        found = {path[:-4] for suffix in (".idx", ".bin") for path in glob.glob(f"{name}{suffix}", recursive=True)}
    if not found:
        return [], [f"--inputs: {name!r} names no dataset (PREFIX of a PREFIX.idx and PREFIX.bin)"]
    # Left out silently, a part whose writer was killed would be missing from the whole.
    pairs = ((prefix, f"{prefix}{suffix}") for prefix in sorted(found) for suffix in (".idx", ".bin"))
    problems = [
        f"--inputs: {prefix} is no whole dataset: {path} is missing"
        for prefix, path in pairs
        if not Path(path).is_file()
    ]
    return sorted(found, key=_natural), problems


def _natural(prefix: str) -> list[tuple[int, str]]:
    parts = re.split(r"([0-9]+)", prefix)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
