"""Fine-tuning data by position, for scripts that know the order of their arguments by heart.

    python toolkits/sft_data_preprocessing/make_samples.py ORDER ARGUMENT... [--dry-run]
    python toolkits/sft_data_preprocessing/make_samples.py --help           every order
    python toolkits/sft_data_preprocessing/make_samples.py ORDER --help     one of them

Checks every argument, prints what became of each and the `megatron-patch sft-data` command that does the same, and runs
that. The script beside it calls this. It does not read data, and knows no tokenizer.
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script starts with its own folder on the path. In front, since the predecessor's package has the same name as ours.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_patch.data.sft.arguments import SftDataArgs
from megatron_patch.launch.main import main as megatron_patch
from toolkits.positional import Program
from toolkits.sft_data_preprocessing.command import ENVIRONMENT, command
from toolkits.sft_data_preprocessing.orders import ORDERS

PROGRAM = Program("make_samples.py", ORDERS, ENVIRONMENT, command, {"sft-data": SftDataArgs}, megatron_patch)


def main(argv: list[str] | None = None) -> int:
    """Runs a call and returns its exit code; 2 for a user's mistake."""
    return PROGRAM.main(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":  # its workers import this file again
    sys.exit(main())
