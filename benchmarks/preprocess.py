"""CPU time, memory and bytes of `megatron-patch preprocess` beside the loop of Megatron-LM's preprocess_data.py.

    python benchmarks/preprocess.py --input zh.train.jsonl en.train.jsonl --tokenizer-model MODEL_DIR... \\
        [--engines hf auto] [--rounds 3] [--workers 2] [--megabytes 2]

The loop: json.loads, tokenizer(text)["input_ids"] of transformers, Pool.imap with chunks of 32, and megatron-core's
IndexedDatasetBuilder.add_document in the parent. Literal special tokens are text in both. Of a directory without a
tokenizer.json, where transformers would give other ids (a SentencePiece model) or run Python code, the loop reads the
tokenizer.json that ours saves; that those ids are right is for tests/tokenizer to prove. Round by round and in turn,
each is a process of its own, start-up included, on the same file: the inputs' documents, interleaved. CPU time is user
and system time of a process and all its descendants that it waited for; memory is the largest peak (VmHWM) of the main
process and of any worker, read every 50 ms. Prints medians; ratio is that of CPU times, loop / ours: above 1, ours
needs less. Exit code 1 if a .bin or .idx differs from the loop's by a byte, or, from 70 MB on, if a bound of BOUNDS is
missed. For text to measure with see corpus.py.
"""

from __future__ import annotations

import filecmp
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import tyro

BOUNDS = {"hf": 1.5, "best": 8.0}
"""Least ratio of CPU times: with --engine hf, and with the best engine of the run."""
LEAST_BYTES = 70_000_000
"""Less text than this says little: start-up weighs too much."""

_LOOP = """
import json, multiprocessing, sys
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from transformers import AutoTokenizer

source, prefix, model, workers = sys.argv[1:]
tokenizer = None

def start():
    global tokenizer
    tokenizer = AutoTokenizer.from_pretrained(model)

def encode(line):
    ids = tokenizer(json.loads(line)["text"], split_special_tokens=True)["input_ids"]
    return [*ids, tokenizer.eos_token_id], len(line)

def main():
    start()
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    pool = multiprocessing.Pool(int(workers), initializer=start)
    builder = IndexedDatasetBuilder(prefix + "_text_document.bin", dtype=DType.optimal_dtype(vocab_size))
    with open(source, encoding="utf-8") as lines:
        for ids, _ in pool.imap(encode, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(prefix + "_text_document.idx")
    pool.close()
    pool.join()

main()
"""


@dataclass(frozen=True)
class Args:
    """Measure preprocessing beside the plain loop."""

    input: tuple[Path, ...]
    """JSON lines with the key text; their documents are interleaved."""
    tokenizer_model: tuple[Path, ...]
    """Hugging Face directories of tokenizers, each measured by itself."""
    engines: tuple[str, ...] = ("hf", "auto")
    """Values of --engine."""
    workers: int = 2
    """Processes of both."""
    rounds: int = 3
    """How often each is run."""
    megabytes: float | None = None
    """Take so much of the documents instead of all."""
    directory: Path | None = None
    """Where to put files (default: the system's directory for temporary ones)."""
    json: Path | None = None
    """Also write every measurement to this file."""


@dataclass(frozen=True)
class Measurement:
    """One run."""

    wall: float
    cpu: float
    """User and system seconds of all processes."""
    peak: int
    """Largest resident size of the main process, in bytes."""
    worker_peak: int
    """Largest resident size of any other."""
    is_identical: bool
    """Whether .bin and .idx are those of the loop."""


# ---------------------------------------------------------------------------------------------------------------- input


def interleave(inputs: tuple[Path, ...], target: Path, megabytes: float | None) -> int:
    """Writes documents of all inputs in turn, in proportion to their sizes; returns the bytes written."""
    budget = sum(path.stat().st_size for path in inputs)
    share = min(1.0, megabytes * 1e6 / budget) if megabytes else 1.0
    files = [(path.open("rb"), path.stat().st_size * share) for path in inputs]
    with target.open("wb") as out:
        done = [0.0] * len(files)  # the share of each that has been written
        while min(done) < 1:
            i = done.index(min(done))
            line = files[i][0].readline()
            done[i] = done[i] + len(line) / files[i][1] if line else 1.0
            out.write(line)
    for file, _ in files:
        file.close()
    return target.stat().st_size


# -------------------------------------------------------------------------------------------------------------- one run


