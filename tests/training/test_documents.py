"""A run whose documents are told apart equals a plain transformers loop over each document alone, under every layout;
and a run refuses data that was not made for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_patch.data.datasets import batches, build_datasets
from megatron_patch.data.indexed import indexed_writer
from megatron_patch.data.manifest import write_manifest
from megatron_patch.tokenizer import load_tokenizer
from tests.training.runs import arguments, curve
from tests.workers import WorkerError

STEPS = 5
SHORT: dict[str, Any] = dict(train_iters=STEPS, lr_decay_style="constant", lr_warmup_iters=None)
FLAGS: dict[str, dict[str, bool]] = {
    "all": dict(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True),
    "positions": dict(reset_position_ids=True),
    "attention": dict(reset_attention_mask=True),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP2, recomputed": (2, dict(pipeline_model_parallel_size=2, recompute_granularity="full")),
    "DP2": (2, dict()),
    "micro batches of 4": (1, dict(micro_batch_size=4)),
}


@pytest.fixture(scope="module")
def one_process(run: Callable[..., Path]) -> dict[str, Path]:
    return {name: run(1, **SHORT, **flags) for name, flags in FLAGS.items()}


@pytest.mark.parametrize("flags", FLAGS)
def test_losses_and_norms_equal_a_loop_over_documents(
    flags: str, workplace: Path, one_process: dict[str, Path]
) -> None:
    losses, norms = _reference_loop(workplace, **FLAGS[flags])
    assert curve(one_process[flags], "loss") == pytest.approx(losses, rel=1e-5)
    assert curve(one_process[flags], "grad_norm") == pytest.approx(norms, rel=1e-4)


def test_each_flag_changes_the_losses(one_process: dict[str, Path], plain: Path) -> None:
    # The learning rate of the first step matters to the second: only the first is the same run.
    first = [curve(save, "loss")[0] for save in (*one_process.values(), plain)]
    assert len({round(loss, 4) for loss in first}) == len(first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_do_not_depend_on_the_layout(layout: str, run: Callable[..., Path], one_process: dict[str, Path]) -> None:
    world_size, changes = LAYOUTS[layout]
    save = run(world_size, **SHORT, **FLAGS["all"], **changes)
    for name in ("loss", "grad_norm", "validation_loss"):
        assert curve(save, name) == pytest.approx(curve(one_process["all"], name), rel=1e-5), name


def _reference_loop(
    workplace: Path, reset_position_ids: bool = False, reset_attention_mask: bool = False, eod_mask_loss: bool = False
) -> tuple[list[float], list[float]]:
    from transformers import AutoModelForCausalLM

    # The samples without the flags: what they mean is worked out here.
    data, _, _ = build_datasets(arguments(workplace, None).data, load_tokenizer(workplace / "hf"), (4 * STEPS, 0, 0))
    model = AutoModelForCausalLM.from_pretrained(workplace / "hf")
    groups = [[p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]]
    settings = [dict(params=groups[0]), dict(params=groups[1], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(settings, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    losses, norms = [], []
    for batch in list(batches(data, 0, 4, 300))[:STEPS]:
        logits = [_row_logits(model, row, reset_position_ids, reset_attention_mask) for row in batch["tokens"]]
        each = torch.nn.functional.cross_entropy(torch.cat(logits), batch["labels"].flatten(), reduction="none")
        loss = each[batch["tokens"].flatten() != 0].mean() if eod_mask_loss else each.mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def _row_logits(model: torch.nn.Module, row: torch.Tensor, positions: bool, attention: bool) -> torch.Tensor:
    ends = (row[:-1] == 0).nonzero()[:, 0] + 1
    documents = row.tensor_split(ends)
    if attention:
        return torch.cat([model(document[None]).logits[0] for document in documents])
    places = torch.cat([torch.arange(len(document)) for document in documents])
    return model(row[None], position_ids=places[None], attention_mask=torch.ones_like(row)[None]).logits[0]


# ----------------------------------------------------------------------------------------------- data of another making


def _dataset(prefix: Path, documents: list[list[int]]) -> str:
    with indexed_writer(str(prefix), np.dtype(np.uint16)) as writer:
        for document in documents:
            writer.add(np.array(document, np.uint16), np.array([len(document)], np.int32))
    return str(prefix)


def test_a_run_refuses_data_of_another_tokenizer(run: Callable[..., Path], workplace: Path, tmp_path: Path) -> None:
    tokenizer, prefix = load_tokenizer(workplace / "hf"), _dataset(tmp_path / "data", [[5, 6, 0]] * 100)
    write_manifest(prefix, replace(tokenizer, vocab_size=500), append_eod=True)
    data = dict(data_path=(prefix,), train_iters=1, lr_warmup_iters=None)
    with pytest.raises(WorkerError, match="data: made with another tokenizer, of a vocabulary of 500, the run's has"):
        run(1, **data)
    write_manifest(prefix, tokenizer, append_eod=True)
    assert len(curve(run(1, **data), "loss")) == 1


def test_a_run_refuses_ids_that_the_model_does_not_have(run: Callable[..., Path], tmp_path: Path) -> None:
    prefix = _dataset(tmp_path / "data", [[5, 6, 0]] * 100 + [[300, 0]])
    with pytest.raises(WorkerError, match="data: holds token id 300, the vocabulary ends at 299"):
        run(1, data_path=(prefix,), train_iters=1, lr_warmup_iters=None)
