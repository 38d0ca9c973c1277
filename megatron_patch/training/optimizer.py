"""megatron-core's DDP, optimizer and schedule from the flags. It knows modules and plain records; no files, no data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch.backend.torch_adam import torch_adams
from megatron_patch.training.arguments import Plan, TrainingArgs


def training_dtype(args: TrainingArgs) -> torch.dtype:
    """The dtype of parameters and activations."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def wrap(model: torch.nn.Module, config: TransformerConfig, args: TrainingArgs) -> DistributedDataParallel:
    """The model with fp32 gradient buffers that are reduced over data-parallel processes."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=args.overlap_grad_reduce,
        use_distributed_optimizer=args.use_distributed_optimizer,
        check_for_nan_in_grad=not args.fp16,  # with fp16 the loss scaler looks for them, and skips the step
    )
    wrapped = DistributedDataParallel(config, ddp, model)
    wrapped.broadcast_params()
    return wrapped


def build_optimizer(
    args: TrainingArgs, plan: Plan, config: TransformerConfig, model: Sequence[DistributedDataParallel]
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW without weight decay of vectors, its schedule (counted in samples), and the hooks the schedules call."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=args.lr,
            min_lr=args.min_lr,
            weight_decay=args.weight_decay,
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            adam_eps=args.adam_eps,
            clip_grad=args.clip_grad,
            bf16=args.bf16,
            fp16=args.fp16,
            params_dtype=training_dtype(args),
            initial_loss_scale=args.initial_loss_scale,
            min_loss_scale=args.min_loss_scale,
            loss_scale_window=args.loss_scale_window,
            hysteresis=args.hysteresis,
            use_distributed_optimizer=args.use_distributed_optimizer,
        ),
        list(model),
        use_gloo_process_groups=torch.cuda.is_available(),
    )
    _use_fused_adam(optimizer)
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        config.no_sync_func = model[0].no_sync
    return optimizer, _scheduler(args, plan, optimizer)


def _use_fused_adam(optimizer: MegatronOptimizer) -> None:
    # Where core falls back to torch's AdamW (no Transformer Engine, no apex) its one-kernel form is the fastest.
    for _, adam in torch_adams(optimizer):
        for group in adam.param_groups:
            group["fused"] = True


def _scheduler(args: TrainingArgs, plan: Plan, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=plan.warmup_iters * plan.global_batch_size,
        lr_decay_steps=plan.decay_iters * plan.global_batch_size,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=plan.train_iters * plan.global_batch_size,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=not args.override_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
    )
