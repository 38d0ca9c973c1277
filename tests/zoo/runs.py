"""What the workers compute of a tiny model: logits, loss, gradients, a short training, a generation, mutants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from tests.zoo.cases import LENGTH

VOCABULARY = 200


@dataclass(frozen=True)
class Layout:
    """A parallel layout; what tensor and pipeline leave over is data parallel, and holds the experts."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    """Ranks that share each expert: as many as the other layers have, if None."""

    data: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


LAYOUTS: dict[str, Layout] = {
    "TP1": Layout(),
    "TP2": Layout(2),
    "TP2+SP": Layout(2, sequence_parallel=True),
    "PP2": Layout(pipeline=2),
}
MOE_LAYOUTS: dict[str, Layout] = {
    **LAYOUTS,
    "EP2": Layout(expert=2, data=2),
    "TP2+SP EP2 ETP1": Layout(2, expert=2, expert_tensor=1, sequence_parallel=True),
    "TP2+SP EP2": Layout(2, expert=2, data=2, sequence_parallel=True),
    "PP2 EP2": Layout(pipeline=2, expert=2, data=2),
}
FOUR = ("TP2+SP EP2", "PP2 EP2")
"""Layouts of four processes, for one case a family."""


@dataclass(frozen=True)
class Job:
    """One converted model and its texts."""

    root: str
    ids: torch.Tensor
    expected: str = ""
    """The reference's gradients, as a converted checkpoint."""


def load(root: str, layout: Layout, **settings: Any) -> torch.nn.Module:
    """This rank's part of a converted checkpoint; an odd number of layers leaves the last stage one more."""
    from megatron.core import parallel_state

    from megatron_patch.checkpoint.directory import read_config
    from megatron_patch.checkpoint.megatron import load_weights
    from megatron_patch.model import build_model, transformer_config
    from megatron_patch.models import family_for
    from megatron_patch.training.initialize import seed_everything

    sizes = dict(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    if not parallel_state.is_initialized():  # once a call: every gloo group has threads of its own
        parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
    seed_everything(1)
    architecture = family_for(values := read_config(root)).describe(values)
    if layout.pipeline > 1 and architecture.num_layers % 2:
        settings["num_layers_in_first_pipeline_stage"] = architecture.num_layers // 2
    config = transformer_config(architecture, sequence_parallel=layout.sequence_parallel, **sizes, **settings)
    model = build_model(architecture, config, make_vocab_size_divisible_by=16)
    load_weights([model], root)
    return model


def _positions(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1])[None].expand_as(ids)


def _run(model: torch.nn.Module, forward: Callable[..., Any], count: int, rows: int, **options: Any) -> list[Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(range(count)),
        model=[model],
        num_microbatches=count,
        seq_length=LENGTH,
        micro_batch_size=rows,
        **options,
    )


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor | None:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    def forward(data: Any, model: torch.nn.Module) -> Any:
        next(data)
        return model(ids, _positions(ids), None), lambda output, non_loss_data: output

    with torch.no_grad():
        outputs = _run(model, forward, 1, len(ids), forward_only=True, collect_non_loss_data=True)
        return gather_from_tensor_model_parallel_region(outputs[0])[..., :VOCABULARY] if outputs else None


def logits(rank: int, world_size: int, jobs: dict[str, Job], layout: Layout) -> dict[str, torch.Tensor]:
    """Whole logits of every model, on the ranks of the last stage."""
    found = {name: _logits(load(job.root, layout).eval(), job.ids) for name, job in jobs.items()}
    return {name: one for name, one in found.items() if one is not None}


# ------------------------------------------------------------------------------------------------------------- training


def labels_and_mask(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each position should say, and whether it counts."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(VOCABULARY, ids.shape, generator=generator)
    return labels, (torch.randint(4, ids.shape, generator=generator) > 0).float()


def _trainable(root: str, layout: Layout) -> tuple[torch.nn.Module, torch.nn.Module]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    model = load(root, layout, calculate_per_token_loss=True, finalize_model_grads_func=finalize_model_grads)
    return model, DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)


