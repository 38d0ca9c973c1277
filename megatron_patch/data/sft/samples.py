"""A sample: token ids, and which of them are to be learned. It knows neither text nor where samples come from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Sample(NamedTuple):
    """One conversation as the model sees it."""

    ids: np.ndarray
    """int32 [n]: token ids."""
    mask: np.ndarray
    """bool [n]: True where token i is to be learned, that is where it is the label of the token before it."""

    @property
    def supervised(self) -> int:
        """Tokens to be learned. The first token has none before it that could predict it."""
        return int(np.count_nonzero(self.mask[1:]))


def sample(ids: np.ndarray, mask: np.ndarray) -> Sample:
    """A sample of any kind of arrays; ValueError if they are not of one length."""
    if len(ids) != len(mask):
        raise ValueError(f"a sample of {len(ids)} ids cannot have a mask of {len(mask)}")
    return Sample(np.asarray(ids, np.int32), np.asarray(mask, bool))
