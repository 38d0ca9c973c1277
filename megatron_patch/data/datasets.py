"""Indexed datasets to training batches, with megatron-core's own GPTDataset and blended builder.

    train, valid, test = build_datasets(spec, tokenizer, (1000, 50, 0))
    for batch in batches(train, consumed_samples=0, micro_batch_size=2, vocab_size=tokenizer.vocab_size):
        batch["tokens"]  # int64 [micro_batch_size, seq_length]; labels and position_ids too, loss_mask is float32

Works with torch.distributed (every rank builds, rank 0 first) and without. It adds what core leaves out: files are
checked before they are used, data of another tokenizer is refused, and cached sample indices are tied to the content of
the data, not only to its path.
It does not know models or the training loop.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import DataLoader, Dataset

from megatron_patch.data.arguments import SPLITS, Blend, DataSpec, raise_problems
from megatron_patch.data.indexed import IndexInfo, read_index
from megatron_patch.data.manifest import check_fit, index_digest
from megatron_patch.tokenizer import Tokenizer

KEYS = ("tokens", "labels", "loss_mask", "position_ids")
"""What a batch holds."""
STARTS = "starts"
"""What it holds too where the dataset tells the texts of a row apart by itself: where each token's text starts."""

T = TypeVar("T")
Splits = tuple[Dataset | None, Dataset | None, Dataset | None]