def _backward(ddp: torch.nn.Module, ids: torch.Tensor) -> list[Any]:
    """Forward and backward of this data-parallel rank's rows, one at a time."""
    from megatron.core import parallel_state

    from megatron_patch.training.loss import masked_loss

    labels, mask = labels_and_mask(ids)
    rows = range(parallel_state.get_data_parallel_rank(), len(ids), parallel_state.get_data_parallel_world_size())

    def forward(data: Any, model: torch.nn.Module) -> Any:
        row = slice(index := rows[next(data)], index + 1)
        output = model(ids[row], _positions(ids[row]), None, labels=labels[row])
        return output, lambda losses: masked_loss(mask[row], losses)

    ddp.zero_grad_buffer()
    sums = _run(ddp, forward, len(rows), 1, forward_only=False)
    return [(float(one[0]), float(one[1])) for one in sums or ()]


def gradients(rank: int, world_size: int, jobs: dict[str, Job], layout: Layout) -> dict[str, tuple[list, dict]]:
    """Of each model: sums of losses and their weights (nothing before the last stage), and each weight's relative
    gradient error."""
    found = {}
    for name, job in jobs.items():
        wanted = dict(load(job.expected, layout).named_parameters())
        model, ddp = _trainable(job.root, layout)
        sums = _backward(ddp, job.ids)
        found[name] = sums, {key: _error(p.main_grad, wanted[key], key) for key, p in model.named_parameters()}
    return found


def _error(found: torch.Tensor, wanted: torch.Tensor, name: str) -> float:
    if name.startswith(("embedding.word", "output_layer.")):
        from megatron.core import parallel_state

        first = parallel_state.get_tensor_model_parallel_rank() * len(found)
        found, wanted = found[: max(VOCABULARY - first, 0)], wanted[: max(VOCABULARY - first, 0)]
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)) if wanted.numel() else 0.0


def training(rank: int, world_size: int, jobs: dict[str, Job], layout: Layout, steps: int) -> dict[str, list[float]]:
    """The loss of each step of AdamW on the same texts (nothing before the last stage)."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    found = {}
    for name, job in jobs.items():
        _, ddp = _trainable(job.root, layout)
        config = OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=1.0)
        optimizer = get_megatron_optimizer(config, [ddp], use_gloo_process_groups=False)
        found[name] = []
        for _ in range(steps):
            sums = _backward(ddp, job.ids)
            optimizer.step()
            found[name] += [sum(s for s, _ in sums) / sum(n for _, n in sums)] if sums else []
    return found


def in_bf16(rank: int, world_size: int, jobs: dict[str, Job]) -> dict[str, tuple[float, float, bool]]:
    """Losses in fp32 and bf16, and whether every gradient of the latter is a number."""
    found = {}
    for name, job in jobs.items():
        losses, finite = [], True
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(1)
            model = load(job.root, Layout(), dtype=dtype)
            labels, _ = labels_and_mask(job.ids)
            loss = model(job.ids, _positions(job.ids), None, labels=labels).float().mean()
            loss.backward()
            losses.append(loss.item())
            finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        found[name] = (*losses, finite)
    return found


def context_losses(rank: int, world_size: int, job: Job) -> list[torch.Tensor]:
    """Of a model that reads a prefix: which positions count, how many a training step counts, and logits before and
    after the token of position 2 is another one."""
    from megatron_patch.training.loss import forward_step

    model, labels = load(job.root, Layout()), labels_and_mask(job.ids)[0]
    batch = dict(tokens=job.ids, labels=labels, loss_mask=torch.ones(job.ids.shape), position_ids=_positions(job.ids))
    output, reduce = forward_step(iter([batch]), model)
    counted = reduce(output)[1]
    model.eval()
    changed = job.ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 100
    before, after = _logits(model, job.ids), _logits(model, changed)
    return [model.prefix.counts_BS, counted, before, after]


# ----------------------------------------------------------------------------------------------- generation and mutants


def generation(
    rank: int, world_size: int, jobs: dict[str, list[list[int]]], roots: dict[str, str], limits: Sequence[int]
) -> dict:
    """Greedy continuations of each model's prompts, with a cache of two rows."""
    from megatron_patch.generation.engine import generate

    options = dict(max_new_tokens=limits, batch_size=2)
    return {name: generate(load(roots[name], Layout()), prompts, **options) for name, prompts in jobs.items()}


