"""Rows of new tokens: against the formula in plain torch, and the files against transformers and safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_patch.tokenizer import load_tokenizer
from megatron_patch.vocab.arguments import VocabInitArgs, VocabVerifyArgs
from megatron_patch.vocab.initialise import INITIALISATION, initialise
from megatron_patch.vocab.merge import MergeReport
from megatron_patch.vocab.subpieces import compare
from megatron_patch.vocab.verify import verify
from tests.tokenizer.make import byte_bpe
from tests.vocab import make

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Grow = Callable[..., Path]


def weights(directory: Path) -> dict[str, Tensor]:
    return {name: one for file in sorted(directory.glob("*.safetensors")) for name, one in load_file(file).items()}


@pytest.fixture
def grow(tmp_path: Path, merging: MergeReport) -> Grow:
    """Makes a base with a tiny Llama, grows it, and returns the result; the base lies in ``tmp_path / "base"``."""

    def run(model: dict[str, object] | None = None, **options: object) -> Path:
        base = make.base_directory(tmp_path / "base")
        make.llama(base, merging.base_size, **(model or {}))
        out = str(tmp_path / "grown")
        initialise(VocabInitArgs(str(base), merging.output, out, **({"pad_multiple": 64} | options)))
        return tmp_path / "grown"

    return run


def check(tmp_path: Path, **options: object) -> dict[str, bool]:
    report = verify(VocabVerifyArgs(str(tmp_path / "base"), str(tmp_path / "grown"), **options))
    return {one.name: one.ok for one in report.checks}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_row_is_the_mean_of_its_characters_rows_computed_in_fp32(tmp_path, grow, dtype):
    grown, token = grow({"dtype": dtype}), AutoTokenizer.from_pretrained(tmp_path / "grown").convert_tokens_to_ids
    before, after = weights(tmp_path / "base"), weights(grown)
    for name in (EMBEDDING, HEAD):
        pair = before[name][[token("天"), token("气")]].float()
        torch.testing.assert_close(after[name][token("天气")], pair.mean(0).to(before[name].dtype), rtol=0, atol=0)
    assert not torch.equal(after[EMBEDDING], after[HEAD])


def test_a_character_that_the_base_lacks_is_the_mean_of_its_bytes(tmp_path, grow):
    grown, token = grow(), AutoTokenizer.from_pretrained(tmp_path / "grown").convert_tokens_to_ids
    old = AutoTokenizer.from_pretrained(tmp_path / "base").get_vocab()
    character = next(c for c in "计算机互联网越重" if c not in old and token(c) != token("<unk>"))
    parts = [old[f"<0x{byte:02X}>"] for byte in character.encode()]
    assert len(parts) == 3
    expected = weights(tmp_path / "base")[EMBEDDING][parts].mean(0)
    torch.testing.assert_close(weights(grown)[EMBEDDING][token(character)], expected, rtol=0, atol=1e-7)


def test_old_rows_and_all_other_tensors_stay_as_they_are(tmp_path, grow, merging):
    after, before = weights(grow()), weights(tmp_path / "base")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
    assert len(after[EMBEDDING]) == len(after[HEAD]) == merging.vocab_size


def test_reserved_rows_are_the_mean_of_all_old_ones(tmp_path, grow, merging):
    after = weights(grow())[HEAD]
    centre = weights(tmp_path / "base")[HEAD].mean(0)
    for row in after[-merging.reserved :]:
        torch.testing.assert_close(row, centre)


def test_the_grown_directory_has_the_new_tokenizer_and_no_trace_of_the_old_one(tmp_path, grow, merging):
    base = make.base_directory(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(base)
    (base / "LICENSE").write_text("free")
    grown = grow()
    assert len(AutoTokenizer.from_pretrained(grown)) == merging.vocab_size
    assert json.loads((grown / "config.json").read_text())["vocab_size"] == merging.vocab_size
    assert load_tokenizer(grown).fingerprint == load_tokenizer(merging.output).fingerprint
    assert (grown / "LICENSE").read_text() == "free"


def test_transformers_runs_the_grown_model_on_the_new_tokenization(grow):
    grown = grow()
    ids = AutoTokenizer.from_pretrained(grown)("今天天气很好", return_tensors="pt").input_ids
    logits = AutoModelForCausalLM.from_pretrained(grown)(ids).logits
    assert logits.isfinite().all() and logits.shape[-1] == len(AutoTokenizer.from_pretrained(grown))


def test_a_tied_model_has_one_tensor_and_a_copy_of_it_is_kept_the_same(tmp_path, grow):
    grown = grow({"tie_word_embeddings": True})
    assert HEAD not in weights(grown) and all(check(tmp_path, level="rows").values())
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, file, metadata={"format": "pt"})
    initialise(VocabInitArgs(str(tmp_path / "base"), str(grown), str(tmp_path / "again"), pad_multiple=64))
    after = weights(tmp_path / "again")
    assert torch.equal(after[HEAD], after[EMBEDDING]) and len(after[HEAD]) == len(weights(grown)[EMBEDDING])


def test_only_files_with_a_changed_tensor_are_written_and_the_index_is_right(tmp_path, grow):
    grown, base = grow({"shard": "40KB"}), tmp_path / "base"
    files = sorted(path.name for path in base.glob("*.safetensors"))
    index = json.loads((grown / "model.safetensors.index.json").read_text())
    changed = {index["weight_map"][name] for name in (EMBEDDING, HEAD)}
    assert len(files) > 3 and {one for one in files if not os.path.samefile(base / one, grown / one)} == changed
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in weights(grown).values())
    assert index["weight_map"].keys() == weights(grown).keys()
    AutoModelForCausalLM.from_pretrained(grown)


def test_files_are_copied_on_request_and_through_links(tmp_path, grow, merging):
    grow({"shard": "40KB"})
    base, cache = tmp_path / "base", tmp_path / "cache"
    cache.mkdir()
    for file in base.glob("*.safetensors"):  # as the hub's cache has them
        file.rename(cache / file.name)
        file.symlink_to(cache / file.name)
    for name, copy in (("linked", False), ("copied", True)):
        out = tmp_path / name
        initialise(VocabInitArgs(str(base), merging.output, str(out), pad_multiple=64, copy=copy))
        same = [os.path.samefile(file, cache / file.name) for file in out.glob("*.safetensors")]
        assert any(same) is not copy and not any(file.is_symlink() for file in out.iterdir())
        assert {n: t.tolist() for n, t in weights(out).items()} == {
            n: t.tolist() for n, t in weights(tmp_path / "grown").items()
        }


def test_bin_files_become_safetensors(tmp_path, grow, merging):
    grow()
    base = tmp_path / "base"
    torch.save(weights(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    initialise(VocabInitArgs(str(base), merging.output, str(tmp_path / "again"), pad_multiple=64))
    assert [file.name for file in (tmp_path / "again").glob("*model*") if file.suffix in (".bin", ".safetensors")] == [
        "model.safetensors"
    ]
    after, expected = weights(tmp_path / "again"), weights(tmp_path / "grown")
    assert all(torch.equal(after[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("method", "index"), [("first", 0), ("last", -1)])
def test_the_first_or_the_last_part_can_be_taken_alone(tmp_path, grow, method, index):
    grown, token = grow(method=method), AutoTokenizer.from_pretrained(tmp_path / "grown").convert_tokens_to_ids
    part = token("天气"[index])
    assert torch.equal(weights(grown)[HEAD][token("天气")], weights(tmp_path / "base")[HEAD][part])
    assert all(check(tmp_path, level="rows").values())


def test_weighted_takes_a_frequent_part_more(tmp_path, grow):
    corpus = make.jsonl(tmp_path / "counts.jsonl", ["天天天", "气"])
    grown = grow(method="weighted", corpus=(corpus,))
    token = AutoTokenizer.from_pretrained(grown).convert_tokens_to_ids
    old = weights(tmp_path / "base")[HEAD]
    expected = (old[token("天")] * 4 + old[token("气")] * 2) / 6
    torch.testing.assert_close(weights(grown)[HEAD][token("天气")], expected)
    assert all(check(tmp_path, level="rows").values())


def test_random_rows_have_the_model_s_spread_and_differ_between_tensors(tmp_path, grow):
    rows = weights(grow(method="random"))
    token = AutoTokenizer.from_pretrained(tmp_path / "grown").convert_tokens_to_ids
    first = len(weights(tmp_path / "base")[HEAD])
    new = rows[HEAD][first : token("<|reserved_0|>")]
    assert abs(float(new.std()) - 0.02) < 0.002 and not torch.equal(new, rows[EMBEDDING][first:][: len(new)])
    assert all(check(tmp_path, level="rows").values())


def test_rows_beyond_the_old_tokenizer_are_used_before_there_are_more(tmp_path, merging):
    base = make.base_directory(tmp_path / "base")
    make.llama(base, merging.vocab_size + 64)
    initialise(VocabInitArgs(str(base), merging.output, str(tmp_path / "grown"), pad_multiple=64))
    before, after = weights(base)[EMBEDDING], weights(tmp_path / "grown")[EMBEDDING]
    assert before.shape == after.shape
    assert torch.equal(before[: merging.base_size], after[: merging.base_size])
    assert not torch.equal(before[merging.base_size], after[merging.base_size])
    assert torch.equal(before[merging.vocab_size :], after[merging.vocab_size :])


def test_tokens_of_a_byte_level_bpe_are_taken_apart_by_its_own_merges(tmp_path):
    old = Path(byte_bpe(tmp_path / "old"))
    content = json.loads((old / "tokenizer.json").read_text())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    size = len(vocab)
    one, two, three = (bytes_to_unicode()[byte] for byte in "龘".encode())
    halves = [(one, two), (one + two, three), ("Ġ", one + two)]  # two bytes of three, all, and two after a space
    for left, right in halves:
        vocab[left + right] = len(vocab)
        merges.append([left, right])
    new = Path(byte_bpe(tmp_path / "new"))
    (new / "tokenizer.json").write_text(json.dumps(content))
    growth = compare(load_tokenizer(old), load_tokenizer(new), rows=size)
    parts = {"".join(pair): [*"".join(pair)] for pair in halves}
    assert vocab["Ġ" + one + two] == size + 2
    assert {i: list(ids) for i, ids in growth.sources.items()} == {
        vocab[token]: [vocab[one] for one in letters] for token, letters in parts.items()
    }


def test_an_added_control_token_is_made_of_its_spelling(tmp_path, base):
    hf = AutoTokenizer.from_pretrained(base)
    hf.add_special_tokens({"pad_token": "<the city>"})
    hf.save_pretrained(tmp_path / "new")
    old = load_tokenizer(base)
    growth = compare(old, load_tokenizer(tmp_path / "new"), rows=old.vocab_size)
    (parts,) = growth.sources.values()
    assert old.decode(parts) == "<the city>"


def test_a_tokenizer_that_moves_old_tokens_is_refused(tmp_path, merging):
    base = make.base_directory(tmp_path / "base")
    make.llama(base, merging.base_size)
    other = byte_bpe(tmp_path / "other")
    with pytest.raises(ValueError, match="is no extension of the tokenizer"):
        initialise(VocabInitArgs(str(base), other, str(tmp_path / "grown")))
    assert not (tmp_path / "grown").exists()


# ------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"tie_word_embeddings": True}, {"dtype": "float16"}])
def test_a_grown_model_is_proven_to_compute_what_its_base_does(tmp_path, grow, changes):
    grow(changes)
    found = check(tmp_path, tensor_model_parallel_size=4)
    assert {"hidden states", "old logits", "new logits", "tensor parallel"} < found.keys()
    assert all(found.values()), found


def _damage(file: Path, name: str, row: int) -> None:
    tensors = load_file(file)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1, tensors[name].shape[-1])[row, 0] += 1e-4
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "row", "failing"),
    [
        (EMBEDDING, 5, f"old rows of {EMBEDDING}"),
        (HEAD, 5, f"old rows of {HEAD}"),
        (HEAD, 510, f"other rows of {HEAD}"),
        (EMBEDDING, -1, f"other rows of {EMBEDDING}"),
        ("model.layers.1.mlp.up_proj.weight", 3, "other tensors"),
    ],
)
def test_a_damaged_tensor_is_found(tmp_path, grow, name, row, failing):
    _damage(grow() / "model.safetensors", name, row)
    assert [one for one, ok in check(tmp_path, level="rows").items() if not ok] == [failing]


def test_rows_that_do_not_divide_or_disagree_with_the_config_are_found(tmp_path, grow):
    grown = grow()
    assert check(tmp_path, level="rows", tensor_model_parallel_size=7)["tensor parallel"] is False
    config = json.loads((grown / "config.json").read_text())
    (grown / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    assert check(tmp_path, level="rows")["rows as config.json says"] is False


def test_a_model_that_init_has_not_written_is_refused(tmp_path, grow):
    (grow() / INITIALISATION).unlink()
    with pytest.raises(ValueError, match="not written by `vocab init`"):
        check(tmp_path)
