"""A start without torch, for a command that only tokenizes.

transformers imports torch wherever it finds it, which is two thirds of the time that such a command takes to start. In
a process of its own torch can be hidden from it; in one that is somebody else's (a test, a notebook) nothing is.
"""

from __future__ import annotations

import os
import sys

own_process = False
"""Whether this process was started for one command, as the front door knows."""


def hide_torch() -> None:
    """From now on `import torch` fails here, and libraries that can do without it do."""
    if own_process and "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # what the import system understands as "not there"
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would complain that there is no torch
