"""torch's own launcher, whose report of a failed process is one line, and whose exit code is that process's.

Started by `megatron-patch ... --nproc-per-node N` as `python -m megatron_patch.launch.torchrun`, with torchrun's
arguments. Without it, every mistake of a user ends in forty lines of traceback and exit code 1.
"""

from __future__ import annotations

import logging
import sys


def main(argv: list[str]) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # what it would log is in the line below
    try:
        run.main(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"megatron-patch: rank {rank} ended first, with {_describe(failure.exitcode)}", file=sys.stderr)
        return _as_exit_code(failure.exitcode)
    except SignalException as error:
        print(f"megatron-patch: stopped by {error.sigval.name}", file=sys.stderr)
        return _as_exit_code(-error.sigval.value)
    return 0


def _describe(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _as_exit_code(code: int) -> int:
    """As a shell reports it: 128 + N for a process that signal N ended."""
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
