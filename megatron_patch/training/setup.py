"""From arguments to a run that is ready to train: model, optimizer, schedule, and what a checkpoint restores.

The one part of training that looks up a family, by the config beside the checkpoint, and that loads a tokenizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint.filling import fill
from megatron_patch.checkpoint.formats import Source
from megatron_patch.checkpoint.megatron import load_weights
from megatron_patch.checkpoint.opening import open_source
from megatron_patch.family import Architecture
from megatron_patch.model import build_model, transformer_config
from megatron_patch.models import family_for
from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from megatron_patch.training import checkpointing
from megatron_patch.training.arguments import Plan, TrainingArgs, batching_of
from megatron_patch.training.checkpointing import Layout, Progress, Trainer
from megatron_patch.training.initialize import device, seed_everything
from megatron_patch.training.metrics import Reporter
from megatron_patch.training.optimizer import build_optimizer, training_dtype, wrap


class Task(Protocol):
    """What is trained on, and what of a run follows from that."""

    settings: Mapping[str, Any]
    """What it asks of megatron-core's config."""

    begins_anew: bool
    """Whether nothing but weights is taken of --load."""

    filled: float
    """Once the data are open: the share of a row that is not padding."""

    def open(self, tokenizer: Tokenizer, vocab_size: int, world_size: int, say: Callable[[str], None]) -> Plan:
        """Look at the data, as far as the plan depends on them. Every process calls it; one of them has a voice."""

    def amend(self, model: GPTModel) -> None:
        """Change the built model as the data want it; ValueError if it cannot."""

    def datasets(self, plan: Plan) -> tuple[Any, Any]:
        """The training data, enough for the whole run, and the validation data or None."""


@dataclass
class Run:
    """Everything one process holds while it trains."""

    args: TrainingArgs
    plan: Plan
    architecture: Architecture
    config: TransformerConfig
    model: list[DistributedDataParallel]
    trainer: Trainer
    filled: float = 1.0
    """Share of a row that is not padding."""

    progress: Progress = field(default_factory=Progress)
    reporter: Reporter | None = None
    """On the one process that reports."""


def set_up(args: TrainingArgs, task: Task, opened: Source | None = None) -> Run:
    """Build the model, its optimizer and schedule, and load what there is to load.

    Args:
        opened: what `beginning` gave.
    """
    source = _source(args)
    values = layout.read_config(source)
    architecture = family_for(values).describe(values)
    batching_of(args, dist.get_world_size())  # tells what does not fit before data are read
    config = _config(args, architecture, task)
    files = layout.huggingface_directory(source) if layout.is_megatron(source) else Path(source)
    derived = task.open(load_tokenizer(files), architecture.vocab_size, dist.get_world_size(), _voice())
    bare = build_model(architecture, config, make_vocab_size_divisible_by=args.make_vocab_size_divisible_by)
    bare.to(device())
    task.amend(bare)
    resumes = _resumes(args, task, source)
    if not resumes:
        _load(bare, source, opened)
    model = [wrap(bare, config, args)]
    optimizer, scheduler = build_optimizer(args, derived, config, model)
    trainer = Trainer([bare], optimizer, scheduler, Layout.current(args.use_distributed_optimizer))
    run = Run(args, derived, architecture, config, model, trainer, task.filled)
    if resumes:
        run.progress = checkpointing.load(layout.latest(source)[0], trainer, with_optimizer=not args.no_load_optim)
    else:
        seed_everything(args.seed)
    if args.save and dist.get_rank() == 0:
        layout.carry_huggingface(source, args.save)
    return run


def beginning(args: TrainingArgs) -> Source | None:
    """Where the weights come from, if megatron-core cannot load them at any layout: Hugging Face or legacy files.

    Called before the parallel state is there: describing a model makes one of its own.
    """
    source = _source(args)
    if source == args.hf_config or _is_torch_dist(source):
        return None
    return open_source(source)


def _is_torch_dist(source: str) -> bool:
    return layout.is_megatron(source) and not layout.is_legacy(layout.locate(source)[1])


def _load(model: GPTModel, source: str, opened: Source | None) -> None:
    """The weights to begin with; with --hf-config the random ones stay."""
    if opened is None:
        if layout.is_megatron(source):
            load_weights([model], source)
        return
    if model.config.mtp_num_layers:
        raise ValueError(
            f"--load {source}: layers that predict further tokens are read from torch_dist alone; "
            f"megatron-patch convert --source {source} --target CHECKPOINT"
        )
    fill([model], opened)


def _voice() -> Callable[[str], None]:
    return partial(print, file=sys.stderr, flush=True) if dist.get_rank() == 0 else lambda line: None


def _config(args: TrainingArgs, architecture: Architecture, task: Task) -> TransformerConfig:
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
        **task.settings,
        **_recompute(args),
    )


def _source(args: TrainingArgs) -> str:
    # A run that was killed resumes when its command is given again.
    if args.save and layout.is_megatron(args.save):
        return args.save
    return args.load or args.hf_config or ""


def _resumes(args: TrainingArgs, task: Task, source: str) -> bool:
    # --finetune and --hf-config say how a run begins, not how it goes on; so does `finetune`.
    begun = layout.is_megatron(source) and layout.latest(source)[1] is not None
    return begun and (source == args.save or not task.begins_anew)


def _recompute(args: TrainingArgs) -> dict[str, Any]:
    if args.recompute_granularity != "full":
        return {"recompute_granularity": args.recompute_granularity}
    return {
        "recompute_granularity": "full",
        "recompute_method": args.recompute_method,
        "recompute_num_layers": args.recompute_num_layers,
    }
