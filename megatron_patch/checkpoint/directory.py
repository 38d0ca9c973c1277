"""The layout of a Megatron checkpoint on disk, and how a directory comes into being: whole or not at all.

    ROOT/latest_checkpointed_iteration.txt      the tracker: "release" or an iteration number
    ROOT/release/  ROOT/iter_0000010/           weights and training state: .metadata, metadata.json, common.pt, .distcp
    ROOT/huggingface/                           config.json, tokenizer and every other file that is no weight

Everything is Megatron-LM's but ``huggingface/``. `staging` writes a directory under a temporary name beside its place,
fsyncs it and renames it; `write_tracker` comes last. This module knows paths only: no tensors, no families, no torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
HUGGINGFACE = "huggingface"
CONFIG = "config.json"

# Not common.pt: newer versions of megatron-core keep its content in a .distcp file.
_COMPLETE = (".metadata", "metadata.json")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|ggml|h5|msgpack|ot|onnx)|.*\.(safetensors|bin)\.index\.json")


# ----------------------------------------------------------------------------------------------------- what lies where


def iteration_directory(root: str | Path, iteration: int | None) -> Path:
    """Where the checkpoint of an iteration lies; None is the released (converted) model."""
    return Path(root) / (RELEASE if iteration is None else f"iter_{iteration:07d}")


def huggingface_directory(root: str | Path) -> Path:
    """Where config.json, the tokenizer and the other files of the Hugging Face model lie."""
    return Path(root) / HUGGINGFACE


def is_megatron(path: str | Path) -> bool:
    """Whether this is the root of a Megatron checkpoint, or one of its iterations."""
    path = Path(path)
    return (path / TRACKER).is_file() or all((path / name).is_file() for name in _COMPLETE)


def is_huggingface(path: str | Path) -> bool:
    """Whether this is a Hugging Face model directory."""
    return (Path(path) / CONFIG).is_file() and not is_megatron(path)


def latest(root: str | Path) -> tuple[Path, int | None]:
    """The directory and the iteration (None: release) that the tracker names.

    Raises:
        ValueError: there is no tracker, or what it names is missing or incomplete.
    """
    tracker = Path(root) / TRACKER
    if not tracker.is_file():
        raise ValueError(f"{root} is no Megatron checkpoint: it has no {TRACKER}")
    content = tracker.read_text().strip()
    if content != RELEASE and not content.isdecimal():
        raise ValueError(f"{tracker} holds {content!r}; it must hold {RELEASE!r} or an iteration number")
    iteration = None if content == RELEASE else int(content)
    directory = iteration_directory(root, iteration)
    _check_complete(directory)
    return directory, iteration


def locate(path: str | Path) -> tuple[Path, Path, int | None]:
    """Root, directory and iteration of a checkpoint, given its root or the directory of one iteration.

    Raises:
        ValueError: it is neither, or incomplete.
    """
    path = Path(path)
    if path.name == RELEASE or re.fullmatch(r"iter_\d+", path.name):
        _check_complete(path)
        return path.parent, path, None if path.name == RELEASE else int(path.name.removeprefix("iter_"))
    return path, *latest(path)


def _check_complete(directory: Path) -> None:
    if not directory.is_dir():
        raise ValueError(f"the checkpoint directory {directory} does not exist")
    if missing := [name for name in _COMPLETE if not (directory / name).is_file()]:
        raise ValueError(f"{directory} is incomplete: {', '.join(missing)} missing (was the save interrupted?)")


def read_config(path: str | Path) -> dict[str, Any]:
    """The Hugging Face config.json of a Hugging Face directory, a Megatron root, or one of its iterations.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    path = Path(path)
    places = [folder / CONFIG for folder in (path, huggingface_directory(path), huggingface_directory(path.parent))]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"{path} holds no model: neither {CONFIG} nor {HUGGINGFACE}/{CONFIG} is there")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; a ValueError names the file where it is none."""
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


# ------------------------------------------------------------------------------------------ files that are no weights


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Copy every file of a model directory that is no weight: config, tokenizer, generation config, code, licence."""
    source, target = Path(source), Path(target)
    for folder, names, files in os.walk(source, followlinks=True):
        names[:] = [name for name in names if not name.startswith(".")]
        place = target / Path(folder).relative_to(source)
        for name in files:
            if not _WEIGHTS.fullmatch(name):
                place.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(folder) / name, place / name)


def carry_huggingface(source: str | Path, root: str | Path) -> None:
    """Give `root` the side files of a Hugging Face directory or of another Megatron root, unless it has its own."""
    source, target = Path(source), huggingface_directory(root)
    if (target / CONFIG).is_file():
        return
    folders = (source, huggingface_directory(source), huggingface_directory(source.parent))
    with staging(target, overwrite=True) as staged:
        copy_side_files(next(folder for folder in folders if (folder / CONFIG).is_file()), staged)


# -------------------------------------------------------------------------------------------------------- safe writing


def write_tracker(root: str | Path, iteration: int | None) -> None:
    """Make `iteration` (None: release) the checkpoint that `latest` finds; atomic, and on disk when it returns."""
    write_text(Path(root) / TRACKER, RELEASE if iteration is None else str(iteration))


def write_text(path: Path, text: str) -> None:
    """Write a small file so that either all of it or its former content is there, and on disk."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, "utf-8")
    _sync(temporary)
    temporary.rename(path)
    _sync(path.parent)


@contextmanager
def staging(final: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `final` that takes its place when the block ends well, and vanishes otherwise.

    What killed processes of this machine left behind here is cleared away first.

    Raises:
        ValueError: `final` exists, is not an empty directory, and `overwrite` is not given.
    """
    final = Path(os.path.abspath(final))
    final.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(final)
    refuse_existing(final, overwrite)
    staged = _beside(final, "tmp")
    staged.mkdir()
    try:
        yield staged
        _sync_tree(staged)
        _put_in_place(staged, final)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def refuse_existing(final: Path, overwrite: bool) -> None:
    """Raise a ValueError if `final` exists, is not an empty directory, and `overwrite` is not given."""
    if final.exists() and not overwrite and not (final.is_dir() and not any(final.iterdir())):
        raise ValueError(f"{final} exists; give --overwrite to replace it, or another place")


def _put_in_place(staged: Path, final: Path) -> None:
    if not final.exists() or not _exchange(staged, final):
        replaced = _beside(final, "old")
        if final.exists():
            final.rename(replaced)
        staged.rename(final)
        staged = replaced
    _sync(final.parent)
    if staged.exists():
        shutil.rmtree(staged)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <fcntl.h> and <stdio.h>
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _beside(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{kind}-{socket.gethostname()}-{os.getpid()}")


def _clear_leftovers(final: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(final.name)}\.(tmp|old)-{re.escape(socket.gethostname())}-(\d+)")
    for path in final.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None or (int(match[2]) != os.getpid() and _is_alive(int(match[2]))):
            continue
        if match[1] == "old" and not final.exists():
            path.rename(final)  # killed between the two renames of a replacement: the old one is the good one
        else:
            shutil.rmtree(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_tree(folder: Path) -> None:
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(place) / name)
        _sync(Path(place))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
