"""A family's architecture -> `TransformerConfig` -> layer spec -> `GPTModel`, for any pipeline stage, on meta or real.

It knows the family record, the backend's choices and megatron-core: no arguments, no disk, no Hugging Face weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_patch.backend.core_versions import submodules
from megatron_patch.family import Architecture
from megatron_patch.layers.attention import SDPAttention
from megatron_patch.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_patch.layers.norm import LayerNorm, RMSNorm
from megatron_patch.layers.rotary import Rotary, attention_factor

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
        **architecture.config,
        **layout,
    }
    with warnings.catch_warnings():
        # About core's own default for CUDA graphs, which nobody here has asked for.
        warnings.filterwarnings("ignore", "full scope is deprecated", UserWarning)
        return TransformerConfig(**fields)


_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")


def check_layout(
    architecture: Architecture,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
) -> None:
    """Raise a ValueError naming the value, the rule and the choices where a layout does not fit."""
    tensor, heads, groups = tensor_model_parallel_size, architecture.num_attention_heads, architecture.num_query_groups
    if tensor not in (choices := [n for n in range(1, heads + 1) if _heads_fit(heads, groups, n)]):
        raise ValueError(
            f"tensor_model_parallel_size={tensor} does not divide num_attention_heads={heads} with "
            f"num_query_groups={groups}; choose {_listed(choices)}"
        )
    stages = pipeline_model_parallel_size * (virtual_pipeline_model_parallel_size or 1)
    layers = architecture.config["num_layers"]
    if layers % stages:
        choices = [n for n in range(1, layers + 1) if layers % n == 0]
        raise ValueError(
            f"pipeline_model_parallel_size={stages} does not divide num_layers={layers}; choose {_listed(choices)}"
        )


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


def layer_spec(architecture: Architecture, config: TransformerConfig) -> ModuleSpec:
    """megatron-core's local layer with our norm, linears and core attention, and the family's swaps."""
    spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    layer = submodules(spec)
    attention = submodules(layer.self_attention)
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    attention.core_attention = SDPAttention
    mlp = submodules(layer.mlp)
    attention.linear_qkv = mlp.linear_fc1 = ColumnParallelLinear
    attention.linear_proj = mlp.linear_fc2 = RowParallelLinear
    for swap in architecture.swaps:
        *path, last = swap.at.split(".")
        owner = layer
        for name in path:
            owner = submodules(getattr(owner, name))
        setattr(owner, last, _layer_class(swap.layer))
    return spec


def _layer_class(name: str) -> type:
    module, cls = name.split(".")
    return getattr(import_module(f"megatron_patch.layers.{module}"), cls)


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
    spec = layer_spec(architecture, config)
    norm = spec.submodules.input_layernorm
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    model = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm),
        vocab_size=padded_vocab_size(
            architecture.vocab_size, config.tensor_model_parallel_size, make_vocab_size_divisible_by
        ),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="none" if architecture.rope is None else "rope",
        vp_stage=vp_stage,
    )
    if architecture.rope is not None:
        model.rotary_pos_emb = Rotary(architecture.rope, config.kv_channels)
    if model.post_process and model.vocab_size > architecture.vocab_size:
        model.output_layer.register_forward_hook(partial(_hide_padding, model.vocab_size, architecture.vocab_size))
    return model


def _hide_padding(padded: int, true: int, module: torch.nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> None:
    logits = output[0]
    first = 0 if logits.shape[-1] == padded else parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    # Softmax gives these columns exactly 0, hence no gradient: autograd need not know, and copies nothing.
    with torch.no_grad():
        logits[..., max(true - first, 0) :] = torch.finfo(logits.dtype).min


def flops_per_token(architecture: Architecture, seq_length: int) -> float:
    """Model FLOPs of one token's forward and backward pass (Narayanan et al. 2021: recomputation is not counted).

    6 for each weight of a matrix product, the output layer's included and the embedding's not, and 12 for each layer,
    position and channel of the attention scores and context; the causal half is not taken off, as is the custom.
    """
    c = architecture.config
    queries, keys = (
        n * architecture.kv_channels for n in (architecture.num_attention_heads, architecture.num_query_groups)
    )
    attention = c["hidden_size"] * (2 * queries + 2 * keys)
    mlp = c["hidden_size"] * c["ffn_hidden_size"] * (3 if c.get("gated_linear_unit") else 2)
    head = c["hidden_size"] * architecture.vocab_size
    return 6 * (c["num_layers"] * (attention + mlp) + head) + 12 * c["num_layers"] * queries * seq_length
