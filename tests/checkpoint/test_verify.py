"""The proof itself: it is right about right models, and says what is wrong with wrong ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.opening import Wanted
from megatron_patch.checkpoint.sharding import Layout, Pipeline
from megatron_patch.checkpoint.verify import CHINESE, ENGLISH, Bounds, verify
from megatron_patch.launch.convert import main as convert_command
from megatron_patch.launch.verify import check as check_verify
from megatron_patch.launch.verify import main as verify_command
from tests.tiny import tokens

Directory = Callable[[str], Path]
Edit = Callable[[Path, Callable[[dict[str, Any]], None]], Path]


def _nudge(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"][3] += 0.05


def test_figures_are_those_of_transformers(hf: Directory, megatron: Directory) -> None:
    from transformers import AutoModelForCausalLM

    ids = tokens(batch=2)
    model = AutoModelForCausalLM.from_pretrained(hf("gqa"))
    with torch.no_grad():
        losses = [model(one[None], labels=one[None]).loss.item() for one in ids]
    report = verify(megatron("gqa"), hf("gqa"), ids=ids.tolist())
    assert report.ok and [one.tokens for one in report.texts] == [32, 32]
    assert [one.hf_loss for one in report.texts] == pytest.approx(losses, rel=1e-6)
    assert [one.megatron_loss for one in report.texts] == pytest.approx(losses, rel=1e-6)


def test_each_bound_that_is_broken_is_named(hf: Directory, edit: Edit, megatron: Directory) -> None:
    other = edit(hf("gqa"), _nudge)
    report = verify(other, megatron("gqa"), bounds=Bounds(max_abs=1e-3, loss=1e-5, top1=1.0))
    assert len(report.problems) in (2, 3)
    assert "max abs difference of logits is" in report.problems[0] and "bound 0.001" in report.problems[0]
    assert verify(other, megatron("gqa"), bounds=Bounds(max_abs=10, loss=10, top1=0)).ok


def test_nan_breaks_every_bound(hf: Directory, edit: Edit, tmp_path: Path) -> None:
    other = edit(hf("gqa"), lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    convert(other, tmp_path / "megatron")
    assert len(verify(other, tmp_path / "megatron", bounds=Bounds(max_abs=10, loss=10, top1=1.0)).problems) == 2


def test_text_needs_a_tokenizer(hf: Directory, megatron: Directory) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer"):
        verify(hf("gqa"), megatron("gqa"), texts=[("mine", "hello")])


def test_texts_are_tokenized_and_cut(hf: Directory, megatron: Directory, tmp_path: Path) -> None:
    folder = _with_tokenizer(hf("gqa"), tmp_path / "hf")
    report = verify(folder, megatron("gqa"), max_tokens=50)
    assert [(one.name, one.tokens) for one in report.texts] == [("English", 50), ("Chinese", 50)] and report.ok
    assert [one.tokens for one in verify(folder, megatron("gqa"), texts=[("mine", "one two three")]).texts] == [3]
    with pytest.raises(ValueError, match="mine: a text must have at least 2 tokens"):
        verify(folder, megatron("gqa"), texts=[("mine", "one")])


def _with_tokenizer(source: Path, target: Path) -> Path:
    """The model with a tokenizer that has a token for each word, as far as 190 go."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = list(dict.fromkeys(["<unk>", *["one", "two", "three"], *ENGLISH.split(), *CHINESE]))[:190]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[一-鿿，。：“”、]"), "isolated")]
    )
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(target)
    return target


# ---------------------------------------------------------------------------------------------------------------- bits


