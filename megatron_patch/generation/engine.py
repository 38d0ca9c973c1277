"""Continuing prompts of token ids with a GPTModel: one pass over the prompts, then one token a step with a KV cache.

Tensor-parallel ranks see the same gathered logits and choose alike. Pipeline stages pass hidden states on; the last one
chooses and tells the others. Every rank calls `generate` with the same arguments and gets the same answer.

It knows token ids and megatron-core's GPTModel: no text, no tokenizer, no arguments. Shapes: B rows, S new tokens, V
padded vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_patch.generation.params import SamplingParams
from megatron_patch.generation.sampling import choose, uniform_draws
from megatron_patch.layers.cache import KVCache


@dataclass(frozen=True)
class _Task:
    """What holds for all batches of one call."""

    model: GPTModel
    params: SamplingParams
    eos_token_ids: frozenset[int]
    max_new_tokens: int
    on_step: Callable[[int], None]


@torch.inference_mode()
def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int] = (),
    batch_size: int | None = None,
    on_step: Callable[[int], None] = lambda num_tokens: None,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        model: this rank's part, as `build_model` makes it.
        prompts: token ids; their lengths may differ.
        params: how to choose tokens; greedy by default.
        eos_token_ids: a row that chooses one of these is finished.
        batch_size: prompts computed at a time; all by default. What is generated does not depend on it.
        on_step: told after each step how many tokens were generated in it.

    Returns:
        The new ids of each prompt, in the order of the prompts; the id that finished a row is its last.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, more tokens than the model has positions for, or a
            parallel layout that cannot generate.
    """
    params = params or SamplingParams()
    _check_layout(model)
    _check_request(model, prompts, max_new_tokens, batch_size)
    task = _Task(model, params, frozenset(eos_token_ids), max_new_tokens, on_step)
    draws = None if params.greedy else uniform_draws(len(prompts), max_new_tokens, params.seed)
    # Prompts of like length share a batch, which spares padding; the longest first: memory runs out early, if ever.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    size = batch_size or max(len(order), 1)
    outputs: list[list[int]] = [[] for _ in prompts]
    with _evaluating(model), _last_token_only(model):
        for rows in (order[start : start + size] for start in range(0, len(order), size)):
            batch = _generate_batch(task, [prompts[row] for row in rows], None if draws is None else draws[rows])
            for row, ids in zip(rows, batch, strict=True):
                outputs[row] = ids
    return outputs


def _generate_batch(task: _Task, prompts: list[Sequence[int]], draws: Tensor | None) -> list[list[int]]:
    tokens_BS, padding_B = _left_pad(prompts, next(task.model.parameters()).device)
    cache = KVCache(padding_B, tokens_BS.shape[1] + task.max_new_tokens - 1)
    seen_BV = _mark_seen(tokens_BS, task.model.vocab_size) if task.params.repetition_penalty != 1.0 else None
    outputs: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the tensors belongs to
    running = set(rows)
    with cache.attached(task.model):
        for step in range(task.max_new_tokens):
            draws_B = None if draws is None else draws[rows, step]
            tokens_BS = _next_tokens(task, cache, tokens_BS, seen_BV, draws_B)[:, None]
            if seen_BV is not None:
                seen_BV.scatter_(1, tokens_BS, True)
            task.on_step(len(running))
            running -= _record(outputs, rows, running, tokens_BS[:, 0].tolist(), task.eos_token_ids)
            if not running:
                break
            if 2 * len(running) <= len(rows):  # only then: it copies the cache
                keep = [index for index, row in enumerate(rows) if row in running]
                cache.reorder(torch.tensor(keep, device=tokens_BS.device))
                tokens_BS, rows = tokens_BS[keep], [rows[index] for index in keep]
                seen_BV = None if seen_BV is None else seen_BV[keep]
    return outputs


def _record(
    outputs: list[list[int]], rows: list[int], running: set[int], tokens: list[int], eos: frozenset[int]
) -> set[int]:
    """Append each running row's token to its output; returns the rows that it finished."""
    for row, token in zip(rows, tokens, strict=True):
        if row in running:
            outputs[row].append(token)
    return {row for row, token in zip(rows, tokens, strict=True) if row in running and token in eos}


def _left_pad(prompts: list[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, S] with the prompts at the right end, and how many slots [B] before each are padding."""
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    # Padded with the prompt's own first id: padding then adds nothing to the set of ids that a row holds.
    ids = [[prompt[0]] * missing + list(prompt) for prompt, missing in zip(prompts, padding, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(padding, device=device)


def _mark_seen(tokens_BS: Tensor, vocab_size: int) -> Tensor:
    seen_BV = torch.zeros(tokens_BS.shape[0], vocab_size, dtype=torch.bool, device=tokens_BS.device)
    return seen_BV.scatter_(1, tokens_BS, True)


# ---------------------------------------------------------------------------------------------------- one pipeline step


def _next_tokens(
    task: _Task, cache: KVCache, tokens_BS: Tensor, seen_BV: Tensor | None, draws_B: Tensor | None
) -> Tensor:
    """The next token of each row [B], known to every rank."""
    output = _forward(task.model, cache, tokens_BS)
    if task.model.post_process:
        tokens_B = choose(output[:, -1], task.params, seen_BV, draws_B)
    else:
        dist.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
        tokens_B = tokens_BS.new_empty(tokens_BS.shape[0])
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(tokens_B, parallel_state.get_pipeline_model_parallel_last_rank(), group)
    return tokens_B


def _forward(model: GPTModel, cache: KVCache, tokens_BS: Tensor) -> Tensor:
    """Logits [B, 1, V] from the last stage, hidden states [S, B, H] from the others."""
    num_rows, num_new = tokens_BS.shape
    if not model.pre_process:
        config = model.config
        hidden_SBH = tokens_BS.new_empty((num_new, num_rows, config.hidden_size), dtype=config.pipeline_dtype)
        dist.recv(hidden_SBH, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden_SBH)
    with cache.step(num_new):
        return model(tokens_BS, cache.positions_SB().T, None, runtime_gather_output=True)


@contextmanager
def _evaluating(model: GPTModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _last_token_only(model: GPTModel) -> Iterator[None]:
    """Let the output layer see the last position alone: nobody asks for logits inside a prompt."""
    if not model.post_process:
        yield
        return
    hook = model.output_layer.register_forward_pre_hook(lambda _module, inputs: (inputs[0][-1:], *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


# --------------------------------------------------------------------------------------------------------------- checks


def _check_layout(model: GPTModel) -> None:
    config = model.config
    if config.sequence_parallel:
        raise ValueError("sequence_parallel=True cannot split the single token of a step; build the model without it")
    if config.virtual_pipeline_model_parallel_size is not None:
        value = config.virtual_pipeline_model_parallel_size
        raise ValueError(f"virtual_pipeline_model_parallel_size={value} is not supported in generation; choose None")


def _check_request(
    model: GPTModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int | None
) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    rotary = getattr(model, "rotary_pos_emb", None)
    limit = model.max_sequence_length if rotary is None else rotary.num_positions
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"prompt {index} is empty: give at least one token, such as the beginning-of-sequence token"
            )
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise ValueError(
                f"prompt {index} has ids {min(prompt)}..{max(prompt)}; the model's are 0..{model.vocab_size - 1}"
            )
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} that is more than the "
                f"{limit} positions of the model; choose a shorter prompt or fewer new tokens"
            )
