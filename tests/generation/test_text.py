"""From prompts to text: the command's files, order, fields and refusals, and text equal to transformers'."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_patch.generation.arguments import GenerateArgs
from megatron_patch.generation.job import eos_token_ids
from megatron_patch.launch import generate as command
from megatron_patch.launch import main as front_door
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


SAMPLED = ["--temperature", "1", "--top-p", "0.9", "--logprobs", "--batch-size", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_every_format_and_layout_writes_the_same(
    model: torch.nn.Module, checkpoint: str, prompts_file: str, tmp_path: Path
) -> None:
    from megatron_patch.checkpoint.convert import convert
    from megatron_patch.checkpoint.opening import Wanted
    from megatron_patch.checkpoint.sharding import Layout

    convert(checkpoint, tmp_path / "legacy", Wanted(format="legacy", layout=Layout(2)))
    argv = ["--prompts-file", prompts_file, "--prompt-key", "question", "--max-new-tokens", "8", *SAMPLED]
    for name, load in (("torch_dist", checkpoint), ("huggingface", model.name_or_path)):
        assert command.main([*argv, "--load", load, "--output", str(tmp_path / name)]) == 0
    parallel = ["--nproc-per-node", "2", "--pipeline-model-parallel-size", "2", "--load", str(tmp_path / "legacy")]
    words = [
        sys.executable,
        "-m",
        "megatron_patch",
        "generate",
        *parallel,
        *argv,
        "--output",
        str(tmp_path / "legacy."),
    ]
    subprocess.run(words, check=True, env=ENVIRONMENT)
    first, *others = ([*map(rounded, lines(tmp_path / name))] for name in ("torch_dist", "huggingface", "legacy."))
    assert others == [first, first]
    assert all(len(one["tokens"]) == len(one["logprobs"]) == one["num_tokens"] for one in first)


def rounded(answer: dict[str, Any]) -> dict[str, Any]:
    return {**answer, "logprobs": [round(one, 3) for one in answer["logprobs"]]}


DYING = """
import os, signal, sys
from megatron_patch.generation.answers import Answers
from megatron_patch.launch.generate import main

def dying(self, value, append=Answers._append):
    if len(self.done) == 3:
        self._file.write(b'[4, {"completion": "to')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, value)

