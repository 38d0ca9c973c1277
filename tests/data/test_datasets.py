"""Datasets and batches against megatron-core's GPTDataset built directly, alone and on several gloo ranks."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_patch.data.arguments import DataSpec
from megatron_patch.data.datasets import KEYS, batches, build_datasets, sample_indices
from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer import make

SEQ = 16


def documents(number: int, seed: int = 0) -> list[list[int]]:
    """Documents of random ids (1..599), each ended by id 0, the test tokenizer's end of document."""
    random = np.random.RandomState(seed)
    return [[*random.randint(1, 600, random.randint(1, 50)).tolist(), 0] for _ in range(number)]


@pytest.fixture(scope="module")
def tokenizer(bpe: str) -> Tokenizer:
    return load_tokenizer(bpe)


def spec(*data_path: str, **changes: Any) -> DataSpec:
    return DataSpec(data_path=data_path, **({"seq_length": SEQ} | changes))


def samples(dataset: Any, number: int | None = None) -> list[list[int]]:
    """Tokens and the last label of every sample."""
    count = len(dataset) if number is None else number
    return [[*dataset[i]["tokens"].tolist(), int(dataset[i]["labels"][-1])] for i in range(count)]


def core_dataset(
    prefix: str, tokenizer: Tokenizer, wanted: int, bounds: tuple[float, float], split: Split, cache: Path
):
    """GPTDataset as a user of megatron-core alone would build it."""
    config = GPTDatasetConfig(
        random_seed=1234, sequence_length=SEQ, blend=([prefix], None), split="90,10", path_to_cache=str(cache),
        tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    low = IndexedDataset(prefix)
    indices = np.arange(round(bounds[0] * len(low)), round(bounds[1] * len(low)), dtype=np.int32)
    return GPTDataset(low, prefix, indices, wanted, split, config)


def test_each_split_is_megatron_cores_dataset_of_its_documents(tokenizer, tmp_path, write_dataset):
    prefix = write_dataset("data", documents(100))
    train, valid, test = build_datasets(spec(prefix, split="90,10"), tokenizer, (400, 20, 0))
    assert test is None and len(train) >= 400 and len(valid) >= 20
    expected = core_dataset(prefix, tokenizer, 400, (0.0, 0.9), Split.train, tmp_path / "cache")
    assert samples(train) == samples(expected)
    expected = core_dataset(prefix, tokenizer, 20, (0.9, 1.0), Split.valid, tmp_path / "cache")
    assert samples(valid) == samples(expected)


def test_one_epoch_holds_every_token_once(tokenizer, write_dataset):
    written = documents(40)
    flat = [token for document in written for token in document]
    train, _, _ = build_datasets(spec(write_dataset("data", written), split="1"), tokenizer, (1, 0, 0))
    assert len(train) == (len(flat) - 1) // SEQ
    seen = np.bincount([token for sample in samples(train) for token in sample[:-1]], minlength=600)
    assert seen.sum() == len(train) * SEQ and (seen <= np.bincount(flat, minlength=600)).all()


@pytest.mark.parametrize("special", [{"pad_token": "<|im_end|>"}, {"pad_token": "<|endoftext|>"}, {}])
def test_no_token_of_the_corpus_is_taken_for_padding(special, tmp_path, write_dataset):
    tokenizer = load_tokenizer(make.byte_bpe(tmp_path / "t", eos_token="<|endoftext|>", **special))
    prefix = write_dataset("data", [[5, 1, 6, 0, 7, 1] * 20] * 5)
    train, _, _ = build_datasets(spec(prefix), tokenizer, (20, 0, 0))
    for sample in (train[i] for i in range(20)):
        assert sample["loss_mask"].all() and (sample["tokens"] == 1).sum() > 2 and (sample["tokens"] == 0).sum() > 1


def test_eod_mask_loss_masks_the_end_of_document_alone(tokenizer, write_dataset):
    train, _, _ = build_datasets(spec(write_dataset("data", documents(50)), eod_mask_loss=True), tokenizer, (50, 0, 0))
    for sample in (train[i] for i in range(50)):
        assert torch.equal(sample["loss_mask"] == 0, sample["tokens"] == 0)


def test_weights_share_out_the_samples(tokenizer, write_dataset):
    a, b = write_dataset("a", [[1] * 50] * 20), write_dataset("b", [[2] * 50] * 20)
    train, _, _ = build_datasets(spec("0.75", a, "0.25", b), tokenizer, (400, 0, 0))
    assert isinstance(train, BlendedDataset)
    first = [sample[0] for sample in samples(train, 400)]
    assert (first.count(1), first.count(2)) == (300, 100)


def test_what_is_read_of_each_source_is_told_and_true(tokenizer, write_dataset):
    first, second = write_dataset("a", documents(40)), write_dataset("b", documents(80, seed=1))
    said: list[str] = []
    train, *_ = build_datasets(spec("3", first, "1", second, split="100,0,0"), tokenizer, (200, 0, 0), say=said.append)
    told = [line for line in said if line.startswith("train: ")]
    read = [sum(index == which for index in train.dataset_index[:200].tolist()) for which in (0, 1)]
    for line, prefix, samples_read, share in zip(told, (first, second), read, ("75.0%", "25.0%"), strict=True):
        source = IndexedDataset(prefix)  # its arrays must not outlive it
        tokens = source.sequence_lengths.sum()
        times = float(line.split(", ")[-1].split()[0])
        assert f"train: {prefix}: {tokens:,} tokens, {share} of what is read" in line
        assert times == pytest.approx(samples_read * SEQ / tokens, rel=0.03)


def test_prefixes_without_weights_are_passed_over_once(tokenizer, write_dataset):
    a, b = write_dataset("a", [[1] * 49] * 20), write_dataset("b", [[2] * 49] * 10)
    train, _, _ = build_datasets(spec(a, b, split="1"), tokenizer, (90, 0, 0))
    first = [sample[0] for sample in samples(train)]
    assert (first.count(1), first.count(2)) == (60, 30)
    with pytest.raises(ValueError, match="the train datasets hold 91 samples where 200 are wanted; give weights"):
        build_datasets(spec(a, b, split="1"), tokenizer, (200, 0, 0))


def test_splits_may_have_datasets_of_their_own(tokenizer, write_dataset):
    a, b, c = (write_dataset(name, [[i] * 50] * 20) for i, name in enumerate("abc", 1))
    own = DataSpec(train_data_path=("3", a, "1", b), valid_data_path=(c,), seq_length=SEQ)
    train, valid, test = build_datasets(own, tokenizer, (40, 10, 0))
    assert {sample[0] for sample in samples(train)} == {1, 2} and {sample[0] for sample in samples(valid)} == {3}
    assert test is None
    train, valid, _ = build_datasets(own, tokenizer, (0, 10, 0))
    assert train is None and len(valid) >= 10


@pytest.mark.parametrize("cache", [None, "elsewhere"])
def test_a_rebuilt_dataset_does_not_meet_the_index_of_the_old_one(cache, tokenizer, tmp_path, write_dataset):
    cached = spec("", data_cache_path=cache and f"{tmp_path}/{cache}", split="1")
    for number in (200, 40):
        written = documents(number)
        prefix = write_dataset("data", written)
        train, _, _ = build_datasets(dataclasses.replace(cached, data_path=(prefix,)), tokenizer, (1, 0, 0))
        assert len(samples(train)) == (sum(map(len, written)) - 1) // SEQ


def test_a_second_build_uses_the_cache(tokenizer, tmp_path, write_dataset):
    cached = spec(write_dataset("data", documents(50)), data_cache_path=f"{tmp_path}/cache")
    first = samples(build_datasets(cached, tokenizer, (100, 0, 0))[0])
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(files) == 3
    assert samples(build_datasets(cached, tokenizer, (100, 0, 0))[0]) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")} == files


def test_a_truncated_dataset_is_refused(tokenizer, write_dataset):
    prefix = write_dataset("data", documents(50))
    os.truncate(f"{prefix}.bin", 10)
    with pytest.raises(ValueError, match="data.bin has 10 bytes"):
        build_datasets(spec(prefix), tokenizer, (10, 0, 0))


def test_a_split_without_documents_is_an_error_and_not_an_endless_loop(tokenizer, write_dataset):
    prefix = write_dataset("data", documents(10))
    with pytest.raises(ValueError, match="none of its 10 documents falls to valid; change --split"):
        build_datasets(spec(prefix), tokenizer, (10, 5, 0))
    with pytest.raises(ValueError, match="5 test samples are wanted, but no data is given for test"):
        build_datasets(spec(prefix), tokenizer, (10, 0, 5))


def test_a_cache_that_cannot_be_written_names_the_flag(tokenizer, tmp_path, write_dataset):
    prefix = write_dataset("data", documents(10))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot keep sample indices in .*give --data-cache-path"):
        build_datasets(spec(prefix, data_cache_path=f"{tmp_path}/file"), tokenizer, (10, 0, 0))


# ----------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data_path": ()}, "give the training data: --data-path"),
        ({"train_data_path": ("x",)}, "not both"),
        ({"data_path": ("0.5", "PREFIX", "x")}, "a weight before every prefix"),
        ({"data_path": ("-1", "PREFIX")}, "weight -1 must be a positive number"),
        ({"data_path": ("nan", "PREFIX")}, "weight nan must be a positive number"),
        ({"data_path": ("PREFIX.bin",)}, "give the prefix without .bin or .idx"),
        ({"data_path": ("SHORT",)}, "did you mean SHORT_text_document?"),
        ({"split": "99,1,0,0"}, "--split 99,1,0,0"),
        ({"split": "1e-3,1"}, "--split 1e-3,1"),
        ({"split": "0,0,0"}, "--split 0,0,0"),
        ({"split": "9,-1"}, "--split 9,-1"),
        ({"data_path": (), "train_data_path": ("PREFIX",), "split": "1,1"}, "no meaning with --train-data-path"),
        ({"seq_length": 0}, "--seq-length 0"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_a_wrong_argument_is_named(changes, problem, write_dataset):
    prefix = write_dataset("corpus_text_document", documents(1))
    names = {"PREFIX": prefix, "PREFIX.bin": f"{prefix}.bin", "SHORT": prefix.removesuffix("_text_document")}
    named = {
        key: tuple(names.get(part, part) for part in value) if isinstance(value, tuple) else value
        for key, value in changes.items()
    }
    with pytest.raises(ValueError) as caught:
        DataSpec(**({"data_path": (prefix,)} | named)).validate()
    assert problem.replace("SHORT", names["SHORT"]) in str(caught.value)


def test_good_arguments_pass_without_a_word(write_dataset):
    prefix = write_dataset("data", documents(1))
    for path in ((prefix,), (prefix, prefix), ("1", prefix), ("0.3", prefix, "2", prefix)):
        DataSpec(data_path=path).validate()
        DataSpec(train_data_path=path, valid_data_path=path).validate()
    assert DataSpec(data_path=("3", prefix)).blend().weights is None


# ------------------------------------------------------------------------------------------------------------- batches


def test_a_process_that_reads_ahead_hears_no_signal_to_the_group_of_its_own() -> None:
    samples = [dict.fromkeys(KEYS, torch.zeros(4, dtype=torch.long))] * 8
    before = multiprocessing.active_children()
    stream = batches(samples, 0, 1, 10, num_workers=1)
    next(stream)
    (reader,) = set(multiprocessing.active_children()) - set(before)
    assert os.getpgid(reader.pid) == reader.pid


def test_batches_are_the_samples_in_order(tokenizer, write_dataset):
    train, _, _ = build_datasets(spec(write_dataset("data", documents(50))), tokenizer, (24, 0, 0))
    steps = list(batches(train, 0, micro_batch_size=4, vocab_size=600))
    assert len(steps) == len(train) // 4
    for step, batch in enumerate(steps):
        assert set(batch) == set(KEYS)
        for key in KEYS:
            dtype = torch.float32 if key == "loss_mask" else torch.int64
            assert batch[key].dtype == dtype and batch[key].shape == (4, SEQ)
            assert torch.equal(batch[key], torch.stack([train[i][key] for i in range(4 * step, 4 * step + 4)]))
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        assert torch.equal(batch["position_ids"], torch.arange(SEQ).expand(4, SEQ))


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (3, 1), (2, 2), (1, 4), (3, 5)])
def test_ranks_share_out_every_step_and_none_is_lost(size, ranks):
    steps = [list(sample_indices(50, 0, size, rank, ranks)) for rank in range(ranks)]
    joined = [index for step in zip(*steps, strict=True) for part in step for index in part]
    assert joined == list(range(50 // (size * ranks) * size * ranks))


def test_a_resumed_run_sees_what_was_left_even_with_another_layout():
    whole = list(sample_indices(50, 0, 2, 1, 2))
    assert list(sample_indices(50, 12, 2, 1, 2)) == whole[3:]
    assert next(sample_indices(50, 12, 6, 1, 2)) == [18, 19, 20, 21, 22, 23]


def test_no_samples_left_is_an_error():
    with pytest.raises(ValueError, match="no samples left: 50 of 50 are consumed"):
        sample_indices(50, 50, 1, 0, 1)
    with pytest.raises(ValueError, match="data_parallel_rank=2 must be below data_parallel_size=2"):
        sample_indices(50, 0, 1, 2, 2)


def test_data_of_another_tokenizer_is_an_error(tokenizer, write_dataset):
    prefix = write_dataset("data", [[1, 2, 700, 3] * 50])
    with pytest.raises(ValueError, match=f"token id 700, the vocabulary ends at {tokenizer.vocab_size - 1}"):
        build_datasets(spec(prefix), tokenizer, (5, 0, 0), vocab_size=tokenizer.vocab_size)
    train, _, _ = build_datasets(spec(prefix), tokenizer, (5, 0, 0))
    with pytest.raises(ValueError, match=f"token id 700, the vocabulary ends at {tokenizer.vocab_size - 1}"):
        next(batches(train, 0, micro_batch_size=1, vocab_size=tokenizer.vocab_size))


# ---------------------------------------------------------------------------------------------------- several processes


def _first_batches(rank: int, world_size: int, chosen: DataSpec, directory: str) -> list[list[int]]:
    train, _, _ = build_datasets(chosen, load_tokenizer(directory), (40, 4, 0))
    steps = batches(train, 0, 2, 600, data_parallel_rank=rank, data_parallel_size=world_size)
    return [batch["tokens"].flatten().tolist() for batch in steps]


@pytest.mark.parametrize("blended", [False, True])
def test_ranks_together_see_what_one_process_sees(blended, bpe, tokenizer, pool, write_dataset):
    prefixes = [write_dataset(name, documents(60, seed)) for seed, name in enumerate("ab")]
    chosen = spec("1", prefixes[0], "2", prefixes[1], split="9,1") if blended else spec(prefixes[0], split="9,1")
    ranks = pool.run(_first_batches, 2, chosen, bpe)
    train, _, _ = build_datasets(chosen, tokenizer, (40, 4, 0))
    alone = [batch["tokens"].flatten().tolist() for batch in batches(train, 0, 4, 600)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == alone
