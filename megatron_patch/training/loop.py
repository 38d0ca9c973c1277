"""The training loop: from validated arguments to a trained, saved model.

`train` reads top to bottom in the order a run happens. It knows nothing of families: the model comes described, the
data comes as batches. What it is trained on is the task's: `pretrain` and `finetune` differ in nothing else.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_patch.data.datasets import batches
from megatron_patch.model import flops_per_token
from megatron_patch.training import checkpointing
from megatron_patch.training.arguments import FinetuneArgs, PretrainArgs, TrainingArgs
from megatron_patch.training.checkpointing import Progress
from megatron_patch.training.finetuning import Finetuning
from megatron_patch.training.initialize import device, initialize
from megatron_patch.training.loss import Batch, forward_step
from megatron_patch.training.metrics import Reporter
from megatron_patch.training.optimizer import training_dtype
from megatron_patch.training.pretraining import Pretraining
from megatron_patch.training.setup import Run, Task, beginning, set_up


def pretrain(args: PretrainArgs) -> Progress:
    """Train on indexed datasets; see `train`."""
    return train(args, Pretraining(args))


def finetune(args: FinetuneArgs) -> Progress:
    """Train on conversations; see `train`."""
    return train(args, Finetuning(args))


def train(args: TrainingArgs, task: Task) -> Progress:
    """Train as `args` say, on this process's part of the work.

    Raises:
        ValueError: the arguments do not fit the model, the data or the number of processes.
    """
    opened = beginning(args)
    initialize(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        seed=args.seed,
        timeout_minutes=args.distributed_timeout_minutes,
    )
    run = set_up(args, task, opened)
    train_data, valid_data = task.datasets(run.plan)
    stop = _StopSignal()
    if dist.get_rank() == 0:
        run.reporter = Reporter(args.save, args.tensorboard_dir, run.progress.iteration, run.plan.train_iters)
        run.reporter.say(_announcement(run))
    try:
        _train(run, train_data, valid_data, stop)
    finally:
        stop.restore()
        if run.reporter:
            run.reporter.close()
    return run.progress


# ----------------------------------------------------------------------------------------------------------------- loop


def _train(run: Run, train_data: Any, valid_data: Any, stop: _StopSignal) -> None:
    args, progress = run.args, run.progress
    if progress.iteration >= run.plan.train_iters:
        _say(run, f"nothing to do: iteration {progress.iteration} of {run.plan.train_iters} is reached already")
        return
    data = _batches(run, train_data, progress.consumed_samples)
    window = _Window(run)
    if progress.iteration == 0:
        _evaluate_and_report(run, valid_data)
    while progress.iteration < run.plan.train_iters:
        window.add(train_step(run, data))
        last = progress.iteration == run.plan.train_iters
        if progress.iteration % args.log_interval == 0 or last:
            window.report()
        if progress.iteration % args.eval_interval == 0 or last:
            _evaluate_and_report(run, valid_data)
            window.restart()
        stopped = stop.requested()
        due = args.save_interval and progress.iteration % args.save_interval == 0
        if args.save and (due or last or stopped):
            _save(run)
            window.restart()
        if stopped:
            _say(run, f"stopped by signal after iteration {progress.iteration}" + (", saved" if args.save else ""))
            return


@dataclass(frozen=True)
class Step:
    """What one iteration gave."""

    sums: torch.Tensor
    """[summed loss, number of tokens] of this data-parallel rank's micro-batches; zeros but on the last stage."""

    grad_norm: float
    lr: float
    stepped: bool
    """Whether the optimizer took the step: fp16 skips those that overflow."""


def train_step(run: Run, data: Iterator[Batch]) -> Step:
    """One iteration: all micro-batches forward and backward, the optimizer's step, the schedule's."""
    lr = run.trainer.optimizer.param_groups[0]["lr"]
    for chunk in run.model:
        chunk.train()
        chunk.zero_grad_buffer()
    run.trainer.optimizer.zero_grad()
    sums = _forward_backward(run, data, run.plan.num_microbatches, forward_only=False)
    stepped, norm, _ = run.trainer.optimizer.step()
    if stepped:
        run.trainer.scheduler.step(increment=run.plan.global_batch_size)
    run.progress.iteration += 1
    run.progress.consumed_samples += run.plan.global_batch_size
    return Step(sums, float(norm or 0.0), lr, stepped)


def _forward_backward(run: Run, data: Iterator[Batch], count: int, forward_only: bool) -> torch.Tensor:
    results: Sequence[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data,
        model=run.model,
        num_microbatches=count,
        seq_length=run.args.seq_length,
        micro_batch_size=run.args.micro_batch_size,
        forward_only=forward_only,
    )
    return torch.stack(list(results)).sum(0) if results else torch.zeros(2, device=device())


def _batches(run: Run, dataset: Any, consumed: int) -> Iterator[Batch]:
    return batches(
        dataset,
        consumed,
        run.args.micro_batch_size,
        run.architecture.vocab_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        run.args.num_workers,
    )