def measure(command: list[str]) -> tuple[float, float, int, int]:
    """Wall and CPU seconds of a command and its descendants, peak of the main process and of any other.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, *command], stdout=said, stderr=said, env=environment)
        peaks: dict[int, int] = {}
        while process.poll() is None:
            for pid in family(process.pid):
                peaks[pid] = max(peaks.get(pid, 0), peak_of(pid))
            time.sleep(0.05)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read()[-2000:].strip())
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    main = peaks.pop(process.pid, 0)
    return wall, cpu, main, max(peaks.values(), default=0)


def family(pid: int) -> Iterator[int]:
    """A process and all its descendants."""
    yield pid
    try:
        children = [Path(path).read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return
    for child in " ".join(children).split():
        yield from family(int(child))


def peak_of(pid: int) -> int:
    """VmHWM of a process in bytes; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def command_of(name: str, source: Path, prefix: Path, tokenizer: Path, workers: int) -> list[str]:
    """What runs for the loop, or for an engine."""
    if name == "loop":
        return ["-c", _LOOP, str(source), str(prefix), str(tokenizer), str(workers)]
    flags = {"input": source, "output-prefix": prefix, "tokenizer-model": tokenizer, "engine": name, "workers": workers}
    words = [f"--{flag}={value}" for flag, value in flags.items()]
    return ["-m", "megatron_patch", "preprocess", *words, "--append-eod"]


def for_the_loop(tokenizer: Path, folder: Path) -> Path:
    """The directory that the loop reads for a tokenizer."""
    if (tokenizer / "tokenizer.json").exists():
        return tokenizer
    from megatron_patch.tokenizer import load_tokenizer

    shutil.rmtree(folder, ignore_errors=True)
    load_tokenizer(tokenizer).hf.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------ all of it


def run(args: Args, source: Path, tokenizer: Path, folder: Path) -> dict[str, list[Measurement] | str]:
    """Every measurement of each pipeline with a tokenizer, or why one could not run."""
    theirs = for_the_loop(tokenizer, folder / "tokenizer")
    found: dict[str, list[Measurement] | str] = {name: [] for name in ("loop", *dict.fromkeys(args.engines))}
    for name in itertools.chain.from_iterable([list(found)] * args.rounds):
        if isinstance(found[name], str):
            continue
        prefix = folder / name
        try:
            figures = measure(command_of(name, source, prefix, theirs if name == "loop" else tokenizer, args.workers))
        except RuntimeError as error:
            if name == "loop":
                raise
            found[name] = str(error)
            continue
        is_identical = all(
            filecmp.cmp(f"{folder / 'loop'}_text_document{end}", f"{prefix}_text_document{end}", shallow=False)
            for end in (".bin", ".idx")
        )
        found[name].append(Measurement(*figures, is_identical))
        for path in folder.glob(f"{name}*"):
            if name != "loop":
                path.unlink() if path.is_file() else shutil.rmtree(path)
    return found


def report(found: dict[str, list[Measurement] | str], size: int) -> bool:
    """Prints the table of a tokenizer; whether all is as it should be."""
    loop = median(one.cpu for one in found["loop"])
    print(f"{'':14}{'wall s':>9}{'CPU s':>9}{'MB/CPU s':>10}{'ratio':>7}{'main MiB':>10}{'worker MiB':>12}  bytes")
    ratios, good = {}, True
    for name, runs in found.items():
        if isinstance(runs, str):
            print(f"{name:14}  {next((line for line in runs.splitlines() if 'error' in line.lower()), runs)}")
            continue
        wall, cpu = median(one.wall for one in runs), median(one.cpu for one in runs)
        ratios[name] = loop / cpu
        memory = [max(getattr(one, field) for one in runs) / 2**20 for field in ("peak", "worker_peak")]
        same = all(one.is_identical for one in runs)
        figures = f"{wall:9.1f}{cpu:9.1f}{size / 1e6 / cpu:10.2f}{ratios[name]:7.2f}"
        print(f"{name:14}{figures}{memory[0]:10.0f}{memory[1]:12.0f}  {'identical' if same else 'DIFFERENT'}")
        good &= same
    if size < LEAST_BYTES:
        print(f"less than {LEAST_BYTES / 1e6:.0f} MB: start-up weighs too much for the bounds {BOUNDS}")
        return good
    good &= ratios.get("hf", BOUNDS["hf"]) >= BOUNDS["hf"] and max(ratios.values()) >= BOUNDS["best"]
    print(f"identical, and ratios within {BOUNDS}: {'yes' if good else 'NO'}")
    return good


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    good, figures = True, {}
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        folder = Path(name)
        size = interleave(args.input, folder / "source.jsonl", args.megabytes)
        print(f"{size / 1e6:.1f} MB of JSON lines, {args.workers} workers, medians of {args.rounds} rounds")
        for tokenizer in args.tokenizer_model:
            print(f"\n{tokenizer}")
            found = run(args, folder / "source.jsonl", tokenizer, folder)
            good &= report(found, size)
            figures[str(tokenizer)] = {
                name: runs if isinstance(runs, str) else [asdict(one) for one in runs] for name, runs in found.items()
            }
            for path in folder.glob("loop*"):
                path.unlink()
    if args.json:
        args.json.write_text(json.dumps({"bytes": size, "workers": args.workers, "runs": figures}, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
