"""Pretraining: what of a run depends on the data being indexed datasets of running text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_patch.data.datasets import build_datasets, require_eod
from megatron_patch.layers.documents import separate_documents
from megatron_patch.tokenizer import Tokenizer
from megatron_patch.training.arguments import Plan, PretrainArgs


class Pretraining:
    """The task of `pretrain`."""

    filled = 1.0

    def __init__(self, args: PretrainArgs) -> None:
        self.args = args
        # Where every position counts, dividing each micro-batch's loss is the same and spares a pass over gradients.
        self.settings = {"calculate_per_token_loss": args.eod_mask_loss}
        self.begins_anew = args.finetune

    def open(self, tokenizer: Tokenizer, vocab_size: int, world_size: int, say: Callable[[str], None]) -> Plan:
        """What there is to do; datasets are opened later."""
        self._tokenizer, self._vocab_size, self._say = tokenizer, vocab_size, say
        return self.args.plan(world_size)

    def amend(self, model: GPTModel) -> None:
        """Tell documents apart as the flags ask."""
        if not (self.args.reset_position_ids or self.args.reset_attention_mask):
            return
        require_eod(self.args, self._tokenizer)
        flags = {"positions": self.args.reset_position_ids, "attention": self.args.reset_attention_mask}
        separate_documents(model, self._tokenizer.eod, self.args.seq_length, **flags)

    def datasets(self, plan: Plan) -> tuple[Any, Any]:
        """The training and validation datasets, long enough for the whole run."""
        size = plan.global_batch_size
        wanted = (plan.train_iters * size, self.args.eval_iters * size, 0)
        train, valid, _ = build_datasets(self.args.data, self._tokenizer, wanted, self._vocab_size, self._say)
        return train, valid
