"""How likely texts are to a model, and whether they are what it would say: asked in text, answered in numbers.

Every rank asks the same and is told the same. It knows no tasks and no command line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_patch.evaluation.arguments import ScoringArgs
from megatron_patch.evaluation.continuations import Encoding, Pair, row
from megatron_patch.evaluation.loading import Opened, loaded, open_checkpoint
from megatron_patch.evaluation.scoring import Scores, score
from megatron_patch.evaluation.windows import Row, sums
from megatron_patch.progress import Progress


@dataclass(frozen=True)
class Judge:
    """A model that is asked about texts."""

    model: GPTModel
    opened: Opened
    encoding: Encoding
    micro_batch_size: int

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that speaks."""
        return dist.get_rank() == 0

    def continuations(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Of each continuation log p given its context, in nats, and whether each of its tokens is the likeliest."""
        encoded = self.encoding.pairs(pairs)
        rows = [row(*ids, self.opened.seq_length) for ids in encoded]
        cut = sum(len(one.ids) < sum(map(len, ids)) for one, ids in zip(rows, encoded, strict=True))
        if cut and self.is_first:
            length = f"--seq-length {self.opened.seq_length}"
            print(
                f"evaluate: the beginning of {cut:,} of {len(rows):,} contexts is left out, {length}", file=sys.stderr
            )
        scores = self._score(rows)
        found = zip(scores.negative_log_likelihood.tolist(), scores.greedy.tolist(), strict=True)
        return [(-value, greedy) for value, greedy in found]

    def whole(self, texts: Sequence[str]) -> list[float]:
        """log p of each text, in nats; longer ones are scored window by window."""
        rows = [list(self.encoding.windows(text, self.opened.seq_length)) for text in texts]
        found = self._score([one for windows in rows for one in windows]).negative_log_likelihood
        return (-sums(found, rows)).tolist()

    def _score(self, rows: Sequence[Row]) -> Scores:
        if rows:
            self.opened.check_ids(max(int(np.max(one.ids)) for one in rows), "what is asked")
        with Progress("evaluate", sum(one.counts for one in rows), "tokens", quiet=not self.is_first) as progress:
            return score(self.model, rows, micro_batch_size=self.micro_batch_size, on_batch=progress)


@contextmanager
def judge(args: ScoringArgs, opened: Opened | None = None, *, parse_special_tokens: bool = False) -> Iterator[Judge]:
    """A checkpoint, ready to be asked, in the layout that the arguments want."""
    opened = opened or open_checkpoint(args)
    encoding = Encoding.of(opened.tokenizer, parse_special_tokens=parse_special_tokens)
    with loaded(args, opened) as model:
        yield Judge(model, opened, encoding, args.micro_batch_size)
