"""Configs as they stand on the hub are understood, or refused for a reason that is known.

tests/published/configs/all.json has about a hundred: some copied from public copies, most reconstructed from memory, so
a field may differ from the published one. They are here for the fields that occur together, not for their values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.models import family_for

CONFIGS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "published/configs/all.json").read_text())

REFUSED = {
    "qwen2.5-7b-1m": "dual_chunk_attention_config",
    "deepseek-r1-0528-qwen3-8b": "attn_factor",
    "opt-350m": "OPT-350M is not supported",
    "chatglm-6b-ptuning": "pre_seq_len",
}
"""Name -> what the message must say."""


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in REFUSED])
def test_a_published_config_is_understood(name: str) -> None:
    assert family_for(CONFIGS[name]).describe(CONFIGS[name]).num_layers > 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]):
        family_for(CONFIGS[name]).describe(CONFIGS[name])
