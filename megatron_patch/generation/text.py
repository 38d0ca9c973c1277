"""Prompts in, text out: reads prompts, encodes them, runs the engine, decodes and writes, in the order of the prompts.

The engine below knows ids only; this is the layer that knows a tokenizer and files. It knows no parallel layout and no
command line.
"""

from __future__ import annotations

import codecs
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from megatron.core.models.gpt.gpt_model import GPTModel
from tqdm import tqdm

from megatron_patch.checkpoint.directory import huggingface_directory, locate, read_json, write_text
from megatron_patch.generation.engine import generate
from megatron_patch.generation.params import SamplingParams
from megatron_patch.tokenizer import Tokenizer

_SECONDS_BETWEEN_LINES = 10.0
_OUTPUT_KEYS = ("completion", "num_tokens", "finish_reason")


@dataclass(frozen=True)
class Prompt:
    """A prompt and what came with it."""

    text: str
    fields: dict[str, Any]
    """The whole JSON object it stood in, or just the text under its key."""


@dataclass(frozen=True)
class Completion:
    """What a model made of a prompt."""

    prompt: Prompt
    text: str
    """What follows the prompt."""
    num_tokens: int
    finish_reason: str
    """``eos`` where the model ended the text, ``length`` where the limit did."""

    def json(self) -> str:
        """One line: the prompt's fields, then ours."""
        values = (self.text, self.num_tokens, self.finish_reason)
        return json.dumps({**self.prompt.fields, **dict(zip(_OUTPUT_KEYS, values, strict=True))}, ensure_ascii=False)


def generate_text(
    model: GPTModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    batch_size: int | None = None,
    parse_special_tokens: bool = False,
    on_step: Callable[[int], None] = lambda num_tokens: None,
) -> list[Completion]:
    """Continue each prompt; see `engine.generate`."""
    ids = tokenizer.encode_batch([prompt.text for prompt in prompts], parse_special_tokens=parse_special_tokens)
    outputs = generate(
        model,
        ids,
        params,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        batch_size=batch_size,
        on_step=on_step,
    )
    return [
        Completion(prompt, _continuation(tokenizer, before, after), len(after), _reason(after, eos_token_ids))
        for prompt, before, after in zip(prompts, ids, outputs, strict=True)
    ]


def _continuation(tokenizer: Tokenizer, before: list[int], after: list[int]) -> str:
    # Decoded together with the prompt: some tokenizers drop the space that the first word of a text begins with.
    known, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (before, before + after))
    return whole[len(known) :] if whole.startswith(known) else tokenizer.decode(after, skip_special_tokens=True)


def _reason(ids: list[int], eos_token_ids: Sequence[int]) -> str:
    return "eos" if ids[-1] in eos_token_ids else "length"


# ---------------------------------------------------------------------------------------------------------------- files


def read_prompts(texts: Sequence[str], file: str | None, key: str) -> list[Prompt]:
    """The prompts of the command line, or those of a .txt (a line each) or .jsonl file; empty lines are no prompts.

    Raises:
        ValueError: a line that is no JSON object with a string under `key`, or has a field that the output needs; it
            names file and line.
    """
    if file is None:
        return [Prompt(text, {key: text}) for text in texts]
    parse = _parse_json if file.endswith(".jsonl") else _parse_text
    lines = Path(file).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    prompts = [parse(line, key, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"{file} holds no prompt")
    return prompts


def _parse_text(line: bytes, key: str, place: str) -> Prompt:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: is not UTF-8: {error}") from None
    return Prompt(text, {key: text})


def _parse_json(line: bytes, key: str, place: str) -> Prompt:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{place}: is no valid JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        raise ValueError(f"{place}: must be a JSON object with a string under {key!r}")
    if taken := [name for name in _OUTPUT_KEYS if name in value]:
        raise ValueError(f"{place}: has the field {taken[0]!r} already, which the output writes; rename it")
    return Prompt(value[key], value)


def eos_token_ids(root: str | Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends a text: `eos_token_id` of the checkpoint's generation_config.json, else of its tokenizer."""
    file = huggingface_directory(locate(root)[0]) / "generation_config.json"
    value = read_json(file).get("eos_token_id") if file.is_file() else None
    if value is None:
        value = [] if tokenizer.eos is None else tokenizer.eos
    return tuple(value) if isinstance(value, list) else (value,)


def show(completions: Sequence[Completion], output: str | None) -> None:
    """Write the completions to a file as JSON lines, or print them."""
    if output is not None:
        write_text(Path(output), "".join(one.json() + "\n" for one in completions))
        return
    for number, one in enumerate(completions, 1):
        rule = f"--- {number} of {len(completions)}: {one.num_tokens} tokens, {one.finish_reason} "
        print(f"{rule:-<100}\n{one.prompt.text}{one.text}")


class Progress:
    """Counts tokens: a bar on a terminal, elsewhere a plain line every ten seconds; a summary at the end."""

    def __init__(self, most: int, quiet: bool = False) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._quiet, self._most, self._done = quiet, most, 0
        off = quiet or not self._is_terminal
        self._bar = tqdm(total=most, unit=" tokens", desc="generate", disable=off, leave=False)
        self._start = self._last = time.monotonic()

    def __call__(self, num_tokens: int) -> None:
        self._done += num_tokens
        self._bar.update(num_tokens)
        now = time.monotonic()
        if not self._is_terminal and now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last, rate = now, self._done / (now - self._start)
            left = (self._most - self._done) / rate
            self._say(f"{self._done} of at most {self._most} tokens, {rate:.1f} tokens/s, at most {left:.0f} s left")

    def close(self) -> None:
        """Clear the bar and print how much was done how fast."""
        self._bar.close()
        seconds = time.monotonic() - self._start
        self._say(f"{self._done} tokens in {seconds:.1f} s, {self._done / seconds:.1f} tokens/s")

    def _say(self, text: str) -> None:
        if not self._quiet:
            print(f"generate: {text}", file=sys.stderr, flush=True)
