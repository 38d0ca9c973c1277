"""What commands leave behind for programs to read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def write_json(report: Any, path: str | None, **more: Any) -> None:
    """Writes a report, a dataclass, to the file that was asked for, if one was; `more` comes before its fields."""
    from megatron_patch.checkpoint.directory import write_text

    if path:
        content = json.dumps({**more, **asdict(report)}, indent=2, ensure_ascii=False)
        write_text(Path(path), content + "\n")