def build_datasets(
    spec: DataSpec,
    tokenizer: Tokenizer,
    num_samples: tuple[int, int, int],
    vocab_size: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Splits:
    """The train, validation and test datasets, each at least `num_samples` long, repeating its documents if need be.

    A split of which no sample is wanted is None. Call it on every rank. Raises ValueError if files are missing,
    damaged or too small for a split, or if they were made with another tokenizer.

    Args:
        vocab_size: ids that the model knows; a sample of the data is compared with it, if given.
        say: takes each line that the user should read.
    """
    spec.validate()
    require_eod(spec, tokenizer)
    blends = [spec.blend()] * 3 if spec.data_path else list(spec.blend_per_split())
    indices = {prefix: read_index(prefix) for blend in blends if blend for prefix in blend.prefixes}
    _check_fit(spec, tokenizer, indices, vocab_size, say)
    config = _config(spec, tokenizer, indices)
    ranges = config.split_matrix or [(0.0, 1.0)] * 3
    raise_problems(_empty_splits(blends, ranges, num_samples, indices))
    _drop_unwanted(config, num_samples)
    with _process_group():
        datasets = BlendedMegatronDatasetBuilder(GPTDataset, list(num_samples), lambda: True, config).build()
    raise_problems(_short_splits(datasets, num_samples))
    for line in source_lines(spec, blends[0], ranges[0], num_samples[0], indices):
        if say is not None:
            say(line)
    return tuple(datasets)


def require_eod(spec: DataSpec, tokenizer: Tokenizer) -> None:
    """Raises ValueError if a flag goes by the end-of-document token and the tokenizer has none."""
    if spec.document_flags and tokenizer.eod is None:
        flags = ", ".join(spec.document_flags)
        raise ValueError(f"{flags}: the tokenizer in {tokenizer.directory!r} has no end-of-sequence token")


def _check_fit(
    spec: DataSpec,
    tokenizer: Tokenizer,
    indices: dict[str, IndexInfo],
    vocab_size: int | None,
    say: Callable[[str], None] | None,
) -> None:
    fits = [check_fit(prefix, info, tokenizer, vocab_size, spec.document_flags) for prefix, info in indices.items()]
    raise_problems([problem for fit in fits for problem in fit.problems])
    for note in (note for fit in fits for note in fit.notes):
        if say is not None:
            say(note)


def source_lines(
    spec: DataSpec,
    blend: Blend | None,
    bounds: tuple[float, float] | None,
    num_samples: int,
    indices: dict[str, IndexInfo],
) -> Iterator[str]:
    """For each source of the training data: its tokens, its share of what will be read, and how often it is read."""
    if blend is None or bounds is None or not num_samples:
        return
    tokens = []
    for prefix in blend.prefixes:
        lengths = indices[prefix].lengths
        begin, end = (round(bound * len(lengths)) for bound in bounds)
        tokens.append(int(lengths[begin:end].sum(dtype=np.int64)))
    weights = blend.weights or tokens
    for prefix, count, weight in zip(blend.prefixes, tokens, weights, strict=True):
        share = weight / sum(weights)
        times = num_samples * spec.seq_length * share / count
        yield f"train: {prefix}: {count:,} tokens, {share:.1%} of what is read, {times:.2f} times over"


def _config(spec: DataSpec, tokenizer: Tokenizer, indices: dict[str, IndexInfo]) -> GPTDatasetConfig:
    blend = spec.blend()
    return GPTDatasetConfig(
        random_seed=spec.seed,
        sequence_length=spec.seq_length,
        blend=_core_blend(blend),
        blend_per_split=None if blend else [_core_blend(one) for one in spec.blend_per_split()],
        split=spec.split_shares if blend else None,
        path_to_cache=str(_cache_directory(spec, indices)),
        tokenizer=tokenizer,
        reset_position_ids=spec.reset_position_ids,
        reset_attention_mask=False,  # the model does it (layers/documents.py): core would make a mask of S x S
        eod_mask_loss=spec.eod_mask_loss,
        create_attention_mask=False,
    )


def _core_blend(blend: Blend | None) -> tuple[list[str], list[float] | None] | None:
    return blend and (list(blend.prefixes), blend.weights and list(blend.weights))


def _cache_directory(spec: DataSpec, indices: dict[str, IndexInfo]) -> Path:
    """A directory for core's cached indices that no other version of the data shares.

    Core's own key is the path of a dataset: after a rebuild it would use the old index, which points outside the data.
    The indices name documents and offsets, so the .idx decides; a .bin whose content alone is new is read as it is.
    """
    digest = hashlib.sha256()
    for prefix in indices:
        digest.update(f"{prefix}\0{index_digest(prefix)}\0".encode())
    # Where core keeps it by default, and where `preprocess --overwrite` clears it away.
    parent = Path(spec.data_cache_path) if spec.data_cache_path else Path(next(iter(indices))) / "cache"
    directory = parent / digest.hexdigest()[:16]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot keep sample indices in {parent} ({error}); give --data-cache-path") from error
    return directory


def _empty_splits(
    blends: list[Blend | None],
    ranges: list[tuple[float, float] | None],
    num_samples: tuple[int, int, int],
    indices: dict[str, IndexInfo],
) -> list[str]:
    """Splits that samples are wanted of and that hold no token: core would look for them for ever."""
    problems = []
    for split, blend, bounds, wanted in zip(SPLITS, blends, ranges, num_samples, strict=True):
        if not wanted:
            continue
        if blend is None or bounds is None:
            problems.append(f"{wanted} {split} samples are wanted, but no data is given for {split}")
            continue
        for prefix in blend.prefixes:
            lengths = indices[prefix].lengths
            begin, end = (round(bound * len(lengths)) for bound in bounds)
            if not lengths[begin:end].any():
                problems.append(f"{prefix}: none of its {len(lengths)} documents falls to {split}; change --split")
    return problems


def _drop_unwanted(config: GPTDatasetConfig, num_samples: tuple[int, int, int]) -> None:
    """Keeps core from indexing splits of which no sample is wanted."""
    if config.blend_per_split:
        config.blend_per_split = _where(num_samples, config.blend_per_split)
    else:
        config.split_matrix = _where(num_samples, config.split_matrix)


def _where(wanted: Sequence[int], values: Sequence[T]) -> list[T | None]:
    return [value if want else None for want, value in zip(wanted, values, strict=True)]


def _short_splits(datasets: list[Dataset | None], num_samples: tuple[int, int, int]) -> list[str]:
    return [
        f"the {split} datasets hold {len(dataset)} samples where {wanted} are wanted; give weights to repeat them"
        for split, dataset, wanted in zip(SPLITS, datasets, num_samples, strict=True)
        if dataset is not None and len(dataset) < wanted
    ]


@contextmanager
def _process_group() -> Iterator[None]:
    """A process group for the time of building, where there is none: core's BlendedDataset asks for its rank."""
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


# -------------------------------------------------------------------------------------------------------------- batches


def batches(
    dataset: Dataset,
    consumed_samples: int,
    micro_batch_size: int,
    vocab_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    num_workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of one data-parallel rank, from `consumed_samples` (of all ranks together) to the dataset's end.

    tokens, labels, position_ids, and starts where the dataset has them: int64 [micro_batch_size, seq_length];
    loss_mask: float32, same shape.
    Raises ValueError if a token id is not below vocab_size: the data was made with another tokenizer.
    """
    order = sample_indices(len(dataset), consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
    pin = torch.cuda.is_available()
    loader = DataLoader(
        dataset, batch_sampler=order, num_workers=num_workers, pin_memory=pin, worker_init_fn=_leave_group
    )
    for sample in loader:
        batch = {key: sample[key] for key in (*KEYS, STARTS) if key in sample}
        largest = int(torch.maximum(batch["tokens"].max(), batch["labels"].max()))
        if largest >= vocab_size:
            raise ValueError(
                f"the data holds token id {largest}, the vocabulary ends at {vocab_size - 1}: "
                "it was made with another tokenizer"
            )
        yield batch


def _leave_group(_: int) -> None:
    """In a worker: launchers signal a whole group of processes, and a run that is to stop still needs its data."""
    os.setpgrp()


def sample_indices(
    num_samples: int, consumed_samples: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[list[int]]:
    """The sample numbers of each micro-batch of one rank, as MegatronPretrainingSampler of Megatron-LM gives them.

    Samples are taken in order; every micro_batch_size * data_parallel_size of them are shared out by rank. What is
    left at the end and does not fill such a step is dropped.
    """
    if not 0 <= data_parallel_rank < data_parallel_size or micro_batch_size < 1:
        raise ValueError(
            f"data_parallel_rank={data_parallel_rank} must be below data_parallel_size={data_parallel_size}, "
            f"and micro_batch_size={micro_batch_size} at least 1"
        )
    if not 0 <= consumed_samples < num_samples:
        raise ValueError(f"no samples left: {consumed_samples} of {num_samples} are consumed")
    return _sample_indices(num_samples, consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size)


def _sample_indices(total: int, consumed: int, size: int, rank: int, ranks: int) -> Iterator[list[int]]:
    for step in range(consumed, total - size * ranks + 1, size * ranks):
        begin = step + rank * size
        yield list(range(begin, begin + size))
