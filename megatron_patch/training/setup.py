"""From arguments to a run that is ready to train: model, optimizer, schedule, datasets, and what a checkpoint restores.

The one part of training that looks up a family, by the config beside the checkpoint, and that loads a tokenizer.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint.megatron import load_weights
from megatron_patch.data.datasets import build_datasets, require_eod
from megatron_patch.family import Architecture
from megatron_patch.layers.documents import separate_documents
from megatron_patch.model import build_model, transformer_config
from megatron_patch.models import family_for
from megatron_patch.tokenizer import load_tokenizer
from megatron_patch.training import checkpointing
from megatron_patch.training.arguments import Plan, PretrainArgs, plan
from megatron_patch.training.checkpointing import Layout, Progress, Trainer
from megatron_patch.training.initialize import device, seed_everything
from megatron_patch.training.metrics import Reporter
from megatron_patch.training.optimizer import build_optimizer, training_dtype, wrap


@dataclass
class Run:
    """Everything one process holds while it trains."""

    args: PretrainArgs
    plan: Plan
    architecture: Architecture
    config: TransformerConfig
    model: list[DistributedDataParallel]
    trainer: Trainer
    tokenizer_directory: Path
    progress: Progress = field(default_factory=Progress)
    reporter: Reporter | None = None
    """On the one process that reports."""


def set_up(args: PretrainArgs) -> Run:
    """Build the model, its optimizer and schedule, and load what there is to load."""
    derived = plan(args, dist.get_world_size())
    source = _source(args)
    values = layout.read_config(source)
    architecture = family_for(values).describe(values)
    config = _config(args, architecture)
    bare = build_model(architecture, config, make_vocab_size_divisible_by=args.make_vocab_size_divisible_by)
    bare.to(device())
    files = layout.huggingface_directory(source) if layout.is_megatron(source) else Path(source)
    _separate_documents(args, bare, files)
    resumes = _resumes(args, source)
    if layout.is_megatron(source) and not resumes:
        load_weights([bare], source)
    model = [wrap(bare, config, args)]
    optimizer, scheduler = build_optimizer(args, derived, config, model)
    trainer = Trainer([bare], optimizer, scheduler, Layout.current(args.use_distributed_optimizer))
    run = Run(args, derived, architecture, config, model, trainer, files)
    if resumes:
        run.progress = checkpointing.load(layout.latest(source)[0], trainer, with_optimizer=not args.no_load_optim)
    else:
        seed_everything(args.seed)
    if args.save and dist.get_rank() == 0:
        layout.carry_huggingface(source, args.save)
    return run


def _separate_documents(args: PretrainArgs, model: GPTModel, tokenizer_directory: Path) -> None:
    if not (args.reset_position_ids or args.reset_attention_mask):
        return
    tokenizer = load_tokenizer(tokenizer_directory)
    require_eod(args, tokenizer)
    flags = {"positions": args.reset_position_ids, "attention": args.reset_attention_mask}
    separate_documents(model, tokenizer.eod, args.seq_length, **flags)


def _config(args: PretrainArgs, architecture: Architecture) -> TransformerConfig:
    if any(architecture.moe_layers) and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise ValueError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}: a model with experts needs "
            "--sequence-parallel as well, or a tensor parallel size of 1"
        )
    return transformer_config(
        architecture,
        training_dtype(args),
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        sequence_parallel=args.sequence_parallel,
        # Where every position counts, dividing each micro-batch's loss is the same and spares a pass over gradients.
        calculate_per_token_loss=args.eod_mask_loss,
        **_recompute(args),
    )


def _source(args: PretrainArgs) -> str:
    # A run that was killed resumes when its command is given again.
    if args.save and layout.is_megatron(args.save):
        return args.save
    return args.load or args.hf_config or ""


def _resumes(args: PretrainArgs, source: str) -> bool:
    # --finetune and --hf-config say how a run begins, not how it goes on.
    begun = layout.is_megatron(source) and layout.latest(source)[1] is not None
    return begun and (source == args.save or not args.finetune)


def _recompute(args: PretrainArgs) -> dict[str, Any]:
    if args.recompute_granularity != "full":
        return {"recompute_granularity": args.recompute_granularity}
    return {
        "recompute_granularity": "full",
        "recompute_method": args.recompute_method,
        "recompute_num_layers": args.recompute_num_layers,
    }


def load_datasets(run: Run) -> tuple[Any, Any]:
    """The training and validation datasets, long enough for the whole run."""
    args, size = run.args, run.plan.global_batch_size
    tokenizer = load_tokenizer(run.tokenizer_directory)
    wanted = (run.plan.train_iters * size, args.eval_iters * size, 0)
    say = partial(print, file=sys.stderr, flush=True) if dist.get_rank() == 0 else None
    train, valid, _ = build_datasets(args.data, tokenizer, wanted, run.architecture.vocab_size, say)
    return train, valid
