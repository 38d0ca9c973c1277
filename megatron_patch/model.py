"""A family's architecture -> `TransformerConfig` -> layer spec -> `GPTModel`, for any pipeline stage, on meta or real.

It knows the family record, the backend's choices and megatron-core: no arguments, no disk, no Hugging Face weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules, get_mtp_layer_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_patch.backend.core_versions import submodules, with_module
from megatron_patch.backend.local_layers import mend_local_layers
from megatron_patch.family import Architecture
from megatron_patch.layers.attention import SDPAttention
from megatron_patch.layers.embedding import prepare_positions
from megatron_patch.layers.experts import SequentialExperts
from megatron_patch.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_patch.layers.norm import LayerNorm, RMSNorm
from megatron_patch.layers.rotary import LatentRotary, Rotary, attention_factor

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def transformer_config(
    architecture: Architecture, dtype: torch.dtype = torch.float32, **layout: Any
) -> TransformerConfig:
    """megatron-core's config for this architecture.

    Args:
        dtype: of parameters and activations.
        layout: further fields, such as ``tensor_model_parallel_size`` or ``sequence_parallel``.

    Raises:
        ValueError: the layout does not fit the architecture, or it has an activation we do not know.
    """
    if architecture.activation not in _ACTIVATIONS:
        choices = ", ".join(_ACTIVATIONS)
        raise ValueError(
            f"config.json: hidden_act={architecture.activation!r} is not supported; choose one of {choices}"
        )
    check_layout(architecture, **{name: value for name, value in layout.items() if name in _LAYOUT})
    fields = {
        "activation_func": _ACTIVATIONS[architecture.activation],
        "softmax_scale": _softmax_scale(architecture),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        # Every rank draws the whole weight and keeps its part, so a layout does not change the initial model.
        "use_cpu_initialization": not torch.cuda.is_available(),
        "moe_token_dispatcher_type": "alltoall",
        **architecture.config,
        **layout,
    }
    with warnings.catch_warnings():
        # About core's own default for CUDA graphs, which nobody here has asked for.
        warnings.filterwarnings("ignore", "full scope is deprecated", UserWarning)
        return (MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig)(**fields)


_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
)


def check_layout(
    architecture: Architecture,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    num_layers_in_first_pipeline_stage: int | None = None,
    num_layers_in_last_pipeline_stage: int | None = None,
    pipeline_model_parallel_layout: Any = None,
) -> None:
    """Raise a ValueError naming the value, the rule and the choices where a layout does not fit."""
    tensor, heads, groups = tensor_model_parallel_size, architecture.num_attention_heads, architecture.num_query_groups
    if tensor not in (choices := [n for n in range(1, heads + 1) if _heads_fit(heads, groups, n)]):
        raise ValueError(
            f"tensor_model_parallel_size={tensor} does not divide num_attention_heads={heads} with "
            f"num_query_groups={groups}; choose {_listed(choices)}"
        )
    _check_experts(architecture, expert_model_parallel_size, expert_tensor_parallel_size or tensor)
    if pipeline_model_parallel_layout is None:  # a layout written out layer by layer is checked by megatron-core
        ends = {
            "num_layers_in_first_pipeline_stage": num_layers_in_first_pipeline_stage,
            "num_layers_in_last_pipeline_stage": num_layers_in_last_pipeline_stage,
        }
        virtual = virtual_pipeline_model_parallel_size or 1
        _check_stages(architecture.num_layers, pipeline_model_parallel_size, virtual, ends)


def _check_experts(architecture: Architecture, expert: int, expert_tensor: int) -> None:
    num_experts = architecture.config.get("num_moe_experts") or 0
    if expert > 1 and not num_experts:
        raise ValueError(f"expert_model_parallel_size={expert}, but the model has no experts; choose 1")
    if num_experts:
        _check_divides("expert_model_parallel_size", expert, "num_moe_experts", num_experts)
        width = architecture.config["moe_ffn_hidden_size"]
        _check_divides("expert_tensor_parallel_size", expert_tensor, "moe_ffn_hidden_size", width)


def _check_stages(layers: int, pipeline: int, virtual: int, ends: dict[str, int | None]) -> None:
    """The layers that the named end stages leave over must spread evenly over the other stages."""
    named = {name: count for name, count in ends.items() if count is not None}
    for name, count in named.items():
        _check_divides("virtual_pipeline_model_parallel_size", virtual, name, count)
    if not named:
        _check_divides("pipeline_model_parallel_size", pipeline * virtual, "num_layers", layers)
        return
    rest, stages = layers - sum(named.values()), pipeline - len(named)
    if stages < 0 or rest < 0 or (rest % (stages * virtual) if stages else rest):
        given = " and ".join(f"{name}={count}" for name, count in named.items())
        raise ValueError(
            f"pipeline_model_parallel_size={pipeline} with {given} leaves {rest} of num_layers={layers} for "
            f"{stages * virtual} stages, which must divide them"
        )


def _check_divides(name: str, value: int, what: str, total: int) -> None:
    if total % value:
        choices = [n for n in range(1, total + 1) if total % n == 0]
        raise ValueError(f"{name}={value} does not divide {what}={total}; choose {_listed(choices)}")


def _heads_fit(heads: int, groups: int, tensor: int) -> bool:
    # More ranks than groups: each rank computes one group's keys and values, several ranks the same ones.
    return heads % tensor == 0 and (groups % tensor == 0 or tensor % groups == 0)


def _listed(choices: list[int]) -> str:
    *most, last = map(str, choices)
    return f"{', '.join(most)} or {last}" if most else last


def _softmax_scale(architecture: Architecture) -> float | None:
    # yarn multiplies both rotated queries and keys by its factor; scaling their product once is the same.
    factor = attention_factor(architecture.rope) if architecture.rope else 1.0
    return None if factor == 1.0 else factor**2 / architecture.kv_channels**0.5


def layer_spec(architecture: Architecture, config: TransformerConfig, moe: bool = False) -> ModuleSpec:
    """megatron-core's local layer with our norm, linears and core attention, and the family's swaps."""
    mend_local_layers()
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if moe else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
    )
    layer = submodules(spec)
    layer.input_layernorm = layer.pre_mlp_layernorm = _norm(config)
    _choose_attention(submodules(layer.self_attention), config)
    if moe:
        submodules(layer.mlp).experts = with_module(submodules(layer.mlp).experts, SequentialExperts)
    for mlp in _mlps(layer.mlp, moe):
        mlp.linear_fc1, mlp.linear_fc2 = ColumnParallelLinear, RowParallelLinear
    layer.sharded_state_dict_keys_map = _checkpoint_keys(config, moe)
    for swap in architecture.swaps:
        *path, last = swap.at.split(".")
        owner = layer
        for name in path:
            owner = submodules(getattr(owner, name))
        if last:
            setattr(owner, last, _ours(swap.layer))
        else:
            spec = with_module(spec, _ours(swap.layer))
    return spec


def _norm(config: TransformerConfig) -> type:
    return RMSNorm if config.normalization == "RMSNorm" else LayerNorm


def _choose_attention(attention: Any, config: TransformerConfig) -> None:
    attention.core_attention, attention.linear_proj = SDPAttention, RowParallelLinear
    if config.multi_latent_attention:
        # On every rank whole, as with Transformer Engine. The gradient of the keys' rotary part is right only so: with
        # core's column-parallel one, each rank would know what comes from its own heads and no more.
        attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
        attention.linear_q_proj = attention.linear_q_up_proj = attention.linear_kv_up_proj = ColumnParallelLinear
        if config.qk_layernorm:
            attention.q_layernorm = attention.kv_layernorm = _norm(config)
        return
    attention.linear_qkv = ColumnParallelLinear
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = _norm(config)


def _mlps(spec: Any, moe: bool) -> tuple[Any, ...]:
    inner = submodules(spec)
    return (submodules(inner.experts), submodules(inner.shared_experts)) if moe else (inner,)


def _checkpoint_keys(config: TransformerConfig, moe: bool) -> dict[str, str]:
    """Keys of norms that Transformer Engine fuses into the next linear, so that both specs load the same files.

    megatron-core's local spec has them right for dense layers with ordinary attention only.
    """
    keys = {} if moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if not config.multi_latent_attention:
        return {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", **keys}
    latents = {
        f"self_attention.{part}_layernorm.": f"self_attention.linear_{part}_up_proj.layer_norm_" for part in ("q", "kv")
    }
    return {**latents, **keys}


def _ours(name: str) -> Any:
    module, what = name.split(".")
    return getattr(import_module(f"megatron_patch.layers.{module}"), what)


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int, divisible_by: int = 128) -> int:
    """Rows of the padded embedding: the next multiple of ``divisible_by * tensor_model_parallel_size``."""
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def build_model(
    architecture: Architecture,
    config: TransformerConfig,
    *,
    vp_stage: int | None = None,
    make_vocab_size_divisible_by: int = 128,
    parallel_output: bool = True,
) -> GPTModel:
    """This rank's part of the model; megatron-core's parallel state must be initialised.

    The embedding is padded to a multiple that tensor parallelism divides; logits of padded ids are the smallest number
    the dtype has, so neither the loss nor sampling ever sees them.

    Args:
        config: from `transformer_config`.
        vp_stage: which model chunk, with virtual pipeline stages.
        parallel_output: leave the logits split over tensor-parallel ranks.
    """
    last, positions = (
        parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        architecture.positions,
    )
    model = GPTModel(
        config,
        _block_spec(architecture, config, vp_stage),
        vocab_size=padded_vocab_size(
            architecture.vocab_size, config.tensor_model_parallel_size, make_vocab_size_divisible_by
        ),
        max_sequence_length=positions.rows if positions else architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=last,
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="learned_absolute" if positions else "rope" if architecture.rope else "none",
        mtp_block_spec=_mtp_spec(architecture, config) if last and config.mtp_num_layers else None,
        vp_stage=vp_stage,
    )
    _amend(model, architecture)
    if model.post_process and model.vocab_size > architecture.vocab_size:
        model.output_layer.register_forward_hook(partial(_hide_padding, model.vocab_size, architecture.vocab_size))
    return model


def _amend(model: GPTModel, architecture: Architecture) -> None:
    """What core's GPTModel has no place for, or builds for itself."""
    config, model.max_sequence_length = model.config, architecture.max_position_embeddings
    if architecture.rope is not None and not config.multi_latent_attention:
        model.rotary_pos_emb = Rotary(architecture.rope, config.kv_channels, config.rotary_interleaved)
    if config.multi_latent_attention:
        for layer in model.decoder.layers:
            layer.self_attention.rotary_pos_emb = LatentRotary(layer.self_attention.rotary_pos_emb)
    if architecture.positions:
        prepare_positions(model, architecture.positions.offset)
    for function, options in architecture.amendments:
        _ours(function)(model, **options)


