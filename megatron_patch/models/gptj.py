"""GPT-J: attention and MLP side by side under one norm, rotary pairs of neighbours, a head with a bias.

Wang and Komatsuzaki 2021.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from megatron_patch.family import Amendment, HFConfig, Rope, Swap, only
from megatron_patch.models.gpt2 import GPT2, H, M, one_dropout
from megatron_patch.weights import QKV, Copy, copies


def _rope(hf: HFConfig) -> Rope:
    rotary_dim, head_dim = hf["rotary_dim"], hf["n_embd"] // hf["n_head"]
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"config.json: rotary_dim={rotary_dim} is not supported; choose an even number up to {head_dim}"
        )
    return Rope(max_position_embeddings=hf["n_positions"], fraction=Fraction(rotary_dim, head_dim))


GPTJ = replace(
    GPT2,
    name="gptj",
    models="GPT-J 6B",
    hf_types=("gptj",),
    special="attention and MLP side by side under one LayerNorm, interleaved partial rotary, a head with a bias",
    config={
        **{name: source for name, source in GPT2.config.items() if name != "softmax_scale"},
        "attention_dropout": lambda hf: hf.get("attn_pdrop", 0.0),
        "hidden_dropout": lambda hf: one_dropout(hf, "resid_pdrop", "embd_pdrop", 0.0),
    },
    fixed={**GPT2.fixed, "add_bias_linear": False, "rotary_interleaved": True},
    positions=lambda hf: None,
    rope=_rope,
    tied=lambda hf: hf.get("tie_word_embeddings", False),
    swaps=(
        Swap("", "block.ParallelLayer"),
        Swap("pre_mlp_layernorm", "block.NoNorm"),
        Swap("mlp.linear_fc1", "linear.ColumnParallelLinearWithBias"),
        Swap("mlp.linear_fc2", "linear.RowParallelLinearWithBias"),
    ),
    amendments=(Amendment("head.add_bias"),),
    inert={
        **{name: passes for name, passes in GPT2.inert.items() if name.startswith("summary_")},
        **only(True, "rotary", "scale_attn_weights"),
    },
    weights=(
        Copy("embedding.word_embeddings.weight", "transformer.wte.weight"),
        QKV(M + "self_attention.linear_qkv.weight", *(H + f"attn.{part}_proj.weight" for part in "qkv")),
        Copy(M + "self_attention.linear_proj.weight", H + "attn.out_proj.weight"),
        *copies({"input_layernorm": "ln_1", "mlp.linear_fc1": "mlp.fc_in", "mlp.linear_fc2": "mlp.fc_out"}, M, H),
        *copies({"decoder.final_layernorm": "transformer.ln_f", "output_layer": "lm_head"}),
    ),
)
