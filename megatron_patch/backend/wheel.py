"""Proves that the installed megatron-core is the published wheel: its files against the hashes in the wheel's RECORD.

Also names the package that Python would really import, since another Megatron checkout on PYTHONPATH hides the wheel.
Imports neither torch nor megatron-core, and takes a few hundredths of a second. Knows nothing of what the files mean.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, PackagePath, distribution
from pathlib import Path

_CODE = {".py", ".so"}


@dataclass(frozen=True)
class WheelReport:
    """How the files on disk differ from those the wheel brought."""

    version: str
    num_files: int
    """Files whose hashes were compared."""
    modified: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    """Python or compiled files inside the package that the wheel did not bring."""
    hidden_by: str | None
    """The folder that Python would import instead of the wheel."""

    @property
    def intact(self) -> bool:
        """Whether what gets imported is what was published."""
        return self.num_files > 0 and not (self.modified or self.missing or self.extra or self.hidden_by)

    def __str__(self) -> str:
        if not self.num_files:
            return "not installed from a wheel: there are no hashes to compare with"
        if self.intact:
            return f"unmodified: {self.num_files} files match the wheel's RECORD"
        lists = {"modified": self.modified, "missing": self.missing, "not from the wheel": self.extra}
        parts = [f"{name}: {_some(paths)}" for name, paths in lists.items() if paths]
        return "; ".join(parts + [f"hidden by {self.hidden_by}"] * bool(self.hidden_by))


def _some(paths: tuple[str, ...], limit: int = 3) -> str:
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return ", ".join(paths[:limit]) + more


def check_wheel(name: str = "megatron-core", package: str = "megatron/core") -> WheelReport:
    """Compares every file of distribution `name`; raises PackageNotFoundError where it is not installed."""
    found = distribution(name)
    recorded = [path for path in found.files or () if path.hash and str(path).startswith(f"{package}/")]
    on_disk = {path for path in recorded if Path(path.locate()).is_file()}
    return WheelReport(
        version=found.version,
        num_files=len(recorded),
        modified=tuple(str(path) for path in recorded if path in on_disk and _hash(path) != path.hash.value),
        missing=tuple(str(path) for path in recorded if path not in on_disk),
        extra=_extra(found, package, {str(path) for path in recorded}),
        hidden_by=_hidden_by(found, package),
    )


def _hash(path: PackagePath) -> str:
    """The digest as RECORD spells it: URL-safe base64 without padding."""
    digest = hashlib.new(path.hash.mode, Path(path.locate()).read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _extra(found: Distribution, package: str, recorded: set[str]) -> tuple[str, ...]:
    root = Path(found.locate_file(""))
    present = (path for path in (root / package).rglob("*") if path.suffix in _CODE)
    return tuple(sorted({path.relative_to(root).as_posix() for path in present} - recorded))


def _hidden_by(found: Distribution, package: str) -> str | None:
    namespace, _, rest = package.partition("/")
    spec = PathFinder.find_spec(namespace)
    for folder in spec.submodule_search_locations if spec else ():
        if (Path(folder) / rest / "__init__.py").is_file():
            imported = Path(folder).resolve()
            return None if imported == Path(found.locate_file(namespace)).resolve() else str(imported)
    return None
