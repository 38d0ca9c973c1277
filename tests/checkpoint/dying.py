"""A process that converts, is killed (SIGKILL) at random things it does to the disk, and resumes; for test_kill.py.

    python -m tests.checkpoint.dying '{"a name": {"source": ..., "target": ..., "format": ..., "kills": {"pwrite": 8}}}'

Each job converts once into TARGET.whole to count the events of each kind, and then again and again into TARGET: a child
kills itself right before its event, loaders are asked what they think, another child goes on with `resume`. JSON tells
what happened: first of all what an undisturbed run does. A journal line is torn rather than left out. The disk itself
is not waited for: a killed process takes no page cache with it.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

import megatron_patch  # noqa: F401  before megatron.core, which its backend adapts where there is no CUDA
from megatron_patch.checkpoint import convert as engine
from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint import moving
from megatron_patch.checkpoint.manifest import Journal
from megatron_patch.checkpoint.opening import Wanted
from megatron_patch.checkpoint.sharding import Layout, Pipeline


class Events:
    """Counts what happens, of each kind, in any thread; dies before one event, or tears a journal line."""

    def __init__(self, kind: str | None, index: int) -> None:
        self.count: Counter[str] = Counter()
        self._deadly, self._lock = (kind, index), threading.Lock()

    def happen(self, kind: str, last_words: Callable[[], None] | None = None) -> None:
        with self._lock:
            if (kind, self.count[kind]) == self._deadly:
                if last_words:
                    last_words()
                os.kill(os.getpid(), signal.SIGKILL)
            self.count[kind] += 1

    def before(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.happen(kind)
            return function(*args, **options)

        return counted

    def watch(self) -> None:
        """Have this process tell of its events, and settle every tensor by itself."""
        os.pwrite, os.unlink = self.before("pwrite", os.pwrite), self.before("unlink", os.unlink)
        os.rename, os.fsync = self.before("rename", os.rename), self.before("fsync", lambda descriptor: None)
        layout._exchange = self.before("rename", layout._exchange)
        moving._SETTLE = 1
        add = Journal.add

        def torn(journal: Journal, entries: list[Any]) -> None:
            def half_a_line() -> None:
                journal._file.write('{"name": "decoder.layers.0')
                journal._file.flush()

            self.happen("journal", half_a_line)
            add(journal, entries)

        Journal.add = torn


def run(job: dict[str, Any], target: str, resume: bool, kind: str | None = None, index: int = 0) -> dict[str, Any]:
    """Convert, and die at an event of a kind; returns how many events of each kind there were, and what was done."""
    events, moved = Events(kind, index), []
    events.watch()
    wanted = Wanted(format=job["format"], layout=Layout(2, Pipeline(2)) if job["format"] == "legacy" else Layout())
    report = engine.convert(
        job["source"],
        target,
        wanted,
        overwrite=job.get("overwrite", False),
        resume=resume,
        progress=lambda name, done, total: moved.append(name),
    )
    return {"events": events.count, "resumed": report.resumed, "moved": len(moved)}


def accepted(path: Path) -> list[str]:
    """Which loaders take what is there for a checkpoint."""
    from megatron.core import dist_checkpointing

    release = layout.iteration_directory(path, None)
    loaders: dict[str, Callable[[], Any]] = {
        "latest": lambda: layout.latest(path),
        "transformers": lambda: LlamaForCausalLM.from_pretrained(path, local_files_only=True),
        "megatron-core": lambda: dist_checkpointing.load({}, str(release)),
        "is_huggingface": lambda: layout.is_huggingface(path) or _refuse(),
        "is_megatron": lambda: layout.is_megatron(path) or _refuse(),
    }
    return [name for name, load in loaders.items() if _succeeds(load)]


def _refuse() -> None:
    raise ValueError("no checkpoint")


def _succeeds(load: Callable[[], Any]) -> bool:
    try:
        load()
    except Exception:  # each loader refuses in its own way
        return False
    return True


def look(target: Path, whole: Path) -> dict[str, Any]:
    """What a killed process left."""
    partial, finished = layout.partial_of(target), target.exists() and differences(target, whole) == []
    return {
        "accepted": accepted(target),
        "finished": finished,
        "vocab_size": layout.read_config(target)["vocab_size"] if target.exists() else None,
        "accepted_partial": accepted(partial),
        "whole": len(engine._done(partial)) if partial.is_dir() else 0,
    }


def _content(path: Path) -> Any:
    """A file's bytes. What torch notes in .metadata of the writing itself (a random id, the directory) is left out."""
    if path.name != ".metadata":
        return path.read_bytes()
    metadata = pickle.loads(path.read_bytes())
    return metadata.state_dict_metadata, metadata.storage_data


def differences(one: Path, other: Path) -> list[str]:
    """Files that two directories do not both have, with the same content."""
    one_has, other_has = ({path.relative_to(root) for path in root.rglob("*")} for root in (one, other))
    common = [path for path in one_has & other_has if (one / path).is_file()]
    return sorted(map(str, one_has ^ other_has)) + [str(p) for p in common if _content(one / p) != _content(other / p)]


def forked(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any] | None:
    """What a function returns in a child; None if that was killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, json.dumps(function(*args)).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        content = answer.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    return json.loads(content)


def die_and_resume(job: dict[str, Any], kind: str, index: int) -> dict[str, Any]:
    """One kill and what comes after it."""
    target, whole = Path(job["target"]), Path(f"{job['target']}.whole")
    killed = forked(run, job, str(target), False, kind, index) is None
    after = forked(lambda: {"left": look(target, whole), **run(job, str(target), True)})
    different = differences(target, whole)
    beside = sorted(path.name for path in target.parent.glob(f".{target.name}.*"))
    return {"killed": killed, "at": f"{kind} {index}", "different": different, "beside": beside, **after}


def work(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What an undisturbed run does, and then all kills."""
    target = Path(job["target"])
    _begin(job, Path(f"{target}.whole"))
    undisturbed = forked(run, job, f"{target}.whole", False)
    yield undisturbed
    chance = random.Random(target.name)
    for kind, number in job["kills"].items():
        count = undisturbed["events"].get(kind, 0)
        for index in sorted(chance.sample(range(count), min(number, count))):
            _begin(job, target)
            yield die_and_resume(job, kind, index)
            shutil.rmtree(target)


def _begin(job: dict[str, Any], target: Path) -> None:
    if "former" in job:
        shutil.copytree(job["former"], target)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    gc.freeze()  # or every child would copy all pages with objects in them
    print(json.dumps({name: list(work(job)) for name, job in json.loads(sys.argv[1]).items()}))
