"""The model zoo: one small data file a lineage. `family_for` finds the family of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_patch.family import Family
from megatron_patch.models.baichuan import BAICHUAN
from megatron_patch.models.bloom import BLOOM
from megatron_patch.models.chatglm import CHATGLM
from megatron_patch.models.chatglm2 import CHATGLM2
from megatron_patch.models.deepseek import DEEPSEEK
from megatron_patch.models.deepseek_moe import DEEPSEEK_MOE
from megatron_patch.models.deepseek_v2 import DEEPSEEK_V2
from megatron_patch.models.falcon import FALCON, FALCON_40B
from megatron_patch.models.glm import GLM, GLM4
from megatron_patch.models.glm130b import GLM130B
from megatron_patch.models.glm_blocks import GLM_BLOCKS, GLM_BLOCKS_WRAPPED
from megatron_patch.models.gpt2 import GPT2
from megatron_patch.models.gptj import GPTJ
from megatron_patch.models.llama import LLAMA
from megatron_patch.models.mistral import MISTRAL
from megatron_patch.models.mixtral import MIXTRAL
from megatron_patch.models.opt import OPT
from megatron_patch.models.qwen import QWEN
from megatron_patch.models.qwen2 import QWEN2
from megatron_patch.models.qwen2_moe import QWEN2_MOE
from megatron_patch.models.qwen3 import QWEN3
from megatron_patch.models.qwen3_moe import QWEN3_MOE
from megatron_patch.models.starcoder import STARCODER
from megatron_patch.models.starcoder2 import STARCODER2

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    QWEN2,
    BLOOM,
    MIXTRAL,
    DEEPSEEK,
    GPT2,
    MISTRAL,
    QWEN3,
    STARCODER,
    STARCODER2,
    FALCON,
    FALCON_40B,
    BAICHUAN,
    QWEN,
    GPTJ,
    OPT,
    GLM,
    GLM4,
    CHATGLM,
    GLM_BLOCKS,
    GLM_BLOCKS_WRAPPED,
    GLM130B,
    CHATGLM2,
    QWEN2_MOE,
    QWEN3_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_MOE,
)


def family_for(config: Mapping[str, Any]) -> Family:
    """The family a Hugging Face config belongs to.

    Raises:
        ValueError: no family has this ``model_type``.
    """
    kind = config.get("model_type")
    found = [family for family in FAMILIES if kind in family.hf_types]
    if not found:
        known = ", ".join(dict.fromkeys(hf_type for family in FAMILIES for hf_type in family.hf_types))
        raise ValueError(f"config.json: model_type={kind!r} belongs to no known family; known: {known}")
    matching = [family for family in found if family.matches(config)]
    if len(matching) != 1:
        names = " or ".join(family.name for family in found)
        raise ValueError(
            f"config.json: model_type={kind!r} could be {names}, but its fields are not those of one of them"
        )
    return matching[0]
