"""Tiny random models of every family of the zoo, each with the reference that it must equal.

A reference is the installed class of transformers, or a plain module under tests/reference for families whose weights
came with their own code. Every weight, norm and bias is random, so that none can be forgotten unnoticed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

LENGTH = 32


@dataclass(frozen=True)
class Case:
    """One tiny model."""

    config: dict[str, Any]
    """Its config.json."""

    reference: str = ""
    """``module.variant`` below tests.reference; nothing for transformers."""

    bound: float = 1e-5
    """Of the largest absolute difference of logits."""

    is_main: bool = False
    """Whether it stands for its family where one is enough: training, gradients at every layout."""

    @property
    def family(self) -> str:
        """Its family's name."""
        from megatron_patch.models import family_for

        return family_for(self.config).name

    @property
    def is_moe(self) -> bool:
        return any("expert" in name and value for name, value in self.config.items())

    @property
    def cached_keys_differ(self) -> bool:
        """Whether keys in a cache keep the frequencies of the step that made them, in its reference, too."""
        return self.config.get("rope_parameters", {}).get("rope_type") == "dynamic"

    @property
    def num_layers(self) -> int:
        return next(self.config[name] for name in ("num_hidden_layers", "num_layers", "n_layer") if name in self.config)

    def model(self, seed: int = 0) -> torch.nn.Module:
        """The reference with random weights, fp32, eval mode."""
        if self.reference:
            module, variant = self.reference.split(".")
            return import_module(f"tests.reference.{module}").make(variant, seed)
        return _of_transformers(self.config, seed)

    def ids(self, seed: int = 1, batch: int = 2, length: int = LENGTH) -> torch.Tensor:
        """Texts [batch, length] as this model takes them."""
        own = self.reference and getattr(import_module(f"tests.reference.{self.reference.split('.')[0]}"), "ids", None)
        if own:
            return own(self.reference.split(".")[1], batch, length, seed)
        return torch.randint(200, (batch, length), generator=torch.Generator().manual_seed(seed))

    def save(self, model: torch.nn.Module, place: Path) -> Path:
        """Write a Hugging Face directory."""
        if not self.reference:
            model.save_pretrained(place)
            return place
        from safetensors.torch import save_file

        place.mkdir(parents=True)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(self.config))
        return place


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The reference's logits."""
    output = model(ids)
    return getattr(output, "logits", output)


def next_logits_of(model: torch.nn.Module, ids: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """The reference's logits of what comes next in a generation [batch, vocabulary].

    A plain module may have a `next_logits` of its own: published generation may depend on where the prompt ended.
    """
    own = getattr(model, "next_logits", None)
    return own(ids, prompt_length) if own else logits_of(model, ids)[:, -1]


def _of_transformers(config: dict[str, Any], seed: int) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    saved = model.state_dict()  # what is not, such as rotary angles, is no weight
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if values.is_floating_point() and name in saved:
                values.normal_(*_spread(name, values))
    return model


def _spread(name: str, values: torch.Tensor) -> tuple[float, float]:
    is_norm = values.dim() == 1 and name.endswith("weight")
    # A router with clear preferences: no rounding error changes an expert.
    return (1.0 if is_norm else 0.0), (0.5 if "gate.weight" in name else 0.12)


def _transformers(model_type: str, base: dict[str, Any], **variants: dict[str, Any]) -> dict[str, Case]:
    """Cases of one model type: the base, and what each variant changes in it."""
    common = {"model_type": model_type, "vocab_size": 200, **base}
    cases = {model_type: Case(common, is_main=True)}
    return cases | {f"{model_type}_{name}": Case({**common, **one}) for name, one in variants.items()}


def _reference(module: str, main: str, without: tuple[str, ...] = (), **options: Any) -> dict[str, Case]:
    """Cases of a plain module: each of its variants, but for those that nobody published."""
    tiny = import_module(f"tests.reference.{module}").TINY
    return {
        f"{module}_{name}": Case(config, f"{module}.{name}", is_main=name == main, **options)
        for name, config in tiny.items()
        if name not in without
    }


_LLAMA: dict[str, Any] = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=64,
)

