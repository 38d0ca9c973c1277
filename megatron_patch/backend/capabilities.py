"""What this machine has and which kernel serves which operation, as plain records.

Everything is read from package metadata, files and `nvidia-smi`; torch is not imported, so all of it takes a fraction
of a second. A capability that is not there names its fix. `megatron-patch doctor` prints these records; they know
nothing of it.
"""

from __future__ import annotations

import math
import os
import platform
import re
import runpy
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from megatron_patch.backend.wheel import check_wheel

FP8_COMPUTE_CAPABILITY = 8.9
"""Ada; the first CUDA architecture with FP8 matrix units."""

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits")
_CUDA_TORCH = 'TORCH_SPEC="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130" ./run_tests.sh'


@dataclass(frozen=True)
class Capability:
    """One thing that may or may not be there."""

    name: str
    version: str | None
    """The installed version; None where there is none."""
    usable: bool | None
    """None where it could not be found out."""
    note: str
    """What it is used for here, or why it is not usable."""
    fix: str = ""
    """The command or step that makes it usable; empty where nothing needs to be done."""
    required: bool = False
    """Whether Megatron Patch cannot work without it."""


@dataclass(frozen=True)
class Kernel:
    """Which implementation serves an operation."""

    operation: str
    kernel: str
    why: str


@dataclass(frozen=True)
class Gpu:
    """One device as nvidia-smi describes it."""

    name: str
    compute_capability: float
    memory_gib: float


def capabilities() -> tuple[Capability, ...]:
    """Everything that matters here, required things first."""
    return (
        _python(),
        *(_requirement(requirement) for requirement in _requirements()),
        _core_wheel(),
        *_devices(),
        Capability("torch SDPA", None, torch_build() is not None, "core attention, on CPU and CUDA; part of torch"),
        _transformer_engine(),
        _flash_attention(),
        _apex(),
        _gguf(),
        *_machine(),
    )


def kernels(found: Mapping[str, Capability]) -> tuple[Kernel, ...]:
    """What computes what, given the capabilities by name. Transformer Engine's layers are not used yet."""
    device = "CUDA" if found["CUDA device"].usable else "CPU"
    return (
        Kernel(
            "core attention",
            "torch scaled_dot_product_attention",
            f"megatron_patch/layers/attention.py; torch picks its flash kernel on {device} where shape and dtype allow",
        ),
        Kernel(
            "norm",
            "torch rms_norm / layer_norm",
            "megatron_patch/layers/norm.py; core's own torch norm refuses sequence parallelism",
        ),
        Kernel(
            "linear",
            "megatron-core ColumnParallelLinear / RowParallelLinear",
            "core's local layers; Transformer Engine's (FP8) are not used by this version, installed or not",
        ),
        Kernel("rotary embedding", "megatron-core, unfused", "the fused one comes from Transformer Engine"),
        Kernel("cross entropy", "megatron-core vocab_parallel_cross_entropy", "works on shards of the vocabulary"),
        _adam(found),
    )


def _adam(found: Mapping[str, Capability]) -> Kernel:
    """megatron-core decides while it is imported: Transformer Engine, else NVIDIA apex, else torch."""
    for name, package in (("Transformer Engine", "Transformer Engine"), ("apex", "NVIDIA apex")):
        if found[name].usable:
            return Kernel("Adam", f"{package} FusedAdam", "megatron-core takes it where it can be imported")
    return Kernel("Adam", "torch AdamW", "megatron-core's choice without Transformer Engine and NVIDIA apex")


# ---------------------------------------------------------------- required packages


def _python() -> Capability:
    return Capability("python", platform.python_version(), True, platform.machine(), required=True)


def _requirements() -> list[Requirement]:
    try:
        declared = requires("megatron-patch") or []
    except PackageNotFoundError:
        raise ValueError("megatron-patch is not installed in this environment; run: pip install -e .") from None
    return [requirement for requirement in map(Requirement, declared) if requirement.marker is None]


def _requirement(requirement: Requirement) -> Capability:
    """A runtime dependency, held against the range that pyproject.toml declares."""
    found = _version(requirement.name)
    fix = f"pip install '{requirement}' -c constraints.txt"
    if found is None:
        return Capability(requirement.name, None, False, "not installed", fix, required=True)
    if not requirement.specifier.contains(found, prereleases=True):
        note = f"outside {requirement.specifier}, the range this version works with"
        return Capability(requirement.name, found, False, note, fix, required=True)
    return Capability(requirement.name, found, True, _USE.get(requirement.name, ""), required=True)


_USE = {
    "torch": "tensors, autograd, scaled_dot_product_attention, gloo and NCCL process groups",
    "megatron-core": "model, parallelism, optimizer, datasets, distributed checkpoints",
    "transformers": "configs, tokenizers, and the reference that `verify` compares with",
    "safetensors": "reads and writes Hugging Face weights",
    "sentencepiece": "tokenizers that come as tokenizer.model",
    "tensorboard": "training curves",
    "matplotlib": "the loss-curve PNG at the end of a run",
}


def _core_wheel() -> Capability:
    name, fix = "megatron-core wheel", "pip install --force-reinstall --no-deps megatron-core -c constraints.txt"
    try:
        report = check_wheel()
    except PackageNotFoundError:
        return Capability(name, None, False, "not installed", fix, required=True)
    if report.hidden_by:
        fix = f"take {report.hidden_by} off PYTHONPATH and sys.path"
    return Capability(name, report.version, report.intact, str(report), "" if report.intact else fix, required=True)


