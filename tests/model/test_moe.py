"""Mixtures of experts: logits, loss and every weight's gradient equal transformers', under tensor, pipeline and expert
parallelism, with experts split like the rest of the model (ETP = TP) or kept whole (ETP 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.test_against_transformers import _error, _positions, _run, convert_model
from tests.tiny import MOE, hf_moe, tokens

IDS = tokens()
LABELS = tokens(seed=2)
MASK = (tokens(vocab_size=4, seed=3) > 0).float()


@dataclass(frozen=True)
class Layout:
    """A parallel layout with experts; what tensor and pipeline leave over is data parallel, and holds the experts."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    data: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def fields(self) -> dict[str, Any]:
        return dict(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            expert_model_parallel_size=self.expert,
            expert_tensor_parallel_size=self.expert_tensor,
        )


LAYOUTS: dict[str, Layout] = {
    "TP1": Layout(),
    "TP2": Layout(2),
    "TP2xETP1": Layout(2, expert_tensor=1),
    "PP2": Layout(pipeline=2),
    "EP2": Layout(expert=2, data=2),
    "EP4": Layout(expert=4, data=4),
    "TP2xEP2xETP1": Layout(2, expert=2, expert_tensor=1),
    "TP2xEP2": Layout(2, expert=2, data=2),
    "PP2xEP2": Layout(pipeline=2, expert=2, data=2),
}
SEQUENCE_PARALLEL: dict[str, Layout] = {
    "TP2+SP": Layout(2, sequence_parallel=True),
    "TP2xEP2xETP1+SP": Layout(2, expert=2, expert_tensor=1, sequence_parallel=True),
    "TP2xEP2+SP": Layout(2, expert=2, data=2, sequence_parallel=True),
}
# megatron-core trains experts under tensor parallelism with sequence parallelism only.
TRAINING = {name: LAYOUTS[name] for name in ("TP1", "PP2", "EP2", "EP4", "PP2xEP2")} | SEQUENCE_PARALLEL


# ------------------------------------------------------------------------------------------------------- in the workers


def _load(root: str, layout: Layout, **config: Any) -> torch.nn.Module:
    """This rank's part of a converted checkpoint; the process group exists already."""
    from megatron.core import parallel_state

    from megatron_patch.checkpoint.directory import read_config
    from megatron_patch.checkpoint.megatron import load_weights
    from megatron_patch.model import build_model, transformer_config
    from megatron_patch.models import family_for
    from megatron_patch.training.initialize import seed_everything

    if not parallel_state.is_initialized():  # once a call: every gloo group has threads of its own
        parallel_state.initialize_model_parallel(**layout.fields, create_gloo_process_groups=False)
    seed_everything(1)
    architecture = family_for(values := read_config(root)).describe(values)
    config |= dict(layout.fields, sequence_parallel=layout.sequence_parallel)
    model = build_model(architecture, transformer_config(architecture, **config), make_vocab_size_divisible_by=16)
    load_weights([model], root)
    return model


def _rows(layout: Layout) -> list[int]:
    """Which of the two texts this rank computes: with data parallelism ranks differ, and so do their experts' loads."""
    from megatron.core import parallel_state

    return [parallel_state.get_data_parallel_rank() % 2] if layout.data > 1 else [0, 1]


def logits(rank: int, world_size: int, roots: dict[str, str], layout: Layout) -> dict[str, Any]:
    """Rows and whole logits of every variant, on the ranks of the last stage."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    results = {}
    for name, root in roots.items():
        model = _load(root, layout).eval()
        ids = IDS[_rows(layout)]

        def forward(data: Any, model: torch.nn.Module, ids: torch.Tensor = ids) -> Any:
            next(data)
            return model(ids, _positions(ids), None), lambda output, non_loss_data: output

        with torch.no_grad():
            options = dict(forward_only=True, collect_non_loss_data=True, micro_batch_size=len(ids))
            if outputs := _run(model, forward, 1, **options):
                results[name] = _rows(layout), gather_from_tensor_model_parallel_region(outputs[0])[..., :200]
    return results


def gradients(rank: int, world_size: int, root: str, expected: str, layout: Layout) -> tuple[list, dict[str, float]]:
    """Sums of losses and of their weights (nothing before the last stage); each weight's relative gradient error."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from megatron_patch.training.loss import masked_loss

    wanted = dict(_load(expected, layout).named_parameters())
    model = _load(root, layout, calculate_per_token_loss=True, finalize_model_grads_func=finalize_model_grads)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    ddp.zero_grad_buffer()
    rows = _rows(layout)

    def forward(data: Any, model: torch.nn.Module) -> Any:
        row = slice(index := rows[next(data)], index + 1)
        output = model(IDS[row], _positions(IDS[row]), None, labels=LABELS[row])
        return output, lambda losses: masked_loss(MASK[row], losses)

    sums = _run(ddp, forward, len(rows), micro_batch_size=1, forward_only=False)
    errors = {name: _error(p.main_grad, wanted[name], name) for name, p in model.named_parameters()}
    return [(float(s[0]), float(s[1])) for s in sums or ()], errors


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: convert_model(hf_moe(name), tmp_path_factory.mktemp(name)) for name in MOE}


@pytest.fixture(scope="module")
def logits_under(pool: Any, roots: dict[str, str]) -> Callable[[Layout], list[dict[str, Any]]]:
    """Every variant's logits under a layout; each layout runs once."""
    return cache(lambda layout: pool.run(logits, layout.world_size, roots, layout))


@pytest.mark.parametrize("layout", LAYOUTS | SEQUENCE_PARALLEL)
@pytest.mark.parametrize("variant", MOE)
def test_logits_equal_transformers(variant: str, layout: str, logits_under: Callable[[Layout], Any]) -> None:
    with torch.no_grad():
        expected = hf_moe(variant)(IDS).logits
    found = [result[variant] for result in logits_under((LAYOUTS | SEQUENCE_PARALLEL)[layout]) if result]
    assert {row for rows, _ in found for row in rows} == {0, 1}
    assert max(float((one - expected[rows]).abs().max()) for rows, one in found) <= 1e-5


@pytest.mark.parametrize("variant", MOE)
def test_there_and_back_is_bit_equal(variant: str, roots: dict[str, str], tmp_path: Path) -> None:
    from megatron_patch.checkpoint.convert import convert

    convert(roots[variant], str(tmp_path / "back"))
    before, after = (path / "model.safetensors" for path in (Path(roots[variant]).parent / "hf", tmp_path / "back"))
    assert before.read_bytes() == after.read_bytes()


@pytest.mark.parametrize("layout", TRAINING)
@pytest.mark.parametrize("variant", ["mixtral", "deepseek_yarn"])
def test_loss_and_gradients_equal_transformers(
    variant: str, layout: str, pool: Any, roots: dict[str, str], tmp_path: Path
) -> None:
    model = hf_moe(variant)
    losses = torch.nn.functional.cross_entropy(model(IDS).logits.flatten(0, 1), LABELS.flatten(), reduction="none")
    loss = (losses * MASK.flatten()).sum() / MASK.sum()
    loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    expected = convert_model(model, tmp_path)
    results = pool.run(gradients, TRAINING[layout].world_size, roots[variant], expected, TRAINING[layout])
    sums = [one for sums, _ in results for one in sums]
    assert abs(sum(s for s, _ in sums) / sum(n for _, n in sums) - loss.item()) / loss.item() <= 1e-5
    errors = {f"rank {rank} {name}": error for rank, (_, found) in enumerate(results) for name, error in found.items()}
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}
