"""Documents that share a row equal each document alone in transformers: logits, loss and gradients, under every layout.

The models are the zoo's: rotary and learned positions, biases by distance, a sliding window, latent attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from megatron_patch.checkpoint.convert import convert
from megatron_patch.layers.documents import attend_documents, document_starts, separate_documents
from tests.zoo import runs
from tests.zoo.cases import CASES, LENGTH, logits_of
from tests.zoo.runs import Job, Layout

EOD = 0
LENGTHS = ((5, 11, 1, 1, 14), (LENGTH,), (1, 24, 7), (8, 8, 8, 8))
"""Of the documents of each row, their ends included; the last of a row has none if the row cuts it."""

BOTH = dict(positions=True, attention=True)
POSITIONS = dict(positions=True, attention=False)
ATTENTION = dict(positions=False, attention=True)
CHOSEN: dict[str, tuple[str, dict[str, bool]]] = {
    "rotary, both": ("llama", BOTH),
    "rotary, positions": ("llama", POSITIONS),
    "rotary, attention": ("llama", ATTENTION),
    "learned, both": ("gpt2", BOTH),
    "learned, positions": ("gpt2", POSITIONS),
    "learned, attention": ("gpt2", ATTENTION),
    "window, both": ("mistral", BOTH),
    "distances, both": ("bloom", BOTH),
    "distances, attention": ("bloom", ATTENTION),
    "latent, both": ("deepseek_v2", BOTH),
}
TRAINED = ("rotary, both", "rotary, positions", "learned, both", "window, both", "distances, attention")
LAYOUTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "TP1": (Layout(), {}),
    "TP2": (Layout(2), {}),
    "TP2+SP": (Layout(2, sequence_parallel=True), {}),
    "PP2": (Layout(pipeline=2), {}),
    # Two micro-batches are under way when the first is recomputed.
    "PP2, recomputed": (
        Layout(pipeline=2),
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    ),
    "PP2, attention recomputed": (Layout(pipeline=2), dict(recompute_granularity="selective")),
}


def rows() -> torch.Tensor:
    """Token ids [rows, LENGTH] with an end after each document."""
    ids = torch.randint(1, 200, (len(LENGTHS), LENGTH), generator=torch.Generator().manual_seed(1))
    for row, lengths in zip(ids, LENGTHS, strict=True):
        row[torch.tensor(lengths[:-1]).cumsum(0).long() - 1] = EOD
    ids[3, -1] = EOD
    return ids


def restarting(ids: torch.Tensor) -> torch.Tensor:
    """megatron-core's own position ids."""
    options = dict(reset_position_ids=True, reset_attention_mask=False, eod_mask_loss=False)
    return torch.stack(
        [_get_ltor_masks_and_position_ids(row, EOD, create_attention_mask=False, **options)[2] for row in ids]
    )


def reference(model: torch.nn.Module, ids: torch.Tensor, positions: bool, attention: bool) -> torch.Tensor:
    """transformers' logits."""
    if not attention:  # a mask that hides nothing keeps transformers from telling documents apart by their positions
        return model(ids, position_ids=restarting(ids), attention_mask=torch.ones_like(ids)).logits
    takes_positions = "position_ids" in signature(model.forward).parameters
    results = []
    for row, lengths in zip(ids, LENGTHS, strict=True):
        begins = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
        for begin, length in zip(begins, lengths, strict=True):
            first = 0 if positions else begin
            places = dict(position_ids=torch.arange(first, first + length)[None]) if takes_positions else {}
            results.append(model(row[None, begin : begin + length], **places).logits[0])
    return torch.cat(results).unflatten(0, ids.shape)


# ------------------------------------------------------------------------------------------------------- in the workers


def separated(
    rank: int, world_size: int, what: str, jobs: dict[str, Job], layout: Layout, settings: dict[str, Any]
) -> dict[str, Any]:
    """`runs.logits` or `runs.gradients` of models whose documents are told apart."""
    found, load = {}, runs.load
    for name, job in jobs.items():
        _, flags = CHOSEN[name]

        def amended(root: str, layout: Layout, flags: dict[str, bool] = flags, **own: Any) -> torch.nn.Module:
            model = load(root, layout, **{**own, **settings})
            separate_documents(model, EOD, LENGTH, **flags)
            return model

        places = restarting if flags["positions"] else runs._positions
        with patch.object(runs, "load", amended), patch.object(runs, "_positions", places):
            found |= getattr(runs, what)(rank, world_size, {name: job}, layout)
    return found


# ---------------------------------------------------------------------------------------------------------------- tests


@cache
def model_of(case: str) -> torch.nn.Module:
    return CASES[case].model()


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    def made(case: str) -> str:
        place = tmp_path_factory.mktemp(case)
        convert(CASES[case].save(model_of(case), place / "hf"), place / "megatron")
        return str(place / "megatron")

    return {case: made(case) for case in {case for case, _ in CHOSEN.values()}}


@pytest.mark.parametrize("layout", ["TP1", "TP2", "TP2+SP", "PP2"])
def test_logits_equal_those_of_each_document_alone(layout: str, pool: Any, roots: dict[str, str]) -> None:
    chosen = {name: one for name, one in CHOSEN.items() if not (CASES[one[0]].is_moe and layout == "TP2")}
    ids, (ranks, settings) = rows(), LAYOUTS[layout]
    jobs = {name: Job(roots[case], ids) for name, (case, _) in chosen.items()}
    results = pool.run(separated, ranks.world_size, "logits", jobs, ranks, settings)
    found = results[-1]
    with torch.no_grad():
        errors = {
            name: float((found[name] - reference(model_of(case), ids, **flags)).abs().max())
            for name, (case, flags) in chosen.items()
        }
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


