"""Weight rules: both directions, and that every parameter has exactly one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_patch.weights import QKV, Copy, Stack, claim

HEADS = SimpleNamespace(num_attention_heads=6, num_query_groups=3, kv_channels=2)


def test_qkv_lays_out_each_group_as_its_queries_then_key_then_value() -> None:
    q, k, v = torch.arange(12.0), 100 + torch.arange(6.0), 200 + torch.arange(6.0)
    merged = QKV("m", "q", "k", "v").to_internal([q, k, v], HEADS)
    assert merged.tolist()[:8] == [0, 1, 2, 3, 100, 101, 200, 201]
    assert merged.tolist()[8:16] == [4, 5, 6, 7, 102, 103, 202, 203]


@pytest.mark.parametrize("rest", [(), (5,)])
def test_qkv_and_stack_are_reversible(rest: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(n, *rest) for n in (12, 6, 6))
    rule = QKV("m", "q", "k", "v")
    assert all(map(torch.equal, rule.to_hf(rule.to_internal([q, k, v], HEADS), HEADS), (q, k, v)))
    gate, up = torch.randn(4, *rest), torch.randn(4, *rest)
    stack = Stack("m", "g", "u")
    assert torch.equal(stack.to_internal([gate, up], HEADS)[:4], gate)
    assert all(map(torch.equal, stack.to_hf(stack.to_internal([gate, up], HEADS), HEADS), (gate, up)))


def test_a_claim_fills_numbers_and_derives_the_hugging_face_shapes() -> None:
    rules = (QKV("layers.*.qkv", "h.*.q", "h.*.k", "h.*.v"), Copy("norm", "ln"))
    one, two = claim(rules, {"layers.11.qkv": (24, 5), "norm": (5,)})
    assert one.hf == ("h.11.q", "h.11.k", "h.11.v") and two.hf == ("ln",)
    assert one.hf_shapes(HEADS) == ((12, 5), (6, 5), (6, 5))


def test_a_parameter_without_a_rule_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"layers\.0\.extra must be claimed by exactly one weight rule; claimed by: none"
    ):
        claim((Copy("norm", "ln"),), {"layers.0.extra": (1,)})


def test_a_parameter_with_two_rules_is_named_with_both() -> None:
    with pytest.raises(ValueError, match=r"claimed by: layers\.\*\.w, layers\.0\.w"):
        claim((Copy("layers.*.w", "a.*"), Copy("layers.0.w", "b")), {"layers.0.w": (1,)})


def test_a_source_claimed_twice_is_named() -> None:
    with pytest.raises(ValueError, match="tensor a is claimed by both x and y"):
        claim((Copy("x", "a"), Copy("y", "a")), {"x": (1,), "y": (1,)})
