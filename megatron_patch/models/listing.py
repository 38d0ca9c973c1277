"""The table of families: for `megatron-patch families`, for README.md, and for whoever asks in Python."""

from __future__ import annotations

from megatron_patch.family import Family
from megatron_patch.models import FAMILIES

HEADER = ("family", "model_type", "models", "what is special", "proven at", "against")


def rows() -> list[tuple[str, ...]]:
    """One row a family, under `HEADER`."""
    return [
        (one.name, ", ".join(one.hf_types), one.models, one.special, ", ".join(modes(one)), one.reference)
        for one in FAMILIES
    ]


def modes(family: Family) -> tuple[str, ...]:
    """Parallel modes in which tests/zoo compares it with its reference."""
    return ("TP", "SP", "PP", "EP", "ETP") if "num_moe_experts" in family.config else ("TP", "SP", "PP")


def markdown() -> str:
    """The table as README.md has it."""
    lines = [HEADER, ("---",) * len(HEADER)]
    lines += [(name, f"`{types.replace(', ', '`, `')}`", *others) for name, types, *others in rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
