"""What the tests of generation share: prompts, transformers' own answers, and the engine as a function for the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.model.layouts import Layout, load_tiny
from tests.tiny import tokens

LENGTHS = (3, 11, 1, 7, 16, 5, 9, 2)
PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
NEW = 40
LIMITS = (9, 2, 14, 1, 5, 12, 3, 7)
"""New tokens of each prompt: with three rows at a time, some finish beside others that go on, and one at once."""


@dataclass(frozen=True)
class Request:
    """One call of the engine."""

    prompts: Sequence[Sequence[int]] = tuple(map(tuple, PROMPTS))
    max_new_tokens: int | Sequence[int] = NEW
    params: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def ours(rank: int, world_size: int, roots: dict[str, str], layout: Layout, *requests: Request) -> dict[str, list[Any]]:
    """For each checkpoint, the engine's answers to the requests."""
    answers = {}
    for name, root in roots.items():
        model = load_tiny(root, layout)
        answers[name] = [answer(model, request) for request in requests]
    return answers


def answer(model: torch.nn.Module, request: Request) -> list[list[int]]:
    from megatron_patch.generation.engine import generate
    from megatron_patch.generation.params import SamplingParams

    params = SamplingParams(**request.params)
    return generate(model, request.prompts, params, max_new_tokens=request.max_new_tokens, **request.options)


def theirs(model: torch.nn.Module, request: Request, **options: Any) -> list[list[int]]:
    """transformers' greedy answers, one prompt at a time, so without any padding."""
    from transformers import GenerationConfig

    settings = dict(max_new_tokens=request.max_new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    # Not as an argument: what that leaves out, such as the end of text, would come from the model's own.
    model.generation_config = GenerationConfig(**{**settings, **options})
    return [_one(model, prompt) for prompt in request.prompts]


def _one(model: torch.nn.Module, prompt: Sequence[int]) -> list[int]:
    # A dynamic rotary embedding keeps the frequencies of the longest text so far until it sees a short one.
    model(torch.tensor([[0]]))
    ids = torch.tensor([list(prompt)])
    return model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist()
