"""Rows for new tokens in a Hugging Face model: `megatron-patch vocab init`.

    report = initialise(VocabInitArgs(base="model/", tokenizer="merged/", output="grown/"))

A row is the mean of the rows of the old tokens that its text is made of, computed in fp32 and cast once. Only weight
files that hold the embedding or the output layer are written anew, tensor by tensor; the others are hard-linked. Which
tensors those are is asked of the model's family. A Megatron checkpoint is the matter of megatron.py. It knows neither
megatron-core nor any model by name.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.checkpoint.directory import CONFIG, copy_side_files, read_json, staging
from megatron_patch.checkpoint.huggingface import FilePlan, HFReader, TensorInfo, header, write_index
from megatron_patch.family import EMBEDDING, Architecture
from megatron_patch.models import family_for
from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from megatron_patch.tokenizer.hf import tokenizer_files
from megatron_patch.vocab.arguments import VocabInitArgs
from megatron_patch.vocab.corpus import Corpus, batches
from megatron_patch.vocab.note import EXTENSION, INITIALISATION, read_note, write_note
from megatron_patch.vocab.subpieces import Growth, compare
from megatron_patch.weights import Rule

OUTPUT_LAYER = "output_layer."
_BLOCK = 4096
_PIECE = 64 << 20


@dataclass(frozen=True)
class InitReport:
    """What giving new tokens their rows did."""

    output: str
    method: str
    base_rows: int
    rows: int
    new_tokens: int
    """Tokens of the new tokenizer that got a row made of others."""
    filled: int
    """Rows without a text of their own (reserved, padding): the mean of all old rows."""
    tied: bool
    tensors: tuple[str, ...]
    """Those that were rewritten."""
    written: tuple[str, ...]
    """Weight files that were written; the others are the base's."""
    linked: int
    seconds: float

    def table(self) -> Iterator[tuple[str, str]]:
        """Names and values for a table."""
        yield "method", self.method
        yield "rows", f"{self.base_rows:,} -> {self.rows:,}"
        yield "new tokens, rows that only fill up", f"{self.new_tokens:,}, {self.filled:,}"
        yield "rewritten", f"{', '.join(self.tensors)}{' (tied)' if self.tied else ''}"
        yield "weight files", f"{len(self.written)} written, {self.linked} taken over"
        yield "note", "the optimizer's state no longer fits: begin with a fresh one; tokenize all data anew"
        yield "time", f"{self.seconds:.1f} s"


def initialise(args: VocabInitArgs) -> InitReport:
    """Writes the grown model, in the format of its base.

    Raises ValueError for what a user can mend: a tokenizer that does not extend the model's, a model of no known
    family, a vocabulary tensor that is not there. Nothing is left behind then.
    """
    start = time.perf_counter()
    args.validate()
    if args.is_megatron:
        from megatron_patch.vocab.megatron import write_grown

        model, recipe, written = write_grown(args)
        linked = 0
    else:
        model = open_huggingface(args.base)
        recipe = make_recipe(args, model)
        written = _write_huggingface(args, model, recipe)
        linked = len(model.weights.plan.files) - len(written)
    own = [ids for ids in recipe.growth.sources.values() if ids]
    return InitReport(
        output=args.output,
        method=args.method,
        base_rows=model.rows,
        rows=recipe.rows,
        new_tokens=len(own),
        filled=recipe.rows - len(recipe.growth.old_ids) - len(own),
        tied=model.architecture.tied,
        tensors=model.tensors,
        written=written,
        linked=linked,
        seconds=time.perf_counter() - start,
    )


