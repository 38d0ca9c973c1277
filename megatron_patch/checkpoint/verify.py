"""Proof that two checkpoints are the same model, whatever their formats and layouts.

    verify("path/to/hf", "path/to/megatron")       logits, loss and top-1 of transformers against ours, on text
    verify("path/to/one", "path/to/other")         every tensor, bit by bit

A round trip alone proves nothing about a weight map (a wrong rule undoes itself); logits do. It knows no arguments and
no training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint.arguments import Level
from megatron_patch.checkpoint.formats import Source
from megatron_patch.checkpoint.huggingface import HFReader
from megatron_patch.checkpoint.logits import TextResult, compare_logits, no_reference
from megatron_patch.checkpoint.opening import open_source
from megatron_patch.checkpoint.whole import world_of_one
from megatron_patch.tokenizer.hf import load_tokenizer, tokenizer_files

ENGLISH = """In the valley behind the old mill, the river divides into two narrow arms before it reaches the lake.
For many years people believed that the eastern arm was dug by hand, because its bed is so straight; but a survey in
the spring of 1964 showed that both follow a fault in the rock. The villagers were not disappointed. They still tell
visitors about the seven brothers who, it is said, moved the water in a single winter, and every August they hold a race
of small wooden boats down the straight arm. The rules are simple: a boat may carry no sail and no motor, its owner may
touch it only with a pole of hazel, and whoever laughs at a sinking boat must help to build the next one."""

CHINESE = """清晨的集市刚刚开门，卖豆腐的老人已经把木桌擦得发亮。他每天只做六十块豆腐，卖完就收摊，从不多做。
有人劝他请一个学徒，再添一台机器，这样一天可以卖三百块。老人笑着摇头，说豆子要泡多久、水要烧多热，
都要看当天的天气，机器不会看天。后来城里来了一位年轻的工程师，在他的摊位旁边坐了整整一个月，
记下每天的温度、湿度和泡豆的时间，画成一张表送给他。老人看了很久，说：“这张表很好，可是它少了一样东西。”
工程师问少了什么，老人指了指排队的人：“他们今天想吃什么味道。”"""

_BUILT_IN = (("English", ENGLISH), ("Chinese", CHINESE))


@dataclass(frozen=True)
class Bounds:
    """How far the two may be apart."""

    max_abs: float = 1e-3
    """Largest absolute difference of two logits."""

    loss: float = 1e-5
    """Absolute difference of the mean losses."""

    top1: float = 1.0
    """Least share of positions where both put the same token first."""


@dataclass(frozen=True)
class VerifyReport:
    """What was compared, and what is wrong."""

    first: str
    second: str
    level: Level
    texts: tuple[TextResult, ...]
    """Per text, where logits were compared."""

    tensors: int
    """How many tensors were compared by name and shape, or bit by bit."""

    widened: int
    """How many of them have two dtypes and were compared in the wider one."""

    problems: tuple[str, ...]
    """What broke a bound or differs; empty when the two are the same model."""

    @property
    def ok(self) -> bool:
        """Whether they are the same model, within the bounds."""
        return not self.problems


@dataclass(frozen=True)
class Pair:
    """Two checkpoints, opened for a comparison."""

    first: Path
    second: Path
    level: Level
    sides: tuple[Source | Named, Source | Named] | tuple[Path, Path | Source]
    """What is compared; for logits: the Hugging Face directory, then the Megatron checkpoint (where megatron-core loads
    it at any layout, its path)."""


def open_pair(
    first: str | Path,
    second: str | Path,
    level: Level | None = None,
    *,
    hf_config: str | Path | None = None,
    trust_pickle: bool = False,
) -> Pair:
    """Open two checkpoints. Before megatron-core's parallel state is initialised, where one of them is legacy.

    Args:
        level: "names" (and shapes), "checksums" (every tensor, bit by bit) or "logits" (one of the two must be a
            Hugging Face directory, the other not). By default logits where that is possible, else checksums.
        hf_config: directory with the config.json of a Megatron checkpoint that does not carry it.
        trust_pickle: read legacy checkpoints that need full unpickling, which can run any code.

    Raises:
        ValueError: not a pair of checkpoints that can be compared so.
    """
    paths = Path(first), Path(second)
    kinds = [layout.is_huggingface(path) for path in paths]
    level = level or ("logits" if sum(kinds) == 1 else "checksums")
    if level != "logits":
        if all(kinds):
            return Pair(*paths, level, tuple(Named(HFReader(path)) for path in paths))
        others = paths[::-1]
        ways = [
            {"hf_config": hf_config or _lent(*both), "trust_pickle": trust_pickle}
            for both in zip(paths, others, strict=True)
        ]
        return Pair(*paths, level, tuple(open_source(path, **way) for path, way in zip(paths, ways, strict=True)))
    hf, megatron = paths if kinds[0] else paths[::-1]
    if sum(kinds) != 1 or not layout.is_megatron(megatron):
        raise ValueError(f"one of {first} and {second} must be a Hugging Face directory, the other a checkpoint")
    config = hf_config or _lent(megatron, hf)
    if config or layout.is_legacy(layout.locate(megatron)[1]):
        megatron = open_source(megatron, hf_config=config, trust_pickle=trust_pickle)
    return Pair(*paths, level, (hf, megatron))


def _lent(path: Path, other: Path) -> Path | None:
    """The other directory, where it has the config.json that this checkpoint does not carry."""
    carries = not layout.is_megatron(path) or layout.carries_config(path)
    return None if carries or not layout.is_huggingface(other) else other


def compare(
    pair: Pair,
    *,
    texts: Sequence[tuple[str, str]] | None = None,
    ids: Sequence[Sequence[int]] | None = None,
    max_tokens: int = 512,
    dtype: torch.dtype = torch.float32,
    bounds: Bounds | None = None,
    was_cast: bool = False,
) -> VerifyReport:
    """Compare them. Logits at any layout: where the parallel state is initialised, every rank calls it.

    Args:
        texts: (name, text) pairs; by default a paragraph of English and one of Chinese.
        ids: token ids to use instead of texts. A model without a tokenizer gets random ones.
        max_tokens: where texts are cut.
        dtype: of both computations, whatever the weights are stored in.
        bounds: how far logits and losses may be apart.
        was_cast: bit by bit, the first is compared in the dtype of the second, which was made of it by a cast.
    """
    if pair.level != "logits":
        return _compare_tensors(*pair.sides, pair.level, was_cast)
    hf, megatron = pair.sides
    samples = [(f"ids {i}", list(one)) for i, one in enumerate(ids)] if ids else _samples(hf, texts, max_tokens)
    with nullcontext() if parallel_state.is_initialized() else world_of_one():
        results = compare_logits(hf, megatron, samples, dtype)
    problems = _violations(results, bounds or Bounds())
    return VerifyReport(str(pair.first), str(pair.second), "logits", results, 0, 0, problems)


def verify(
    first: str | Path,
    second: str | Path,
    level: Level | None = None,
    *,
    hf_config: str | Path | None = None,
    trust_pickle: bool = False,
    **how: Any,
) -> VerifyReport:
    """Compare two checkpoints: `open_pair` and `compare` in one."""
    return compare(open_pair(first, second, level, hf_config=hf_config, trust_pickle=trust_pickle), **how)


def prove(source: str | Path, target: str | Path, *, was_cast: bool = False, **ways: Any) -> Iterator[VerifyReport]:
    """All that can be proven of a conversion: every tensor, bit by bit; then logits, where one of the two is a Hugging
    Face directory, no dtype was changed on purpose, and transformers has the model (see `why_no_logits`)."""
    yield verify(source, target, "checksums", **ways, was_cast=was_cast)
    if not why_no_logits(source, target, was_cast):
        yield verify(source, target, "logits", **ways)


def why_no_logits(source: str | Path, target: str | Path, was_cast: bool) -> str:
    """Why a conversion's logits are not compared, if so."""
    if was_cast:
        return "--dtype may change them; `verify` alone has bounds"
    hf = [path for path in (source, target) if layout.is_huggingface(path)]
    if len(hf) != 1:
        return "that takes a Hugging Face directory and a Megatron checkpoint"
    return no_reference(layout.read_config(hf[0]))


