"""Conversion by position, for scripts that know the order of their arguments by heart.

    python toolkits/model_checkpoints_convertor/convert.py ORDER ARGUMENT... [--dry-run]
    python toolkits/model_checkpoints_convertor/convert.py --help           every order
    python toolkits/model_checkpoints_convertor/convert.py ORDER --help     one of them

Checks every argument, prints what became of each and the `megatron-patch` command that does the same, and runs that.
The scripts in the folders of the families call this. It does not convert, and knows no family.
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script starts with its own folder on the path. In front, since the predecessor's package has the same name as ours.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_patch.checkpoint.arguments import ConvertArgs, VerifyArgs
from megatron_patch.launch.main import main as megatron_patch
from toolkits.model_checkpoints_convertor.command import ENVIRONMENT, command
from toolkits.model_checkpoints_convertor.orders import ORDERS
from toolkits.positional import Program

PROGRAM = Program(
    "convert.py", ORDERS, ENVIRONMENT, command, {"convert": ConvertArgs, "verify": VerifyArgs}, megatron_patch
)


def main(argv: list[str] | None = None) -> int:
    """Runs a call and returns its exit code; 2 for a user's mistake."""
    return PROGRAM.main(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":  # a conversion may start processes that import this file again
    sys.exit(main())
