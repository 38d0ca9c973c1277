"""The flags of `pretrain`: typed, with Megatron-LM's names, checked once before anything heavy is imported.

It knows dataclasses and nothing else: no torch, no distributed state, no model. What only the model's config can decide
(whether TP divides the heads) is checked where the model is described.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_patch.data.arguments import DataSpec, raise_problems


@dataclass(frozen=True)
class ParallelArgs:
    """How the processes share the work."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Processes that share the layers among them, in stages."""
    expert_model_parallel_size: int = 1
    """Processes that share the experts among them: data-parallel ones, or those that --expert-tensor-parallel-size
    leaves over of the tensor-parallel ones."""
    expert_tensor_parallel_size: int | None = None
    """Processes that share each expert (default: as many as the other layers')."""
    sequence_parallel: bool = False
    """Split activations along the sequence where tensor parallelism would repeat them; needs tensor parallelism."""
    use_distributed_optimizer: bool = False
    """Share the optimizer's state among data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def expert_parallel_size(self) -> int:
        """Processes that hold the experts of one layer."""
        return self.expert_model_parallel_size * (self.expert_tensor_parallel_size or self.tensor_model_parallel_size)

    def problems(self) -> list[str]:
        """Everything that is wrong with these values."""
        sizes = {name: getattr(self, name) for name in _SIZES}
        found = [
            f"--{_flag(n)} {size}: must be at least 1" for n, size in sizes.items() if size is not None and size < 1
        ]
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            found.append("--sequence-parallel: needs --tensor-model-parallel-size of at least 2")
        if self.expert_model_parallel_size > 1 and self.tensor_model_parallel_size > 1 and not self.sequence_parallel:
            found.append(
                f"--expert-model-parallel-size {self.expert_model_parallel_size}: with --tensor-model-parallel-size "
                f"{self.tensor_model_parallel_size} it needs --sequence-parallel"
            )
        return found


_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


@dataclass(frozen=True)
class OptimizerArgs:
    """AdamW, its schedule and precision."""

    lr: float = 1e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    lr_warmup_iters: int | None = None
    """Iterations over which the learning rate rises from 0."""
    lr_warmup_tokens: int | None = None
    """The same, in tokens."""
    lr_decay_iters: int | None = None
    """Iteration at which the decay ends (default: the last)."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases and norms have none."""
    adam_beta1: float = 0.9
    """Decay of the running mean of gradients."""
    adam_beta2: float = 0.95
    """Decay of the running mean of squared gradients."""
    adam_eps: float = 1e-8
    """Added to the denominator."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    bf16: bool = False
    """Train in bfloat16, with fp32 main weights and gradients."""
    fp16: bool = False
    """Train in float16, with fp32 main weights and gradients and a dynamic loss scale."""
    initial_loss_scale: float = 2.0**32
    """First loss scale of fp16."""
    min_loss_scale: float = 1.0
    """Smallest loss scale of fp16."""
    loss_scale_window: int = 1000
    """Good iterations of fp16 before the loss scale is doubled."""
    hysteresis: int = 2
    """Bad iterations of fp16 before the loss scale is halved."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: whole layers, or only core attention."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With full: which layers; see Megatron-LM."""
    recompute_num_layers: int = 1
    """With full: how many layers make a unit (uniform), or are recomputed (block)."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values."""
        found = []
        if self.bf16 and self.fp16:
            found.append("--bf16 and --fp16: choose one, or neither for fp32")
        if not 0 <= self.min_lr <= self.lr:
            found.append(f"--min-lr {self.min_lr:g}: must lie between 0 and --lr {self.lr:g}")
        if self.lr_warmup_iters is not None and self.lr_warmup_tokens is not None:
            found.append("--lr-warmup-iters and --lr-warmup-tokens: give one")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"--{_flag(name)} {getattr(self, name):g}: must lie in [0, 1)")
        for name in ("weight_decay", "clip_grad", "adam_eps"):
            if getattr(self, name) < 0:
                found.append(f"--{_flag(name)} {getattr(self, name):g}: must not be negative")
        return found


