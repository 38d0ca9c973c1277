"""The ChatGLM2 / ChatGLM3 / GLM-4-9B reference against published names and shapes, and values worked out by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM

from tests.reference.chatglm2 import TINY, Attention, Reference, make, rotate

PUBLISHED = {
    name: json.loads((Path(__file__).parents[1] / "published" / f"{name}.json").read_text())
    for name in ("chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat")
}
VARIANT = {"chatglm2-6b": "chatglm2", "chatglm3-6b": "chatglm3", "glm-4-9b-chat": "glm4"}


def expanded(published):
    layers = range(published["config"]["num_layers"])
    return {
        name.replace("*", str(layer)): tuple(shape) for name, shape in published["tensors"].items() for layer in layers
    }


def some_ids(seed=0):
    return torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_state_dict_has_the_published_names_and_shapes(name):
    with torch.device("meta"):
        model = Reference(PUBLISHED[name]["config"])
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == expanded(PUBLISHED[name])


def test_the_published_size_in_bytes_is_that_of_the_tensors_and_of_32_frequencies():
    published = PUBLISHED["chatglm2-6b"]
    numbers = sum(math.prod(shape) for shape in expanded(published).values())
    assert 2 * (numbers + 32) == published["total_size"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tiny_config_has_every_field_of_the_published_one(name):
    assert PUBLISHED[name]["config"].keys() <= TINY[VARIANT[name]].keys()


def transformers_twin(config):
    """The class transformers has for the GLM-4-9B that was published again under other names."""
    return GlmForCausalLM(
        GlmConfig(
            vocab_size=config["padded_vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["ffn_hidden_size"],
            num_hidden_layers=config["num_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["multi_query_group_num"],
            head_dim=config["kv_channels"],
            rms_norm_eps=config["layernorm_epsilon"],
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0 * config["rope_ratio"],
                "partial_rotary_factor": 0.5,
            },
            attention_bias=config["add_qkv_bias"],
            pad_token_id=None,
        )
    ).eval()


TWIN_NAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
    "transformer.encoder.layers": "model.layers",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}


def twin_state(model):
    """The model's weights under the twin's names, with the stacked projection taken apart."""
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in TWIN_NAMES.items():
            name = name.replace(ours, theirs)
        if "query_key_value" in name:
            for letter, part in zip("qkv", tensor.split((48, 16, 16)), strict=True):
                state[name.replace("self_attention.query_key_value", f"self_attn.{letter}_proj")] = part
        else:
            state[name] = tensor
    return state


@torch.no_grad()
def test_glm_4_equals_the_class_that_transformers_has_for_it():
    model, ids_BS = make("glm4"), some_ids()
    twin = transformers_twin(TINY["glm4"])
    twin.load_state_dict(twin_state(model))
    torch.testing.assert_close(twin(ids_BS).logits, model(ids_BS), atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("variant", TINY)
def test_changing_a_later_token_changes_no_earlier_logit(variant):
    model, ids_BS = make(variant), some_ids()
    changed = ids_BS.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 200
    before, after = model(ids_BS), model(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert (after[:, 7:] - before[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_rotation_turns_neighbouring_channels_of_the_first_half_only():
    x_BSND = torch.tensor([1.0, 0, 1, 0, 5, 6, 7, 8]).expand(1, 3, 1, 8)
    turned = rotate(x_BSND, 10000.0)[0, :, 0]
    torch.testing.assert_close(turned[0], x_BSND[0, 0, 0])
    expected = [math.cos(2), math.sin(2), math.cos(0.02), math.sin(0.02), 5, 6, 7, 8]
    torch.testing.assert_close(turned[2], torch.tensor(expected))


def test_the_rope_ratio_multiplies_the_base():
    assert Attention(TINY["glm4"]).base == 5_000_000
    assert Attention(TINY["chatglm2"]).base == 10_000


def test_the_stacked_rows_are_all_queries_then_all_keys_then_all_values():
    q, k, v = Attention(TINY["chatglm2"]).split(torch.arange(96.0).reshape(1, 1, 96))
    assert (q.shape[2], k.shape[2], v.shape[2]) == (8, 2, 2)
    assert (q[0, 0, 1, 0], k[0, 0, 0, 0], k[0, 0, 1, 0], v[0, 0, 0, 0]) == (8, 64, 72, 80)


def test_without_groups_the_stacked_rows_are_query_key_and_value_of_each_head():
    q, k, v = Attention(TINY["layernorm"]).split(torch.arange(192.0).reshape(1, 1, 192))
    assert (q[0, 0, 1, 0], k[0, 0, 1, 0], v[0, 0, 1, 0]) == (24, 32, 40)


@torch.no_grad()
def test_the_first_half_of_the_query_heads_reads_the_first_key_and_value_group():
    model, x_BSH = make("chatglm2"), torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(1))
    attention = model.transformer.encoder.layers[0].self_attention
    attention.dense = torch.nn.Identity()
    before = attention(x_BSH)
    attention.query_key_value.bias[80:88] += 1  # the value of group 0
    torch.testing.assert_close(attention(x_BSH) - before, torch.tensor([1.0] * 32 + [0.0] * 32).expand(1, 5, 64))


@torch.no_grad()
def test_the_first_half_of_the_wide_projection_is_the_gate():
    mlp = make("layernorm").transformer.encoder.layers[0].mlp
    mlp.dense_h_to_4h.weight.zero_()
    mlp.dense_h_to_4h.bias[:112], mlp.dense_h_to_4h.bias[112:] = 2.0, 3.0
    mlp.dense_4h_to_h = torch.nn.Identity()
    torch.testing.assert_close(mlp(torch.ones(48)), torch.full((112,), 3 * 2 / (1 + math.exp(-2))))


@torch.no_grad()
@pytest.mark.parametrize(("variant", "scale"), [("chatglm2", 1.0), ("no_final_norm", 4.0)])
def test_only_the_final_norm_hides_the_size_of_the_last_hidden_state(variant, scale):
    encoder = make(variant, num_layers=0).transformer.encoder
    x_BSH = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(encoder(4 * x_BSH), scale * encoder(x_BSH), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("variant", "is_normed"), [("chatglm2", False), ("layernorm", True)])
def test_the_residual_is_the_input_or_its_norm_as_the_config_says(variant, is_normed):
    layer = make(variant).transformer.encoder.layers[0]
    for parameter in (*layer.self_attention.dense.parameters(), *layer.mlp.dense_4h_to_h.parameters()):
        parameter.zero_()
    x_BSH = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(3))
    normed_BSH = layer.post_attention_layernorm(layer.input_layernorm(x_BSH))
    torch.testing.assert_close(layer(x_BSH), normed_BSH if is_normed else x_BSH)


@pytest.mark.parametrize("change", [{"pre_seq_len": 8}, {"quantization_bit": 4}, {"tie_word_embeddings": True}])
def test_what_the_reference_does_not_know_is_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        make("chatglm2", **change)
