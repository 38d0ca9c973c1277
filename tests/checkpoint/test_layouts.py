"""megatron-core's own loader, at any layout, reads what the converter writes; the converter reads what core saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.directory import carry_huggingface, iteration_directory, write_tracker
from megatron_patch.checkpoint.logits import load_model, logits
from megatron_patch.checkpoint.verify import verify
from tests.tiny import VARIANTS, hf_llama, tokens
from tests.workers import Pool

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
Directory = Callable[[str], Path]


def _logits(rank: int, world: int, root: str, tp: int, pp: int) -> torch.Tensor | None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
    return logits(load_model(Path(root), torch.float32), tokens(batch=1))


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("variant", ["tied", "biases"])
def test_core_loads_a_converted_checkpoint_at_any_layout(
    megatron: Directory, pool: Pool, variant: str, tp: int, pp: int
) -> None:
    with torch.no_grad():
        expected = hf_llama(**VARIANTS[variant])(tokens(batch=1)).logits[0]
    found = [one for one in pool.run(_logits, tp * pp, str(megatron(variant)), tp, pp) if one is not None]
    assert len(found) == tp  # the last pipeline stage's ranks
    for one in found:
        assert (one[:, : expected.shape[1]] - expected).abs().max() <= 1e-5


def _save(rank: int, world: int, root: str, target: str, tp: int, pp: int, dtype: torch.dtype) -> None:
    """Save weights and something that stands for training state, as a training run with padded vocabulary would."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor

    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
    (model,) = load_model(Path(root), dtype)
    directory = iteration_directory(target, 10)
    if rank == 0:
        directory.mkdir(parents=True)
    torch.distributed.barrier()
    moment = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg", torch.ones(4), (0, rank, world))
    state = {"model": model.sharded_state_dict(), "optimizer": {"exp_avg": moment}, "iteration": 10}
    dist_checkpointing.save(state, str(directory), content_metadata={"distrib_optim_sharding_type": "dp_reshardable"})
    if rank == 0:
        carry_huggingface(root, target)
        write_tracker(target, 10)


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (1, 1)])
@pytest.mark.parametrize("variant", ["tied", "biases"])
def test_a_training_checkpoint_exports_its_weights(
    hf: Directory, megatron: Directory, pool: Pool, tmp_path: Path, variant: str, tp: int, pp: int
) -> None:
    pool.run(_save, tp * pp, str(megatron(variant)), str(tmp_path / "run"), tp, pp, torch.float32)
    report = convert(tmp_path / "run", tmp_path / "export")
    assert report.dtypes.keys() == {"float32"}
    assert verify(hf(variant), tmp_path / "export").ok
    names = [sorted(file.name for file in folder.glob("model*")) for folder in (hf(variant), tmp_path / "export")]
    assert names[0] == names[1]


def test_a_run_in_another_dtype_exports_that_dtype(megatron: Directory, pool: Pool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    pool.run(_save, 1, str(megatron("gqa")), str(tmp_path / "run"), 1, 1, torch.bfloat16)
    assert convert(tmp_path / "run" / "iter_0000010", tmp_path / "export").dtypes.keys() == {"bfloat16"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert loaded.dtype == torch.bfloat16
    for mine, original in zip(loaded.parameters(), hf_llama().bfloat16().parameters(), strict=True):
        assert torch.equal(mine, original)


def _load_into(rank: int, world: int, root: str, config_of: str, tp: int) -> str:
    """What load_weights says when a checkpoint is loaded into the model of another."""
    from megatron.core import parallel_state

    from megatron_patch.checkpoint.megatron import load_weights

    parallel_state.initialize_model_parallel(tp, 1, create_gloo_process_groups=False)
    model = load_model(Path(config_of), torch.float32)
    try:
        load_weights(model, root)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("checkpoint", "model", "message"),
    [
        ("gqa", "biases", "has no weight decoder.layers.self_attention.linear_proj.bias"),
        ("biases", "gqa", "has weights that the model has not: decoder.layers.mlp.linear_fc1.bias"),
        ("gqa", "mha", "decoder.layers.self_attention.linear_qkv.weight has shape (4, 96, 48); the model needs"),
        ("gqa", "tied", "has weights that the model has not: output_layer.weight"),
    ],
)
def test_weights_of_another_model_are_refused_on_every_rank(
    megatron: Directory, pool: Pool, checkpoint: str, model: str, message: str
) -> None:
    for said in pool.run(_load_into, 2, str(megatron(checkpoint)), str(megatron(model)), 2):
        assert message in said


def _verify(rank: int, world: int, hf: str, megatron: str, tp: int, pp: int) -> tuple[bool, float]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
    report = verify(hf, megatron)
    return report.ok, report.texts[0].max_abs


@pytest.mark.parametrize(("tp", "pp", "world"), [(1, 1, 1), (2, 2, 4), (1, 2, 4)])
def test_verify_gives_every_rank_the_same_report(
    hf: Directory, megatron: Directory, pool: Pool, tp: int, pp: int, world: int
) -> None:
    reports = pool.run(_verify, world, str(hf("gqa")), str(megatron("gqa")), tp, pp)
    assert len(set(reports)) == 1
    assert reports[0][0] and reports[0][1] <= 1e-5
