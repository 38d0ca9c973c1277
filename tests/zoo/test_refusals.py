"""What a family does not honour is refused by name, never ignored."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_patch.models import family_for
from tests.zoo.cases import CASES

# Case, what is changed in its config.json, what the message must say.
REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("baichuan_7b", {"tie_word_embeddings": True}, "family baichuan does not honour tie_word_embeddings=True"),
    ("baichuan_13b", {"rope_theta": 1e6}, "family baichuan does not honour rope_theta=1000000.0"),
    ("baichuan_2-7b", {"num_key_value_heads": 4}, "family baichuan does not honour num_key_value_heads=4"),
    ("baichuan_2-13b", {"hidden_act": "relu6"}, "hidden_act='relu6' is not supported"),
    ("qwen_long", {"kv_channels": 8}, "kv_channels=8 must be hidden_size / num_attention_heads=6"),
    ("qwen_long", {"seq_length": None}, "the field 'seq_length' is missing"),
    ("qwen_plain", {"no_bias": False}, "family qwen does not honour no_bias=False"),
    ("qwen_plain", {"rotary_pct": 0.5}, "family qwen does not honour rotary_pct=0.5"),
    ("qwen_plain", {"scale_attn_weights": False}, "family qwen does not honour scale_attn_weights=False"),
    ("qwen_plain", {"emb_dropout_prob": 0.1}, "family qwen does not honour emb_dropout_prob=0.1"),
    ("qwen_plain", {"use_cache_quantization": True}, "family qwen does not honour use_cache_quantization=True"),
    ("qwen_plain", {"quantization_config": {"bits": 4}}, "family qwen does not honour quantization_config"),
    ("qwen2", {"hidden_act": "tanh"}, "hidden_act='tanh' is not supported"),
    ("bloom", {"skip_bias_add_qkv": True}, "family bloom does not honour skip_bias_add_qkv=True"),
    ("mistral", {"attention_bias": True}, "family mistral does not honour attention_bias=True"),
    ("mistral", {"use_sliding_window": False}, "family mistral does not honour use_sliding_window=False"),
    ("mistral", {"num_key_value_heads": None}, "the field 'num_key_value_heads' is missing"),
    ("qwen3", {"mlp_bias": True}, "family qwen3 does not honour mlp_bias=True"),
    ("qwen3", {"use_sliding_window": True}, "the field 'sliding_window' is missing"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "family qwen3 does not honour layer_types="),
    ("starcoder2", {"mlp_type": "gated"}, "family starcoder2 does not honour mlp_type='gated'"),
    ("starcoder2", {"norm_type": "rms_norm"}, "family starcoder2 does not honour norm_type='rms_norm'"),
    ("starcoder2", {"embedding_dropout": 0.1}, "embedding_dropout=0.1 must equal residual_dropout=0.0"),
    ("gpt2", {"embd_pdrop": 0.1}, "embd_pdrop=0.1 must equal resid_pdrop=0.0"),
    ("gpt2", {"add_cross_attention": True}, "family gpt2 does not honour add_cross_attention=True"),
    ("gpt2", {"attention_head_type": "multiquery"}, "family gpt2 does not honour attention_head_type='multiquery'"),
    ("gpt2", {"activation_function": "tanh"}, "='tanh' is not supported; choose one of silu"),
    ("gpt_bigcode", {"add_cross_attention": True}, "family starcoder does not honour add_cross_attention=True"),
    ("gpt_bigcode", {"scale_attn_by_inverse_layer_idx": True}, "does not honour scale_attn_by_inverse_layer_idx=True"),
    ("chatglm2_chatglm2", {"multi_query_attention": False}, "multi_query_attention=False is not supported"),
    ("chatglm2_chatglm2", {"post_layer_norm": False}, "family chatglm2 does not honour post_layer_norm=False"),
    ("chatglm2_chatglm2", {"rmsnorm": False}, "family chatglm2 does not honour rmsnorm=False"),
    ("chatglm2_chatglm2", {"add_qkv_bias": False}, "family chatglm2 does not honour add_qkv_bias=False"),
    (
        "chatglm2_chatglm2",
        {"rope_ratio": 16, "padded_vocab_size": 65024},
        "rope_ratio=16 .* chatglm2-6b-32k",
    ),
    ("chatglm2_chatglm3", {"vocab_size": 199}, "vocab_size=199 must equal padded_vocab_size=200"),
    ("chatglm2_chatglm3", {"quantization_bit": 4}, "family chatglm2 does not honour quantization_bit=4"),
    ("chatglm2_chatglm3", {"pre_seq_len": 128}, "family chatglm2 does not honour pre_seq_len=128"),
    ("chatglm2_glm4", {"num_hidden_layers": 4}, "num_hidden_layers=4 must equal num_layers=3"),
    (
        "falcon",
        {"apply_residual_connection_post_layernorm": True},
        "not honour apply_residual_connection_post_layernorm",
    ),
    ("falcon", {"num_ln_in_parallel_attn": 2}, "family falcon does not honour num_ln_in_parallel_attn=2"),
    ("falcon_eleven", {"parallel_attn": False}, "parallel_attn=False is not supported with new_decoder_architecture"),
    ("falcon_forty", {"parallel_attn": False}, "parallel_attn=False is not supported with new_decoder_architecture"),
    ("falcon_multi_head_biased", {"num_kv_heads": 2}, "num_kv_heads=2 must equal num_attention_heads=6"),
    ("gptj", {"rotary_dim": None}, "the field 'rotary_dim' is missing"),
    ("gptj", {"rotary_dim": 8}, "rotary_dim=8 is not supported; choose an even number up to 6"),
    ("gptj", {"rotary_dim": 3}, "rotary_dim=3 is not supported"),
    ("gptj", {"scale_attn_weights": False}, "family gptj does not honour scale_attn_weights=False"),
    ("gptj", {"embd_pdrop": 0.1}, "embd_pdrop=0.1 must equal resid_pdrop=0.0"),
    ("opt", {"do_layer_norm_before": False}, "family opt does not honour do_layer_norm_before=False"),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16 must equal hidden_size=48"),
    ("opt", {"_remove_final_layer_norm": True}, "family opt does not honour _remove_final_layer_norm=True"),
    ("opt", {"layerdrop": 0.1}, "family opt does not honour layerdrop=0.1"),
    ("glm", {"mlp_bias": True}, "family glm does not honour mlp_bias=True"),
    ("glm", {"head_dim": None}, "the field 'head_dim' is missing"),
    ("glm4", {"use_sliding_window": True}, "family glm4 does not honour use_sliding_window=True"),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope' is not supported"),
    ("llama", {"rope_interleaved": True}, "family llama does not honour rope_interleaved=True"),
    ("mixtral", {"output_router_logits": True}, "family mixtral does not honour output_router_logits=True"),
    ("mixtral", {"router_jitter_noise": 0.1}, "family mixtral does not honour router_jitter_noise=0.1"),
    ("mixtral", {"num_local_experts": None}, "the field 'num_local_experts' is missing"),
    ("qwen2_moe", {"use_sliding_window": True}, "family qwen2-moe does not honour use_sliding_window=True"),
    ("qwen2_moe", {"layer_types": ["sliding_attention"] * 4}, "family qwen2-moe does not honour layer_types="),
    ("qwen2_moe", {"output_router_logits": True}, "family qwen2-moe does not honour output_router_logits=True"),
    ("qwen3_moe", {"use_sliding_window": True}, "family qwen3-moe does not honour use_sliding_window=True"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "not honour shared_expert_intermediate_size=8"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "family deepseek does not honour scoring_func='softmax'"),
    ("deepseek_v3", {"norm_topk_prob": False}, "family deepseek does not honour norm_topk_prob=False"),
    ("deepseek_v3", {"topk_group": 3}, "num_experts_per_tok=4 must be twice topk_group=3"),
    ("deepseek_v3", {"attention_bias": True}, "family deepseek does not honour attention_bias=True"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' .* greedy or group_limited_greedy"),
    ("deepseek_v2", {"norm_topk_prob": True}, "family deepseek-v2 does not honour norm_topk_prob=True"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "family deepseek-v2 does not honour scoring_func='sigmoid'"),
    ("deepseek_v2", {"mlp_bias": True}, "family deepseek-v2 does not honour mlp_bias=True"),
    ("deepseek_moe_base", {"scoring_func": "sigmoid"}, "family deepseek-moe does not honour scoring_func='sigmoid'"),
    ("deepseek_moe_base", {"mlp_bias": True}, "family deepseek-moe does not honour mlp_bias=True"),
)


@pytest.mark.parametrize("name", CASES)
def test_an_unknown_field_is_refused_by_name(name: str) -> None:
    config = {**CASES[name].config, "flux_capacitor": 1.21}
    with pytest.raises(ValueError, match="does not honour flux_capacitor=1.21"):
        family_for(config).describe(config)


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_a_value_that_is_not_honoured_is_refused_by_name(name: str, change: dict[str, Any], message: str) -> None:
    from megatron_patch.model import transformer_config

    config = {**CASES[name].config, **change}
    with pytest.raises(ValueError, match=message):
        transformer_config(family_for(config).describe(config))
