"""The ChatGLM-6B reference against the published names and shapes, and against values worked out by hand."""

import json
from pathlib import Path

import pytest
import torch

from tests.reference.chatglm import TINY, Reference, frequencies, ids, make, positions, rotate_2d, visible

PUBLISHED = json.loads((Path(__file__).parents[1] / "published" / "chatglm-6b.json").read_text())
MASK, GMASK, BOS = (TINY["base"][f"{name}_token_id"] for name in ("mask", "gmask", "bos"))


def expanded(published):
    layers = range(published["config"]["num_layers"])
    return {
        name.replace("*", str(layer)): tuple(shape) for name, shape in published["tensors"].items() for layer in layers
    }


def test_the_state_dict_has_the_published_names_and_shapes():
    with torch.device("meta"):
        model = Reference(PUBLISHED["config"])
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expanded(PUBLISHED)


def test_the_head_is_tied_as_the_published_parameter_count_implies():
    with torch.device("meta"):
        model = Reference(PUBLISHED["config"])
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == 6.2
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


@pytest.mark.parametrize("variant", TINY)
def test_the_tiny_config_has_every_field_of_the_published_one(variant):
    assert PUBLISHED["config"].keys() <= TINY[variant].keys()


@pytest.mark.parametrize(
    ("row", "position", "block"),
    [
        ([5, 6, GMASK, BOS, 7, 8], [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]),
        ([5, MASK, 6, BOS, 7, 8], [0, 1, 2, 1, 1, 1], [0, 0, 0, 1, 2, 3]),
        ([MASK, 6, GMASK, BOS, 7, BOS], [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]),
        ([GMASK, 6, GMASK, 5, BOS, 7], [0, 1, 2, 3, 0, 0], [0, 0, 0, 0, 1, 2]),
    ],
    ids=["gmask", "mask", "gmask wins over mask, the first BOS counts", "the first gmask counts"],
)
def test_positions_stop_at_the_mask_and_block_positions_start_at_bos(row, position, block):
    assert positions(torch.tensor([row]), TINY["base"]).tolist() == [[position, block]]


def test_the_context_sees_itself_and_the_rest_is_causal():
    seen = visible(torch.tensor([[5, GMASK, BOS, 7]]), TINY["base"])[0].int().tolist()
    assert seen == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


@torch.no_grad()
def test_a_later_context_token_changes_the_first_logits_and_a_later_answer_token_does_not():
    model, row = make("base"), torch.tensor([[5, 6, 7, GMASK, BOS, 8, 9]])
    context, answer = row.clone(), row.clone()
    context[0, 2], answer[0, 6] = 11, 11
    logits = model(row)
    assert (model(context)[0, 0] - logits[0, 0]).abs().max() > 1e-3
    torch.testing.assert_close(model(answer)[0, :6], logits[0, :6])
    assert (model(answer)[0, 6] - logits[0, 6]).abs().max() > 1e-3


@torch.no_grad()
def test_each_row_of_a_batch_has_a_context_of_its_own():
    model, ids_BS = make("odd"), ids("odd", 3, 16)
    alone = torch.cat([model(row[None]) for row in ids_BS])
    torch.testing.assert_close(model(ids_BS), alone, atol=1e-5, rtol=0)


def test_each_kind_of_position_turns_its_own_half_of_the_head():
    x_BSND = torch.randn(1, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    still = rotate_2d(x_BSND, torch.tensor([[[0], [0]]]))
    first, second = rotate_2d(x_BSND, torch.tensor([[[3], [0]]])), rotate_2d(x_BSND, torch.tensor([[[0], [3]]]))
    assert torch.equal(still, x_BSND)
    assert torch.equal(first[..., 4:], x_BSND[..., 4:]) and (first[..., :4] != x_BSND[..., :4]).all()
    assert torch.equal(second[..., :4], x_BSND[..., :4]) and (second[..., 4:] != x_BSND[..., 4:]).all()


def test_a_quarter_turn_carries_a_channel_to_its_partner_two_further():
    x_BSND = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]).reshape(1, 1, 1, 8)
    turned = rotate_2d(x_BSND, torch.tensor([[[torch.pi / 2], [0.0]]]))
    torch.testing.assert_close(turned.flatten(), torch.tensor([0.0, 0, 1, 0, 0, 0, 0, 0]))


def test_rotary_frequencies_are_rounded_to_float16():
    assert frequencies(4).tolist() == [1.0, 0.01000213623046875]


@torch.no_grad()
def test_the_stacked_rows_are_query_key_and_value_of_each_head():
    attention = make("base").transformer.layers[0].attention
    attention.dense = torch.nn.Identity()
    x_SH = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    rows = attention.query_key_value(x_SH)
    head = 5
    q, k, v = (rows[:, start : start + 8] for start in (24 * head, 24 * head + 8, 24 * head + 16))
    expected = (q @ k.T / 8**0.5).softmax(-1) @ v
    unturned, everything = torch.zeros(1, 2, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    out = attention(x_SH[None], unturned, everything)[0, :, 8 * head : 8 * head + 8]
    torch.testing.assert_close(out, expected)


@torch.no_grad()
def test_the_activation_is_the_tanh_form_of_gelu():
    mlp = make("base").transformer.layers[0].mlp
    mlp.dense_h_to_4h, mlp.dense_4h_to_h = torch.nn.Identity(), torch.nn.Identity()
    x = torch.tensor([-2.0, 0.5, 2.0])
    expected = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    torch.testing.assert_close(mlp(x), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_without_sublayers_a_layer_scales_its_norms_by_the_root_of_twice_the_depth():
    model, ids_BS = make("odd"), ids("odd", 1, 8)
    layer = model.transformer.layers[0]
    for linear in (layer.attention.dense, layer.mlp.dense_4h_to_h):
        linear.weight.zero_()
        linear.bias.zero_()
    x_BSH = model.transformer.word_embeddings(ids_BS)
    expected = 6**0.5 * layer.post_attention_layernorm(6**0.5 * layer.input_layernorm(x_BSH))
    torch.testing.assert_close(layer(x_BSH, positions(ids_BS, TINY["odd"]), visible(ids_BS, TINY["odd"])), expected)


def test_the_rows_of_ids_end_their_contexts_at_different_places_and_in_three_ways():
    ids_BS = ids("base", 6, 24)
    assert (ids_BS == BOS).sum(1).tolist() == [1] * 6
    assert len(set((ids_BS == BOS).int().argmax(1).tolist())) == 6
    assert (ids_BS == GMASK).any(1).tolist() == [True, False, True] * 2
    assert (ids_BS == MASK).any(1).tolist() == [False, True, True] * 2


@pytest.mark.parametrize("row", [[5, GMASK, 6], [5, 6, BOS]], ids=["no BOS", "no mask"])
def test_a_row_without_its_landmarks_is_refused(row):
    with pytest.raises(ValueError, match="token_id"):
        make("odd")(torch.tensor([row]))


@pytest.mark.parametrize("change", [{"position_encoding_2d": False}, {"pre_seq_len": 8}, {"quantization_bit": 4}])
def test_what_the_reference_does_not_know_is_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        make("base", **change)
