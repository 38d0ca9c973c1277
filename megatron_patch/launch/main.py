"""The command `megatron-patch`: picks a sub-command, imports only that one, and turns a user's mistake into one line.

A sub-command is a module with `main(argv) -> exit code`; one that runs as several processes may have
`check(argv, num_processes)` too, which finds a user's mistakes before they start. A ValueError is something the user
can mend (exit code 2), an OSError something the machine refused (1); both print one line, or their traceback where
MEGATRON_PATCH_DEBUG=1. Any other exception is a defect of ours and keeps its traceback. Knows the sub-commands by name.
"""

from __future__ import annotations

import atexit
import gc
import os
import select
import sys
import time
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.metadata import version

from megatron_patch import recipe
from megatron_patch.launch import light, processes

RECIPE_OPTION = "--config"
RECIPE_HELP = f"  {RECIPE_OPTION} FILE            take flags from a YAML file, named without dashes; typed ones win\n"

_STDOUT = 1
SECONDS_BEHIND_RANK_0 = 2.0
"""How long other ranks wait before they report an error, which mostly is the one that rank 0 reports."""


@dataclass(frozen=True)
class Command:
    """One row of the table of sub-commands."""

    help: str
    parallel: bool = False
    """Whether it may run as several processes."""
    arguments: str = ""
    """Its dataclass, as module:name in the package, where --config may name a recipe of its flags."""
    repeats: bool = False
    """Whether a flag is repeated for each of its values."""


COMMANDS = {
    "doctor": Command("what is installed here, which kernels are used and why, the fix for what is missing"),
    "families": Command("which models there are, what is special about each, what it was proven against"),
    "convert": Command("Hugging Face, torch_dist and legacy checkpoints into one another, at any layout"),
    "verify": Command("prove two checkpoints the same model: names, every bit, or logits on text", parallel=True),
    "preprocess": Command("jsonl, parquet or text -> the .bin/.idx files that pretraining reads"),
    "merge": Command("join several .bin/.idx datasets into one, and tell the tokens of each"),
    "inspect": Command("what a .bin/.idx dataset holds: sizes, lengths, special tokens, documents as text"),
    "verify-data": Command("prove a .bin/.idx dataset sound: index, sizes, ids, ends of documents"),
    "sft-data": Command("conversations (jsonl, parquet) -> tokenized samples that fine-tuning reads"),
    "vocab": Command("extend a tokenizer: train, analyze, merge; give the new tokens their rows: init, verify"),
    "pretrain": Command(
        "pretrain, or continue to pretrain a converted checkpoint", True, "training.arguments:PretrainArgs"
    ),
    "finetune": Command("fine-tune on conversations, packed into rows", True, "training.arguments:FinetuneArgs"),
    "evaluate": Command(
        "loss and perplexity of a checkpoint on text or indexed data", True, "evaluation.arguments:EvaluateArgs"
    ),
    "choices": Command(
        "accuracy on local questions of several choices, or of a last word", True, "evaluation.arguments:ChoicesArgs"
    ),
    "harness": Command("tasks of lm-evaluation-harness with a checkpoint", True, "evaluation.arguments:HarnessArgs"),
    "generate": Command("continue prompts with a checkpoint", True, "generation.arguments:GenerateArgs", repeats=True),
}


def main(argv: list[str] | None = None) -> int:
    atexit.register(gc.freeze)  # or Python, as it ends, once more looks for garbage in all of torch, most of a second
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if name in ("-V", "--version"):
        print(f"megatron-patch {version('megatron-patch')}")
        return 0
    if name not in COMMANDS:
        problem = f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}" if name else "name a command"
        print(f"{_usage()}\n\nmegatron-patch: error: {problem}", file=sys.stderr)
        return 2
    light.own_process = argv is None
    return _guarded(name, rest)


def _usage() -> str:
    rows = [f"  {name:<11} {command.help}" for name, command in COMMANDS.items()]
    tail = "Options of a command: megatron-patch COMMAND --help. Version: megatron-patch --version."
    return "\n".join(["usage: megatron-patch COMMAND [options]", "", *rows, "", tail])


def _guarded(name: str, argv: list[str]) -> int:
    try:
        return _run(name, argv)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _stdout_has_no_reader():  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
            return 1
        if os.environ.get("MEGATRON_PATCH_DEBUG") == "1":
            raise
        print(f"megatron-patch {name}{_rank()}: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        return 130


def _stdout_has_no_reader() -> bool:
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _rank() -> str:
    """Names the rank where there are several, after a while: torchrun ends the others once rank 0 has reported."""
    rank = os.environ.get("RANK", "")
    if rank not in ("", "0"):
        time.sleep(SECONDS_BEHIND_RANK_0)
    return f" (rank {rank})" if rank else ""


def with_recipe(command: Command, argv: list[str]) -> list[str]:
    """The words of a command, with those of its recipe if there is one."""
    file, typed = processes.split_option(argv, RECIPE_OPTION) if command.arguments else (None, argv)
    if file is None:
        return argv
    module, _, name = command.arguments.partition(":")
    dataclass = getattr(import_module(f"megatron_patch.{module}"), name)
    defaults = {one.name.replace("_", "-"): one.default for one in fields(dataclass)}
    option = {processes.OPTION.removeprefix("--"): 1} if command.parallel else {}
    return recipe.expand(file, typed, {**defaults, **option}, repeats=command.repeats)


def _run(name: str, argv: list[str]) -> int:
    argv = with_recipe(COMMANDS[name], argv)
    num_processes, argv = processes.take_option(argv) if COMMANDS[name].parallel else (1, argv)
    module = import_module(f"megatron_patch.launch.{name.replace('-', '_')}")
    if "-h" in argv or "--help" in argv:
        print(processes.HELP if COMMANDS[name].parallel else "", end="")
        print(RECIPE_HELP if COMMANDS[name].arguments else "", end="")
    elif num_processes > 1:
        if hasattr(module, "check"):
            module.check(argv, num_processes)
        processes.run_again(num_processes, [name, *argv])
    return module.main(argv)


if __name__ == "__main__":  # core's checkpoint writer starts processes that import this module again
    sys.exit(main())
