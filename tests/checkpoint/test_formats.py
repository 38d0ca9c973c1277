"""Every pair of formats and layouts: the same bits through the internal format, the same logits as transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.opening import Wanted
from megatron_patch.checkpoint.sharding import Layout, Pipeline
from megatron_patch.checkpoint.verify import verify

Directory = Callable[[str], Path]

LEGACY = Wanted(format="legacy", make_vocab_size_divisible_by=16)


def _legacy(tensor: int = 1, pipeline: Pipeline | None = None, expert: int = 1, **others: object) -> Wanted:
    return replace(LEGACY, layout=Layout(tensor, pipeline or Pipeline(), expert), **others)


UNEVEN, INTERLEAVED = Pipeline(3, first=1, last=1), Pipeline(2, virtual=2)
FORMATS: dict[str, Wanted] = {
    "huggingface": Wanted(format="huggingface", max_shard_size="60KB"),
    "torch_dist": Wanted(format="torch_dist"),
    "TP1": _legacy(),
    "TP2": _legacy(2, naming="te"),
    "TP4": _legacy(4, naming="2023"),
    "TP4 replicated": _legacy(4, replicate_kv_heads=True),
    "PP2": _legacy(1, Pipeline(2), naming="2023"),
    "PP3 uneven": _legacy(1, UNEVEN, naming="te"),
    "PP2 VPP2": _legacy(1, INTERLEAVED),
    "TP2 PP2": _legacy(2, Pipeline(2), naming="te"),
    "TP2 PP2 VPP2": _legacy(2, INTERLEAVED, naming="2023"),
    "layout string": _legacy(1, Pipeline(2, layout="Et|tttL")),
}
MOE_FORMATS: dict[str, Wanted] = {
    **{name: FORMATS[name] for name in ("huggingface", "torch_dist", "TP1", "PP3 uneven", "PP2 VPP2")},
    "EP2": _legacy(1, expert=2),
    "EP2 grouped": _legacy(1, expert=2, naming="te", expert_layout="grouped"),
    "TP2 EP2": _legacy(2, expert=2, naming="te"),
    "TP2 EP2 ETP1": replace(LEGACY, layout=Layout(2, Pipeline(), 2, expert_tensor=1)),
    "TP2 PP2 EP2": _legacy(2, Pipeline(2), expert=2, naming="te", expert_layout="grouped"),
}


@pytest.fixture(scope="session")
def written(hf: Directory, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A variant in a format, converted from Hugging Face."""
    root = tmp_path_factory.mktemp("formats")

    def directory(variant: str, name: str) -> Path:
        target = root / variant / name.replace(" ", "_")
        if not target.exists():
            convert(hf(variant), target, (FORMATS | MOE_FORMATS)[name])
        return target

    return directory


def _pairs(formats: dict[str, Wanted]) -> list[tuple[str, str]]:
    return [(one, other) for one in formats for other in formats]


@pytest.mark.parametrize(("one", "other"), _pairs(FORMATS))
def test_every_format_becomes_every_other_bit_by_bit(
    hf: Directory, written: Callable[[str, str], Path], tmp_path: Path, one: str, other: str
) -> None:
    convert(written("few_groups", one), tmp_path / "there", FORMATS[other])
    report = verify(hf("few_groups"), tmp_path / "there", "checksums")
    assert report.ok and report.tensors in (27, 39) and not report.widened


@pytest.mark.parametrize(("one", "other"), _pairs(MOE_FORMATS))
def test_every_format_of_experts_becomes_every_other_bit_by_bit(
    hf: Directory, written: Callable[[str, str], Path], tmp_path: Path, one: str, other: str
) -> None:
    convert(written("mixtral", one), tmp_path / "there", MOE_FORMATS[other])
    assert verify(hf("mixtral"), tmp_path / "there", "checksums").ok


KINDS = ("few_groups", "mha_biases", "tied", "gqa", "head_dim")


# Heads are repeated only where there are more ranks than heads.
LOGITS = [(kind, name) for kind in KINDS for name in FORMATS if name not in ("huggingface", "TP4 replicated")]


@pytest.mark.parametrize(("variant", "name"), [*LOGITS, ("few_groups", "TP4 replicated")])
def test_every_layout_gives_the_logits_of_transformers(
    hf: Directory, written: Callable[[str, str], Path], variant: str, name: str
) -> None:
    report = verify(hf(variant), written(variant, name), max_tokens=24)
    assert report.ok and report.texts[0].max_abs <= 1e-5


@pytest.mark.parametrize("name", [name for name in MOE_FORMATS if name != "huggingface"])
def test_every_layout_of_experts_gives_the_logits_of_transformers(
    hf: Directory, written: Callable[[str, str], Path], name: str
) -> None:
    report = verify(hf("mixtral"), written("mixtral", name), max_tokens=24)
    assert report.ok and report.texts[0].max_abs <= 1e-5


def test_wrong_values_are_seen_through_any_format(
    hf: Directory, written: Callable[[str, str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    source = tmp_path / "hf"
    convert(hf("few_groups"), source, Wanted(format="huggingface", max_shard_size="1GB"))
    (source / "conversion.json").unlink()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.weight"][3, 5] += 1e-3
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for name in ("torch_dist", "TP2 PP2"):
        (problem,) = verify(source, written("few_groups", name), "checksums").problems
        assert problem.startswith("decoder.layers.2.self_attention.linear_qkv.weight: 1 of ")