_NO_ENDS: dict[str, Any] = dict(bos_token_id=None, eos_token_id=None)

_GPT2: dict[str, Any] = dict(
    n_embd=48, n_layer=4, n_head=8, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_NO_ENDS
)

_OPT: dict[str, Any] = dict(
    hidden_size=48,
    ffn_dim=64,
    num_hidden_layers=4,
    num_attention_heads=8,
    max_position_embeddings=64,
    dropout=0.0,
    pad_token_id=None,
    **_NO_ENDS,
)

# Sizes of heads that are not hidden size over heads.
_GLM: dict[str, Any] = {
    **_LLAMA,
    **_NO_ENDS,
    "pad_token_id": None,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
}
_GLM_VARIANTS: dict[str, Any] = dict(
    unbiased_quarter=dict(
        attention_bias=False,
        num_key_value_heads=8,
        rms_norm_eps=1e-3,
        rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.25),
    ),
)

_DEEPSEEK: dict[str, Any] = {
    **_LLAMA,
    "num_key_value_heads": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.0,
    "rms_norm_eps": 1e-6,
}
_YARN: dict[str, Any] = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
_LATENT_YARN: dict[str, Any] = dict(rope_parameters={**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7})

CASES: dict[str, Case] = {
    **_transformers(
        "llama",
        _LLAMA,
        biases=dict(attention_bias=True, mlp_bias=True, head_dim=10),
        tied_mqa_odd=dict(tie_word_embeddings=True, num_key_value_heads=1, num_hidden_layers=3, rms_norm_eps=1e-3),
        yarn=dict(rope_parameters=_YARN),
        llama3=dict(rope_parameters={**_YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        dynamic=dict(rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=1e4), max_position_embeddings=24),
    ),
    **_transformers("qwen2", _LLAMA, tied=dict(tie_word_embeddings=True), odd=dict(num_hidden_layers=3)),
    **_transformers(
        "bloom",
        dict(hidden_size=48, n_layer=4, n_head=8, layer_norm_epsilon=1e-5),
        six_heads=dict(n_head=6, n_layer=3),
        late_residual=dict(apply_residual_connection_post_layernorm=True),
    ),
    **_transformers(
        "mistral",
        {**_LLAMA, "sliding_window": 8, "head_dim": 10},
        no_window=dict(sliding_window=None, head_dim=None, tie_word_embeddings=True, num_hidden_layers=3),
    ),
    **_transformers(
        "qwen3",
        {**_LLAMA, "head_dim": 10},
        window=dict(use_sliding_window=True, sliding_window=8, max_window_layers=2, num_key_value_heads=8),
        biased_tied_odd=dict(attention_bias=True, tie_word_embeddings=True, num_hidden_layers=3),
    ),
    **_transformers(
        "starcoder2",
        {**_LLAMA, "sliding_window": 8, **_NO_ENDS},
        unbiased=dict(use_bias=False, tie_word_embeddings=False, num_hidden_layers=3, norm_epsilon=1e-3),
        no_window=dict(sliding_window=None, num_key_value_heads=2, hidden_act="gelu"),
    ),
    **_transformers(
        "gpt2",
        _GPT2,
        wide_untied=dict(n_inner=80, tie_word_embeddings=False, activation_function="gelu", n_head=6, n_layer=3),
        depth_scaled=dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True, layer_norm_epsilon=1e-3),
        unscaled=dict(scale_attn_weights=False, activation_function="relu"),
    ),
    **_transformers(
        "gpt_bigcode",
        _GPT2,
        multi_head=dict(multi_query=False, n_head=6, n_layer=3),
        wide_untied=dict(n_inner=80, tie_word_embeddings=False, activation_function="gelu", scale_attn_weights=False),
    ),
    **_transformers(
        "falcon",
        dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=6, max_position_embeddings=64),
        rw=dict(alibi=True, bias=True, parallel_attn=False, multi_query=False, num_attention_heads=8),
        eleven=dict(
            new_decoder_architecture=True,
            num_ln_in_parallel_attn=1,
            num_kv_heads=2,
            ffn_hidden_size=80,
            tie_word_embeddings=False,
            num_hidden_layers=3,
        ),
        multi_head_biased=dict(multi_query=False, bias=True, activation="gelu_new", layer_norm_epsilon=1e-3),
        alibi_one_key=dict(alibi=True, num_attention_heads=8, num_hidden_layers=3),
        forty=dict(new_decoder_architecture=True, num_kv_heads=2),
        forty_biased_alibi=dict(
            new_decoder_architecture=True,
            num_ln_in_parallel_attn=2,
            num_kv_heads=4,
            num_attention_heads=8,
            alibi=True,
            bias=True,
            num_hidden_layers=3,
        ),
    ),
    **_transformers(
        "gptj",
        {**_GPT2, "rotary_dim": 4},
        tied_odd=dict(tie_word_embeddings=True, n_layer=3, n_head=6, rotary_dim=8, layer_norm_epsilon=1e-3),
        wide=dict(n_inner=80, activation_function="gelu", rotary_dim=2),
    ),
    **_transformers(
        "opt",
        _OPT,
        galactica=dict(activation_function="gelu", enable_bias=False, layer_norm_elementwise_affine=False),
        unbiased_untied_odd=dict(enable_bias=False, tie_word_embeddings=False, num_hidden_layers=3),
        biased_plain_norms=dict(layer_norm_elementwise_affine=False, num_attention_heads=6),
    ),
    **_transformers("glm", _GLM, tied_odd=dict(tie_word_embeddings=True, num_hidden_layers=3), **_GLM_VARIANTS),
    **_transformers("glm4", _GLM, tied_odd=dict(tie_word_embeddings=True, num_hidden_layers=3), **_GLM_VARIANTS),
}