def _samples(hf: Path, texts: Sequence[tuple[str, str]] | None, max_tokens: int) -> list[tuple[str, list[int]]]:
    try:
        tokenizer_files(hf)
    except ValueError:
        if texts:
            raise
        return [("random ids", _random_ids(layout.read_config(hf), max_tokens))]
    tokenizer = load_tokenizer(hf)
    samples = [(name, tokenizer.encode(text)[:max_tokens]) for name, text in texts or _BUILT_IN]
    if short := [name for name, ids in samples if len(ids) < 2]:
        raise ValueError(f"{', '.join(short)}: a text must have at least 2 tokens")
    return samples


def _random_ids(config: dict[str, Any], max_tokens: int) -> list[int]:
    size = min(max_tokens, config.get("max_position_embeddings") or max_tokens)
    return torch.randint(config["vocab_size"], (size,), generator=torch.Generator().manual_seed(1)).tolist()


def _violations(results: Sequence[TextResult], bounds: Bounds) -> tuple[str, ...]:
    problems = []
    for one in results:
        checks = (
            ("max abs difference of logits", one.max_abs, one.max_abs <= bounds.max_abs, bounds.max_abs),
            ("loss difference", abs(one.hf_loss - one.megatron_loss), None, bounds.loss),
            ("top-1 agreement", one.top1, one.top1 >= bounds.top1, bounds.top1),
        )
        for what, value, good, bound in checks:
            # NaN passes no comparison, so it breaks every bound.
            if not (value <= bound if good is None else good):
                problems.append(f"{one.name}: {what} is {value:.3g}, bound {bound:g}")
    return tuple(problems)


