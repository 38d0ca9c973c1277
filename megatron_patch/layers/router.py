"""Routers that megatron-core does not have.

Shapes: S tokens of a row, B rows, E experts, G groups of them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class BestExpertRouter(TopKRouter):
    """Each token goes to the groups of its best experts (DeepSeek-AI 2024, "DeepSeek-V2", section 2.2.2).

    For softmax over all experts, before the choice. megatron-core's counts the sum of a group's best few instead; it
    finds the other groups empty here, so that it has no choice, and its weights are made those among all experts again.
    """

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Weights and choice of every token; see megatron-core's."""
        groups, wanted = self.config.moe_router_num_groups, self.config.moe_router_group_topk
        best_SBG = logits.unflatten(-1, (groups, -1)).amax(-1)
        left_out_SBG = torch.ones_like(best_SBG, dtype=torch.bool).scatter(-1, best_SBG.topk(wanted).indices, False)
        left_out_SBE = left_out_SBG.repeat_interleave(logits.shape[-1] // groups, -1)
        kept_SB = logits.softmax(-1).masked_fill(left_out_SBE, 0.0).sum(-1)
        weights, chosen = super().routing(logits.masked_fill(left_out_SBE, float("-inf")), *args, **kwargs)
        return weights * kept_SB.view(-1, 1), chosen
