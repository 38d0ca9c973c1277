"""Small JSON files that one step of a vocabulary extension leaves for the next, beside the tokenizer or the weights.

It does not know what is in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXTENSION = "extension.json"
"""What `merge` notes beside the tokenizer: among others `reserved`, the tokens that only fill up."""

INITIALISATION = "initialisation.json"
"""What `init` notes beside the weights."""


def write_note(directory: str | Path, name: str, content: Mapping[str, Any]) -> None:
    """Write a note into a directory that is still being made."""
    (Path(directory) / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_note(directory: str | Path, name: str) -> dict[str, Any]:
    """The note, or an empty one."""
    file = Path(directory) / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
