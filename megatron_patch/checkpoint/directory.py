"""The layout of a Megatron checkpoint on disk, and how a directory comes into being: whole or not at all.

    ROOT/latest_checkpointed_iteration.txt      the tracker: "release" or an iteration number
    ROOT/release/  ROOT/iter_0000010/           weights and training state: .metadata, metadata.json, common.pt, .distcp
    ROOT/huggingface/                           config.json, tokenizer and every other file that is no weight

Everything is Megatron-LM's but ``huggingface/``. `staging` writes a directory under a temporary name beside its place,
fsyncs it and renames it; `write_tracker` comes last. This module knows paths only: no tensors, no families, no torch.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
HUGGINGFACE = "huggingface"
CONFIG = "config.json"
MANIFEST = "conversion.json"

# Not common.pt: newer versions of megatron-core keep its content in a .distcp file.
METADATA = ".metadata"
_COMPLETE = (METADATA, "metadata.json")
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
    is_iteration = path.is_dir() and (is_legacy(path) or all((path / name).is_file() for name in _COMPLETE))
    return (path / TRACKER).is_file() or is_iteration


def is_legacy(directory: Path) -> bool:
    """Whether an iteration's directory holds mp_rank_XX directories rather than a torch_dist checkpoint."""
    return any(directory.glob("mp_rank_*"))


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
    if is_legacy(directory):
        return  # what is in there is the matter of its reader
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


def carries_config(path: str | Path) -> bool:
    """Whether a Megatron checkpoint (its root, or an iteration) has the config.json of its model."""
    return any((huggingface_directory(folder) / CONFIG).is_file() for folder in (Path(path), Path(path).parent))


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
            if not _WEIGHTS.fullmatch(name) and name != MANIFEST:
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
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The same for bytes."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_bytes(content)
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


@contextmanager
def staging(final: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `final` that takes its place when the block ends well, and vanishes otherwise.

    What killed processes of this machine left behind here is cleared away first.

    Raises:
        ValueError: `final` exists, is not an empty directory, and `overwrite` is not given.
    """
    final = Path(os.path.abspath(final))
    final.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(final)
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


@contextmanager
def resumable(final: str | Path, plan: Mapping[str, Any], *, overwrite: bool, resume: bool) -> Iterator[Path]:
    """Like `staging`, for work of hours: where the process is killed or the disk is full, what was done is kept.

    Args:
        plan: what is being made, as JSON; only the same plan can be resumed.
        resume: go on with what a killed process left; without it that is thrown away.

    Raises:
        ValueError: `final` exists and `overwrite` is not given; another process works on it; or another plan was begun.
    """
    final = Path(os.path.abspath(final))
    final.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(final)
    refuse_existing(final, overwrite)
    staged = partial_of(final)
    staged.mkdir(exist_ok=True)
    with locked(staged):
        _begin(staged, plan, resume)
        try:
            yield staged
            _sync_tree(staged)
            if _is_taken(final) and not overwrite:
                raise FileExistsError(f"{final} has come to be in the meantime")
            (staged / _PLAN).unlink()
            _put_in_place(staged, final)
        except ValueError:
            _forget(staged)
            shutil.rmtree(staged, ignore_errors=True)
            raise
        except OSError as error:
            raise OSError(f"{error}; what is done so far is kept in {staged}: --resume goes on with it") from error


_PLAN = ".plan.json"
_NOTES = (_PLAN, MANIFEST, f"{RELEASE}/{MANIFEST}")
"""What says of a partial directory what is being made there; the manifests, once all is done."""


def partial_of(final: str | Path) -> Path:
    """Where `resumable` works on a directory."""
    final = Path(os.path.abspath(final))
    return final.with_name(f".{final.name}.partial")


def drop_partial(final: str | Path) -> None:
    """Remove what lies where `resumable` works, now that `final` is whole: it may be what was replaced."""
    staged = partial_of(final)
    if staged.exists():
        with locked(staged):
            _forget(staged)
            shutil.rmtree(staged)


@contextmanager
def locked(staged: Path) -> Iterator[None]:
    """Hold a directory against other processes; the lock ends with the process, however that ends."""
    descriptor = os.open(staged, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another process is writing {staged}; wait for it, or end it") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)


def _begin(staged: Path, plan: Mapping[str, Any], resume: bool) -> None:
    plan, begun = json.loads(json.dumps(plan)), _begun(staged)
    if resume and begun is not None and begun != plan:
        changed = "; ".join(changes(begun, plan))
        raise ValueError(f"{staged} was begun with something else: {changed}. Start over without --resume")
    if not resume or begun is None:
        _forget(staged)
        for path in staged.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for torn in staged.rglob(".*.tmp-*"):
        torn.unlink()
    write_text(staged / _PLAN, json.dumps(plan))


def _begun(staged: Path) -> dict[str, Any] | None:
    """The plan of what a killed process left here."""
    file = next((staged / name for name in _NOTES if (staged / name).is_file()), None)
    content = file and read_json(file)
    return content["plan"] if content and file.name == MANIFEST else content


def changes(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Where two plans differ, and how."""
    for key in {**before, **now}:
        one, other, place = before.get(key), now.get(key), f"{where}{key}"
        if isinstance(one, dict) and isinstance(other, dict):
            yield from changes(one, other, f"{place} ")
        elif one != other:
            yield f"{place} was {one}, now is {other}"


def _forget(staged: Path) -> None:
    """Remove what says that there is something to go on with, before anything else goes."""
    for name in _NOTES:
        (staged / name).unlink(missing_ok=True)


def refuse_existing(final: Path, overwrite: bool) -> None:
    """Raise a ValueError if `final` exists, is not an empty directory, and `overwrite` is not given."""
    if _is_taken(final) and not overwrite:
        raise ValueError(f"{final} exists; give --overwrite to replace it, or another place")


def _is_taken(final: Path) -> bool:
    return final.exists() and not (final.is_dir() and not any(final.iterdir()))


def _put_in_place(staged: Path, final: Path) -> None:
    replaced = _beside(final, "old")
    if final.exists() and _exchange(staged, final):
        staged.rename(replaced)  # so that it is never taken for a partial one while it is being removed
    else:
        if final.exists():
            final.rename(replaced)
        staged.rename(final)
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <fcntl.h> and <stdio.h>
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _beside(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{kind}-{socket.gethostname()}-{os.getpid()}")


def clear_leftovers(final: Path) -> None:
    """Remove what killed processes of this machine left beside a directory, or put it back where it was."""
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
            sync(Path(place) / name)
        sync(Path(place))


def sync(path: Path, *, forget: bool = False) -> None:
    """Force a file or directory to disk.

    Args:
        forget: also drop it from the page cache. Who writes more than fits there would otherwise take memory from all
            others, and fill ever new pages, which on virtual machines costs more than the writing.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
