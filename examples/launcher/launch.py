"""Training, finetuning, generation and evaluation by position, for scripts whose arguments people know by heart.

    python examples/launcher/launch.py ORDER[,ORDER...] ARGUMENT... [--dry-run]
    python examples/launcher/launch.py --help           every order
    python examples/launcher/launch.py ORDER --help     one of them

Checks every argument, prints what became of each and the `megatron-patch` command that does the same, and runs that:
on this node, or as this node's part of several. The scripts in the folders of the families call this. It does not
train, and knows no family.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path

# A script starts with its own folder on the path. In front, since the predecessor's package has the same name as ours.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.launcher.command import ENVIRONMENT, Launch, command
from examples.launcher.orders import orders_of
from megatron_patch import recipe
from megatron_patch.checkpoint.directory import write_text
from megatron_patch.evaluation.arguments import EvaluateArgs
from megatron_patch.generation.arguments import GenerateArgs
from megatron_patch.launch import processes
from megatron_patch.launch.main import main as megatron_patch
from megatron_patch.training.arguments import FinetuneArgs, PretrainArgs
from toolkits.positional import Command, Program, fail, rehearse

NAME = "launch.py"
PARSERS = {"pretrain": PretrainArgs, "finetune": FinetuneArgs, "generate": GenerateArgs, "evaluate": EvaluateArgs}
LAUNCHER_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
"""What a cluster says of nodes under names that torchrun uses for processes; torchrun sets them anew."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a call and returns its exit code; 2 for a user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    program = Program(NAME, orders_of(words[0] if words else ""), ENVIRONMENT, command, PARSERS, megatron_patch)
    understood = program.understand(words)
    if isinstance(understood, int):
        return understood
    plan, dry_run = understood
    _prepare_environment(plan)
    try:
        check(plan)
    except ValueError as error:
        return fail(f"{NAME} {words[0]}", str(error))
    if file := os.environ.get("RECIPE"):
        write_text(Path(file), as_recipe(plan))
        print(f"the same: megatron-patch {plan.argv[0]} --config {file}", flush=True)
    if dry_run:
        print("dry run: nothing is done")
        return 0
    return start(plan)


def check(plan: Launch) -> None:
    """Lets the command's own parser and plan judge it; ValueError for what they refuse."""
    name, *flags = plan.argv
    _, flags = processes.take_option(flags)
    import_module(f"megatron_patch.launch.{name}").check(flags, plan.where.world_size)


def as_recipe(plan: Launch) -> str:
    """The command as a recipe: flags that are not at their defaults, and processes where one node runs them all."""
    name, *flags = plan.argv
    num_processes, flags = processes.take_option(flags)
    dataclass = PARSERS[name]
    arguments = rehearse(Command((name, *flags), {}), PARSERS)
    defaults = {one.name: one.default for one in fields(dataclass)}
    values = {key: getattr(arguments, key) for key in defaults if getattr(arguments, key) != defaults[key]}
    spread = {"nproc_per_node": num_processes} if num_processes > 1 else {}
    return f"# megatron-patch {name} --config FILE\n{recipe.dump({**spread, **values})}"


def start(plan: Launch) -> int:
    """Runs the command: here, or under torchrun as one node of several (which does not return)."""
    if plan.where.nodes == 1:
        return megatron_patch(list(plan.argv))
    variables = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": processes.SECONDS_TO_SAVE, **os.environ}
    torchrun = [sys.executable, "-m", "megatron_patch.launch.torchrun", *plan.where.torchrun]
    sys.stdout.flush()
    os.execve(sys.executable, [*torchrun, "-m", "megatron_patch", *plan.argv], variables)


def _prepare_environment(plan: Launch) -> None:
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    if plan.where.gpus:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron-core overlaps communication in one queue
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        threads = max(1, len(os.sched_getaffinity(0)) // plan.where.processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


if __name__ == "__main__":  # core's checkpoint writer starts processes that import this module again
    sys.exit(main())