# ---------------------------------------------------------------------------------------------------------------- bits


class Named:
    """Hugging Face tensors by their own names: they need no family to be compared with their like."""

    def __init__(self, reader: HFReader) -> None:
        self.path, self.infos, self.read = reader.directory, reader.infos, reader.read


def _compare_tensors(first: Source | Named, second: Source | Named, level: Level, was_cast: bool) -> VerifyReport:
    mine, yours = first.infos, second.infos
    problems = [f"{name} is only in {first.path}" for name in mine if name not in yours]
    problems += [f"{name} is only in {second.path}" for name in yours if name not in mine]
    common = [name for name in mine if name in yours]
    widened = 0
    for name in common:
        if mine[name].shape != yours[name].shape:
            problems.append(f"{name}: shape {mine[name].shape} in {first.path}, {yours[name].shape} in {second.path}")
        elif level == "checksums":
            widened += mine[name].dtype != yours[name].dtype
            problems += _differences(name, first, second, was_cast)
    return VerifyReport(str(first.path), str(second.path), level, (), len(common), widened, tuple(problems))


def _differences(name: str, first: Source | Named, second: Source | Named, was_cast: bool) -> list[str]:
    try:
        one, other = first.read(name), second.read(name)
    except ValueError as error:  # damaged: worth a line, and the others are worth a look
        return [str(error)]
    common = other.dtype if was_cast else torch.promote_types(one.dtype, other.dtype)
    different = int((_bits(one.to(common)) != _bits(other.to(common))).sum())
    return [f"{name}: {different} of {one.numel()} values differ"] if different else []


def _bits(tensor: Tensor) -> Tensor:
    # Bits, not numbers: NaN must equal itself, and 0 must not equal -0.
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
