"""Legacy checkpoints: written files equal the state of megatron-core's own models at each rank; what runs save is read;
damage and disagreement are found."""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_patch.checkpoint.legacy import LegacySource, LegacyTarget
from megatron_patch.checkpoint.sharding import Layout, Pipeline
from tests.checkpoint.legacy_runs import (
    DIVISIBLE_BY,
    config,
    random_tensors,
    save_run,
    save_whole,
    whole,
    world_size,
    write,
)
from tests.workers import Pool

PP2, PP2_UNEVEN, VPP2 = Pipeline(2), Pipeline(2, first=3), Pipeline(2, 2)

CASES: dict[str, tuple[str, Layout]] = {
    "TP1": ("gqa", Layout()),
    "TP2 biases": ("biases", Layout(2)),
    "TP4": ("gqa", Layout(4)),
    "TP4 above KV groups": ("mqa", Layout(4)),
    "PP2 uneven": ("biases", Layout(1, PP2_UNEVEN)),
    "PP3 uneven tied": ("tied", Layout(1, Pipeline(3, first=1, last=1))),
    "PP2 VPP2 tied": ("tied", Layout(1, VPP2)),
    "PP2 VPP2 by string": ("gqa", Layout(1, Pipeline(2, 2, layout="E|t*2|t|tL"))),
    "TP2 PP2 tied": ("tied", Layout(2, PP2)),
    "tied": ("tied", Layout()),
    "EP2": ("mixtral", Layout(expert=2)),
    "TP2 EP2": ("mixtral", Layout(2, expert=2)),
    "TP2 EP2 ETP1": ("mixtral", Layout(2, expert=2, expert_tensor=1)),
    "PP2 EP2": ("mixtral", Layout(1, PP2, expert=2)),
    "TP2 ETP1": ("mixtral", Layout(2, expert_tensor=1)),
    "latent attention, TP2 PP2": ("deepseek", Layout(2, PP2)),
    "multi-token prediction, PP2": ("mtp", Layout(1, PP2)),
}

model_of = cache(whole)


@cache
def tensors_of(variant: str) -> dict[str, torch.Tensor]:
    return random_tensors(model_of(variant))


def target_of(variant: str, layout: Layout, **options: Any) -> LegacyTarget:
    model = model_of(variant)
    return LegacyTarget(model, dict.fromkeys(model.claims, torch.float32), layout, divisible_by=DIVISIBLE_BY, **options)


def source_of(folder: Path, variant: str, **options: Any) -> LegacySource:
    return LegacySource(folder, folder, model_of(variant), **options)


def assert_reads(folder: Path, variant: str, **options: Any) -> LegacySource:
    source = source_of(folder, variant, **options)
    wanted = tensors_of(variant)
    assert source.infos.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(source.read(name), tensor), name
        assert source.infos[name].shape == tensor.shape
    return source


