"""Makes small installed packages and a small `nvidia-smi` in a folder, for tests of what is found on a machine."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path


def install(site: Path, name: str, version: str, files: dict[str, str]) -> None:
    """Writes `files` and a dist-info whose RECORD has their hashes, as pip would."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    rows = []
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(text)}\n")
    (info / "RECORD").write_text("".join([*rows, f"{info.name}/RECORD,,\n"]))


def nvidia_smi(folder: Path, script: str) -> None:
    """A program of that name that runs `script` in bash."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
