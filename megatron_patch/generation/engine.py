"""Continuing prompts of token ids with a GPTModel: one pass over each prompt, then one token a step with a KV cache.

Every rank calls `generate` with the same arguments and gets the same answer. batching.py says which rows share a step,
forward.py what a step is.

It knows token ids and megatron-core's GPTModel: no text, no tokenizer, no arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_patch.generation.batching import Row, Work, run
from megatron_patch.generation.forward import Forward
from megatron_patch.generation.params import SamplingParams
from megatron_patch.generation.sampling import uniform_draws

Prompts = Sequence[Sequence[int]]


class PromptError(ValueError):
    """One of the prompts cannot be continued; raised before anything is computed."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"prompt {index} {problem}")
        self.index, self.problem = index, problem


def never(index: int, ids: Sequence[int]) -> bool:
    """No row ends before its time."""
    return False


def ignore(*told: object) -> None:
    """What is told is of no interest."""


@torch.inference_mode()
def generate(
    model: GPTModel,
    prompts: Prompts,
    params: SamplingParams | None = None,
    *,
    max_new_tokens: int | Sequence[int],
    eos_token_ids: Sequence[int] = (),
    batch_size: int | None = None,
    seeds: Sequence[tuple[int, int]] | None = None,
    logprobs: bool = False,
    is_finished: Callable[[int, Sequence[int]], bool] = never,
    on_step: Callable[[int], None] = ignore,
    on_finish: Callable[[int, list[int], list[float]], None] = ignore,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        model: this rank's part, as `build_model` makes it.
        prompts: token ids; their lengths may differ.
        params: how to choose tokens; greedy by default.
        max_new_tokens: of all prompts, or of each.
        eos_token_ids: a row that chooses one of these is finished.
        batch_size: prompts computed at a time; all by default. What is generated does not depend on it.
        seeds: seed and stream of each prompt's random draws; by default the seed of `params` and the prompt's index.
        logprobs: find out the probability that the model itself, before `params`, gave to each new token.
        is_finished: asked after each new token of a prompt, by its index and all its new ids, whether they are enough.
            It must answer alike on every rank.
        on_step: told after each step how many tokens were generated in it.
        on_finish: told of each prompt that is finished its index, its new ids, and the natural logarithms of their
            probabilities (none without `logprobs`).

    Returns:
        The new ids of each prompt, in the order of the prompts; the id that finished a row is its last.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, more tokens than the model has positions for, or a
            parallel layout that cannot generate.
    """
    params = params or SamplingParams()
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    _check_layout(model)
    _check_counts(prompts, max_new_tokens, batch_size)
    _check_prompts(model, prompts, limits)
    eos = frozenset(eos_token_ids)

    def is_done(row: Row) -> bool:
        return row.ids[-1] in eos or len(row.ids) == row.limit or is_finished(row.index, row.ids)

    rows = [Row(index, prompt, limit) for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))]
    if not params.greedy:
        _give_draws(rows, seeds or [(params.seed, row.index) for row in rows])
    # The longest first: prompts that are computed together are of like length, and memory runs out early, if ever.
    order = sorted(rows, key=lambda row: -len(row.prompt) - row.limit)
    work = Work(Forward(model, params, logprobs), is_done, on_step)
    with closing(run(work, order, batch_size or len(rows))) as finished:  # the model is itself again, whatever happens
        for row in finished:
            on_finish(row.index, row.ids, row.logprobs)
    return [row.ids for row in rows]


def _give_draws(rows: Sequence[Row], seeds: Sequence[tuple[int, int]]) -> None:
    for row, seed in zip(rows, seeds, strict=True):
        row.draws = uniform_draws(*seed)


# --------------------------------------------------------------------------------------------------------------- checks


def _check_layout(model: GPTModel) -> None:
    config = model.config
    if config.sequence_parallel:
        raise ValueError("sequence_parallel=True cannot split the single token of a step; build the model without it")
    if config.virtual_pipeline_model_parallel_size is not None:
        value = config.virtual_pipeline_model_parallel_size
        raise ValueError(f"virtual_pipeline_model_parallel_size={value} is not supported in generation; choose None")


def _check_counts(prompts: Prompts, max_new_tokens: int | Sequence[int], batch_size: int | None) -> None:
    counts = {"batch_size": batch_size}
    if isinstance(max_new_tokens, int):
        counts["max_new_tokens"] = max_new_tokens
    elif len(max_new_tokens) != len(prompts):
        raise ValueError(
            f"max_new_tokens has {len(max_new_tokens)} numbers for {len(prompts)} prompts; give one for each"
        )
    else:
        counts |= {f"max_new_tokens[{index}]": value for index, value in enumerate(max_new_tokens)}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _check_prompts(model: GPTModel, prompts: Prompts, limits: Sequence[int]) -> None:
    rotary = getattr(model, "rotary_pos_emb", None)
    positions = model.max_sequence_length if rotary is None else rotary.num_positions
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not prompt:
            raise PromptError(index, "is empty: give at least one token, such as the beginning-of-sequence token")
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise PromptError(index, f"has ids {min(prompt)}..{max(prompt)}; the model's are 0..{model.vocab_size - 1}")
        if len(prompt) + limit > positions:
            raise PromptError(
                index,
                f"has {len(prompt)} tokens; with max_new_tokens={limit} that is more than the {positions} positions of "
                "the model; choose a shorter prompt or fewer new tokens",
            )