@cache
def reference_loss(name: str) -> tuple[float, torch.nn.Module]:
    """transformers' masked loss, and a model that holds its gradients in place of weights."""
    case, flags = CHOSEN[name]
    model, ids = CASES[case].model(), rows()
    labels, mask = runs.labels_and_mask(ids)
    logits = reference(model, ids, **flags)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    loss = (losses * mask.flatten()).sum() / mask.sum()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return loss.item(), model


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    @cache
    def gradients(name: str) -> str:
        place: Path = tmp_path_factory.mktemp("gradients")
        convert(CASES[CHOSEN[name][0]].save(reference_loss(name)[1], place / "hf"), place / "megatron")
        return str(place / "megatron")

    return gradients


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_those_of_each_document_alone(
    layout: str, pool: Any, roots: dict[str, str], expected: Callable[[str], str]
) -> None:
    ranks, settings = LAYOUTS[layout]
    jobs = {name: Job(roots[CHOSEN[name][0]], rows(), expected(name)) for name in TRAINED}
    results = pool.run(separated, ranks.world_size, "gradients", jobs, ranks, settings)
    for name in TRAINED:
        sums = results[-1][name][0]
        loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
        assert abs(loss - reference_loss(name)[0]) <= 1e-5 * loss
        errors = {(rank, key): one for rank, found in enumerate(results) for key, one in found[name][1].items()}
        assert {key: error for key, error in errors.items() if not error <= 1e-5} == {}, name


def test_the_references_differ_from_a_row_read_as_one_text() -> None:
    ids = rows()
    with torch.no_grad():
        for name, (case, flags) in CHOSEN.items():
            difference = (reference(model_of(case), ids, **flags) - logits_of(model_of(case), ids)).abs().amax((1, 2))
            assert difference[1] <= 1e-5, name  # the row that is one text
            assert difference[[0, 2, 3]].min() > 1e-2, name


# -------------------------------------------------------------------------------------------------------- the attention


def test_starts_are_where_the_text_before_ended() -> None:
    expected = [[s for begin, n in _documents(lengths) for s in [begin] * n] for lengths in LENGTHS]
    assert document_starts(rows(), EOD).tolist() == expected


def _documents(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip(torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist(), lengths, strict=True))


def test_each_token_comes_back_to_its_place_and_sees_its_document_alone() -> None:
    starts = document_starts(rows(), EOD)
    states = torch.arange(starts.numel(), dtype=torch.float).view(len(LENGTHS), LENGTH).T[:, :, None, None]
    seen: list[torch.Tensor] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        seen.append(query)
        return query + key + value

    assert torch.equal(attend_documents((states, states, states), starts, attend)[:, :, 0], 3 * states[:, :, 0, 0])
    for group in seen:
        rows_N = group[:, 0, :, 0]
        document = starts.flatten()[rows_N.long()] + rows_N.long() // LENGTH * LENGTH
        assert (document == document[:, :1]).all()


def test_padding_behind_the_documents_gets_zeros_and_is_seen_by_nobody() -> None:
    starts = document_starts(rows(), EOD)
    starts[0, 20:], starts[3, 8:] = -1, -1
    states = torch.arange(1.0, starts.numel() + 1).view(len(LENGTHS), LENGTH).T[:, :, None, None]
    seen: list[torch.Tensor] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        seen.extend((query, key, value))
        return query

    found = attend_documents((states, states, states), starts, attend)[:, :, 0].T
    assert torch.equal(found, torch.where(starts < 0, 0, states[:, :, 0, 0].T))
    padding = states[:, :, 0, 0].T[starts < 0]
    assert not torch.isin(padding, torch.cat([one.flatten() for one in seen])).any()


def test_rows_of_padding_alone_are_refused() -> None:
    states = torch.zeros(LENGTH, 2, 1, 1)
    with pytest.raises(ValueError, match="rows of padding alone"):
        attend_documents((states, states, states), torch.full((2, LENGTH), -1), lambda query, key, value: value)


def test_no_more_is_computed_than_documents_of_like_length_need() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 60, (4, 2048), generator=generator)
    shapes: list[torch.Size] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        shapes.append(query.shape)
        return value

    states = torch.zeros(2048, 4, 1, 1)
    attend_documents((states, states, states), document_starts(ids, EOD), attend)
    assert len(shapes) < 20 and sum(shape.numel() for shape in shapes) < 4 * 2048 / 0.75


# ------------------------------------------------------------------------------------------------------ what cannot be


def _refused(rank: int, world_size: int, root: str, flags: dict[str, bool], length: int) -> str:
    try:
        separate_documents(runs.load(root, Layout()), EOD, length, **flags)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "flags", "length", "problem"),
    [
        ("bloom", POSITIONS, 32, "this model knows distances only; give --reset-attention-mask as well"),
        ("deepseek_v2", POSITIONS, 32, "this model knows distances only; give --reset-attention-mask as well"),
        ("llama_dynamic", BOTH, 25, "rope_type='dynamic' turns by the length of the whole row beyond 24 tokens"),
        ("llama_dynamic", ATTENTION, 25, ""),
        ("llama_dynamic", BOTH, 24, ""),
    ],
)
def test_a_model_that_cannot_says_so(
    case: str, flags: dict[str, bool], length: int, problem: str, pool: Any, tmp_path: Path
) -> None:
    convert(CASES[case].save(model_of(case), tmp_path / "hf"), tmp_path / "megatron")
    (message,) = pool.run(_refused, 1, str(tmp_path / "megatron"), flags, length)
    assert problem in message and bool(problem) == bool(message)