@pytest.fixture(scope="module")
def run(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of an iteration that real models of a case saved."""

    @cache
    def weights(variant: str) -> str:
        folder = str(tmp_path_factory.mktemp(variant))
        pool.run(save_whole, 1, config(variant), tensors_of(variant), folder)
        return folder

    @cache
    def folder(case: str) -> Path:
        variant, layout = CASES[case]
        root = tmp_path_factory.mktemp("run") / "iter_0000010"
        pool.run(save_run, world_size(layout), config(variant), weights(variant), str(root), layout)
        return root

    return folder


@pytest.fixture
def copy(run: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of such a directory, to be damaged."""
    return lambda case: Path(shutil.copytree(run(case), tmp_path / "copy"))


@contextmanager
def edited(folder: Path, rank: str) -> Iterator[dict[str, Any]]:
    """The content of a rank's file, written back in the end."""
    file = folder / rank / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    yield content
    torch.save(content, file)


# ------------------------------------------------------------------------------------------------ against megatron-core


@pytest.mark.parametrize("case", CASES)
def test_written_files_equal_the_state_of_real_models(case: str, run: Callable[[str], Path], tmp_path: Path) -> None:
    variant, layout = CASES[case]
    written = write(target_of(variant, layout), tensors_of(variant), tmp_path)
    files = {folder: sorted(path.relative_to(folder) for path in folder.glob("*/*")) for folder in (written, run(case))}
    assert files[written] == files[run(case)]
    for file in files[written]:
        with torch.serialization.safe_globals([Namespace]):
            mine = torch.load(written / file, weights_only=True)
        real = torch.load(run(case) / file, weights_only=False)
        parts = [key for key in real if key.startswith("model")]
        assert [key for key in mine if key.startswith("model")] == parts
        for part in parts:
            assert mine[part].keys() == real[part].keys()
            for key, tensor in real[part].items():
                assert mine[part][key] is tensor is None or torch.equal(mine[part][key], tensor), (file, key)


@pytest.mark.parametrize("case", CASES)
def test_what_a_run_saved_is_read(case: str, run: Callable[[str], Path]) -> None:
    variant, layout = CASES[case]
    source = assert_reads(run(case), variant)
    assert source.kind.startswith(f"legacy TP{layout.tensor} PP{layout.pipeline.stages}")
    assert source.kind.endswith("local naming")


def test_an_unsplit_tensor_is_not_copied(run: Callable[[str], Path]) -> None:
    source = source_of(run("TP1"), "gqa")
    once, again = (source.read("decoder.layers.0.mlp.linear_fc1.weight").data_ptr() for _ in range(2))
    assert once == again


def test_tensors_that_share_one_buffer_are_read(copy: Callable[[str], Path]) -> None:
    """As a distributed optimizer leaves them."""
    folder = copy("TP2 biases")
    with edited(folder, "mp_rank_01") as content:
        tensors = {key: tensor for key, tensor in content["model"].items() if tensor is not None}
        buffer, start = torch.cat([tensor.flatten() for tensor in tensors.values()]), 0
        for key, tensor in tensors.items():
            content["model"][key] = buffer[start : start + tensor.numel()].view(tensor.shape)
            start += tensor.numel()
    assert_reads(folder, "biases")


# ------------------------------------------------------------------------------------------------------------ our files

NAMINGS: dict[str, tuple[str, Layout, dict[str, Any]]] = {
    "te": ("gqa", Layout(2, PP2), dict(naming="te")),
    "te experts": ("mixtral", Layout(2, PP2, expert=2), dict(naming="te")),
    "te grouped experts": ("mixtral", Layout(2, expert=4), dict(naming="te", expert_layout="grouped")),
    "te latent attention": ("deepseek", Layout(2, PP2_UNEVEN, 2, 1), dict(naming="te")),
    "2023": ("biases", Layout(2, PP2), dict(naming="2023")),
    "2023 tied": ("tied", Layout(1, PP2), dict(naming="2023")),
    "2023 virtual": ("tied", Layout(2, VPP2), dict(naming="2023")),
    "repeated heads": ("mqa", Layout(4), dict(replicate_kv=True)),
    "repeated heads of groups": ("gqa", Layout(8), dict(replicate_kv=True)),
    "layers behind a stage without": ("gqa", Layout(1, Pipeline(2, layout="E|t*4L")), {}),
    "padding": ("gqa", Layout(2), dict(extra_vocab_size=0)),
}


@pytest.mark.parametrize("case", NAMINGS)
def test_what_was_written_is_read(case: str, tmp_path: Path) -> None:
    variant, layout, options = NAMINGS[case]
    target = target_of(variant, layout, **options)
    assert assert_reads(write(target, tensors_of(variant), tmp_path), variant).kind == target.kind


def test_2023_files_are_nested_as_megatron_nested_them(tmp_path: Path) -> None:
    folder = write(target_of("tied", Layout(1, PP2), naming="2023"), tensors_of("tied"), tmp_path)
    first, last = (torch.load(folder / f"mp_rank_00_00{i}/model_rng.pt", weights_only=False)["model"] for i in (0, 1))
    embedding = tensors_of("tied")["embedding.word_embeddings.weight"]
    assert torch.equal(first["language_model"]["embedding"]["word_embeddings"]["weight"][:200], embedding)
    assert torch.equal(last["word_embeddings_for_head"]["weight"][:200], embedding)
    norm = last["language_model"]["encoder"]["layers.1.post_attention_layernorm.weight"]
    assert torch.equal(norm, tensors_of("tied")["decoder.layers.3.pre_mlp_layernorm.weight"])


@pytest.mark.parametrize(
    ("old", "new"), [("_layernorm.", "_norm."), ("encoder", "transformer")], ids=["late 2023", "early"]
)
def test_other_names_of_2023_are_read(old: str, new: str, tmp_path: Path) -> None:
    folder = write(target_of("gqa", Layout(), naming="2023"), tensors_of("gqa"), tmp_path)
    file = folder / "mp_rank_00/model_rng.pt"
    content = torch.load(file, weights_only=False)
    language = content["model"]["language_model"]
    language["encoder"] = {key.replace(old, new): tensor for key, tensor in language["encoder"].items()}
    if new == "transformer":
        language[new] = language.pop("encoder")
    torch.save(content, file)
    assert_reads(folder, "gqa")


def test_args_are_what_megatron_looks_up(tmp_path: Path) -> None:
    folder = write(target_of("tied", Layout(2, VPP2)), tensors_of("tied"), tmp_path)
    content = torch.load(folder / "mp_rank_01_001/model_optim_rng.pt", weights_only=False)
    wanted = dict(
        num_layers=4,
        hidden_size=48,
        num_query_groups=4,
        group_query_attention=True,
        kv_channels=6,
        ffn_hidden_size=64,
        max_position_embeddings=64,
        swiglu=True,
        normalization="RMSNorm",
        norm_epsilon=1e-5,
        position_embedding_type="rope",
        rotary_base=10000,
        untie_embeddings_and_output_weights=False,
        vocab_size=200,
        padded_vocab_size=224,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        num_layers_per_virtual_pipeline_stage=1,
        params_dtype=torch.float32,
        iteration=0,
        consumed_train_samples=0,
    )
    assert {name: getattr(content["args"], name) for name in wanted} == wanted
    assert (content["checkpoint_version"], content["iteration"]) == (3.0, 0)


def test_each_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    model = model_of("gqa")
    dtypes = {name: torch.float32 if "norm" in name else torch.bfloat16 for name in model.claims}
    tensors = {name: tensor.to(dtypes[name]) for name, tensor in tensors_of("gqa").items()}
    source = source_of(write(LegacyTarget(model, dtypes, Layout(2)), tensors, tmp_path), "gqa")
    assert {name: info.dtype for name, info in source.infos.items()} == dtypes
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("variant", "layout", "options", "message"),
    [
        ("gqa", Layout(3), {}, "tensor_model_parallel_size=3 does not divide"),
        ("gqa", Layout(1, Pipeline(3)), {}, "pipeline_model_parallel_size=3 does not divide num_layers=4"),
        ("gqa", Layout(expert=2), {}, "the model has no experts"),
        ("mixtral", Layout(expert=3), {}, "expert_model_parallel_size=3 does not divide num_moe_experts=8"),
        ("mixtral", Layout(4, expert_tensor=2), {}, "expert_tensor_parallel_size=2 must be 1 or tensor_model"),
        ("gqa", Layout(4), dict(extra_vocab_size=2), "extra_vocab_size=2 makes 202 rows, .* choose 4"),
        ("gqa", Layout(4), dict(replicate_kv=True), "replicate_kv_heads needs more tensor-parallel ranks"),
        ("gqa", Layout(), dict(naming="core"), "naming='core' is not known; choose one of local, te, 2023"),
        ("mixtral", Layout(), dict(naming="2023"), "no name for the parameter .*mlp.router.weight"),
        ("mixtral", Layout(), dict(expert_layout="grouped"), "exists with naming='te' only"),
        ("gqa", Layout(1, Pipeline(2, layout="Ett|ttmL")), {}, "must have 0 layers of multi-token prediction"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    variant: str, layout: Layout, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        target_of(variant, layout, **options)


# -------------------------------------------------------------------------------------------------------------- damage


def _change(content: dict[str, Any], key: str) -> None:
    content["model"][key].view(-1)[3] += 1


@pytest.mark.parametrize(
    ("case", "rank", "key", "name"),
    [
        ("TP4", "mp_rank_02", "decoder.layers.1.input_layernorm.weight", "decoder.layers.1.input_layernorm.weight"),
        ("PP3 uneven tied", "mp_rank_00_002", "output_layer.weight", "embedding.word_embeddings.weight"),
        ("EP2", "mp_rank_00_001", "decoder.layers.1.self_attention.linear_proj.weight", None),
        ("TP2 ETP1", "mp_rank_01", "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight", None),
        ("multi-token prediction, PP2", "mp_rank_00_001", "embedding.word_embeddings.weight", None),
    ],
)
def test_copies_that_differ_are_an_error(
    case: str, rank: str, key: str, name: str | None, copy: Callable[[str], Path]
) -> None:
    folder = copy(case)
    with edited(folder, rank) as content:
        _change(content, key)
    source = source_of(folder, CASES[case][0])
    with pytest.raises(ValueError, match=f"copies of {name or key} differ.*{rank}"):
        source.read(name or key)


def test_repeated_heads_that_differ_are_an_error(tmp_path: Path) -> None:
    name = "decoder.layers.2.self_attention.linear_qkv.weight"
    folder = write(target_of("gqa", Layout(8), replicate_kv=True), tensors_of("gqa"), tmp_path)
    with edited(folder, "mp_rank_05") as content:
        content["model"][name][-1] += 1
    with pytest.raises(ValueError, match=f"copies of {name} differ.*mp_rank_04.*mp_rank_05"):
        source_of(folder, "gqa").read(name)


def test_not_a_number_agrees_with_itself(copy: Callable[[str], Path]) -> None:
    name = "decoder.layers.1.input_layernorm.weight"
    folder = copy("TP4")
    for i in range(4):
        with edited(folder, f"mp_rank_0{i}") as content:
            content["model"][name][0] = float("nan")
    assert source_of(folder, "gqa").read(name)[0].isnan()


def _exchange_gate_and_up(folder: Path) -> None:
    with edited(folder, "mp_rank_00") as content:
        weight = content["model"]["decoder.layers.0.mlp.linear_fc1.weight"]
        weight.copy_(torch.cat(weight.chunk(2)[::-1]))


def _exchange_ranks(folder: Path) -> None:
    for old, new in (("00", "tmp"), ("01", "00"), ("tmp", "01")):
        (folder / f"mp_rank_{old}").rename(folder / f"mp_rank_{new}")


@pytest.mark.parametrize("change", [_exchange_gate_and_up, _exchange_ranks])
def test_a_wrong_order_does_not_read_the_same(change: Callable[[Path], None], copy: Callable[[str], Path]) -> None:
    folder = copy("TP2 biases")
    change(folder)
    with pytest.raises(AssertionError, match="weight|bias"):
        assert_reads(folder, "biases")


def test_stages_in_the_wrong_order_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("PP2 uneven")
    for old, new in (("000", "tmp"), ("001", "000"), ("tmp", "001")):
        (folder / f"mp_rank_00_{old}").rename(folder / f"mp_rank_00_{new}")
    with pytest.raises(ValueError, match="mp_rank_00_000.* has no embedding.word_embeddings.weight"):
        source_of(folder, "biases")


@pytest.mark.parametrize(
    ("case", "rank"),
    [
        ("TP4", "mp_rank_02"),
        ("TP2 PP2 tied", "mp_rank_01_000"),
        ("TP2 EP2", "mp_rank_00_001"),
        ("PP2 EP2", "mp_rank_00_000_001"),
    ],
)
def test_a_missing_rank_is_an_error(case: str, rank: str, copy: Callable[[str], Path]) -> None:
    folder = copy(case)
    shutil.rmtree(folder / rank)
    with pytest.raises(ValueError, match=f"incomplete: {rank} is missing"):
        source_of(folder, CASES[case][0])


def test_a_missing_stage_is_an_error(copy: Callable[[str], Path]) -> None:
    folder = copy("PP3 uneven tied")
    shutil.rmtree(folder / "mp_rank_00_002")
    with pytest.raises(ValueError, match="holds 3 layers; by its config it must have 4"):
        source_of(folder, "tied")


KEY = "decoder.layers.1.mlp.linear_fc2.weight"


def _delete(model: dict[str, Any]) -> None:
    del model[KEY]


def _add(model: dict[str, Any]) -> None:
    model["decoder.layers.1.mlp.gate.weight"] = torch.ones(2)


def _transpose(model: dict[str, Any]) -> None:
    model[KEY] = model[KEY].t().contiguous()


def _narrow(model: dict[str, Any]) -> None:
    model[KEY] = model[KEY].half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_delete, f"mp_rank_02/model_optim_rng.pt has no model/{KEY}"),
        (_add, r"mp_rank_02/model_optim_rng.pt has model/decoder.layers.1.mlp.gate.weight, which the model has not"),
        (_transpose, rf"model/{KEY} has shape \(16, 48\); in this layout it must have \(48, 16\)"),
        (_narrow, f"model/{KEY} is torch.float16, but torch.float32 in .*mp_rank_00"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error(
    change: Callable[[dict[str, Any]], None], message: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("TP4")
    with edited(folder, "mp_rank_02") as content:
        change(content["model"])
    with pytest.raises(ValueError, match=message):
        source_of(folder, "gqa")


@pytest.mark.parametrize("size", [0, 100, 0.5, -1])
def test_a_truncated_file_is_an_error(size: float, copy: Callable[[str], Path]) -> None:
    folder = copy("TP4")
    file = folder / "mp_rank_01/model_optim_rng.pt"
    whole_file = file.read_bytes()
    file.write_bytes(whole_file[: int(len(whole_file) * size) if size == 0.5 else int(size)])
    with pytest.raises(ValueError, match="mp_rank_01/model_optim_rng.pt"):
        source_of(folder, "gqa")


def test_a_flipped_bit_is_found(copy: Callable[[str], Path]) -> None:
    folder = copy("TP1")
    file = folder / "mp_rank_00/model_optim_rng.pt"
    content = bytearray(file.read_bytes())
    place = content.find(tensors_of("gqa")["output_layer.weight"].numpy().tobytes())
    content[place + 17] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match="do not match their CRC"):
        source_of(folder, "gqa").read("output_layer.weight")


def test_names_that_nobody_knows_are_an_error(copy: Callable[[str], Path]) -> None:
    folder = copy("TP1")
    with edited(folder, "mp_rank_00") as content:
        content["model"] = {f"transformer.{key}": tensor for key, tensor in content["model"].items()}
    with pytest.raises(ValueError, match="no parameter of it is known, such as .*; namings: local, te, 2023"):
        source_of(folder, "gqa")


def test_an_old_order_of_heads_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("TP1")
    with edited(folder, "mp_rank_00") as content:
        content["checkpoint_version"] = 1.0
    with pytest.raises(ValueError, match="checkpoint_version 1.0"):
        source_of(folder, "gqa")


class Foreign:
    """Pickled under the name of a class that is not installed."""


def _save_something_foreign(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("megatron.training.nowhere")
    module.Foreign = Foreign
    monkeypatch.setattr(Foreign, "__module__", module.__name__)
    with monkeypatch.context() as installed, edited(folder, "mp_rank_00") as content:
        installed.setitem(sys.modules, module.__name__, module)
        content["rerun_state"] = {"kind": Foreign()}
        content["rerun_state"]["kind"].where = "here"


def test_a_class_of_megatron_lm_needs_trust(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("TP1")
    _save_something_foreign(folder, monkeypatch)
    with pytest.raises(ValueError, match="because of megatron.training.nowhere.Foreign.*--trust-pickle"):
        source_of(folder, "gqa")
    assert_reads(folder, "gqa", trust_pickle=True)


def test_origin_and_identity_name_the_files(run: Callable[[str], Path]) -> None:
    source = source_of(run("TP2 PP2 tied"), "tied")
    assert source.origin("decoder.layers.3.mlp.linear_fc1.weight") == (
        "mp_rank_00_001/model/decoder.layers.1.mlp.linear_fc1.weight"
        " + mp_rank_01_001/model/decoder.layers.1.mlp.linear_fc1.weight"
    )
    assert sorted(source.identity()) == [f"mp_rank_0{t}_00{p}/model_optim_rng.pt" for t in (0, 1) for p in (0, 1)]