@dataclass(frozen=True)
class RunArgs:
    """Where to start, how long, what to keep and what to say."""

    load: str | None = None
    """Checkpoint to start from: what `convert` wrote, or the --save of another run."""
    hf_config: str | None = None
    """Start from random weights instead: a Hugging Face directory with config.json and tokenizer."""
    save: str | None = None
    """Where checkpoints, metrics and the loss curve go. If it holds a checkpoint, the run resumes from there."""
    finetune: bool = False
    """Take only the weights of --load: iteration, optimizer, schedule and random state start anew."""
    no_load_optim: bool = False
    """Do not load the optimizer's state."""
    override_opt_param_scheduler: bool = False
    """On resuming, follow the schedule of these flags rather than the checkpoint's."""
    micro_batch_size: int = 1
    """Samples that one process handles at once."""
    global_batch_size: int | None = None
    """Samples of one iteration, over all processes (default: micro batch size x data-parallel size)."""
    train_iters: int | None = None
    """Iterations to train."""
    train_tokens: int | None = None
    """The same, in tokens (rounded down to whole iterations)."""
    eval_interval: int = 100
    """Iterations between two evaluations on the validation split."""
    eval_iters: int = 10
    """Global batches of an evaluation; 0 does not evaluate."""
    save_interval: int | None = None
    """Iterations between two checkpoints; the last iteration is always saved."""
    keep_last: int | None = None
    """Keep only this many of the newest checkpoints of this run."""
    log_interval: int = 1
    """Iterations between two log lines."""
    tensorboard_dir: str | None = None
    """Where TensorBoard events go (default: SAVE/tensorboard)."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    num_workers: int = 0
    """Processes that read data ahead, for each training process."""
    distributed_timeout_minutes: int = 10
    """How long a process waits for the others."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values."""
        found = []
        if (self.load is None) == (self.hf_config is None):
            found.append("give where to start: --load CHECKPOINT, or --hf-config DIR for random weights (one of them)")
        if (self.train_iters is None) == (self.train_tokens is None):
            found.append("give how long to train: --train-iters or --train-tokens (one of them)")
        if self.save_interval is not None and self.save is None:
            found.append("--save-interval: needs --save DIR")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"--{_flag(name)} {value}: must be at least 1")
        if self.eval_iters < 0:
            found.append(f"--eval-iters {self.eval_iters}: must not be negative")
        return found


_COUNTS = (
    "micro_batch_size",
    "global_batch_size",
    "train_iters",
    "train_tokens",
    "eval_interval",
    "save_interval",
    "keep_last",
    "log_interval",
    "make_vocab_size_divisible_by",
    "distributed_timeout_minutes",
)


@dataclass(frozen=True)
class PretrainArgs(ParallelArgs, OptimizerArgs, RunArgs, DataSpec):
    """Pretrain, or continue pretraining, on indexed datasets."""

    @property
    def data(self) -> DataSpec:
        """The part that describes the datasets."""
        return DataSpec(**{name: getattr(self, name) for name in DataSpec.__dataclass_fields__})

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = [*ParallelArgs.problems(self), *OptimizerArgs.problems(self), *RunArgs.problems(self)]
        if self.sequence_parallel and self.seq_length % self.tensor_model_parallel_size:
            problems.append(
                f"--seq-length {self.seq_length}: --sequence-parallel needs a multiple of "
                f"--tensor-model-parallel-size {self.tensor_model_parallel_size}"
            )
        try:
            DataSpec.validate(self)
        except ValueError as error:
            problems.append(str(error))
        raise_problems(problems)


@dataclass(frozen=True)
class Plan:
    """What the flags amount to on a given number of processes."""

    data_parallel_size: int
    global_batch_size: int
    num_microbatches: int
    train_iters: int
    warmup_iters: int
    decay_iters: int

    @property
    def samples_per_process_step(self) -> int:
        """Samples that all data-parallel processes handle in one micro-step."""
        return self.global_batch_size // self.num_microbatches


def plan(args: PretrainArgs, world_size: int) -> Plan:
    """Derive batches and iterations.

    Raises:
        ValueError: the number of processes or the batch sizes do not fit each other.
    """
    if world_size % args.model_parallel_size:
        raise ValueError(
            f"{world_size} processes: must be a multiple of --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size} x --pipeline-model-parallel-size {args.pipeline_model_parallel_size}"
        )
    data_parallel_size = world_size // args.model_parallel_size
    _check_experts(args, data_parallel_size)
    step = args.micro_batch_size * data_parallel_size
    batch = args.global_batch_size or step
    if batch % step:
        raise ValueError(
            f"--global-batch-size {batch}: must be a multiple of --micro-batch-size {args.micro_batch_size} x "
            f"data-parallel size {data_parallel_size} = {step}"
        )
    tokens = batch * args.seq_length
    iters = args.train_iters or (args.train_tokens or 0) // tokens
    if iters < 1:
        raise ValueError(f"--train-tokens {args.train_tokens}: less than one iteration of {tokens} tokens")
    warmup = args.lr_warmup_iters or (args.lr_warmup_tokens or 0) // tokens
    decay = args.lr_decay_iters or iters
    if warmup >= decay:
        raise ValueError(f"the warm-up of {warmup} iterations must end before the decay does, at {decay}")
    return Plan(data_parallel_size, batch, batch // step, iters, warmup, decay)


def _check_experts(args: PretrainArgs, data_parallel_size: int) -> None:
    tensor, expert = args.tensor_model_parallel_size, args.expert_model_parallel_size
    expert_tensor, processes = args.expert_tensor_parallel_size or tensor, tensor * data_parallel_size
    if processes % args.expert_parallel_size:
        free = processes // expert_tensor
        choices = [str(n) for n in range(1, free + 1) if processes % (n * expert_tensor) == 0]
        raise ValueError(
            f"--expert-model-parallel-size {expert} x --expert-tensor-parallel-size {expert_tensor} must divide "
            f"--tensor-model-parallel-size {tensor} x data-parallel size {data_parallel_size} = {processes}; choose "
            f"--expert-model-parallel-size {' or '.join(choices) or '1 and a smaller --expert-tensor-parallel-size'}"
        )


def _flag(name: str) -> str:
    return name.replace("_", "-")
