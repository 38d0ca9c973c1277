"""`python -m megatron_patch` is the command `megatron-patch`. It knows only where that command is."""

from __future__ import annotations

import sys

from megatron_patch.launch.main import main

if __name__ == "__main__":  # core's checkpoint writer starts processes that import this module again
    sys.exit(main())