def test_two_equal_directories_are_equal_bit_by_bit(hf: Directory, edit: Edit) -> None:
    report = verify(hf("gqa"), edit(hf("gqa"), lambda tensors: None))
    assert report.ok and report.tensors == 39 and not report.texts


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t["model.norm.weight"].neg_(), "model.norm.weight: 48 of 48 values differ"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight: shape (48,) in"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}), "values differ"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is only in"),
        (lambda t: t.update({"more": torch.ones(3)}), "more is only in"),
    ],
)
def test_what_differs_is_named(
    hf: Directory, edit: Edit, change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    report = verify(hf("gqa"), edit(hf("gqa"), change))
    assert not report.ok and problem in report.problems[0]


def test_minus_zero_is_not_zero_and_nan_is_itself(hf: Directory, edit: Edit, tmp_path: Path) -> None:
    def zero(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][0] = 0.0
        tensors["model.norm.weight"][1] = float("nan")

    one = edit(hf("gqa"), zero)
    one.rename(tmp_path / "one")
    other = edit(hf("gqa"), lambda tensors: (zero(tensors), tensors["model.norm.weight"][0].neg_()))
    assert verify(tmp_path / "one", tmp_path / "one").ok
    assert verify(tmp_path / "one", other).problems == ("model.norm.weight: 1 of 48 values differ",)


# ------------------------------------------------------------------------------------------------------------ commands


def test_the_commands_convert_prove_and_report(
    hf: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = str(hf("gqa")), str(tmp_path / "megatron")
    assert convert_command(["--source", source, "--target", target, "--verify"]) == 0
    assert "verify: OK" in capsys.readouterr().out
    file = tmp_path / "report.json"
    assert verify_command(["--source", target, "--target", source, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["texts"][0]["top1"] == 1.0


def test_logits_of_a_legacy_checkpoint_are_compared_at_any_layout(hf: Directory, tmp_path: Path) -> None:
    convert(hf("gqa"), tmp_path / "legacy", Wanted(format="legacy", layout=Layout(2, Pipeline(2))))
    pair = ["--source", str(hf("gqa")), "--target", str(tmp_path / "legacy"), "--json", str(tmp_path / "report.json")]
    layout = ["--nproc-per-node", "2", "--tensor-model-parallel-size", "2"]
    command = [sys.executable, "-W", "ignore", "-m", "megatron_patch", "verify", *pair, *layout]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["texts"][0]["max_abs"] <= 1e-5


def test_a_cast_is_verified_in_the_dtype_it_was_cast_to(
    hf: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "bf16")
    options = ["--source", str(hf("gqa")), "--target", target, "--dtype", "bfloat16", "--verify"]
    assert convert_command(options) == 0
    assert "logits are not compared: --dtype may change them" in capsys.readouterr().out
    assert not verify(hf("gqa"), target, "checksums").ok


def test_many_differences_are_counted_rather_than_listed(
    hf: Directory, megatron: Directory, capsys: pytest.CaptureFixture[str], edit: Edit
) -> None:
    other = edit(hf("gqa"), lambda tensors: [tensor.neg_() for tensor in tensors.values()])
    pair = ["--source", str(other), "--target", str(megatron("gqa")), "--level", "checksums"]
    assert verify_command(pair) == 1
    printed = capsys.readouterr().out
    assert printed.count("differs: ") == 20 and "and 7 more differences" in printed


def test_names_and_bits_are_no_matter_for_several_processes(hf: Directory) -> None:
    pair = ["--source", str(hf("gqa")), "--target", str(hf("tied")), "--level", "names"]
    with pytest.raises(ValueError, match="--level names needs one process, not 2"):
        check_verify(pair, 2)


def test_a_checkpoint_without_its_config_borrows_it_from_the_other_side(hf: Directory, tmp_path: Path) -> None:
    convert(hf("gqa"), tmp_path / "megatron")
    (tmp_path / "megatron" / "huggingface").rename(tmp_path / "elsewhere")
    for level in ("names", "checksums", "logits"):
        assert verify(hf("gqa"), tmp_path / "megatron", level).ok
    with pytest.raises(ValueError, match="does not carry the model's config"):
        convert(tmp_path / "megatron", tmp_path / "back")
    convert(tmp_path / "megatron", tmp_path / "back", hf_config=tmp_path / "elsewhere")
    assert verify(hf("gqa"), tmp_path / "back").ok


def test_a_broken_bound_is_exit_code_1(
    hf: Directory, edit: Edit, megatron: Directory, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(edit(hf("gqa"), _nudge))
    assert verify_command(["--source", other, "--target", str(megatron("gqa"))]) == 1
    assert "verify: FAILED" in capsys.readouterr().out
    assert verify_command(["--source", other, "--target", str(hf("gqa"))]) == 1


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (convert_command, ["--source", "nowhere", "--target", "x"], "--source nowhere: no such directory"),
        (convert_command, ["--source", ".", "--target", "x"], "neither a Hugging Face directory"),
        (verify_command, ["--source", ".", "--target", "."], "neither a Hugging Face directory"),
        (verify_command, ["--source", ".", "--target", ".", "--max-tokens", "1"], "the loss needs at least 2 tokens"),
        (verify_command, ["--source", ".", "--target", ".", "--text-file", "gone"], "--text-file gone: no such file"),
    ],
)
def test_arguments_are_checked_before_anything_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[[list[str]], int],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        command(options)
