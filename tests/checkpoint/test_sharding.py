"""Layers per chunk are megatron-core's own; cutting and joining are inverse; copies are told apart bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_patch.checkpoint.legacy_ranks import rank_pairs
from megatron_patch.checkpoint.sharding import (
    Pipeline,
    Split,
    cut,
    cut_replicated,
    disagreeing_ranks,
    join,
    join_replicated,
    replicated_rows,
    same_bits,
)
from tests.workers import Pool

PIPELINES: list[tuple[int, Pipeline]] = [
    (4, Pipeline()),
    (8, Pipeline(4)),
    (7, Pipeline(2, first=3)),
    (7, Pipeline(3, last=1)),
    (61, Pipeline(16, first=4, last=1)),
    (5, Pipeline(2, first=2, last=3)),
    (8, Pipeline(2, 2)),
    (12, Pipeline(2, 3)),
    (24, Pipeline(4, 2, first=4, last=8)),
    (10, Pipeline(3, 2, last=2)),
    (6, Pipeline(2, 2, layout="Et|tt|tt|tL")),
    (6, Pipeline(2, layout="E|t*6L")),
    (7, Pipeline(4, layout="Et*3|t|(t)*2|tL")),
    (5, Pipeline(2, 3, layout="E|t|t|t*2|t|L")),
]


@contextmanager
def _as_if_at(stage: int, virtual: int | None) -> Iterator[None]:
    """What megatron-core asks its parallel state for."""
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)
    parallel_state.set_pipeline_model_parallel_rank(stage)
    try:
        yield
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
        parallel_state.set_pipeline_model_parallel_rank(None)


@pytest.mark.parametrize(("layers", "pipeline"), PIPELINES)
def test_layers_are_where_megatron_core_builds_them(layers: int, pipeline: Pipeline) -> None:
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=pipeline.stages,
        virtual_pipeline_model_parallel_size=pipeline.virtual,
        num_layers_in_first_pipeline_stage=pipeline.first,
        num_layers_in_last_pipeline_stage=pipeline.last,
        pipeline_model_parallel_layout=pipeline.layout,
        pipeline_dtype=torch.float32,
    )
    chunks = pipeline.chunks(layers)
    assert len(chunks) == pipeline.stages * (pipeline.virtual or 1)
    for chunk in chunks:
        virtual = chunk.virtual if pipeline.virtual else None
        with _as_if_at(chunk.stage, pipeline.virtual):
            assert chunk.layers == get_num_layers_to_build(config, virtual)
            assert chunk.layers == 0 or chunk.first == get_transformer_layer_offset(config, virtual)
    assert sum(chunk.layers for chunk in chunks) == layers


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (Pipeline(4), "pipeline_model_parallel_size=4 does not divide num_layers=6; choose one of 1, 2, 3, 6, or give"),
        (Pipeline(2, 2), "virtual_pipeline_model_parallel_size=2 does not divide the 3 layers of a stage"),
        (Pipeline(1, 2), "virtual pipeline stages need pipeline_model_parallel_size > 1"),
        (Pipeline(3, first=1), "5 layers are left for 2 stages"),
        (Pipeline(2, first=1, last=2), "3 layers are left for 0 stages"),
        (Pipeline(2, layout="Et|ttL"), r"it places 3 decoder layers \(t\); the model has 6"),
        (Pipeline(1, layout="Et|tttttL"), "needs pipeline_model_parallel_size > 1"),
        (Pipeline(2, layout="Etx|tttL"), "Invalid layer character"),
        (Pipeline(3, layout="Ettt|tttL"), "must be divisible"),
        (Pipeline(2, 3, layout="Ettt|tttL"), "has 1 chunks a stage"),
        (Pipeline(2, first=2, layout="Ettt|tttL"), "not both"),
    ],
)
def test_layers_that_cannot_be_spread_are_refused(pipeline: Pipeline, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.chunks(6)


@pytest.mark.parametrize("split", [Split(), Split(0), Split(1), Split(0, 2)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_joining_undoes_cutting(split: Split, ranks: int) -> None:
    tensor = torch.randn(16, 8)
    pieces = cut(tensor, split, ranks)
    assert len(pieces) == ranks and all(piece.is_contiguous() for piece in pieces)
    assert torch.equal(join(pieces, split), tensor)


def test_gate_and_up_are_cut_separately() -> None:
    gate, up = torch.zeros(4, 2), torch.ones(4, 2)
    for piece in cut(torch.cat([gate, up]), Split(0, 2), 2):
        assert torch.equal(piece, torch.cat([gate[:2], up[:2]]))


class _Heads:
    num_attention_heads, num_query_groups, kv_channels = 8, 2, 3


@pytest.mark.parametrize("shape", [(36, 5), (36,)])
@pytest.mark.parametrize("ranks", [4, 8])
def test_repeated_heads_come_together_again(shape: tuple[int, ...], ranks: int) -> None:
    tensor = torch.randn(shape)
    pieces = cut_replicated(tensor, _Heads, ranks)
    assert {len(piece) for piece in pieces} == {replicated_rows(_Heads, ranks)}
    assert torch.equal(join_replicated(pieces, _Heads), tensor)
    assert disagreeing_ranks(pieces, _Heads) is None
    pieces[ranks - 1][-1] += 1
    assert disagreeing_ranks(pieces, _Heads) == (ranks // 2, ranks - 1)


def test_bits_are_compared_not_numbers() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert same_bits(nan, nan.clone()) and not same_bits(zero, -zero)


def _pair(rank: int, world: int, tensor: int, expert: int, expert_tensor: int) -> tuple[int, int]:
    parallel_state.initialize_model_parallel(
        tensor,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        create_gloo_process_groups=False,
    )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank()


@pytest.mark.parametrize(("tensor", "expert", "expert_tensor"), [(2, 2, 2), (2, 2, 1), (1, 4, 1), (4, 2, 1), (4, 1, 1)])
def test_ranks_that_occur_together_are_megatron_cores(tensor: int, expert: int, expert_tensor: int, pool: Pool) -> None:
    assert set(pool.run(_pair, 4, tensor, expert, expert_tensor)) == set(rank_pairs(tensor, expert, expert_tensor))
