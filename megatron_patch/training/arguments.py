"""The flags of `pretrain` and `finetune`: typed, with Megatron-LM's names, checked before anything heavy is imported.

It knows dataclasses and nothing else: no torch, no distributed state, no model. What only the model's config can decide
(whether TP divides the heads) is checked where the model is described.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from megatron_patch.data.arguments import DataSpec, RowArgs, parse_blend, raise_problems
from megatron_patch.data.sft.arguments import SftFormatArgs


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
        found = too_small(self, _SIZES)
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
    """Checkpoint to start from: what `convert` wrote, the --save of another run, or a Hugging Face directory."""
    hf_config: str | None = None
    """Start from random weights instead: a Hugging Face directory with config.json and tokenizer."""
    save: str | None = None
    """Where checkpoints, metrics and the loss curve go. If it holds a checkpoint, the run resumes from there."""
    no_load_optim: bool = False
    """Do not load the optimizer's state."""
    override_opt_param_scheduler: bool = False
    """On resuming, follow the schedule of these flags rather than the checkpoint's."""
    micro_batch_size: int = 1
    """Samples (rows of --seq-length tokens) that one process handles at once."""
    global_batch_size: int | None = None
    """Samples of one iteration, over all processes (default: micro batch size x data-parallel size)."""
    train_iters: int | None = None
    """Iterations to train."""
    eval_interval: int = 100
    """Iterations between two evaluations on the validation data."""
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
        if self.save_interval is not None and self.save is None:
            found.append("--save-interval: needs --save DIR")
        found += too_small(self, _COUNTS)
        if self.eval_iters is not None and self.eval_iters < 0:
            found.append(f"--eval-iters {self.eval_iters}: must not be negative")
        return found


_COUNTS = (
    "micro_batch_size",
    "global_batch_size",
    "train_iters",
    "eval_interval",
    "save_interval",
    "keep_last",
    "log_interval",
    "make_vocab_size_divisible_by",
    "distributed_timeout_minutes",
)


@dataclass(frozen=True)
class TrainingArgs(ParallelArgs, OptimizerArgs, RunArgs, RowArgs):
    """The flags that every kind of training has."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values."""
        problems = [*ParallelArgs.problems(self), *OptimizerArgs.problems(self), *RunArgs.problems(self)]
        if self.sequence_parallel and self.seq_length % self.tensor_model_parallel_size:
            problems.append(
                f"--seq-length {self.seq_length}: --sequence-parallel needs a multiple of "
                f"--tensor-model-parallel-size {self.tensor_model_parallel_size}"
            )
        return problems


@dataclass(frozen=True)
class PretrainArgs(TrainingArgs, DataSpec):
    """Pretrain, or continue pretraining, on indexed datasets."""

    finetune: bool = False
    """Take only the weights of --load: iteration, optimizer, schedule and random state start anew."""
    train_tokens: int | None = None
    """Instead of --train-iters, the tokens to train on (rounded down to whole iterations)."""
    lr_warmup_tokens: int | None = None
    """Instead of --lr-warmup-iters, the tokens over which the learning rate rises from 0."""

    @property
    def data(self) -> DataSpec:
        """The part that describes the datasets."""
        return DataSpec(**{name: getattr(self, name) for name in DataSpec.__dataclass_fields__})

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = [*self.problems(), *too_small(self, ("train_tokens",))]
        if (self.train_iters is None) == (self.train_tokens is None):
            problems.append("give how long to train: --train-iters or --train-tokens (one of them)")
        if self.lr_warmup_iters is not None and self.lr_warmup_tokens is not None:
            problems.append("--lr-warmup-iters and --lr-warmup-tokens: give one")
        try:
            DataSpec.validate(self)
        except ValueError as error:
            problems.append(str(error))
        raise_problems(problems)

    def plan(self, world_size: int) -> Plan:
        """What the flags amount to on so many processes; ValueError if they do not fit each other."""
        batching = batching_of(self, world_size)
        tokens = batching.global_batch_size * self.seq_length
        iters = self.train_iters or (self.train_tokens or 0) // tokens
        if iters < 1:
            raise ValueError(f"--train-tokens {self.train_tokens}: less than one iteration of {tokens} tokens")
        warmup = self.lr_warmup_iters or (self.lr_warmup_tokens or 0) // tokens
        return _scheduled(batching, iters, warmup, self.lr_decay_iters)


