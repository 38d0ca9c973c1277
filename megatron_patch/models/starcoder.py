"""StarCoder: GPT-2 with ordinary matrices, and one key and value for all heads (Li et al. 2023, section 5.1)."""

from __future__ import annotations

from dataclasses import replace

from megatron_patch.family import anything, only
from megatron_patch.models.gpt2 import GPT2
from megatron_patch.weights import Copy

STARCODER = replace(
    GPT2,
    name="starcoder",
    models="StarCoder",
    hf_types=("gpt_bigcode",),
    special="learned positions, multi-query attention, LayerNorm, biases, GELU",
    config={**GPT2.config, "num_query_groups": lambda hf: 1 if hf.get("multi_query", True) else hf["n_head"]},
    activation=lambda hf: hf.get("activation_function", "gelu_pytorch_tanh"),
    swaps=(),
    inert={
        **GPT2.inert,
        **only(False, "scale_attn_by_inverse_layer_idx"),
        **anything("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
        **anything("num_key_value_heads"),  # transformers derives it from multi_query
        # how the published code ran it
        **anything("inference_runner", "validate_runner_input", "pre_allocate_kv_cache"),
        **anything("max_batch_size", "max_sequence_length", "pad_key_length"),
    },
    # All queries before one key and one value, or each head's three together: both as in megatron-core.
    weights=tuple(Copy(rule.internal, *rule.hf) for rule in GPT2.weights),
)