def _mutant(rule: str, tensor: torch.Tensor) -> torch.Tensor:
    if rule.endswith("bias"):
        return torch.zeros_like(tensor)
    return tensor.flip(0 if len(tensor) > 1 else -1)


def mutants(rank: int, world_size: int, jobs: dict[str, Job]) -> dict[str, dict[str, float]]:
    """How far logits move when one weight rule gives rows in the wrong order (or no bias at all)."""
    from megatron_patch.checkpoint.directory import read_config
    from megatron_patch.models import family_for
    from megatron_patch.weights import claim

    found: dict[str, dict[str, float]] = {}
    for name, job in jobs.items():
        model = load(job.root, Layout()).eval()
        right = _logits(model, job.ids)
        parameters = {key: value for key, value in [*model.named_parameters(), *model.named_buffers()]}
        architecture = family_for(values := read_config(job.root)).describe(values)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if "_extra_state" not in key}
        by_rule: dict[str, list[torch.Tensor]] = {}
        for one in claim(architecture.family.weights, shapes, architecture.num_layers):
            by_rule.setdefault(one.rule.internal, []).append(parameters[one.name])
        found[name] = {}
        for rule, tensors in by_rule.items():
            before = [tensor.detach().clone() for tensor in tensors]
            with torch.no_grad():
                for tensor in tensors:
                    tensor.copy_(_mutant(rule, tensor))
                found[name][rule] = float((_logits(model, job.ids) - right).abs().max())
                for tensor, values in zip(tensors, before, strict=True):
                    tensor.copy_(values)
    return found


def planted(rank: int, world_size: int, job: Job, error: str) -> float:
    """How far logits move when one thing that is no weight is wrong."""
    right = _logits(load(job.root, Layout()).eval(), job.ids)
    with patch(*_ERRORS[error]()):
        return float((_logits(load(job.root, Layout()).eval(), job.ids) - right).abs().max())


def _wrong_slopes() -> tuple[str, Any]:
    from megatron_patch.layers.attention import alibi_slopes

    return "megatron_patch.layers.attention.alibi_slopes", lambda heads: alibi_slopes(heads)[::-1]


def _late_positions() -> tuple[str, Any]:
    from megatron_patch.layers import embedding

    return "megatron_patch.model.prepare_positions", lambda model, n: embedding.prepare_positions(model, n - 1)


def _wide_window() -> tuple[str, Any]:
    from megatron_patch.layers.attention import _band

    return "megatron_patch.layers.attention._band", lambda length, window, device: _band(length, window + 1, device)


def _late_blocks() -> tuple[str, Any]:
    from megatron_patch.layers.prefix import Context

    plain = Context.positions

    def positions(self: Context, index: torch.Tensor) -> Any:
        first, second = plain(self, index)
        return first, (second - 1).clamp(min=0)

    return "megatron_patch.layers.prefix.Context.positions", positions


def _causal_prefix() -> tuple[str, Any]:
    return "megatron_patch.layers.prefix._hidden", lambda index, context: None


_ERRORS: dict[str, Callable[[], tuple[str, Any]]] = {
    "slopes in the wrong order": _wrong_slopes,
    "positions off by one": _late_positions,
    "window off by one": _wide_window,
    "block positions off by one": _late_blocks,
    "prefix read causally": _causal_prefix,
}
