"""Pretraining data by position, for scripts that know the order of their arguments by heart.

    python toolkits/pretrain_data_preprocessing/make_dataset.py ORDER ARGUMENT... [--dry-run]
    python toolkits/pretrain_data_preprocessing/make_dataset.py --help           every order
    python toolkits/pretrain_data_preprocessing/make_dataset.py ORDER --help     one of them

Checks every argument, prints what became of each and the `megatron-patch preprocess` command that does the same, and
runs that. The scripts beside it call this. It does not read data, and knows no tokenizer.
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script starts with its own folder on the path. In front, since the predecessor's package has the same name as ours.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_patch.data.arguments import PreprocessArgs
from megatron_patch.launch.main import main as megatron_patch
from toolkits.positional import Program
from toolkits.pretrain_data_preprocessing.command import ENVIRONMENT, command
from toolkits.pretrain_data_preprocessing.orders import ORDERS

PROGRAM = Program("make_dataset.py", ORDERS, ENVIRONMENT, command, {"preprocess": PreprocessArgs}, megatron_patch)


def main(argv: list[str] | None = None) -> int:
    """Runs a call and returns its exit code; 2 for a user's mistake."""
    return PROGRAM.main(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":  # its workers import this file again
    sys.exit(main())
