"""The manifest names every tensor with a checksum that is the same in any format; the journal survives any kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.huggingface import HFReader
from megatron_patch.checkpoint.manifest import (
    Checker,
    Entry,
    Journal,
    checksum,
    converted,
    data_of,
    journaled,
    nonfinite,
    read_manifest,
    remove_journals,
    write_manifest,
)
from megatron_patch.checkpoint.opening import Wanted
from megatron_patch.checkpoint.sharding import Layout, Pipeline

Directory = Callable[[str], Path]


def entry(name: str, *files: str) -> Entry:
    return Entry(name, "float32", (2, 3), "0" * 32, 0, files)


# --------------------------------------------------------------------------------------------------------- checksums


def test_checksums_are_the_same_in_every_format_and_layout(hf: Directory, tmp_path: Path) -> None:
    choices = {
        "torch_dist": Wanted(),
        "legacy": Wanted(format="legacy", layout=Layout(2, Pipeline(2)), naming="te"),
        "huggingface": Wanted(format="huggingface", max_shard_size="60KB"),
    }
    found = []
    for name, wanted in choices.items():
        convert(hf("gqa"), tmp_path / name, wanted)
        folder = tmp_path / name if name == "huggingface" else tmp_path / name / "release"
        found.append({one: entry.xxh3_128 for one, entry in converted(folder).items()})
    assert found[0] == found[1] == found[2] and len(set(found[0].values())) == 27
    embedding = HFReader(hf("gqa")).read("model.embed_tokens.weight").numpy().tobytes()
    assert found[0]["embedding.word_embeddings.weight"] == xxhash.xxh3_128_hexdigest(embedding)


def test_the_manifest_tells_plan_versions_and_where_each_tensor_is(hf: Directory, tmp_path: Path) -> None:
    convert(hf("gqa"), tmp_path / "target", Wanted(format="legacy", layout=Layout(2), dtype=torch.bfloat16))
    manifest = read_manifest(tmp_path / "target" / "release")
    assert manifest["plan"]["source"] == str(hf("gqa")) and manifest["plan"]["options"]["dtype"] == "torch.bfloat16"
    assert manifest["plan"]["config"] == layout.read_config(hf("gqa"))
    assert manifest["versions"]["torch"] == torch.__version__ and "megatron-core" in manifest["versions"]
    one = manifest["tensors"]["decoder.layers.3.mlp.linear_fc1.weight"]
    assert (one["dtype"], one["shape"], one["nonfinite"]) == ("bfloat16", [128, 48], 0)
    assert one["files"] == [f"release/mp_rank_0{rank}/model_optim_rng.pt" for rank in range(2)]
    assert all((tmp_path / "target" / file).is_file() for file in one["files"])


def test_two_conversions_leave_the_same_manifest(hf: Directory, tmp_path: Path) -> None:
    for name in ("one", "other"):
        convert(hf("gqa"), tmp_path / name)
    one, other = ((tmp_path / name / "release" / layout.MANIFEST).read_bytes() for name in ("one", "other"))
    assert one == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_a_checksum_covers_every_bit_of_any_dtype(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    assert bytes(data_of(tensor.T)) == bytes(data_of(tensor.T.contiguous())) and len(data_of(tensor)) == tensor.nbytes
    flipped = tensor.clone()
    flipped.view(torch.uint8)[2, -1] ^= 1
    assert checksum(flipped) != checksum(tensor) == checksum(tensor.clone())


def test_a_checker_knows_what_was_written(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    write_manifest(tmp_path, {}, [Entry("a", "float32", (2, 3), checksum(tensor), 0, ("file",))])
    checker = Checker(tmp_path)
    checker.check("a", tensor)
    checker.check("unknown", tensor + 1)
    with pytest.raises(ValueError, match=r"a does not match its checksum in conversion\.json"):
        checker.check("a", tensor + 1)
    with pytest.raises(ValueError, match=r"a does not match its checksum in conversion\.json"):
        checker.check("a", tensor, "1" * 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"plan": {', r"conversion\.json is no valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"plan": {}}', "is no manifest of a conversion"),
    ],
)
def test_what_is_no_manifest_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / layout.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=message):
        Checker(tmp_path)


# -------------------------------------------------------------------------------------------------------- odd values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_nan_and_infinite_values_are_counted(dtype: torch.dtype) -> None:
    values = torch.ones(10, 10)
    assert nonfinite(values.to(dtype)) == 0
    values[3, 3], values[4, 4], values[5, 5] = float("nan"), float("inf"), float("-inf")
    assert nonfinite(values.to(dtype)) == 3


def test_a_sum_that_overflows_is_no_infinite_value() -> None:
    assert nonfinite(torch.full((1000,), 60000.0, dtype=torch.float16)) == 0
    assert nonfinite(torch.full((1000,), 3e38)) == 0
    assert nonfinite(torch.full((4,), 2**62, dtype=torch.int64)) == 0


# ------------------------------------------------------------------------------------------------------------ journal


def test_what_several_processes_did_of_a_tensor_is_put_together(tmp_path: Path) -> None:
    for rank, files in enumerate((("b", "a"), ("c",))):
        with Journal(tmp_path, rank) as journal:
            journal.add([entry("x", *files), entry(f"only {rank}", *files)])
    found = journaled(tmp_path)
    assert found["x"] == entry("x", "a", "b", "c") and found["only 1"] == entry("only 1", "c") and len(found) == 3
    remove_journals(tmp_path)
    assert journaled(tmp_path) == {} and not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_line_is_skipped_and_takes_no_other_along(tmp_path: Path, cut: int) -> None:
    with Journal(tmp_path, 0) as journal:
        journal.add([entry("a", "file"), entry("b", "file")])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    with Journal(tmp_path, 0) as journal:
        journal.add([entry("c", "file")])
    whole = {"a", "c"} if cut > 1 else {"a", "b", "c"}  # a line that lacks its end alone is a whole one
    assert journaled(tmp_path).keys() == whole


def test_a_line_is_on_disk_when_it_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with Journal(tmp_path, 0) as journal:
        monkeypatch.setattr(
            "os.fsync", lambda descriptor: synced.append((tmp_path / ".journal-0.jsonl").stat().st_size)
        )
        journal.add([entry("a", "file")])
        assert [json.loads(line)["name"] for line in (tmp_path / ".journal-0.jsonl").read_text().splitlines()] == ["a"]
    assert synced == [(tmp_path / ".journal-0.jsonl").stat().st_size]
