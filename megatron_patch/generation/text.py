"""Prompts in, completions out: encodes prompts, runs the engine, and makes text of what it generates.

    completions = generate_text(model, tokenizer, prompts, SamplingParams(), max_new_tokens=64, eos_token_ids=(2,))

The engine below knows ids only; this is the layer that knows a tokenizer. It knows no files and no command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_patch.generation.chat import Chat
from megatron_patch.generation.engine import generate, ignore
from megatron_patch.generation.params import SamplingParams
from megatron_patch.generation.prompts import ANSWER, LOGPROBS, Prompt
from megatron_patch.generation.stops import Stops, continuation
from megatron_patch.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """What a model made of a prompt."""

    text: str
    """What follows the prompt, before a stop string."""
    num_tokens: int
    """How many were generated: those of a stop string and the one that ends a text included."""
    finish_reason: str
    """``eos`` where the model ended the text, ``stop`` where a stop string did, ``length`` where the limit did."""
    tokens: list[str] | None = None
    """Each of them as the vocabulary spells it, if their probabilities were asked for."""
    logprobs: list[float] | None = None
    """Natural logarithm of the probability that the model gave to each, before temperature, penalty and filters."""

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        found = dict(zip(ANSWER, (self.text, self.num_tokens, self.finish_reason), strict=True))
        return found | ({} if self.tokens is None else dict(zip(LOGPROBS, (self.tokens, self.logprobs), strict=True)))


def generate_text(
    model: GPTModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    stop: Sequence[str] = (),
    chat: Chat | None = None,
    logprobs: bool = False,
    batch_size: int | None = None,
    parse_special_tokens: bool = False,
    on_step: Callable[[int], None] = ignore,
    on_finish: Callable[[Prompt, Completion], None] = ignore,
) -> list[Completion]:
    """Continue each prompt, or answer each conversation; see `engine.generate`.

    Args:
        max_new_tokens: of prompts that have no limit of their own.
        stop: strings that end every answer, in addition to a prompt's own.
        chat: needed for prompts that are conversations.
        on_finish: told of each prompt as it is finished.
    """
    ids = _encoded(tokenizer, prompts, chat, parse_special_tokens)
    kinds = {strings: Stops(tokenizer, strings) for strings in {(*stop, *prompt.stop) for prompt in prompts}}
    stops = [kinds[*stop, *prompt.stop] for prompt in prompts]
    found: dict[int, Completion] = {}

    def finish(row: int, new: list[int], probabilities: list[float]) -> None:
        text, stopped_by = stops[row].cut(continuation(tokenizer, ids[row], new))
        is_stopped = stopped_by is not None or stops[row].is_finished(ids[row], new)
        reason = "eos" if new[-1] in eos_token_ids else "stop" if is_stopped else "length"
        spelled = (tokenizer.hf.convert_ids_to_tokens(new), probabilities) if logprobs else ()
        found[row] = Completion(text, len(new), reason, *spelled)
        on_finish(prompts[row], found[row])

    generate(
        model,
        ids,
        params,
        max_new_tokens=[prompt.max_new_tokens or max_new_tokens for prompt in prompts],
        eos_token_ids=eos_token_ids,
        batch_size=batch_size,
        seeds=[_seed(prompt, params) for prompt in prompts],
        logprobs=logprobs,
        is_finished=lambda row, new: stops[row].is_finished(ids[row], new),
        on_step=on_step,
        on_finish=finish,
    )
    return [found[row] for row in range(len(prompts))]


def _encoded(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], chat: Chat | None, parse_special_tokens: bool
) -> list[list[int]]:
    if chat is None:
        return tokenizer.encode_batch([one.content for one in prompts], parse_special_tokens=parse_special_tokens)
    found = []
    for prompt in prompts:
        try:
            found.append(chat.encode(prompt.content))
        except ValueError as error:
            raise ValueError(f"{prompt.place}: {error}") from None
    return found


def _seed(prompt: Prompt, params: SamplingParams) -> tuple[int, int]:
    """Seed and stream of its draws: its own seed alone, or else all prompts' and its number."""
    return (params.seed, prompt.index) if prompt.seed is None else (prompt.seed, 0)
