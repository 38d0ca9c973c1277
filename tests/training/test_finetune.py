"""Fine-tuning gives the losses, gradient norms and weights of a plain transformers loop over the same samples, packed
and unpacked, whatever the micro-batch and the parallel layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.directory import latest
from megatron_patch.training.finetuning import length
from tests.tiny import MOE
from tests.training.runs import convert_workplace, curve, make_tokenizer, train
from tests.training.sft import MUTATIONS, POSITIONS, ROWS, finetune_mutant, reference, sft_arguments, write_sets
from tests.training.test_resume import stop_at, weights
from tests.workers import WorkerError
from tests.zoo.cases import CASES

Sft = Callable[..., Path]

CURVES = ("loss", "grad_norm", "validation_loss")
UNPACKED = dict(packing=False)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "packed": (1, {}),
    "packed, micro-batches of 4": (1, dict(micro_batch_size=4)),
    "unpacked": (1, UNPACKED),
    "unpacked, micro-batches of 4": (1, dict(micro_batch_size=4, **UNPACKED)),
    "packed TP2": (2, dict(tensor_model_parallel_size=2)),
    "packed TP2+SP": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True, micro_batch_size=2)),
    "packed PP2": (2, dict(pipeline_model_parallel_size=2)),
    "packed PP2, recomputed": (2, dict(pipeline_model_parallel_size=2, recompute_granularity="full")),
    "packed DP2": (2, {}),
    "packed DP2, overlap": (2, dict(use_distributed_optimizer=True, overlap_grad_reduce=True, micro_batch_size=2)),
    "unpacked TP2+SP": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True, **UNPACKED)),
    "unpacked PP2": (2, dict(pipeline_model_parallel_size=2, micro_batch_size=4, **UNPACKED)),
    "unpacked DP2": (2, dict(micro_batch_size=2, **UNPACKED)),
}
PER_SEQUENCE = ("packed", "packed, micro-batches of 4", "unpacked, micro-batches of 4", "packed PP2", "unpacked DP2")


@pytest.fixture(scope="module")
def place(workplace: Path) -> Path:
    write_sets(workplace)
    return workplace


@pytest.fixture(scope="module")
def sft(pool: Any, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Sft:
    """sft(world_size, save=None, **arguments) fine-tunes and returns the directory it saved to."""

    def run(world_size: int, save: Path | None = None, **changes: Any) -> Path:
        save = save or tmp_path_factory.mktemp("sft")
        pool.run(train, world_size, sft_arguments(place, save, **changes))
        return save

    return run


@pytest.fixture(scope="module")
def expected(place: Path) -> Callable[[str], tuple[dict[str, list[float]], dict[str, torch.Tensor]]]:
    return cache(lambda loss_per: reference(place, loss_per))


def _exported(save: Path) -> dict[str, torch.Tensor]:
    target = save.with_name(f"{save.name}-hf")
    convert(str(save), str(target))
    return load_file(target / "model.safetensors")


def _same(save: Path, expected: tuple[dict[str, list[float]], dict[str, torch.Tensor]]) -> None:
    curves, state = expected
    for name, tolerance in zip(CURVES, (1e-6, 1e-5, 1e-6), strict=True):
        assert curve(save, name) == pytest.approx(curves[name], rel=tolerance), name
    errors = {name: float((found - state[name]).abs().max()) for name, found in _exported(save).items()}
    assert len(errors) > 30 and {name: error for name, error in errors.items() if not error <= 2e-6} == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_norms_and_weights_equal_a_transformers_loop(layout: str, sft: Sft, expected: Any) -> None:
    world_size, changes = LAYOUTS[layout]
    _same(sft(world_size, **changes), expected("token"))


@pytest.mark.parametrize("layout", PER_SEQUENCE)
def test_each_sample_weighs_the_same_where_that_is_asked_for(layout: str, sft: Sft, expected: Any) -> None:
    world_size, changes = LAYOUTS[layout]
    _same(sft(world_size, loss_per="sequence", **changes), expected("sequence"))


def test_the_two_ways_to_weigh_differ(expected: Any) -> None:
    a, b = (expected(loss_per)[0]["loss"][0] for loss_per in ("token", "sequence"))
    assert abs(a - b) > 1e-2


@pytest.mark.parametrize("mutation", sorted(set(MUTATIONS) - {POSITIONS}))
def test_rows_that_are_wrong_would_be_noticed(
    mutation: str, pool: Any, place: Path, tmp_path: Path, expected: Any
) -> None:
    pool.run(finetune_mutant, 1, sft_arguments(place, tmp_path, epochs=1), mutation)
    right, found = expected("token")[0]["loss"][0], curve(tmp_path, "loss")[0]
    assert abs(found - right) > 1e-3 * right


# --------------------------------------------------------------------------------------- batches, epochs and resumption


def test_the_last_batch_is_filled_with_rows_that_count_for_nothing(sft: Sft, place: Path) -> None:
    # 2 x 8 rows in batches of 6: the third has 4. Per token, every sample still counts as often as the next.
    save = sft(1, epochs=2, global_batch_size=6)
    assert curve(save, "consumed_samples") == [6, 12, 18]
    plan = sft_arguments(place, None, epochs=2, global_batch_size=6).plan(1, ROWS)
    assert "3 iterations of 6 rows: 2 x 8, and 2 empty rows that fill the last batch up" in length(plan, ROWS, 2)
    few, many = sft(1, epochs=1, global_batch_size=ROWS), sft(2, epochs=1, global_batch_size=12, micro_batch_size=2)
    assert curve(many, "loss") == pytest.approx(curve(few, "loss"), rel=1e-6)
    assert curve(many, "grad_norm") == pytest.approx(curve(few, "grad_norm"), rel=1e-6)


def test_iterations_can_be_given_instead_of_epochs(sft: Sft) -> None:
    assert curve(sft(1, epochs=None, train_iters=5, global_batch_size=3), "consumed_samples") == [3, 6, 9, 12, 15]


def test_the_warm_up_can_be_a_part_of_the_run(sft: Sft) -> None:
    lr = curve(sft(1, lr_warmup_fraction=0.5, epochs=4, global_batch_size=ROWS, lr_decay_style="constant"), "lr")
    assert lr == pytest.approx([0.0, 5e-3, 1e-2, 1e-2])


@pytest.mark.parametrize("layout", ["packed", "unpacked DP2", "packed PP2"])
def test_a_run_stopped_by_sigterm_resumes_bit_for_bit(
    layout: str, sft: Sft, pool: Any, place: Path, tmp_path: Path
) -> None:
    world_size, changes = LAYOUTS[layout]
    changes = {**changes, "global_batch_size": 4}
    whole, args = sft(world_size, **changes), sft_arguments(place, tmp_path, **changes)
    assert pool.run(stop_at, world_size, args, 3) == [3] * world_size
    last = len(curve(whole, "loss"))
    assert last > 5 and latest(tmp_path)[1] == 3
    assert pool.run(train, world_size, args) == [last] * world_size
    for name in (*CURVES, "lr"):
        assert curve(tmp_path, name) == curve(whole, name), name
    found, wanted = weights(tmp_path), weights(whole)
    assert {name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])} == set()


def test_a_run_begins_with_the_weights_of_another_and_nothing_else(sft: Sft, run: Any) -> None:
    before = run(1, train_iters=2, lr_warmup_iters=None)  # pretraining
    save = sft(1, load=str(before), epochs=1)
    assert curve(save, "consumed_samples") == [ROWS]


def test_validation_takes_all_samples_once_unless_told_otherwise(sft: Sft, expected: Any) -> None:
    everything = expected("token")[0]["validation_loss"][0]
    for changes in (dict(global_batch_size=1), dict(micro_batch_size=3, global_batch_size=3), dict(seed=5)):
        assert curve(sft(1, epochs=None, train_iters=1, **changes), "validation_loss")[0] == pytest.approx(
            everything, rel=1e-6
        )
    some = curve(sft(1, epochs=None, train_iters=1, global_batch_size=1, eval_iters=1), "validation_loss")[0]
    assert abs(some - everything) > 1e-3
    assert curve(sft(1, epochs=None, train_iters=1, eval_iters=0), "validation_loss") == []


# --------------------------------------------------------------------------------------------------- what models can do


@pytest.fixture
def zoo(pool: Any, tmp_path: Path) -> Callable[..., Path]:
    """zoo(case, function=train, *more, **arguments) fine-tunes a model of the zoo."""

    def run(case: str, function: Any = train, *more: Any, **changes: Any) -> Path:
        place, save = tmp_path / case, tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        if not place.exists():
            CASES[case].save(CASES[case].model(), place / "hf")
            write_sets(convert_workplace(place))
        pool.run(function, 1, sft_arguments(place, save, **changes), *more)
        return save

    return run


@pytest.mark.parametrize("case", ["gpt2", "opt", "bloom", "mistral", "deepseek_v2"])
def test_other_kinds_of_positions_and_attention_give_the_same_packed_and_unpacked(case: str, zoo: Sft) -> None:
    packed, unpacked = zoo(case), zoo(case, **UNPACKED)
    for name in CURVES:
        assert curve(packed, name) == pytest.approx(curve(unpacked, name), rel=1e-5), name


def test_positions_that_are_not_reset_would_be_noticed(zoo: Sft) -> None:
    # By a model that learns positions: where only distances count, as in a Llama, they change nothing.
    right, found = (curve(save, "loss")[0] for save in (zoo("gpt2"), zoo("gpt2", finetune_mutant, POSITIONS)))
    assert abs(found - right) > 1e-4 * right


def test_what_balances_experts_stays_as_it_was(zoo: Sft, tmp_path: Path) -> None:
    name = "model.layers.3.mlp.gate.e_score_correction_bias"
    found, before = _exported(zoo("deepseek_v3")), load_file(tmp_path / "deepseek_v3" / "hf" / "model.safetensors")
    assert torch.equal(found[name], before[name]) and before[name].abs().max() > 0


def test_a_model_that_predicts_several_tokens_takes_one_sample_a_row(pool: Any, tmp_path: Path) -> None:
    AutoConfig.for_model(**{**MOE["deepseek"], "num_nextn_predict_layers": 1}).save_pretrained(tmp_path / "hf")
    make_tokenizer().save_pretrained(tmp_path / "hf")
    write_sets(tmp_path)
    begin: dict[str, Any] = dict(load=None, hf_config=str(tmp_path / "hf"))
    with pytest.raises(WorkerError, match="packing: multi-token prediction would .*; give --no-packing"):
        pool.run(train, 1, sft_arguments(tmp_path, None, **begin))
    # Neither the rows beside it nor the padding behind it change what is learned of a sample.
    for name, changes in {"one": {}, "four": dict(micro_batch_size=4, seq_length=48)}.items():
        pool.run(train, 1, sft_arguments(tmp_path, tmp_path / name, **UNPACKED, **begin, **changes))
    for name in CURVES:
        assert curve(tmp_path / "one", name) == pytest.approx(curve(tmp_path / "four", name), rel=1e-5), name


def test_frequencies_that_turn_with_the_length_are_refused_beyond_it(zoo: Sft) -> None:
    with pytest.raises(
        WorkerError, match="packing: rope_type='dynamic' turns .* beyond 24 tokens; give --seq-length 24"
    ):
        zoo("llama_dynamic")


def test_a_model_that_reads_a_prefix_takes_one_sample_a_row(zoo: Sft) -> None:
    with pytest.raises(WorkerError, match="packing: this model reads the beginning of a row .*; give --no-packing"):
        zoo("glm_blocks_base")
    one, four = (zoo("glm_blocks_base", micro_batch_size=size, **UNPACKED) for size in (1, 4))
    for name in CURVES:
        assert curve(one, name) == pytest.approx(curve(four, name), rel=1e-5), name