def _block_spec(
    architecture: Architecture, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    first = get_transformer_layer_offset(config, vp_stage)
    kinds = architecture.moe_layers[first : first + get_num_layers_to_build(config, vp_stage=vp_stage)]
    specs = {moe: layer_spec(architecture, config, moe) for moe in set(kinds)}
    return TransformerBlockSubmodules(layer_specs=[specs[moe] for moe in kinds], layer_norm=_norm(config))


def _mtp_spec(architecture: Architecture, config: TransformerConfig) -> MultiTokenPredictionBlockSubmodules:
    """Layers for multi-token prediction, each around one of the kind that ends the decoder."""
    inner = layer_spec(architecture, config, moe=architecture.moe_layers[-1])
    spec = get_mtp_layer_spec(inner, use_transformer_engine=False)
    parts = submodules(spec)
    parts.enorm = parts.hnorm = parts.layer_norm = _norm(config)
    parts.eh_proj = ColumnParallelLinear
    return MultiTokenPredictionBlockSubmodules(layer_specs=[spec] * config.mtp_num_layers)


def _hide_padding(padded: int, true: int, module: torch.nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> None:
    logits = output[0]
    first = 0 if logits.shape[-1] == padded else parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    # Softmax gives these columns exactly 0, hence no gradient: autograd need not know, and copies nothing.
    with torch.no_grad():
        logits[..., max(true - first, 0) :] = torch.finfo(logits.dtype).min


def flops_per_token(architecture: Architecture, seq_length: int) -> float:
    """Model FLOPs of one token's forward and backward pass (Narayanan et al. 2021: recomputation is not counted).

    6 for each weight of a matrix product that a token meets (of the experts only those it is routed to), the output
    layer's included and the embedding's not, and 6 for each layer, position and channel of the attention scores and
    context; the causal half is not taken off, as is the custom.
    """
    c = architecture.config
    extra = c.get("mtp_num_layers") or 0
    layers = (*architecture.moe_layers, *architecture.moe_layers[-1:] * extra)
    attention, channels = _attention_size(architecture)
    weights = sum(attention + _mlp_size(c, moe) for moe in layers)
    heads = (1 + extra) * c["hidden_size"] * architecture.vocab_size + extra * 2 * c["hidden_size"] ** 2
    return 6 * (weights + heads) + 6 * len(layers) * channels * seq_length


def _attention_size(architecture: Architecture) -> tuple[int, int]:
    """Weights of one layer's projections, and channels of its scores and context."""
    c, heads = architecture.config, architecture.num_attention_heads
    if not c.get("multi_latent_attention"):
        queries, keys = (n * architecture.kv_channels for n in (heads, architecture.num_query_groups))
        return c["hidden_size"] * (2 * queries + 2 * keys), 2 * queries
    rank, key, value = c["kv_lora_rank"], c["qk_head_dim"] + c["qk_pos_emb_head_dim"], c["v_head_dim"]
    query_rank = c["q_lora_rank"]
    queries = (c["hidden_size"] + heads * key) * query_rank if query_rank else c["hidden_size"] * heads * key
    keys_values = c["hidden_size"] * (rank + c["qk_pos_emb_head_dim"]) + rank * heads * (c["qk_head_dim"] + value)
    return queries + keys_values + heads * value * c["hidden_size"], heads * (key + value)


def _mlp_size(c: Mapping[str, Any], moe: bool) -> int:
    """Weights of one layer's MLP that a token meets."""
    width, router = c["ffn_hidden_size"], 0
    if moe:
        width = c["moe_ffn_hidden_size"] * c["moe_router_topk"] + (c.get("moe_shared_expert_intermediate_size") or 0)
        router = c["num_moe_experts"]
    return c["hidden_size"] * (width * (3 if c.get("gated_linear_unit") else 2) + router)
