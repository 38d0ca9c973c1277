"""Tiny fine-tuning runs: random samples as a tokenized set, and what a plain transformers loop makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_patch.data.sft.samples import Sample, sample
from megatron_patch.data.sft.storage import StoreInfo, write_samples
from megatron_patch.training.arguments import FinetuneArgs
from tests.training.runs import make_tokenizer

LENGTH = 32
SIZES = (32, 20, 12, 16, 9, 7, 25, 5, 10, 10, 6, 5, 31, 19, 2, 21)
"""Of the samples: 8 rows if packed, one of them full to the last slot; 16 if not."""
ROWS, STEPS = 8, 3
SETTINGS: dict[str, Any] = dict(lr=1e-2, min_lr=1e-3, adam_eps=1e-3, lr_decay_style="linear")
"""A large epsilon: Adam's step is a smooth function of the gradient, so weights can be compared closely."""


def make_samples(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> list[Sample]:
    """Random ids; of each sample some stretches are learned, and never all."""
    random = np.random.RandomState(seed)
    samples = [sample(random.randint(1, 200, n), random.rand(n) < random.choice([0.2, 0.8])) for n in sizes]
    for one in samples:
        one.mask[0], one.mask[-1] = True, True
    return samples


def write_sets(place: Path) -> None:
    """train and valid, as tokenized sets."""
    info = StoreInfo("", len(make_tokenizer()), "", "", LENGTH, "right", packing=False)
    write_samples(str(place / "train"), [[one] for one in make_samples()], info)
    write_samples(str(place / "valid"), [[one] for one in make_samples(SIZES[:11], seed=1)], info)


def sft_arguments(place: Path, save: Path | None, **changes: Any) -> FinetuneArgs:
    """All samples in each of three iterations, packed unless told otherwise."""
    batch = ROWS if changes.get("packing", True) else len(SIZES)
    settings: dict[str, Any] = dict(
        load=str(place / "megatron"),
        save=save and str(save),
        train_data=(str(place / "train"),),
        valid_data=(str(place / "valid"),),
        seq_length=LENGTH,
        global_batch_size=batch,
        epochs=STEPS,
        make_vocab_size_divisible_by=4,
        **SETTINGS,
    )
    return FinetuneArgs(**{**settings, **changes})


# ------------------------------------------------------------------------------------------------------- the reference


def _labels(one: Sample) -> torch.Tensor:
    """As transformers' Trainer gets them: the ids, and -100 where nothing is to be learned."""
    return torch.tensor(np.where(one.mask, one.ids, -100), dtype=torch.int64)


def token_loss(model: torch.nn.Module, samples: list[Sample]) -> torch.Tensor:
    """transformers' own loss of one padded batch: the mean over all labels that are not -100."""
    ids = [torch.tensor(one.ids, dtype=torch.int64) for one in samples]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(one) for one in ids], batch_first=True)
    labels = pad([_labels(one) for one in samples], batch_first=True, padding_value=-100)
    return model(input_ids=pad(ids, batch_first=True), attention_mask=mask, labels=labels).loss


def sequence_loss(model: torch.nn.Module, samples: list[Sample]) -> torch.Tensor:
    """The mean over samples of transformers' loss of each alone."""
    each = [token_loss(model, [one]) for one in samples]
    return torch.stack(each).mean()


def reference(place: Path, loss_per: str) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Loss and gradient norm of each step, the validation loss before and after, and the weights in the end."""
    from transformers import AutoModelForCausalLM

    loss_of = {"token": token_loss, "sequence": sequence_loss}[loss_per]
    train, valid = make_samples(), make_samples(SIZES[:11], seed=1)
    model = AutoModelForCausalLM.from_pretrained(place / "hf").eval()
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [dict(params=matrices, weight_decay=0.01), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=SETTINGS["adam_eps"])
    curves: dict[str, list[float]] = {"loss": [], "grad_norm": [], "validation_loss": []}
    curves["validation_loss"].append(token_loss(model, valid).item())
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS["lr"] - (SETTINGS["lr"] - SETTINGS["min_lr"]) * step / STEPS
        optimizer.zero_grad()
        (loss := loss_of(model, train)).backward()
        curves["loss"].append(loss.item())
        curves["grad_norm"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    curves["validation_loss"].append(token_loss(model, valid).item())
    return curves, model.state_dict()


def finetune_mutant(rank: int, world_size: int, args: FinetuneArgs, mutation: str) -> int:
    """For the worker pool: a run whose rows are wrong in one way."""
    from unittest.mock import patch

    from megatron_patch.data.sft import rows
    from tests.training.runs import start

    make = rows.make_row

    def mutant(*arguments: Any) -> dict[str, torch.Tensor]:
        row = make(*arguments)
        MUTATIONS[mutation](row)
        return row

    with patch.object(rows, "make_row", mutant):
        return start(args)


def _shift_mask(row: dict[str, torch.Tensor]) -> None:
    row["loss_mask"] = row["loss_mask"].roll(1)


def _cross_boundaries(row: dict[str, torch.Tensor]) -> None:
    row["starts"] = torch.where(row["starts"] >= 0, 0, row["starts"])


def _count_positions_on(row: dict[str, torch.Tensor]) -> None:
    row["position_ids"] = torch.arange(len(row["tokens"]))


def _learn_across_boundaries(row: dict[str, torch.Tensor]) -> None:
    row["labels"] = row["tokens"].roll(-1)
    row["loss_mask"] = torch.where(row["starts"].roll(-1) != row["starts"], 1.0, row["loss_mask"])


POSITIONS = "positions are not reset"
MUTATIONS = {
    "the mask is shifted": _shift_mask,
    "attention crosses boundaries": _cross_boundaries,
    POSITIONS: _count_positions_on,
    "the next sample's first token is learned": _learn_across_boundaries,
}