@dataclass(frozen=True)
class FinetuneArgs(TrainingArgs, SftFormatArgs):
    """Supervised fine-tuning: learn what the assistant says in conversations.

    Where a loss is reported, it is that of learned tokens alone."""

    train_data: tuple[str, ...] = ()
    """Conversations to learn: files, directories or quoted globs of .jsonl, .json (each also as .gz or .zst) and
    .parquet, or prefixes of what `sft-data` wrote. With a number before each, that many times in an epoch, of a
    fraction a part drawn once: 2 a.jsonl 0.5 b.jsonl."""
    valid_data: tuple[str, ...] = ()
    """Conversations to evaluate on: all of them every time, each token that is to be learned weighing the same."""
    data_cache_path: str | None = None
    """Where to keep tokenized files, for the next run with the same data, tokenizer, template and flags; every process
    must see it (default: sft-cache beside the first of the files). Large sets: tokenize with `sft-data` before."""
    data_workers: int = 2
    """Processes that tokenize, at the start."""
    packing: bool = True
    """Put as many samples into a row as fit; they do not see one another. Without it, a sample a row, padded."""
    loss_per: Literal["token", "sequence"] = "token"
    """What weighs the same in a global batch: each learned token, or each sample (the mean of the samples' means)."""
    epochs: int | None = None
    """Instead of --train-iters: times to train on all of the data."""
    lr_warmup_fraction: float | None = None
    """Instead of --lr-warmup-iters: part of the iterations over which the learning rate rises from 0."""
    eval_iters: int | None = None
    """Global batches of an evaluation (default: all of --valid-data); 0 does not evaluate."""

    @property
    def formats(self) -> SftFormatArgs:
        """The part that says how files become samples."""
        return SftFormatArgs(**{name: getattr(self, name) for name in SftFormatArgs.__dataclass_fields__})

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = [*self.problems(), *self.row_problems(), *self.format_problems()]
        problems += too_small(self, ("epochs", "data_workers"))
        if (self.train_iters is None) == (self.epochs is None):
            problems.append("give how long to train: --train-iters or --epochs (one of them)")
        if self.lr_warmup_iters is not None and self.lr_warmup_fraction is not None:
            problems.append("--lr-warmup-iters and --lr-warmup-fraction: give one")
        if self.lr_warmup_fraction is not None and not 0 <= self.lr_warmup_fraction < 1:
            problems.append(f"--lr-warmup-fraction {self.lr_warmup_fraction:g}: must lie in [0, 1)")
        if not self.train_data:
            problems.append("give the training data: --train-data FILE")
        for flag in ("train_data", "valid_data"):
            try:
                parse_blend(getattr(self, flag), f"--{_flag(flag)}")
            except ValueError as error:
                problems.append(str(error))
        raise_problems(problems)

    def plan(self, world_size: int, rows_per_epoch: int) -> Plan:
        """What the flags amount to on so many processes; ValueError if they do not fit each other."""
        batching = batching_of(self, world_size)
        iters = self.train_iters or -(-(self.epochs or 0) * rows_per_epoch // batching.global_batch_size)
        warmup = self.lr_warmup_iters or int((self.lr_warmup_fraction or 0.0) * iters)
        return _scheduled(batching, iters, warmup, self.lr_decay_iters)


@dataclass(frozen=True)
class Batching:
    """How a global batch is made on a given number of processes."""

    data_parallel_size: int
    global_batch_size: int
    num_microbatches: int

    @property
    def samples_per_process_step(self) -> int:
        """Samples that all data-parallel processes handle in one micro-step."""
        return self.global_batch_size // self.num_microbatches


@dataclass(frozen=True)
class Plan(Batching):
    """What the flags amount to."""

    train_iters: int
    warmup_iters: int
    decay_iters: int


def batching_of(args: TrainingArgs, world_size: int) -> Batching:
    """Derive the batch.

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
    return Batching(data_parallel_size, batch, batch // step)


def _scheduled(batching: Batching, iters: int, warmup: int, decay: int | None) -> Plan:
    decay = decay or iters
    if warmup >= decay:
        raise ValueError(f"the warm-up of {warmup} iterations must end before the decay does, at {decay}")
    return Plan(**asdict(batching), train_iters=iters, warmup_iters=warmup, decay_iters=decay)


def _check_experts(args: TrainingArgs, data_parallel_size: int) -> None:
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


def too_small(args: object, names: tuple[str, ...]) -> list[str]:
    """What is wrong with those of these values that are given: they must be at least 1."""
    values = {name: getattr(args, name) for name in names}
    return [
        f"--{_flag(n)} {value}: must be at least 1" for n, value in values.items() if value is not None and value < 1
    ]


def _flag(name: str) -> str:
    return name.replace("_", "-")