def make_recipe(args: VocabInitArgs, model: Model) -> Recipe:
    """What the new rows are to be made of; ValueError for a tokenizer that does not extend the model's."""
    old, new = load_tokenizer(model.folder), load_tokenizer(args.tokenizer)
    growth = compare(old, new, model.rows, read_note(args.tokenizer, EXTENSION).get("reserved", ()))
    rows = -(-max(growth.size, model.rows) // args.pad_multiple) * args.pad_multiple
    counts = _counts(old, args) if args.method == "weighted" else None
    return Recipe(growth, rows, args.method, args.seed, model.std, counts)


def write_companions(args: VocabInitArgs, model: Model, recipe: Recipe, folder: Path) -> None:
    """Every file that is no weight: the base's, with the new tokenizer, the new number of rows and a note."""
    copy_side_files(model.folder, folder)
    _replace_tokenizer(folder, Path(args.tokenizer))
    (folder / CONFIG).write_text(json.dumps(model.grown_config(recipe.rows), indent=2, ensure_ascii=False) + "\n")
    write_note(folder, INITIALISATION, _note(args, model, recipe))


def _write_huggingface(args: VocabInitArgs, model: Model, recipe: Recipe) -> tuple[str, ...]:
    with staging(args.output, args.overwrite) as staged:
        write_companions(args, model, recipe, staged)
        return _write_weights(model, recipe, staged, args.copy)


def _note(args: VocabInitArgs, model: Model, recipe: Recipe) -> dict[str, Any]:
    return {
        "method": args.method,
        "seed": args.seed,
        "base_rows": model.rows,
        "rows": recipe.rows,
        "counts": recipe.counts and {str(i): recipe.counts[i] for i in sorted(recipe.used) if recipe.counts[i]},
    }


def _counts(old: Tokenizer, args: VocabInitArgs) -> list[int]:
    """How often the corpus has each old token."""
    counts = [0] * old.vocab_size
    for texts in batches(Corpus(args.corpus, args.text_key, name="vocab init")):
        for number in chain.from_iterable(old.encode_batch(texts, add_special_tokens=False)):
            counts[number] += 1
    return counts


# ----------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Model:
    """A model, and which of its tensors have a row for each token.

    Raises:
        ValueError: one of these has not as many rows as the first.
    """

    folder: Path
    """Where config.json and the tokenizer lie."""
    config: Mapping[str, Any]
    architecture: Architecture
    weights: Any
    """What has `infos` and `read` of tensors, by the names of the format: an HFReader or a `Source`."""
    parts: Mapping[str, int]
    """Tensors with a row for each token -> which of them it is, or which one it repeats. The embedding is 0."""

    def __post_init__(self) -> None:
        if wrong := [name for name in self.tensors if self.infos[name].shape[0] != self.rows]:
            raise ValueError(f"{self.folder}: {wrong[0]} has {self.infos[wrong[0]].shape[0]} rows, not {self.rows}")

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every tensor."""
        return self.weights.infos

    @property
    def tensors(self) -> tuple[str, ...]:
        """Those with a row for each token, the embedding first."""
        return tuple(self.parts)

    @property
    def rows(self) -> int:
        """Of the embedding."""
        return self.infos[self.tensors[0]].shape[0]

    @property
    def std(self) -> float:
        """Of fresh weights."""
        return float(self.config.get("initializer_range") or 0.02)

    def grown_config(self, rows: int) -> dict[str, Any]:
        """config.json with another number of rows."""
        fields = {self.architecture.family.vocab_size, "vocab_size"}
        known = {name: rows for name in fields if self.config.get(name) is not None}
        return {**self.config, **known}


def vocabulary_rules(architecture: Architecture) -> list[Rule]:
    """The rules of the tensors with a row for each token: the embedding and, unless it is tied, the output layer."""
    inner = (EMBEDDING,) if architecture.tied else (EMBEDDING, OUTPUT_LAYER)
    return [rule for part in inner for rule in architecture.family.weights if rule.internal.startswith(part)]


def open_huggingface(directory: str | Path) -> Model:
    """A Hugging Face model; ValueError if it is of no known family, or a tensor that must be there is not."""
    config, reader = read_json(Path(directory) / CONFIG), HFReader(directory)
    architecture, infos = family_for(config).describe(config), reader.infos
    found = {name: _found(name, infos, directory) for rule in vocabulary_rules(architecture) for name in rule.hf}
    parts = {own: number for number, own in enumerate(dict.fromkeys(found.values()))}
    repeats = {name: original for name, original in architecture.repeats.items() if original in found}
    parts |= {name: parts[found[original]] for name, original in repeats.items() if name in infos}
    return Model(Path(directory), config, architecture, reader, parts)


def _found(name: str, infos: Mapping[str, TensorInfo], directory: str | Path) -> str:
    short = name.partition(".")[2]  # some checkpoints leave out the module around everything
    if name not in infos and short not in infos:
        raise ValueError(f"{directory} has no tensor {name}, which its family must have")
    return name if name in infos else short


# ------------------------------------------------------------------------------------------------------------ the rows


@dataclass(frozen=True)
class Recipe:
    """How the grown tensors are made."""

    growth: Growth
    rows: int
    method: str
    seed: int
    std: float
    counts: Sequence[int] | None = None
    """How often each old token occurs, for the method weighted."""

    @property
    def used(self) -> set[int]:
        """Old ids that new rows are made of."""
        return set(chain.from_iterable(self.growth.sources.values()))

    def grow(self, old: Tensor, part: int) -> Tensor:
        """The tensor with `rows` rows: those of old tokens as they are, new ones in its dtype, computed in fp32.

        Args:
            part: which of the model's tensors it is; random rows are others in each.
        """
        grown = torch.empty(self.rows, *old.shape[1:], dtype=old.dtype)
        keep = min(len(old), self.rows)
        grown[:keep] = old[:keep]
        centre = self._mean_of_all(old)
        generator = torch.Generator().manual_seed(self.seed + part)
        for number in sorted({*self.growth.sources, *range(keep, self.rows)}):
            parts = self.growth.sources.get(number, ())
            grown[number] = self._row(old, parts, generator) if parts else centre
        return grown

    def _row(self, old: Tensor, parts: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.method == "random" and old.dim() > 1:
            return torch.randn(old.shape[1:], generator=generator) * self.std
        return self.mix(old, parts)

    def mix(self, old: Tensor, parts: tuple[int, ...]) -> Tensor:
        """What the method makes of some entries along the first axis, in fp32."""
        parts = {"first": parts[:1], "last": parts[-1:]}.get(self.method, parts)
        weights = torch.ones(len(parts))
        if self.method == "weighted" and self.counts is not None:
            weights = torch.tensor([1.0 + self.counts[part] for part in parts])
        return torch.tensordot(weights / weights.sum(), old[list(parts)].float(), dims=1)

    def _mean_of_all(self, old: Tensor) -> Tensor:
        ids = torch.tensor(self.growth.old_ids)
        total = sum(old[block].double().sum(0) for block in ids.split(_BLOCK))
        return (total / len(ids)).float()


# ------------------------------------------------------------------------------------------------------- the new files


def _replace_tokenizer(staged: Path, tokenizer: Path) -> None:
    """Puts the new tokenizer's files in the place of all of the old one's: what is stale would win over them."""
    for file in (*tokenizer_files(staged), staged / EXTENSION, staged / INITIALISATION):
        file.unlink(missing_ok=True)
    for file in (*tokenizer_files(tokenizer), *tokenizer.glob("chat_template*"), tokenizer / EXTENSION):
        if file.is_file():
            shutil.copyfile(file, staged / file.name)


def _write_weights(model: Model, recipe: Recipe, staged: Path, copy: bool) -> tuple[str, ...]:
    """Writes the files with a changed tensor, takes over the others; returns the names of those written."""
    plan, present, written = model.weights.plan, set(model.weights.files), []
    infos = dict(model.infos) | {
        name: TensorInfo(model.infos[name].dtype, (recipe.rows, *model.infos[name].shape[1:])) for name in model.tensors
    }
    for file, names in plan.files.items():
        if file in present and not set(names) & set(model.tensors):
            _take_over(model.weights.directory / file, staged / file, copy)
            continue
        _write_file(staged / file, names, infos, plan, model, recipe)
        written.append(file)
    write_index(staged, plan, infos)
    return tuple(written)


def _take_over(source: Path, target: Path, copy: bool) -> None:
    if not copy:
        try:
            return os.link(source.resolve(), target)
        except OSError:
            pass  # another file system, or one without hard links
    shutil.copyfile(source, target)


def _write_file(
    path: Path, names: Sequence[str], infos: Mapping[str, TensorInfo], plan: FilePlan, model: Model, recipe: Recipe
) -> None:
    with path.open("wb") as file:
        file.write(header(names, infos, plan.metadata.get(path.name)).content)
        for name in names:
            tensor = model.weights.read(name)
            if name in model.tensors:
                tensor = recipe.grow(tensor, model.parts[name])
            data = tensor.contiguous().flatten().view(torch.uint8)
            for piece in data.split(_PIECE):
                file.write(piece.numpy().data)