CASES |= {
    **_transformers(
        "mixtral",
        {**_LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2},
        window_odd=dict(sliding_window=9, num_hidden_layers=3, num_experts_per_tok=3, head_dim=10),
    ),
    **_transformers(
        "qwen2_moe",
        {
            **_LLAMA,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 40,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
        },
        normed_some_dense=dict(norm_topk_prob=True, mlp_only_layers=[1], num_hidden_layers=3),
        every_second=dict(decoder_sparse_step=2, qkv_bias=False),
    ),
    **_transformers(
        "qwen3_moe",
        {
            **_LLAMA,
            "head_dim": 10,
            "moe_intermediate_size": 16,
            "num_experts": 16,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        raw_biased=dict(norm_topk_prob=False, attention_bias=True, mlp_only_layers=[0], num_hidden_layers=3),
        tied_every_second=dict(tie_word_embeddings=True, decoder_sparse_step=2, num_key_value_heads=2),
    ),
    **_transformers(
        "deepseek_v3",
        {**_DEEPSEEK, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "num_nextn_predict_layers": 0},
        yarn=_LATENT_YARN,
        # As Moonlight has it.
        one_group=dict(n_group=1, topk_group=1, num_experts_per_tok=3, q_lora_rank=None, rms_norm_eps=1e-2),
    ),
    **_transformers(
        "deepseek_v2",
        {
            **_DEEPSEEK,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 4,
            **_LATENT_YARN,
        },
        one_of_a_group=dict(
            topk_group=3,
            num_experts_per_tok=3,
            num_hidden_layers=3,
            rope_parameters=dict(rope_type="default", rope_theta=500.0),
        ),
        # As V2-Lite has it.
        greedy=dict(topk_method="greedy", n_group=1, topk_group=1, q_lora_rank=None, rms_norm_eps=1e-2),
    ),
    **_reference("baichuan", main="2-13b"),
    **_reference("qwen", main="long"),
    **_reference("deepseek_moe", main="base"),
    **_reference("chatglm", main="base"),
    **_reference("glm130b", main="base"),
    **_reference("glm_blocks", main="base"),
    **_reference("chatglm2", main="chatglm2", without=("no_final_norm", "layernorm")),
}

for _name, _case in CASES.items():  # families that share a model type with another one
    if not any(one.is_main for one in CASES.values() if one.family == _case.family):
        CASES[_name] = replace(_case, is_main=True)

if chosen := os.environ.get("ZOO"):  # while one works on a family: ZOO=falcon,bloom
    CASES = {name: case for name, case in CASES.items() if case.family in chosen.split(",")}