def _mean_loss(sums: torch.Tensor) -> float:
    """The loss per token over all data-parallel ranks, known to every rank."""
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    return (sums[0] / sums[1].clamp(min=1)).item()


@torch.no_grad()
def evaluate(run: Run, valid_data: Any) -> float:
    """Loss per token on the first `eval_iters` global batches of the validation data, or all: the same every time."""
    for chunk in run.model:
        chunk.eval()
    data, count = _batches(run, valid_data, 0), len(valid_data) // run.plan.samples_per_process_step
    if run.args.eval_iters is not None:
        count = min(count, run.plan.num_microbatches * run.args.eval_iters)
    return _mean_loss(_forward_backward(run, data, count, forward_only=True))


def _evaluate_and_report(run: Run, valid_data: Any) -> None:
    if valid_data is None:
        return
    loss = evaluate(run, valid_data)
    if run.reporter:
        values = {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 20.0))}
        line = f"validation loss {loss:.6f} | perplexity {values['validation_perplexity']:.4g}"
        run.reporter.record(run.progress.iteration, values, line)


class _Window:
    """Sums between two log lines; the values leave the device only when they are shown."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._flops = flops_per_token(run.architecture, run.args.seq_length)
        self._sums, self._skipped = torch.zeros(2, device=device()), 0
        self.restart()

    def restart(self) -> None:
        """Do not count the time since the last line (an evaluation, a save)."""
        self._begin, self._iterations = time.monotonic(), 0

    def add(self, step: Step) -> None:
        """Take in one iteration."""
        self._sums += step.sums
        self._last, self._skipped = step, self._skipped + (not step.stepped)
        self._iterations += 1
        if self._run.reporter:
            self._run.reporter.step(self._run.progress.iteration)

    def report(self) -> None:
        """Show and forget."""
        loss = _mean_loss(self._sums)
        seconds = (time.monotonic() - self._begin) / self._iterations
        tokens = self._run.plan.global_batch_size * self._run.args.seq_length * self._run.filled / seconds
        values = {
            "loss": loss,
            "grad_norm": self._last.grad_norm,
            "lr": self._last.lr,
            "loss_scale": float(self._run.trainer.optimizer.get_loss_scale()),
            "skipped_iterations": self._skipped,
            "consumed_samples": self._run.progress.consumed_samples,
            "seconds_per_iteration": seconds,
            "tokens_per_second": tokens,
            "tflops_per_process": tokens * self._flops / dist.get_world_size() / 1e12,
        }
        self._sums.zero_()
        self._skipped = 0
        self.restart()
        if self._run.reporter:
            self._run.reporter.record(self._run.progress.iteration, values, self._line(values))

    def _line(self, values: dict[str, float]) -> str:
        parts = [
            f"loss {values['loss']:.6f}",
            f"grad norm {values['grad_norm']:.4f}",
            f"lr {values['lr']:.3e}",
            f"{values['tokens_per_second']:,.0f} tokens/s",
            f"{values['tflops_per_process']:.3f} TFLOP/s per process",
            f"ETA {self._run.reporter.eta(self._run.progress.iteration)}",
        ]
        if self._run.args.fp16:
            parts.append(f"loss scale {values['loss_scale']:g}, skipped {values['skipped_iterations']}")
        return " | ".join(parts)


# ---------------------------------------------------------------------------------------------------- saving, stopping


def _save(run: Run) -> None:
    settings = asdict(run.args)
    place = checkpointing.save(run.args.save, run.trainer, run.progress, settings, run.args.keep_last)
    _say(run, f"saved {place}")


def _say(run: Run, line: str) -> None:
    if run.reporter:
        run.reporter.say(line)


class _StopSignal:
    """SIGTERM, or SIGUSR1 as schedulers send it: finish the iteration, save, leave."""

    _SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self._received = False
        self._before = {number: signal.signal(number, self._receive) for number in self._SIGNALS}

    def _receive(self, *_: Any) -> None:
        self._received = True

    def requested(self) -> bool:
        """Whether any rank received one: all ranks must agree, or some would wait for ever."""
        flag = torch.tensor([float(self._received)], device=device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def restore(self) -> None:
        """Put the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _announcement(run: Run) -> str:
    args, derived, config = run.args, run.plan, run.architecture.config
    sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, derived.data_parallel_size)
    batch = (derived.num_microbatches, derived.samples_per_process_step, args.seq_length)
    return " | ".join(
        (
            f"{run.architecture.family.name}: {config['num_layers']} layers, hidden {config['hidden_size']}, "
            f"vocabulary {run.architecture.vocab_size}",
            "TP {} x PP {} x DP {}".format(*sizes) + _experts(run),
            "global batch {} = {} micro-batches x {} x {} tokens".format(derived.global_batch_size, *batch),
            f"{training_dtype(args)}".removeprefix("torch."),
            f"iterations {run.progress.iteration} to {derived.train_iters}",
        )
    )


def _experts(run: Run) -> str:
    args = run.args
    tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    has_experts = any(run.architecture.moe_layers)
    return f", experts TP {tensor} x EP {args.expert_model_parallel_size}" if has_experts else ""