Answers._append = dying
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_to_the_same_bytes(
    checkpoint: str, prompts_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--load", checkpoint, "--prompts-file", prompts_file, "--prompt-key", "question", "--max-new-tokens", "9"]
    argv += [*SAMPLED, "--output"]
    assert command.main([*argv, str(tmp_path / "whole")]) == 0
    output = tmp_path / "out.jsonl"
    killed = subprocess.run([sys.executable, "-c", DYING, *argv, str(output)], env=ENVIRONMENT)
    assert killed.returncode == -signal.SIGKILL and not output.exists()
    with pytest.raises(ValueError, match="begun with something else: seed was 1234, now is 1. --overwrite begins anew"):
        command.main([*argv, str(output), "--seed", "1"])
    capsys.readouterr()
    assert command.main([*argv, str(output)]) == 0
    assert "3 prompts (2 were there already)" in capsys.readouterr().err
    assert output.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_prompt_that_is_too_long_is_named_by_its_line(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("short\n\nlong\n" + "long " * 2000 + "\n")
    flags = ("--prompts-file", f"{tmp_path}/p.txt", "--max-new-tokens", "4")
    assert front_door.main(["generate", "--load", checkpoint, *flags]) == 2
    assert "p.txt:4: the prompt has " in (told := capsys.readouterr().err) and "positions of the model; choose" in told


def test_a_lines_own_limit_stop_and_seed_count(checkpoint: str, tmp_path: Path) -> None:
    def answers(*prompts: dict[str, Any], flags: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        file, output = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
        file.write_text("".join(json.dumps({"prompt": TEXTS[0], **one}) + "\n" for one in prompts))
        argv = ["--load", checkpoint, "--prompts-file", str(file), "--output", str(output), "--overwrite"]
        assert command.main([*argv, "--max-new-tokens", "16", *flags]) == 0
        return lines(output)

    (whole,) = answers({})
    assert whole["finish_reason"] == "length" and whole["num_tokens"] == 16
    stop = whole["completion"][5:7]
    before = whole["completion"].partition(stop)[0]
    short, stopped = answers({"max_new_tokens": 3}, {"stop": stop})
    assert (short["num_tokens"], short["finish_reason"]) == (3, "length")
    assert whole["completion"].startswith(short["completion"])
    assert (stopped["completion"], stopped["finish_reason"]) == (before, "stop") and stopped["num_tokens"] < 16
    assert stopped["stop"] == stop
    for one in answers({}, {"stop": ["never there"]}, flags=("--stop", "nor this", "--stop", stop)):
        assert (one["completion"], one["finish_reason"]) == (before, "stop")
    drawn = answers({"seed": 3}, {"seed": 3}, {"seed": 4}, {}, flags=("--temperature", "2"))
    assert drawn[0]["completion"] == drawn[1]["completion"]
    assert len({one["completion"] for one in drawn}) == 3


def test_an_answer_ends_where_the_template_ends_a_turn_too(model: torch.nn.Module) -> None:
    from megatron_patch.generation.job import _Job

    args = GenerateArgs(load=model.name_or_path, prompt=("x",))
    assert _Job.of(args).ends == (7, 8)
    assert _Job.of(replace(args, chat=True, chat_template="llama2")).ends == (7, 8, 2)


def test_a_chat_is_answered_by_its_template(
    model: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer, template = AutoTokenizer.from_pretrained(model.name_or_path), tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = [dict(role="user", content="Hi"), dict(role="assistant", content="ok"), dict(role="user", content="x")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ({"said": turns}, {"prompt": "Hi"})))
    argv = ["--load", model.name_or_path, "--prompts-file", str(tmp_path / "p.jsonl"), "--max-new-tokens", "6"]
    argv += ["--chat", "--chat-template", str(template), "--messages-key", "said", "--system", "Be kind."]
    assert command.main([*argv, "--output", str(tmp_path / "o.jsonl")]) == 0
    asked = [[dict(role="system", content="Be kind."), *said] for said in (turns, turns[:1])]
    options = dict(chat_template=template.read_text(), add_generation_prompt=True, return_dict=False)
    ids = [tokenizer.apply_chat_template(said, **options) for said in asked]
    answers = theirs(model, Request(prompts=ids, max_new_tokens=6), eos_token_id=[7, 8, tokenizer.eos_token_id])
    for found, before, after in zip(lines(tmp_path / "o.jsonl"), ids, answers, strict=True):
        whole, known = (tokenizer.decode(one, skip_special_tokens=True) for one in (before + after, before))
        assert known + found["completion"] == whole and found["num_tokens"] == len(after)
    assert command.main([*argv[:2], "--prompt", "Hi", *argv[4:]]) == 0
    assert f"\nHi\n\n{lines(tmp_path / 'o.jsonl')[1]['completion']}\n" in capsys.readouterr().out


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
    assert eos_token_ids(huggingface_directory(checkpoint), tokenizer) == (7, 8)
    assert eos_token_ids(tmp_path, tokenizer) == (tokenizer.eos,)


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
        (dict(stop=("a", "")), "--stop: must not be empty"),
        (dict(logprobs=True), "--logprobs: is written to --output FILE"),
        (dict(system="Be kind."), "--system is for --chat, which is not given"),
        (dict(chat_template="chatml"), "--chat-template is for --chat"),
        (dict(chat=True, chat_template="nowhere"), "--chat-template 'nowhere': no such file or name; give tokenizer"),
        (dict(chat=True, parse_special_tokens=True), "--parse-special-tokens is not for --chat"),
        (dict(hf_config="nowhere"), "--hf-config nowhere: no directory with a config.json"),
        (dict(tokenizer_model="nowhere"), "--tokenizer-model nowhere: no such directory"),
    ],
)
def test_wrong_arguments_are_refused(valid: Callable[..., GenerateArgs], changes: dict[str, Any], message: str) -> None:
    valid().validate()
    with pytest.raises(ValueError, match=message):
        valid(**changes).validate()


def test_all_problems_are_told_at_once(valid: Callable[..., GenerateArgs]) -> None:
    with pytest.raises(ValueError, match=r"--batch-size 0.*\n.*top_p=2"):
        valid(batch_size=0, temperature=1.0, top_p=2.0).validate()


def test_the_number_of_processes_must_fit_the_layout(checkpoint: str) -> None:
    argv = ["--load", checkpoint, "--prompt", "x", "--tensor-model-parallel-size", "2"]
    with pytest.raises(ValueError, match="takes 2 processes, not 3; choose --nproc-per-node 2"):
        command.check(argv, 3)
    with pytest.raises(ValueError, match="takes 2 processes, not 1"):
        command.main(argv)
