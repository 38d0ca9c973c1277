"""Rows of new tokens in a Megatron checkpoint, against the way over Hugging Face: bit for bit, in every format."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.directory import MANIFEST
from megatron_patch.checkpoint.opening import Wanted, like, open_source
from megatron_patch.checkpoint.sharding import Layout, Pipeline
from megatron_patch.launch.main import main
from megatron_patch.tokenizer import load_tokenizer
from megatron_patch.vocab.arguments import VocabInitArgs, VocabVerifyArgs
from megatron_patch.vocab.initialise import initialise
from megatron_patch.vocab.merge import MergeReport
from megatron_patch.vocab.verify import verify
from tests.tiny import hf_llama, hf_moe
from tests.vocab import make

LEGACY = Wanted(format="legacy", make_vocab_size_divisible_by=128)
FORMATS = {
    "torch_dist": Wanted(format="torch_dist"),
    "TP1": LEGACY,
    "TP2 te": replace(LEGACY, layout=Layout(2), naming="te"),
    "TP2 PP2 2023": replace(LEGACY, layout=Layout(2, Pipeline(2)), naming="2023"),
    "PP2 by 8": replace(LEGACY, layout=Layout(1, Pipeline(2)), make_vocab_size_divisible_by=8),
}
Bases = Callable[..., Path]


@pytest.fixture
def hf(tmp_path: Path, merging: MergeReport) -> Bases:
    """A tiny Llama with its old tokenizer, fewer rows than Megatron pads to."""

    def directory(**changes: Any) -> Path:
        base = make.base_directory(tmp_path / "hf")
        make.llama(base, merging.base_size, **changes)
        return base

    return directory


def grown(base: Path, merging: MergeReport, output: Path, **options: Any) -> Path:
    initialise(VocabInitArgs(str(base), merging.output, str(output), **({"pad_multiple": 64} | options)))
    return output


def contents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Every file but the manifest, which tells the way that was gone."""
    for file in sorted(file for file in root.rglob("*") if file.is_file() and file.name != MANIFEST):
        yield str(file.relative_to(root)), file.read_bytes()


def rank_tensors(root: Path) -> dict[str, Tensor]:
    """Every tensor of legacy files, padded rows included."""
    found: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        for key, inner in value.items() if isinstance(value, dict) else ():
            walk(inner, f"{name}/{key}")

    for file in sorted(root.glob("release/mp_rank_*/*.pt")):
        walk(torch.load(file, weights_only=False), file.parent.name)
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_it_commutes_with_conversion(tmp_path, hf, merging, name, tied):
    base = hf(dtype="bfloat16", tie_word_embeddings=tied)
    convert(base, tmp_path / "there", FORMATS[name])
    ours = grown(tmp_path / "there", merging, tmp_path / "grown there")
    convert(grown(base, merging, tmp_path / "grown"), tmp_path / "grown, then there", FORMATS[name])
    assert dict(contents(ours)) == dict(contents(tmp_path / "grown, then there"))


@pytest.mark.parametrize("options", [{"method": "random", "seed": 7}, {"method": "last"}, {"method": "weighted"}])
def test_every_method_gives_the_same_rows(tmp_path, hf, merging, options):
    if options["method"] == "weighted":
        options |= {"corpus": (make.jsonl(tmp_path / "c.jsonl", make.mixed(50)),)}
    base = hf()
    convert(base, tmp_path / "there", FORMATS["TP2 te"])
    ours = grown(tmp_path / "there", merging, tmp_path / "grown there", **options)
    convert(ours, tmp_path / "back")
    direct = grown(base, merging, tmp_path / "grown", **options)
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", direct))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_padded_rows_are_left_out_and_made_anew(tmp_path, hf, merging):
    base = hf()
    convert(base, tmp_path / "there", FORMATS["TP2 te"])
    for file in sorted((tmp_path / "there").glob("release/mp_rank_*/*.pt")):
        content = torch.load(file, weights_only=False)
        if "mp_rank_01" in str(file):  # what training leaves in them
            content["model"]["embedding.word_embeddings.weight"][merging.base_size - 512 :] = 7.0
        torch.save(content, file)
    (tmp_path / "there" / "release" / MANIFEST).unlink()
    before, after = (
        rank_tensors(root) for root in (tmp_path / "there", grown(tmp_path / "there", merging, tmp_path / "g"))
    )
    key = "mp_rank_0{}/model/embedding.word_embeddings.weight"
    one, other = (torch.cat([found[key.format(rank)] for rank in (0, 1)]) for found in (before, after))
    assert (one[merging.base_size :] == 7).all() and torch.equal(one[: merging.base_size], other[: merging.base_size])
    assert merging.base_size < 512 < merging.vocab_size <= len(other) and len(other) % 256 == 0
    assert not (other == 7).any() and (other[merging.vocab_size :] == 0).all()
    others = [name for name in before if "word_embeddings" not in name and "output_layer" not in name]
    assert len(others) > 20 and all(torch.equal(before[name], after[name]) for name in others)


