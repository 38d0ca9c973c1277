"""HF -> Megatron -> HF is the same directory; whatever cannot be converted faithfully is named and leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.huggingface import HFReader
from megatron_patch.checkpoint.opening import Wanted
from tests.tiny import VARIANTS, hf_llama

Directory = Callable[[str], Path]
Edit = Callable[[Path, Callable[[dict[str, Any]], None]], Path]


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != layout.MANIFEST)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_way_back_restores_every_file_byte_for_byte(
    hf: Directory, megatron: Directory, tmp_path: Path, variant: str
) -> None:
    report = convert(megatron(variant), tmp_path / "back")
    assert _contents(tmp_path / "back") == _contents(hf(variant))
    assert report.tensors == len(HFReader(hf(variant)).infos)
    assert report.parameters == sum(p.numel() for p in hf_llama(**VARIANTS[variant]).parameters())


def test_a_single_bf16_file_comes_back_as_it_was(tmp_path: Path) -> None:
    hf_llama().bfloat16().save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron")
    convert(tmp_path / "megatron", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").is_file()
    assert _contents(tmp_path / "back") == _contents(tmp_path / "hf")


def test_each_tensor_keeps_its_own_dtype(hf: Directory, edit: Edit, tmp_path: Path) -> None:
    def mix(tensors: dict[str, Any]) -> None:
        for name in tensors:
            # One layer of a stacked key, and one part of a merged tensor, differ from the others.
            if "layers.1." in name or "up_proj" in name:
                tensors[name] = tensors[name].bfloat16()
            if "embed" in name:
                tensors[name] = tensors[name].half()

    source = edit(hf("gqa"), mix)
    convert(source, tmp_path / "megatron")
    convert(tmp_path / "megatron", tmp_path / "back")
    assert len({info.dtype for info in HFReader(tmp_path / "back").infos.values()}) == 3
    assert _contents(tmp_path / "back") == _contents(source)


def test_a_repeated_tied_embedding_is_restored(hf: Directory, edit: Edit, tmp_path: Path) -> None:
    def repeat(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = edit(hf("tied"), repeat)
    convert(source, tmp_path / "megatron")
    convert(tmp_path / "megatron", tmp_path / "back")
    assert _contents(tmp_path / "back") == _contents(source)


def test_known_buffers_are_left_out_and_reported(hf: Directory, edit: Edit, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    source = edit(hf("gqa"), lambda tensors: tensors.update({name: torch.ones(3)}))
    assert convert(source, tmp_path / "megatron").ignored == (name,)
    convert(tmp_path / "megatron", tmp_path / "back")
    assert HFReader(tmp_path / "back").infos.keys() == HFReader(hf("gqa")).infos.keys()


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files_come_back_as_safetensors(hf: Directory, tmp_path: Path, sharded: bool) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_bytes((hf("gqa") / "config.json").read_bytes())
    state = hf_llama().state_dict()
    names = list(state)
    parts = [names[:20], names[20:]] if sharded else [names]
    count, weight_map = len(parts), {}
    for i, part in enumerate(parts, 1):
        file = f"pytorch_model-{i:05d}-of-{count:05d}.bin" if sharded else "pytorch_model.bin"
        torch.save({name: state[name] for name in part}, source / file)
        weight_map |= dict.fromkeys(part, file)
    if sharded:
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    convert(source, tmp_path / "megatron")
    convert(tmp_path / "megatron", tmp_path / "back")
    files = {file.replace("pytorch_model", "model").replace(".bin", ".safetensors") for file in weight_map.values()}
    assert {path.name for path in (tmp_path / "back").glob("*.safetensors")} == files
    back = HFReader(tmp_path / "back")
    assert back.infos.keys() == state.keys()
    assert all(torch.equal(back.read(name), state[name]) for name in state)


# ------------------------------------------------------------------------------------------------------------ options


def test_dtype_casts_every_tensor_and_the_config_follows(hf: Directory, tmp_path: Path) -> None:
    convert(hf("gqa"), tmp_path / "megatron", Wanted(dtype=torch.bfloat16))
    report = convert(tmp_path / "megatron", tmp_path / "back")
    assert report.dtypes == {"bfloat16": 27} and not report.casts
    assert layout.read_config(tmp_path / "back")["dtype"] == "bfloat16"
    back, original = HFReader(tmp_path / "back"), HFReader(hf("gqa"))
    assert all(torch.equal(back.read(name), original.read(name).bfloat16()) for name in original.infos)
    report = convert(tmp_path / "megatron", tmp_path / "wide", Wanted(dtype=torch.float32))
    assert report.dtypes == {"float32": 27} and report.casts == {"bfloat16 -> float32": 27}


def test_values_that_float16_cannot_hold_are_an_error(hf: Directory, edit: Edit, tmp_path: Path) -> None:
    source = edit(hf("gqa"), lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has values that float16 cannot hold"):
        convert(source, tmp_path / "megatron", Wanted(dtype=torch.float16))
    assert not (tmp_path / "megatron").exists()


def test_max_shard_size_bounds_the_files(megatron: Directory, hf: Directory, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    convert(megatron("gqa"), tmp_path / "back", Wanted(max_shard_size="60KB"))
    sizes = [file.stat().st_size for file in (tmp_path / "back").glob("*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 70_000
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in hf_llama().state_dict().items())
    with pytest.raises(ValueError, match="is for writing Hugging Face files"):
        convert(hf("gqa"), tmp_path / "megatron", Wanted(max_shard_size="60KB"))


def test_an_existing_target_is_refused_unless_overwrite(hf: Directory, megatron: Directory, tmp_path: Path) -> None:
    target = tmp_path / "target"
    convert(hf("gqa"), target)
    with pytest.raises(ValueError, match="exists; give --overwrite"):
        convert(hf("tied"), target)
    convert(hf("tied"), target, overwrite=True)
    assert layout.read_config(target)["tie_word_embeddings"] is True
    convert(megatron("gqa"), target, overwrite=True)
    assert _contents(target) == _contents(hf("gqa"))


def test_overwrite_replaces_nothing_but_checkpoints(hf: Directory, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no checkpoint: --overwrite replaces checkpoints only"):
        convert(hf("gqa"), tmp_path / "thesis", overwrite=True)
    convert(hf("gqa"), tmp_path / "run")
    (tmp_path / "run" / "iter_0000010").mkdir()
    with pytest.raises(ValueError, match=r"holds a training run \(iter_0000010\)"):
        convert(hf("gqa"), tmp_path / "run", overwrite=True)


def test_source_and_target_must_not_contain_one_another(hf: Directory) -> None:
    for target in (hf("gqa"), hf("gqa") / "inside", hf("gqa").parent):
        with pytest.raises(ValueError, match="must not contain one another"):
            convert(hf("gqa"), target, overwrite=True)


# ----------------------------------------------------------------------------- what cannot be converted leaves no trace


def _refused(source: Path, target: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(source, target)
    assert not target.exists()
    assert not [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"has no tensor model\.norm\.weight, which family llama needs"),
        (lambda t: t.update({"model.extra": torch.ones(2)}), r"tensors that family llama does not know: model\.extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(47)}),
            r"model\.norm\.weight has shape \(47,\); by its config it must have \(48,\)",
        ),
        (
            lambda t: t.update({(n := "model.layers.0.mlp.down_proj.weight"): t[n].T.contiguous()}),
            r"down_proj\.weight has shape \(64, 48\); by its config it must have \(48, 64\)",
        ),
        (
            lambda t: t.update({"model.layers.4.input_layernorm.weight": torch.ones(48)}),
            r"does not know: model\.layers\.4\.input_layernorm\.weight",
        ),
    ],
    ids=["missing", "extra", "mis-shaped", "transposed", "a layer too many"],
)
def test_a_tensor_that_does_not_fit_is_named(
    hf: Directory, edit: Edit, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    _refused(edit(hf("gqa"), change), tmp_path / "megatron", message)


def test_an_output_layer_that_differs_from_the_tied_embedding_is_an_error(
    hf: Directory, edit: Edit, tmp_path: Path
) -> None:
    source = edit(hf("tied"), lambda tensors: tensors.update({"lm_head.weight": torch.ones(200, 48)}))
    _refused(
        source,
        tmp_path / "megatron",
        r"by its config lm_head\.weight repeats model\.embed_tokens\.weight, but it differs",
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "perceptron"}, "model_type='perceptron' belongs to no known family"),
        ({"sliding_window": 512}, "does not honour sliding_window=512"),
        ({"hidden_act": "sine"}, "hidden_act='sine' is not supported"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(
    hf: Directory, edit: Edit, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    source = edit(hf("gqa"), lambda tensors: None)
    config = layout.read_config(source)
    (source / "config.json").write_text(json.dumps({**config, **values}))
    _refused(source, tmp_path / "megatron", message)


def test_a_truncated_weight_file_is_named(hf: Directory, edit: Edit, tmp_path: Path) -> None:
    source = edit(hf("gqa"), lambda tensors: None)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    _refused(source, tmp_path / "megatron", r"model\.safetensors is truncated or damaged")


def test_neither_kind_of_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    _refused(tmp_path / "source", tmp_path / "target", r"neither a Hugging Face directory \(config\.json\) nor")


# ------------------------------------------------------------------------------------- damaged Megatron checkpoints


@pytest.fixture
def damaged(hf: Directory, tmp_path: Path) -> Path:
    """A Megatron checkpoint to be damaged."""
    convert(hf("gqa"), tmp_path / "megatron")
    return tmp_path / "megatron"


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_a_checkpoint_without_one_of_its_files_is_incomplete(damaged: Path, tmp_path: Path, name: str) -> None:
    (damaged / "release" / name).unlink()
    _refused(damaged, tmp_path / "back", f"is incomplete: {name} missing")


def test_a_missing_or_damaged_common_state_is_an_error(damaged: Path, tmp_path: Path) -> None:
    file = damaged / "release" / "common.pt"
    file.write_bytes(file.read_bytes()[:50])
    _refused(damaged, tmp_path / "back", r"common\.pt is damaged")
    file.unlink()
    _refused(damaged, tmp_path / "back", r"is incomplete: common\.pt missing")


def test_a_truncated_distcp_file_is_named(damaged: Path, tmp_path: Path) -> None:
    file = damaged / "release" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    _refused(damaged, tmp_path / "back", r"__0_0\.distcp is truncated")


def test_a_missing_distcp_file_is_named(damaged: Path, tmp_path: Path) -> None:
    (damaged / "release" / "__0_0.distcp").unlink()
    _refused(damaged, tmp_path / "back", r"__0_0\.distcp is missing")


def test_overwritten_bytes_are_an_error(damaged: Path, tmp_path: Path) -> None:
    file = damaged / "release" / "__0_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    _refused(damaged, tmp_path / "back", "is damaged")


def test_a_single_flipped_bit_in_a_weight_is_an_error(damaged: Path, tmp_path: Path) -> None:
    file = damaged / "release" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    weight = hf_llama().get_input_embeddings().weight[100].detach().numpy().tobytes()
    content[content.index(weight)] ^= 1
    file.write_bytes(content)
    _refused(
        damaged,
        tmp_path / "back",
        r"embedding\.word_embeddings\.weight at \(0, 0\) is damaged: .* do not match their CRC",
    )


def test_damaged_metadata_is_an_error(damaged: Path, tmp_path: Path) -> None:
    file = damaged / "release" / ".metadata"
    file.write_bytes(file.read_bytes()[:100])
    _refused(damaged, tmp_path / "back", r"\.metadata cannot be read")


def test_a_checkpoint_of_another_model_is_an_error(damaged: Path, tmp_path: Path) -> None:
    config = damaged / "huggingface" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 80}))
    _refused(damaged, tmp_path / "back", r"linear_fc1\.weight has shape \(4, 128, 48\); the model needs \(4, 160, 48\)")


def test_large_checkpoints_are_spread_over_files(
    hf: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_patch.checkpoint import torch_dist

    monkeypatch.setattr(torch_dist, "_FILE_BYTES", (0, 100_000))
    convert(hf("gqa"), tmp_path / "megatron")
    assert len(list((tmp_path / "megatron" / "release").glob("*.distcp"))) > 2
    convert(tmp_path / "megatron", tmp_path / "back")
    assert _contents(tmp_path / "back") == _contents(hf("gqa"))


def test_padding_is_never_stored(megatron: Directory) -> None:
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    stored = TorchDistLoadShardedStrategy().load_tensors_metadata(layout.latest(megatron("gqa"))[0])
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert stored[key].global_shape == (200, 48)
