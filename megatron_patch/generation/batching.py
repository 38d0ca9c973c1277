"""Continuous batching: rows that finish give their place to prompts that wait, while the others go on.

Newcomers are computed apart, in one pass over their prompts, and then join the key-value cache of the batch; from there
on all rows take one token a step. What becomes of a row does not depend on the others. Every rank knows every token
that was chosen, so all of them finish, fill and shrink alike without a word between them.

It knows rows of token ids, not where they come from, and no text. Shapes: B rows, S new tokens, V padded vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_patch.generation.forward import Forward
from megatron_patch.layers.cache import KVCache


@dataclass(eq=False)
class Row:
    """A prompt, and what has become of it."""

    index: int
    """Which of the prompts it is."""
    prompt: Sequence[int]
    limit: int
    """Most new tokens."""
    draws: Iterator[float] | None = None
    """Random numbers, one for each of them; None where nothing is random."""
    ids: list[int] = field(default_factory=list)
    """The new tokens so far."""
    logprobs: list[float] = field(default_factory=list)
    """Of each of them, if asked for."""


@dataclass(frozen=True)
class Work:
    """What holds for all rows of one call."""

    forward: Forward
    is_finished: Callable[[Row], bool]
    """Asked once after each new token of a row."""
    on_step: Callable[[int], None]
    """Told how many tokens a step made."""


def run(work: Work, rows: Iterable[Row], size: int) -> Iterator[Row]:
    """Compute rows, at most `size` at a time, and give them back as they finish; they begin in the order given."""
    waiting = deque(rows)
    batch = _Batch(work, min(size, len(waiting)))
    with work.forward.ready(), batch.cache.attached(work.forward.model):
        while waiting or batch.num_running:
            if waiting and batch.num_free >= min(_pays(size), len(waiting)):
                yield from batch.admit([waiting.popleft() for _ in range(min(batch.num_free, len(waiting)))])
            else:
                yield from batch.step()
            if not waiting:
                batch.shrink()


def _pays(size: int) -> int:
    """How many places must be free before newcomers are let in: a pass over one prompt costs nearly what one over
    several does, and a place that stays free is a row less in each step."""
    return max(size // 8, 1)


class _Batch:
    """Rows that take one token a step together, and places that are free."""

    def __init__(self, work: Work, size: int) -> None:
        device = next(work.forward.model.parameters()).device
        self._work = work
        self._rows: list[Row | None] = [None] * size
        self._tokens_B1 = torch.zeros(size, 1, dtype=torch.long, device=device)
        self._seen_BV = self._mark(self._tokens_B1)
        self.cache = KVCache(torch.zeros(size, dtype=torch.long, device=device))

    @property
    def num_free(self) -> int:
        """Places without a row."""
        return self._rows.count(None)

    @property
    def num_running(self) -> int:
        """Rows that are not finished."""
        return len(self._rows) - self.num_free

    def admit(self, newcomers: list[Row]) -> list[Row]:
        """Let rows begin, in free places; returns those that are finished by their first token."""
        tokens_BS, padding_B = _left_pad([row.prompt for row in newcomers], self._tokens_B1.device)
        cache, seen_BV = KVCache(padding_B), self._mark(tokens_BS)
        with cache.attached(self._work.forward.model):
            tokens_B1 = self._advance(newcomers, cache, tokens_BS, seen_BV)
        stay, finished = self._part(newcomers)
        if stay:
            places = [place for place, row in enumerate(self._rows) if row is None][: len(stay)]
            for place, index in zip(places, stay, strict=True):
                self._rows[place] = newcomers[index]
            here, there = (torch.tensor(one, device=tokens_BS.device) for one in (places, stay))
            self.cache.put(here, cache, there)
            self._tokens_B1[here] = tokens_B1[there]
            if self._seen_BV is not None:
                self._seen_BV[here] = seen_BV[there]
        return [newcomers[index] for index in finished]

    def step(self) -> list[Row]:
        """One more token for every row; returns those that are finished by it, whose places are free then."""
        self._tokens_B1 = self._advance(self._rows, self.cache, self._tokens_B1, self._seen_BV)
        finished = self._part(self._rows)[1]
        rows = [self._rows[place] for place in finished]
        if finished:
            self.cache.release(torch.tensor(finished, device=self._tokens_B1.device))
        for place in finished:
            self._rows[place] = None
        return rows

    def shrink(self) -> None:
        """Give up free places where they are half of all or more; only then, as it copies the cache."""
        if 0 < 2 * self.num_running <= len(self._rows):
            keep = [place for place, row in enumerate(self._rows) if row is not None]
            self._rows, index = [self._rows[place] for place in keep], torch.tensor(keep, device=self._tokens_B1.device)
            self.cache.reorder(index)
            self._tokens_B1 = self._tokens_B1[index]
            self._seen_BV = None if self._seen_BV is None else self._seen_BV[index]

    def _advance(self, rows: Sequence[Row | None], cache: KVCache, tokens_BS: Tensor, seen_BV: Tensor | None) -> Tensor:
        """Append the next token to each row, and return them [B, 1]."""
        draws_B = None
        if not self._work.forward.params.greedy:
            draws_B = torch.tensor([0.0 if row is None else next(row.draws) for row in rows])
        tokens_B, logprobs_B = self._work.forward.next_tokens(cache, tokens_BS, seen_BV, draws_B)
        if seen_BV is not None:
            seen_BV.scatter_(1, tokens_B[:, None], True)
        tokens = tokens_B.tolist()
        logprobs = [None] * len(tokens) if logprobs_B is None else logprobs_B.tolist()
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            if row is not None:
                row.ids.append(token)
                if logprob is not None:
                    row.logprobs.append(logprob)
        self._work.on_step(sum(row is not None for row in rows))
        return tokens_B[:, None]

    def _part(self, rows: Sequence[Row | None]) -> tuple[list[int], list[int]]:
        """Where rows are that go on, and where those that the last token finished."""
        places: tuple[list[int], list[int]] = ([], [])
        for place, row in enumerate(rows):
            if row is not None:
                places[self._work.is_finished(row)].append(place)
        return places

    def _mark(self, tokens_BS: Tensor) -> Tensor | None:
        """Which tokens each row holds [B, V], if there is a penalty on them."""
        forward = self._work.forward
        if forward.params.repetition_penalty == 1.0:
            return None
        shape = (tokens_BS.shape[0], forward.model.vocab_size)
        return torch.zeros(shape, dtype=torch.bool, device=tokens_BS.device).scatter_(1, tokens_BS, True)


def _left_pad(prompts: list[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, S] with the prompts at the right end, and how many slots [B] before each are padding."""
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    # Padded with the prompt's own first id: padding then adds nothing to the set of ids that a row holds.
    ids = [[prompt[0]] * missing + list(prompt) for prompt, missing in zip(prompts, padding, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(padding, device=device)
