"""Rates of the tokenizer engines beside the plain Hugging Face tokenizer, on text of your own.

    python benchmarks/engines.py --tokenizer DIR [DIR ...] --input a.jsonl [b.txt ...] [--megabytes 20] [--key text]

For each tokenizer and engine a fresh process with one thread encodes the same documents once, in batches of about
1 MB; "plain" is what preprocessing scripts do, `tokenizer(text)["input_ids"]` a document. No document is met twice:
engines that remember words would only show their memory. Prints CPU time (which other users of the machine disturb
least), the memory after start-up, in the middle and at the end, and whether the ids are those of "plain"; exit code 1
if any are not. An engine that cannot do a tokenizer is named with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import xxhash

from megatron_patch.tokenizer import load_tokenizer
from megatron_patch.tokenizer.engines import NAMES, ONE_THREAD, choose
from megatron_patch.vocab.corpus import Corpus

BATCH_BYTES = 1 << 20


def batches(args: argparse.Namespace) -> Iterator[list[str]]:
    """Distinct documents of the input files, as `megatron-patch preprocess` reads them, up to --megabytes."""
    batch, size, total, seen = [], 0, 0, set()
    for document in Corpus(args.input, args.key):
        data = document.encode()
        digest = xxhash.xxh3_64_intdigest(data)
        if digest in seen:
            continue
        seen.add(digest)
        batch.append(document)
        size, total = size + len(data), total + len(data)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
        if total >= args.megabytes * 1e6:
            break
    if batch:
        yield batch


def encoder(args: argparse.Namespace) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
    """What is to be measured, from the name and recipe in --one."""
    name, source = args.one
    if name != "plain":
        return pickle.loads(Path(source).read_bytes()).build().encode_batch
    hf = load_tokenizer(source).hf

    def plain(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [hf(text, split_special_tokens=True)["input_ids"] for text in texts]
        return np.array([i for one in ids for i in one], np.uint32), np.array([len(one) for one in ids], np.int64)

    return plain


def measure(args: argparse.Namespace) -> None:
    """Runs one engine in this process and prints a line of JSON."""
    work, process, digest = list(batches(args)), psutil.Process(), xxhash.xxh3_64()
    before, start = process.memory_info().rss, time.process_time()
    encode = encoder(args)
    encode(["warm up"])
    memory, started, tokens = [process.memory_info().rss - before], time.process_time(), 0
    for i, batch in enumerate(work, 1):
        ids, lengths = encode(batch)
        digest.update(ids.astype(np.uint32).tobytes() + lengths.astype(np.int64).tobytes())
        tokens += ids.size
        if i in ((len(work) + 1) // 2, len(work)):
            memory.append(process.memory_info().rss - before)
    seconds = time.process_time() - started
    size = sum(len(document.encode()) for batch in work for document in batch)
    print(json.dumps(dict(mb=size / 1e6, seconds=seconds, startup=started - start, tokens=tokens,
                          memory=[part / 1e6 for part in memory], digest=digest.hexdigest())))  # fmt: skip


def child(args: argparse.Namespace, name: str, source: str) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--input", *args.input, "--megabytes", str(args.megabytes), "--key", args.key]
    environment = os.environ | ONE_THREAD
    done = subprocess.run([*command, "--one", name, source], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(args: argparse.Namespace, directory: str, scratch: Path) -> bool:
    """Prints the table of one tokenizer; False if an engine's ids are not those of "plain"."""
    header = "engine | MB/s | x plain | Mtok/s | start-up s | MB at start, middle, end | ids"
    print(f"\n{directory}\n| {header} |\n|{' --- |' * 7}")
    plain, equal = child(args, "plain", directory), True
    tokenizer, first = load_tokenizer(directory), next(batches(args))
    for name in ("plain", *NAMES):
        try:
            if name != "plain":
                scratch.write_bytes(pickle.dumps(choose(tokenizer, name, first)))
        except ValueError as error:
            print(f"| {name} | {str(error)[:300]} |", flush=True)
            continue
        result = plain if name == "plain" else child(args, name, str(scratch))
        same = result["digest"] == plain["digest"]
        rates = (result["mb"] / result["seconds"], plain["seconds"] / result["seconds"])
        memory = ", ".join(f"{part:.0f}" for part in result["memory"])
        print(f"| {name} | {rates[0]:.2f} | {rates[1]:.1f} | {result['tokens'] / result['seconds'] / 1e6:.2f} | "
              f"{result['startup']:.1f} | {memory} | {'equal' if same else 'DIFFERENT'} |", flush=True)  # fmt: skip
        equal &= same
    print(f"{plain['mb']:.1f} MB, {plain['tokens']} tokens", flush=True)
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", nargs="+", default=[])
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--key", default="text")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure(args)
    with tempfile.TemporaryDirectory() as folder:
        equal = [table(args, directory, Path(folder) / "recipe") for directory in args.tokenizer]
    sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    main()
