"""Time and peak memory of the converter on a synthetic Llama, there and back, beside `cp` and what others do.

    python benchmarks/convert.py [--gigabytes 2] [--rounds 3] [--formats torch_dist legacy] [--directory /tmp] [--naive]

Makes a random bf16 checkpoint in several safetensors files (streamed, never in memory). Then, round by round and
interleaved: copies it there and back with fsync (the floor), converts it to Megatron and back, and, with --naive, does
what most converters do: transformers' from_pretrained, all tensors converted in memory, torch.save. Each step is a
process of its own, start-up included, that finds its source on disk and not in the page cache. Anonymous memory
(RssAnon: what cannot be dropped like page cache) is polled every 5 ms. Prints medians; exit code 1 if a conversion
takes more than 1.5 x cp or 1 GiB, or if the way back is not bit-equal. Needs four times the size on disk.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
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
from safetensors.torch import save_file

from megatron_patch.checkpoint.huggingface import TensorInfo, plan_files, write_index

MEMORY_BOUND, TIME_BOUND = 2**30, 1.5
LEGACY = ["--target-format=legacy", "--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2"]
_COPY = """
import os, subprocess, sys
source, target = sys.argv[1:]
subprocess.run(["cp", "-r", source, target], check=True)
for folder, _, files in os.walk(target):
    for name in files:
        descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
        os.fsync(descriptor)
"""
_NAIVE_THERE = """
import os, sys, torch
from transformers import AutoModelForCausalLM
state = AutoModelForCausalLM.from_pretrained(sys.argv[1]).state_dict()
model = {}
for name, tensor in state.items():
    if "q_proj" in name:
        q, k, v = (state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj"))
        heads = int(os.environ["HEADS"])
        model[name] = torch.cat([t.view(heads, -1, t.shape[1]) for t in (q, k, v)], 1).reshape(-1, q.shape[1])
    elif "gate_proj" in name:
        model[name] = torch.cat([tensor, state[name.replace("gate_proj", "up_proj")]])
    elif not any(part in name for part in ("k_proj", "v_proj", "up_proj")):
        model[name] = tensor
os.mkdir(sys.argv[2])
with open(sys.argv[2] + "/model_optim_rng.pt", "wb") as file:
    torch.save({"model": model}, file)
    file.flush()
    os.fsync(file.fileno())
"""

_CONFIGS = {
    "small": dict(hidden_size=2560, intermediate_size=6912, num_attention_heads=20),
    "13B": dict(hidden_size=5120, intermediate_size=13824, num_attention_heads=40),
}
_COMMON = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=32000,
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


def shapes(config: dict[str, int], num_layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the synthetic model."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], _COMMON["vocab_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(num_layers):
        layer = f"model.layers.{i}."
        found |= {f"{layer}self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        found |= {f"{layer}mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        found |= {f"{layer}mlp.down_proj.weight": (hidden, inner)}
        found |= {f"{layer}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Write the synthetic checkpoint; returns its size in bytes and its number of heads."""
    config = _CONFIGS["13B" if gigabytes > 8 else "small"]
    sizes = [sum(2 * torch.Size(shape).numel() for shape in shapes(config, n).values()) for n in (0, 2)]
    num_layers = 2 * max(1, round((gigabytes * 1e9 - sizes[0]) / (sizes[1] - sizes[0])))
    infos = {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes(config, num_layers).items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**_COMMON, **config, "num_hidden_layers": num_layers}))
    plan = plan_files(infos, "1GB")
    for file, names in plan.files.items():
        tensors = {name: torch.randn(infos[name].shape, dtype=torch.bfloat16) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
    write_index(folder, plan, infos)
    return sum(info.nbytes for info in infos.values()), config["num_attention_heads"]


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(command: list[str], heads: int) -> Measurement:
    """Run a command and watch its memory."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HEADS": str(heads)},
    )
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


def jobs(folder: Path, formats: list[str], naive: bool) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Name -> for each step: source, target, command."""
    source, middle, back = (str(folder / name) for name in ("hf", "middle", "back"))
    convert = ["-m", "megatron_patch", "convert"]
    options = {"torch_dist": [], "legacy": LEGACY}
    found = {"cp": [["-c", _COPY, source, middle], ["-c", _COPY, middle, back]]}
    for one in formats:
        there = [*convert, "--source", source, "--target", middle, *options[one]]
        found[one] = [there, [*convert, "--source", middle, "--target", back]]
    if naive:
        found["load everything"] = [["-c", _NAIVE_THERE, source, middle]]
    return found


def run(folder: Path, rounds: int, formats: list[str], naive: bool, heads: int) -> dict[str, list[list[Measurement]]]:
    """All measurements of each job's steps; the jobs take turns."""
    source, middle, back = (folder / name for name in ("hf", "middle", "back"))
    found = defaultdict(list)
    for _ in range(rounds):
        for name, steps in jobs(folder, formats, naive).items():
            measured = []
            for step, read in zip(steps, (source, middle), strict=False):
                forget(read)
                measured.append(measure(step, heads))
            found[name].append(measured)
            if len(steps) == 2:
                compare(source, back)
            for target in (middle, back):
                shutil.rmtree(target, ignore_errors=True)
    return found


def compare(source: Path, back: Path) -> None:
    """Raise where the way back is not bit-equal."""
    for file in source.glob("*.safetensors"):
        if not filecmp.cmp(file, back / file.name, shallow=False):
            raise RuntimeError(f"{file.name} came back changed")


def report(found: dict[str, list[list[Measurement]]], size: int) -> bool:
    """Print the table; whether every conversion kept within its bounds."""
    rounds = len(found["cp"])
    floor = statistics.median(sum(step.seconds for step in steps) for steps in found["cp"])
    print(f"{size / 1e9:.2f} GB bf16, medians of {rounds} rounds; peak: largest anonymous memory")
    print(f"{'':16}{'there':>9}{'back':>9}{'both':>9}{'x cp':>7}{'peak there':>13}{'peak back':>13}")
    good = True
    for name, all_of_it in found.items():
        each = [statistics.median(steps[i].seconds for steps in all_of_it) for i in range(len(all_of_it[0]))]
        both = statistics.median(sum(step.seconds for step in steps) for steps in all_of_it)
        peaks = [max(steps[i].peak for steps in all_of_it) for i in range(len(each))]
        ratio = both / floor if len(each) == 2 else float("nan")
        times = "".join(f"{value:8.1f}s" for value in (*each, *[float("nan")] * (2 - len(each)), both))
        print(f"{name:16}{times}{ratio:7.2f}" + "".join(f"{peak / 2**20:9.0f} MiB" for peak in peaks))
        if name in ("torch_dist", "legacy"):
            good &= ratio <= TIME_BOUND and max(peaks) <= MEMORY_BOUND
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=["torch_dist", "legacy"], choices=["torch_dist", "legacy"])
    parser.add_argument("--naive", action="store_true", help="also measure a load-everything converter")
    parser.add_argument("--directory", default=None, help="where to put the files (default: the system's)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        size, heads = make(Path(folder) / "hf", args.gigabytes)
        good = report(run(Path(folder), args.rounds, args.formats, args.naive, heads), size)
    print(f"within {TIME_BOUND} x cp and 1 GiB: " + ("yes" if good else "NO"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
