"""Fine-tuning: what of a run depends on the data being conversations, some tokens of which are to be learned."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_patch.data.arguments import parse_blend
from megatron_patch.data.sft.rows import Joined, LossPer, Rows, RowSpec
from megatron_patch.data.sft.sources import find_source
from megatron_patch.data.sft.storage import open_samples
from megatron_patch.layers.documents import separate_documents
from megatron_patch.tokenizer import Tokenizer
from megatron_patch.training.arguments import FinetuneArgs, Plan


class Finetuning:
    """The task of `finetune`."""

    # Tokens of a batch count differently. What balances experts without a loss would count padding as tokens.
    settings = MappingProxyType({"calculate_per_token_loss": True, "moe_router_bias_update_rate": 0.0})
    begins_anew = True
    filled = 1.0

    def __init__(self, args: FinetuneArgs) -> None:
        self.args = args

    def open(self, tokenizer: Tokenizer, vocab_size: int, world_size: int, say: Callable[[str], None]) -> Plan:
        """Tokenize what is not tokenized yet, on one process, and count the rows of an epoch."""
        args = self.args
        self._train = self._rows("train_data", tokenizer, args.loss_per, say)
        with_valid = args.valid_data and args.eval_iters != 0
        self._valid = self._rows("valid_data", tokenizer, "token", say) if with_valid else None
        self.filled = self._train.filled
        plan = args.plan(world_size, self._train.rows_per_epoch)
        say(length(plan, self._train.rows_per_epoch, args.epochs))
        return plan

    def amend(self, model: GPTModel) -> None:
        """Tell samples apart in attention and positions. A model that cannot takes one sample a row."""
        cannot = hasattr(model, "prefix") or model.config.mtp_num_layers
        if self.args.packing or not cannot:
            names = {"flags": "packing", "instead": "give --no-packing"}
            separate_documents(model, None, self.args.seq_length, positions=True, attention=True, **names)

    def datasets(self, plan: Plan) -> tuple[Rows, Rows | None]:
        """Rows for training, and all validation data, filled up to whole micro-batches."""
        train = self._train.extended(plan.train_iters * plan.global_batch_size, self.args.epochs)
        if self._valid is None:
            return train, None
        step = plan.samples_per_process_step
        return train, self._valid.extended(-(-self._valid.rows_per_epoch // step) * step, 1)

    def _rows(self, flag: str, tokenizer: Tokenizer, loss_per: LossPer, say: Callable[[str], None]) -> Rows:
        args, name = self.args, flag.replace("_", " ")
        blend = parse_blend(getattr(args, flag), f"--{flag.replace('_', '-')}")
        options = dict(seq_length=args.seq_length, cache=args.data_cache_path, workers=args.data_workers)

        def tokenized() -> list[str]:
            sources = [find_source(entry, args.formats, tokenizer, **options) for entry in blend.prefixes]
            return [source.tokenize(lambda line: say(f"{name}: {line}")) for source in sources]

        stores = [open_samples(prefix) for prefix in _on_one_process(tokenized)]
        samples = Joined(stores, blend.weights or [1.0] * len(stores), args.seed)
        rows = Rows(samples, RowSpec(args.seq_length, args.packing, args.seed, loss_per))
        say(f"{name}: {rows.summary()}")
        return rows


def _on_one_process(work: Callable[[], list[str]]) -> list[str]:
    """What it gives, for every process; what it finds wrong, too, or the others would wait for ever."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except (ValueError, OSError) as error:
            answer[1] = (OSError if isinstance(error, OSError) else ValueError, str(error))
    dist.broadcast_object_list(answer)
    result, problem = answer
    if problem is not None:
        kind, text = problem
        raise kind(text)
    return result


def length(plan: Plan, rows: int, epochs: int | None) -> str:
    """How long the run is, and what becomes of the last batch; `rows` make an epoch."""
    wanted = plan.train_iters * plan.global_batch_size
    text = f"{plan.train_iters} iterations of {plan.global_batch_size} rows: "
    empty = wanted - epochs * rows if epochs else 0
    if empty <= 0:
        return f"{text}{wanted / rows:.4g} epochs of {rows}"
    return f"{text}{epochs} x {rows}, and {empty} empty rows that fill the last batch up and count for nothing"
