"""How tokens are chosen, as a plain record. It imports no torch, so that the command line can have it at once."""

from __future__ import annotations

from dataclasses import dataclass

_MAX_TEMPERATURE = 100.0  # logits of padded ids are the dtype's minimum: divided by at most this, they stay impossible


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The default is greedy: the most likely token."""

    temperature: float = 0.0
    """Logits are divided by it; 0 is greedy."""

    top_k: int = 0
    """Draw from this many of the most likely tokens; 0 draws from all."""

    top_p: float = 1.0
    """Draw from the smallest set of likely tokens whose probabilities reach this sum; 1 draws from all."""

    repetition_penalty: float = 1.0
    """Logits of tokens that the row already holds are divided (positive) or multiplied (negative) by it; 1 is none."""

    seed: int = 1234
    """Of the random draws."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= _MAX_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature} must lie in 0..{_MAX_TEMPERATURE:g}; 0 is greedy, 1 the model's own"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; choose 0 (all tokens) or a number of tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must lie above 0 and at most at 1; choose 1 for all tokens")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be positive and finite; choose 1 for none"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must lie in 0..2^63-1")
        if self.greedy and (self.top_k or self.top_p < 1.0):
            raise ValueError(
                f"temperature=0 is greedy: top_k={self.top_k} and top_p={self.top_p} would do nothing; "
                "choose a temperature above 0, or leave them out"
            )

    @property
    def greedy(self) -> bool:
        """Whether nothing is random."""
        return self.temperature == 0.0