def test_a_checkpoint_without_config_takes_it_and_the_old_tokenizer_from_elsewhere(tmp_path, hf, merging):
    base = hf()
    convert(base, tmp_path / "there", FORMATS["TP1"])
    shutil.rmtree(tmp_path / "there" / "huggingface")
    with pytest.raises(ValueError, match="--hf-config"):
        grown(tmp_path / "there", merging, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()
    out = grown(tmp_path / "there", merging, tmp_path / "grown", hf_config=str(base))
    assert load_tokenizer(out / "huggingface").fingerprint == load_tokenizer(merging.output).fingerprint
    assert not list((out / "huggingface").glob("*.safetensors"))


def test_a_damaged_tensor_is_not_carried_on(tmp_path, hf, merging):
    convert(hf(), tmp_path / "there", FORMATS["TP1"])
    (file,) = (tmp_path / "there").glob("release/mp_rank_00/*.pt")
    content = torch.load(file, weights_only=False)
    content["model"]["embedding.word_embeddings.weight"][3, 0] += 1
    torch.save(content, file)
    with pytest.raises(ValueError, match="checksum"):
        grown(tmp_path / "there", merging, tmp_path / "grown")
    assert [path.name for path in tmp_path.iterdir() if "grown" in path.name] == []


def test_the_command_grows_and_proves_a_checkpoint(tmp_path, hf, merging, capsys):
    convert(hf(tie_word_embeddings=True), tmp_path / "there", FORMATS["torch_dist"])
    base, out = str(tmp_path / "there"), str(tmp_path / "grown")
    assert main(["vocab", "init", "--base", base, "--tokenizer", merging.output, "--output", out]) == 0
    assert "tied" in capsys.readouterr().out
    assert main(["vocab", "verify", "--base", base, "--model", out, "--tensor-model-parallel-size", "4"]) == 0
    assert main(["vocab", "init", "--base", base, "--tokenizer", merging.output, "--output", out]) == 2  # it exists


@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("embedding.word_embeddings.weight", "old rows of embedding.word_embeddings.weight"),
        ("decoder.layers.1.mlp.linear_fc2.weight", "other tensors"),
    ],
)
def test_damage_is_found(tmp_path, hf, merging, name, failing):
    convert(hf(), tmp_path / "there", FORMATS["TP1"])
    out = grown(tmp_path / "there", merging, tmp_path / "grown")
    args = VocabVerifyArgs(str(tmp_path / "there"), str(out))
    assert verify(args).ok
    (file,) = out.glob("release/mp_rank_00/*.pt")
    content = torch.load(file, weights_only=False)
    content["model"][name][1, 0] += 1
    torch.save(content, file)
    assert [check.name for check in verify(args).checks if not check.ok] == [failing]


def test_what_has_no_meaning_for_a_format_is_refused(tmp_path, hf, merging):
    base = hf()
    convert(base, tmp_path / "there", FORMATS["TP1"])
    with pytest.raises(ValueError, match="--hf-config is for a Megatron --base"):
        grown(base, merging, tmp_path / "grown", hf_config=str(base))
    with pytest.raises(ValueError, match="--copy is for a Hugging Face --base"):
        grown(tmp_path / "there", merging, tmp_path / "grown", copy=True)
    with pytest.raises(ValueError, match="must be of one format"):
        verify(VocabVerifyArgs(str(base), str(tmp_path / "there")))
    with pytest.raises(ValueError, match="--level logits is for Hugging Face"):
        verify(VocabVerifyArgs(str(tmp_path / "there"), str(tmp_path / "there"), level="logits"))


LAYOUTS = {
    "uneven": replace(LEGACY, layout=Layout(1, Pipeline(3, first=1, last=1))),
    "interleaved": replace(LEGACY, layout=Layout(2, Pipeline(2, virtual=2)), naming="te"),
    "ends without layers": replace(LEGACY, layout=Layout(1, Pipeline(4, layout="E|tt|tt|L"))),
    "one end without layers": replace(LEGACY, layout=Layout(1, Pipeline(3, layout="Et|ttt|L"))),
    "heads repeated": replace(LEGACY, layout=Layout(4), replicate_kv_heads=True),
    "experts": replace(LEGACY, layout=Layout(2, Pipeline(), 2, expert_tensor=1)),
    "experts in one module": replace(LEGACY, layout=Layout(1, Pipeline(2), 2), naming="te", expert_layout="grouped"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_a_legacy_checkpoint_is_found_in_its_files(tmp_path, name):
    model = hf_moe("mixtral") if "experts" in name else hf_llama(num_key_value_heads=2)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "there", LAYOUTS[name])
    source = open_source(tmp_path / "there")
    convert(tmp_path / "hf", tmp_path / "again", like(source))
    one, other = rank_tensors(tmp_path / "there"), rank_tensors(tmp_path / "again")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert open_source(tmp_path / "again").kind == source.kind
