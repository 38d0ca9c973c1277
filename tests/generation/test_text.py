"""From prompts to text: the command's files, order, fields and refusals, and text equal to transformers'."""

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

from megatron_patch.generation.arguments import GenerateArgs
from megatron_patch.generation.text import Completion, Prompt, eos_token_ids, read_prompts
from megatron_patch.launch import generate as command
from tests.generation.runs import Request, theirs
from tests.tiny import hf_llama
from tests.tokenizer import make

TEXTS = ["The capital of France is", "今天天气", "a literal </s>", "def f(x):", "spaces  "]
NEW = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """A tiny model on disk, whose tokenizer drops the space that begins a text; `name_or_path` is its directory."""
    root = tmp_path_factory.mktemp("text")
    hf = hf_llama(vocab_size=500)
    hf.generation_config.eos_token_id = [7, 8]
    hf.save_pretrained(root / "hf")
    make.llama_sentencepiece(root / "hf")
    hf.name_or_path = str(root / "hf")
    return hf


@pytest.fixture(scope="module")
def checkpoint(model: torch.nn.Module) -> str:
    from megatron_patch.checkpoint.convert import convert

    target = Path(model.name_or_path).parent / "megatron"
    convert(model.name_or_path, target)
    return str(target)


@pytest.fixture
def prompts_file(tmp_path: Path) -> str:
    lines = [json.dumps({"id": number, "question": text}) for number, text in enumerate(TEXTS)]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(lines) + "\n")
    return str(tmp_path / "prompts.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_completions_are_transformers_text_in_the_order_of_the_prompts(
    model: torch.nn.Module, checkpoint: str, prompts_file: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    output = tmp_path / "out.jsonl"
    argv = ["--load", checkpoint, "--prompts-file", prompts_file, "--prompt-key", "question", "--output", str(output)]
    assert command.main([*argv, "--max-new-tokens", str(NEW), "--batch-size", "2"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    ids = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in TEXTS]
    answers = theirs(model, Request(prompts=ids, max_new_tokens=NEW), eos_token_id=[7, 8])
    for number, (found, before, after) in enumerate(zip(lines(output), ids, answers, strict=True)):
        assert (found["id"], found["question"], found["num_tokens"]) == (number, TEXTS[number], len(after))
        assert found["finish_reason"] == ("eos" if after[-1] in (7, 8) else "length")
        whole, known = (tokenizer.decode(one, skip_special_tokens=True) for one in (before + after, before))
        assert known + found["completion"] == whole


def test_two_processes_write_what_one_writes(checkpoint: str, prompts_file: str, tmp_path: Path) -> None:
    argv = ["--load", checkpoint, "--prompts-file", prompts_file, "--prompt-key", "question", "--max-new-tokens", "8"]
    argv += ["--temperature", "1", "--top-p", "0.9", "--output"]
    assert command.main([*argv, str(tmp_path / "one")]) == 0
    parallel = ["--nproc-per-node", "2", "--pipeline-model-parallel-size", "2", *argv, str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "megatron_patch", "generate", *parallel], check=True, env=environment)
    assert lines(tmp_path / "one") == lines(tmp_path / "two")


def test_without_an_output_file_the_texts_are_printed(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--load", checkpoint, "--prompt", TEXTS[0], "--prompt", TEXTS[1], "--max-new-tokens", "4"]
    assert command.main(argv) == 0
    out, err = capsys.readouterr()
    assert out.index(f"\n{TEXTS[0]}") < out.index("--- 2 of 2: ") < out.index(f"\n{TEXTS[1]}")
    assert "tokens/s" in err


def test_the_models_own_ends_of_text_count_before_the_tokenizers(checkpoint: str, tmp_path: Path) -> None:
    from megatron_patch.checkpoint.directory import huggingface_directory
    from megatron_patch.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(huggingface_directory(checkpoint))
    assert eos_token_ids(checkpoint, tokenizer) == (7, 8)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "release").mkdir()
    for name in (".metadata", "metadata.json"):
        (tmp_path / "release" / name).touch()
    assert eos_token_ids(tmp_path, tokenizer) == (tokenizer.eos,)


# -------------------------------------------------------------------------------------------------------------- reading


def test_a_text_file_has_a_prompt_in_each_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfone \r\n\n  \ntwo\n")
    assert read_prompts((), str(file), "p") == [Prompt("one ", {"p": "one "}), Prompt("two", {"p": "two"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"prompt": "x"}\n{"prompt": 1}\n',
            r"a\.jsonl:2: must be a JSON object with a string under 'prompt'",
        ),
        ("a.jsonl", b"\n[]\n", r"a\.jsonl:2: must be a JSON object"),
        ("a.jsonl", b"{\n", r"a\.jsonl:1: is no valid JSON"),
        ("a.jsonl", b'{"prompt": "x", "completion": "y"}\n', r"a\.jsonl:1: has the field 'completion' already"),
        ("a.txt", b"ok\n\xff\n", r"a\.txt:2: is not UTF-8"),
        ("a.txt", b"\n\n", "holds no prompt"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts((), str(tmp_path / name), "prompt")


def test_a_completion_keeps_the_prompts_fields() -> None:
    line = Completion(Prompt("天", {"id": 1, "p": "天"}), "\n气", 2, "eos").json()
    assert line == '{"id": 1, "p": "天", "completion": "\\n气", "num_tokens": 2, "finish_reason": "eos"}'


# ------------------------------------------------------------------------------------------------------------ arguments


@pytest.fixture
def valid(checkpoint: str) -> Callable[..., GenerateArgs]:
    return lambda **changes: GenerateArgs(**{"load": checkpoint, "prompt": ("x",), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(load="nowhere"), "--load nowhere: no such directory"),
        (dict(prompt=()), "give the prompts: either"),
        (dict(prompts_file="a.txt"), "give the prompts: either"),
        (dict(prompt=(), prompts_file="missing.txt"), "--prompts-file missing.txt: no such file"),
        (dict(prompt=(), prompts_file="a.csv"), r"must end in \.txt or \.jsonl"),
        (dict(output="no/such/place"), "must be a file in a directory that exists"),
        (dict(output=__file__), "exists; give --overwrite"),
        (dict(max_new_tokens=0), "--max-new-tokens 0: must be at least 1"),
        (dict(tensor_model_parallel_size=0), "--tensor-model-parallel-size 0"),
        (dict(top_k=3), "temperature=0 is greedy"),
    ],
)
def test_wrong_arguments_are_refused(valid: Callable[..., GenerateArgs], changes: dict[str, Any], message: str) -> None:
    valid().validate()
    with pytest.raises(ValueError, match=message):
        valid(**changes).validate()


def test_all_problems_are_told_at_once(valid: Callable[..., GenerateArgs]) -> None:
    with pytest.raises(ValueError, match=r"--batch-size 0.*\n.*top_p=2"):
        valid(batch_size=0, temperature=1.0, top_p=2.0).validate()


def test_a_hugging_face_directory_is_to_be_converted_first(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="convert it first: megatron-patch convert --source"):
        GenerateArgs(load=model.name_or_path, prompt=("x",)).validate()


def test_the_number_of_processes_must_fit_the_layout(checkpoint: str) -> None:
    argv = ["--load", checkpoint, "--prompt", "x", "--tensor-model-parallel-size", "2"]
    with pytest.raises(ValueError, match="takes 2 processes, not 3; choose --nproc-per-node 2"):
        command.check(argv, 3)
    with pytest.raises(ValueError, match="takes 2 processes, not 1"):
        command.main(argv)
