"""`--nproc-per-node N`: runs a command again as N processes on this machine, under torch's own launcher.

Takes the option out of the arguments before the command parses them, and replaces the process by the launcher (exec, so
that signals reach it). Knows nothing about the commands. Clusters may as well start
`torchrun ... -m megatron_patch pretrain ...` themselves.
"""

from __future__ import annotations

import os
import sys

OPTION = "--nproc-per-node"
HELP = f"  {OPTION} N       run as N processes on this machine (torchrun does it; default 1)\n"
SECONDS_TO_SAVE = "600"
"""What torchrun leaves its processes after SIGTERM before it kills them: a checkpoint has to fit into it."""


def take_option(argv: list[str]) -> tuple[int, list[str]]:
    """Splits `argv` into the number of processes asked for and everything else."""
    value, others = split_option(argv, OPTION)
    return 1 if value is None else _number(value), others


def split_option(argv: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option, spelled `--option VALUE` or `--option=VALUE`, and all other words; None without it."""
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == option:
            end = position + (1 if equals else 2)
            return value if equals else "".join(argv[position + 1 : end]), argv[:position] + argv[end:]
    return None, argv


def _number(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{OPTION}={value or '(nothing)'}: give the number of processes, 1 or more")
    if "RANK" in os.environ:
        raise ValueError(f"{OPTION}={value}: this already runs under a launcher (RANK is set); use one of the two")
    return int(value)


def run_again(num_processes: int, argv: list[str]) -> None:
    """Replaces this process by `num_processes` of `megatron-patch argv`; does not return."""
    environment = {
        # Processes that each take every core slow each other down; torchrun's own default is a single thread.
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_processes)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SECONDS_TO_SAVE,
        **os.environ,
    }
    launcher = ["-m", "megatron_patch.launch.torchrun", "--standalone", f"{OPTION}={num_processes}"]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *launcher, "-m", "megatron_patch", *argv], environment)