# ---------------------------------------------------------------- devices


def _devices() -> tuple[Capability, ...]:
    build = torch_build()
    cuda = _cuda(build, gpus())
    nccl = _version_of_any(re.compile(r"nvidia-nccl-cu\d+"))
    return (
        cuda,
        Capability("NCCL", nccl, bool(cuda.usable), "between GPUs" if cuda.usable else "only used between GPUs"),
        Capability("gloo", None, build is not None, "between CPU processes; part of torch"),
    )


def _cuda(build: str | None, found: tuple[Gpu, ...] | None) -> Capability:
    name = "CUDA device"
    if found is None:
        return Capability(name, None, None, "nvidia-smi did not answer in time", "run nvidia-smi, look at its message")
    if not found:
        return Capability(name, None, False, "no NVIDIA GPU found; everything runs on CPU with gloo")
    gpu = found[0]
    what = f"{len(found)} x {gpu.name}, {gpu.memory_gib:.0f} GiB, compute capability {gpu.compute_capability}"
    if build in (None, "cpu"):
        return Capability(name, None, False, f"{what}, but the installed torch has no CUDA", _CUDA_TORCH)
    return Capability(name, build, True, what)


@cache
def gpus() -> tuple[Gpu, ...] | None:
    """The GPUs of this machine; None where nvidia-smi is there but does not answer in time."""
    try:
        lines = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=1.5, check=True).stdout.splitlines()
    except subprocess.TimeoutExpired:
        return None
    except (OSError, subprocess.CalledProcessError):
        return ()
    rows = [line.rsplit(",", 2) for line in lines if line.strip()]
    return tuple(Gpu(name.strip(), _number(capability), _number(memory) / 1024) for name, capability, memory in rows)


def _number(text: str) -> float:
    """nvidia-smi writes [N/A] for what a device does not tell, such as the memory that it shares with the host."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def torch_build() -> str | None:
    """The CUDA version torch was built with, "cpu", or None without torch; read from its version file."""
    folder = _folder("torch")
    if folder is None:
        return None
    return runpy.run_path(str(folder / "version.py")).get("cuda") or "cpu"


# ---------------------------------------------------------------- optional packages


def _transformer_engine() -> Capability:
    name, found, folder = "Transformer Engine", _version("transformer-engine"), _folder("transformer_engine")
    unused = "its layers are not used by this version; its FusedAdam is"
    if found is None or folder is None or not (folder / "pytorch").is_dir():
        fix = "pip install -e '.[te]' --no-build-isolation (compiles CUDA code)" if gpus() else ""
        return Capability(name, found, False, f"not installed; {unused}", fix)
    if not gpus():
        return Capability(name, found, False, "installed, but it needs an NVIDIA GPU")
    fp8 = gpus()[0].compute_capability >= FP8_COMPUTE_CAPABILITY
    rule = f"compute capability {gpus()[0].compute_capability}, FP8 needs {FP8_COMPUTE_CAPABILITY}"
    return Capability(name, found, True, f"{unused}; FP8 {'possible' if fp8 else 'not possible'} ({rule})")


def _flash_attention() -> Capability:
    found = _version("flash-attn")
    note = "not used: torch's SDPA has a flash kernel of its own"
    return Capability("flash-attn", found, bool(found and gpus()), note if found else f"not installed, {note}")


def _apex() -> Capability:
    """NVIDIA's apex by its contents: PyPI's package of that name is an unrelated web toolkit."""
    folder = _folder("apex")
    if folder is None:
        note = "NVIDIA apex not installed; only its FusedAdam would be used"
        return Capability("apex", None, False, f"{note}. Never `pip install apex`: that is an unrelated package")
    if (folder / "optimizers").is_dir() and (folder / "multi_tensor_apply").is_dir():
        return Capability("apex", _version("apex"), bool(gpus()), "NVIDIA apex: FusedAdam")
    return Capability(
        "apex",
        _version("apex"),
        False,
        "this is not NVIDIA apex but a package of the same name",
        "pip uninstall apex (nothing here needs it; NVIDIA's is built from github.com/NVIDIA/apex)",
    )


def _gguf() -> Capability:
    found = _version("gguf")
    fix = "" if found else "pip install -e '.[quickstart]'"
    return Capability("gguf", found, bool(found), "quickstart.sh reads its model's GGUF weights with it", fix)


# ---------------------------------------------------------------- the machine


def _machine() -> tuple[Capability, ...]:
    cores = len(os.sched_getaffinity(0))
    free_gib = shutil.disk_usage(".").free / 2**30
    return (
        Capability("CPU cores", str(cores), True, "available to this process"),
        Capability("memory", f"{_available_memory_gib():.1f} GiB", True, "available now"),
        Capability("disk", f"{free_gib:.1f} GiB", True, "free in the current folder"),
    )


def _available_memory_gib() -> float:
    text = Path("/proc/meminfo").read_text()
    return int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) / 2**20


# ---------------------------------------------------------------- finding packages without importing them


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _version_of_any(pattern: re.Pattern[str]) -> str | None:
    """The version of the first of torch's own requirements whose name matches and that is installed."""
    try:
        names = [Requirement(line).name for line in requires("torch") or []]
    except PackageNotFoundError:
        return None
    return next((found for name in names if pattern.fullmatch(name) and (found := _version(name))), None)


def _folder(package: str) -> Path | None:
    """Where a top-level package lies; importing it could take seconds, or crash."""
    spec = PathFinder.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None
