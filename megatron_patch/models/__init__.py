"""The model zoo: one small data file a lineage. `family_for` finds the family of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_patch.family import Family
from megatron_patch.models.deepseek import DEEPSEEK
from megatron_patch.models.llama import LLAMA
from megatron_patch.models.mixtral import MIXTRAL

FAMILIES: tuple[Family, ...] = (LLAMA, MIXTRAL, DEEPSEEK)


def family_for(config: Mapping[str, Any]) -> Family:
    """The family a Hugging Face config belongs to.

    Raises:
        ValueError: no family has this ``model_type``.
    """
    by_type = {hf_type: family for family in FAMILIES for hf_type in family.hf_types}
    kind = config.get("model_type")
    if kind not in by_type:
        raise ValueError(f"config.json: model_type={kind!r} belongs to no known family; known: {', '.join(by_type)}")
    return by_type[kind]
