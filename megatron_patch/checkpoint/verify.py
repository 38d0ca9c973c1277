"""Proof that two checkpoints are the same model.

    verify("path/to/hf", "path/to/megatron")       logits, loss and top-1 of transformers against ours, on text
    verify("path/to/hf", "path/to/hf_export")      every tensor, bit by bit

The first kind runs in one process, or at any tensor and pipeline parallel size where megatron-core's parallel state is
initialised on every rank: rank 0 then also runs transformers, and every rank gets the report. A round trip alone proves
nothing about a weight map (a wrong rule undoes itself); logits do. It knows no arguments and no training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint.convert import world_of_one
from megatron_patch.checkpoint.huggingface import HFReader
from megatron_patch.checkpoint.megatron import load_weights
from megatron_patch.model import build_model, transformer_config
from megatron_patch.models import family_for
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
class TextResult:
    """Both models on one text."""

    name: str
    tokens: int
    max_abs: float
    hf_loss: float
    megatron_loss: float
    top1: float


@dataclass(frozen=True)
class VerifyReport:
    """What was compared, and what is wrong."""

    first: str
    second: str
    texts: tuple[TextResult, ...]
    """Per text, where logits were compared."""

    tensors: int
    """How many tensors were compared bit by bit."""

    problems: tuple[str, ...]
    """What broke a bound or differs; empty when the two are the same model."""

    @property
    def ok(self) -> bool:
        """Whether they are the same model, within the bounds."""
        return not self.problems


def verify(
    first: str | Path,
    second: str | Path,
    *,
    texts: Sequence[tuple[str, str]] | None = None,
    ids: Sequence[Sequence[int]] | None = None,
    max_tokens: int = 512,
    dtype: torch.dtype = torch.float32,
    bounds: Bounds | None = None,
) -> VerifyReport:
    """Compare a Hugging Face directory with a Megatron checkpoint (in either order), or with another one.

    Args:
        texts: (name, text) pairs; by default a paragraph of English and one of Chinese.
        ids: token ids to use instead of texts. A model without a tokenizer gets random ones.
        max_tokens: where texts are cut.
        dtype: of both computations, whatever the weights are stored in.
        bounds: how far logits and losses may be apart.

    Raises:
        ValueError: not a pair of checkpoints that can be compared.
    """
    kinds = [layout.is_huggingface(path) for path in (first, second)]
    if all(kinds):
        return _compare_tensors(Path(first), Path(second))
    hf, megatron = (Path(first), Path(second)) if kinds[0] else (Path(second), Path(first))
    if not any(kinds) or not layout.is_megatron(megatron):
        raise ValueError(f"one of {first} and {second} must be a Hugging Face directory, the other a checkpoint")
    samples = [(f"ids {i}", list(one)) for i, one in enumerate(ids)] if ids else _samples(hf, texts, max_tokens)
    with nullcontext() if parallel_state.is_initialized() else world_of_one():
        results = _compare_logits(hf, megatron, samples, dtype)
    return VerifyReport(str(first), str(second), results, 0, _violations(results, bounds or Bounds()))


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


# -------------------------------------------------------------------------------------------------------------- logits


def _compare_logits(
    hf: Path, megatron: Path, samples: Sequence[tuple[str, list[int]]], dtype: torch.dtype
) -> tuple[TextResult, ...]:
    chunks = load_model(megatron, dtype)
    reference = _reference(hf, dtype) if dist.get_rank() == 0 else None
    results = []
    for name, ids in samples:
        tokens = torch.tensor([ids], device=_device())
        ours = _to_rank_0(logits(chunks, tokens))
        if reference is not None:
            with torch.no_grad():
                results.append(_compare(name, reference(tokens).logits[0].float(), ours, tokens[0]))
    shared = [tuple(results)]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _reference(hf: Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(hf, dtype=dtype).to(_device()).eval()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_model(root: Path, dtype: torch.dtype) -> list[GPTModel]:
    """This rank's part of a checkpoint's model, in the layout of megatron-core's parallel state."""
    config = layout.read_config(root)
    architecture = family_for(config).describe(config)
    fields = transformer_config(
        architecture,
        dtype,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        perform_initialization=False,  # every weight is about to be loaded
    )
    chunks = [build_model(architecture, fields, parallel_output=False).to(_device()).eval()]
    load_weights(chunks, root)
    return chunks


def logits(chunks: list[GPTModel], tokens: Tensor) -> Tensor | None:
    """Logits [sequence, padded vocabulary] of tokens [1, sequence] on the last pipeline stage; None elsewhere."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]

    def forward_step(_iterator: Iterator[Any] | None, model: GPTModel) -> tuple[Tensor, Any]:
        return model(tokens, positions, None), partial(_keep)

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=chunks,
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs[0][0] if outputs else None


def _keep(output: Tensor, non_loss_data: bool = True) -> Tensor:
    return output


def _to_rank_0(output: Tensor | None) -> Tensor | None:
    """Bring the last pipeline stage's logits to rank 0."""
    # Every pipeline has the same logits; they come from the one that rank 0 belongs to.
    owner = [parallel_state.get_pipeline_model_parallel_last_rank()]
    dist.broadcast_object_list(owner, src=0)
    box = [None if output is None else output.float().cpu()]
    if owner[0] != 0 and dist.get_rank() == owner[0]:
        dist.send_object_list(box, dst=0)
    if owner[0] != 0 and dist.get_rank() == 0:
        dist.recv_object_list(box, src=owner[0])
    return box[0].to(_device()) if dist.get_rank() == 0 else None


def _compare(name: str, hf: Tensor, megatron: Tensor, tokens: Tensor) -> TextResult:
    megatron = megatron[:, : hf.shape[1]]
    losses = [F.cross_entropy(one[:-1].double(), tokens[1:]).item() for one in (hf, megatron)]
    same = (hf.argmax(dim=-1) == megatron.argmax(dim=-1)).double().mean().item()
    return TextResult(name, len(tokens), (hf - megatron).abs().max().item(), *losses, same)


# ---------------------------------------------------------------------------------------------------------------- bits


def _compare_tensors(first: Path, second: Path) -> VerifyReport:
    ours, theirs = HFReader(first), HFReader(second)
    mine, yours = ours.infos, theirs.infos
    problems = [f"{name} is only in {first}" for name in mine if name not in yours]
    problems += [f"{name} is only in {second}" for name in yours if name not in mine]
    common = [name for name in mine if name in yours]
    for name in common:
        if mine[name] != yours[name]:
            problems.append(f"{name}: {_say(mine[name])} in {first}, {_say(yours[name])} in {second}")
        elif not torch.equal(_bits(ours.read(name)), _bits(theirs.read(name))):
            problems.append(f"{name} differs")
    return VerifyReport(str(first), str(second), (), len(common), tuple(problems))


def _say(info: Any) -> str:
    return f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"


def _bits(tensor: Tensor) -> Tensor:
    # Bytes, not numbers: NaN must equal itself, and 0 must not equal -0.
    return tensor.contiguous().reshape(-1).view(torch.uint8)
