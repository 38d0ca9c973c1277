"""Peak memory and time of the converter on a synthetic Llama, beside a plain streaming copy of the same bytes.

    python benchmarks/converter_memory.py [--gigabytes 3] [--rounds 3] [--directory /tmp]

Makes a random bf16 checkpoint in several safetensors files (streamed, never in memory), then, interleaved round by
round: copies it (read, write, fsync: the floor), converts it to Megatron, converts that back; each in a process of its
own whose anonymous memory (RssAnon: what cannot be dropped like page cache) is polled every 5 ms. Prints medians; exit
code 1 if a conversion's peak exceeds 1 GiB or the way back is not bit-equal. Needs four times the size on disk.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_patch.checkpoint.huggingface import HFWriter, TensorInfo, plan_files

BOUND = 2**30
_COPY = """
import os, sys
from pathlib import Path
source, target = map(Path, sys.argv[1:])
target.mkdir()
for file in source.iterdir():
    with open(file, "rb") as reading, open(target / file.name, "wb") as writing:
        while block := reading.read(1 << 22):
            writing.write(block)
        writing.flush()
        os.fsync(writing.fileno())
"""

_CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=32000,
    hidden_size=2560,
    intermediate_size=6912,
    num_attention_heads=20,
    num_key_value_heads=20,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    dtype="bfloat16",
)


@dataclass(frozen=True)
class Measurement:
    """One process."""

    seconds: float
    peak: int
    """Largest anonymous memory seen, in bytes."""


def shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the synthetic model."""
    hidden, inner, vocabulary = _CONFIG["hidden_size"], _CONFIG["intermediate_size"], _CONFIG["vocab_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(num_layers):
        layer = f"model.layers.{i}."
        found |= {f"{layer}self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        found |= {f"{layer}mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        found |= {f"{layer}mlp.down_proj.weight": (hidden, inner)}
        found |= {f"{layer}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make(folder: Path, gigabytes: float) -> int:
    """Write the synthetic checkpoint; returns its size in bytes."""
    sizes = [sum(2 * torch.Size(shape).numel() for shape in shapes(n).values()) for n in (0, 1)]
    num_layers = max(1, round((gigabytes * 1e9 - sizes[0]) / (sizes[1] - sizes[0])))
    infos = {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes(num_layers).items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**_CONFIG, "num_hidden_layers": num_layers}))
    with HFWriter(folder, plan_files(infos, "1GB"), infos) as writer:
        for name, info in infos.items():
            writer.write(name, torch.randn(info.shape, dtype=torch.bfloat16))
    return sum(info.nbytes for info in infos.values())


def measure(command: list[str]) -> Measurement:
    """Run a command and watch its memory."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.005)
    seconds, errors = time.perf_counter() - start, process.communicate()[1]
    if process.returncode:
        raise RuntimeError(errors)
    return Measurement(seconds, peak)


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def run(folder: Path, rounds: int) -> dict[str, list[Measurement]]:
    """All measurements of each job; copies and conversions take turns."""
    source, copy, megatron, back = (folder / name for name in ("hf", "copy", "megatron", "back"))
    convert = ["-W", "ignore", "-m", "megatron_patch", "convert"]
    jobs = {
        "copy": ["-c", _COPY, str(source), str(copy)],
        "HF -> Megatron": [*convert, "--source", str(source), "--target", str(megatron)],
        "Megatron -> HF": [*convert, "--source", str(megatron), "--target", str(back)],
    }
    found = defaultdict(list)
    for _ in range(rounds):
        for target in (copy, megatron, back):
            shutil.rmtree(target, ignore_errors=True)
        for name, command in jobs.items():
            found[name].append(measure(command))
    for file in source.glob("*.safetensors"):
        if not filecmp.cmp(file, back / file.name, shallow=False):
            raise RuntimeError(f"{file.name} came back changed")
    return found


def report(found: dict[str, list[Measurement]], size: int) -> bool:
    """Print the table; whether every conversion kept within the bound."""
    floor = statistics.median(one.seconds for one in found["copy"])
    print(f"{size / 1e9:.2f} GB bf16, median of {len(found['copy'])}")
    print(f"{'':16}{'time':>9}{'MB/s':>8}{'x copy':>8}{'peak anonymous':>17}")
    for name, all_of_it in found.items():
        seconds = statistics.median(one.seconds for one in all_of_it)
        peak = max(one.peak for one in all_of_it)
        print(f"{name:16}{seconds:8.1f}s{size / seconds / 1e6:8.0f}{seconds / floor:8.2f}{peak / 2**20:13.0f} MiB")
    return all(one.peak < BOUND for all_of_it in found.values() for one in all_of_it)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", default=None, help="where to put the files (default: the system's)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        size = make(Path(folder) / "hf", args.gigabytes)
        good = report(run(Path(folder), args.rounds), size)
    print("peak below 1 GiB: " + ("yes" if good else "NO"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
