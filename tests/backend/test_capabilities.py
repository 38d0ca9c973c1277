"""What is reported as installed and usable, for real here and on machines made of small fake packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_patch.backend import capabilities as module
from megatron_patch.backend.capabilities import Capability, Gpu, capabilities, gpus, kernels
from tests.backend.fake_packages import install, nvidia_smi

H100 = "echo 'NVIDIA H100 80GB HBM3, 9.0, 81559'"
A100 = "echo 'NVIDIA A100-SXM4-80GB, 8.0, 81920'"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    gpus.cache_clear()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on PATH and on sys.path."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def one(name: str) -> Capability:
    return {capability.name: capability for capability in capabilities()}[name]


def adam() -> str:
    found = {capability.name: capability for capability in capabilities()}
    return {kernel.operation: kernel.kernel for kernel in kernels(found)}["Adam"]


def test_everything_required_is_here() -> None:
    required = [capability for capability in capabilities() if capability.required]
    assert {"python", "torch", "megatron-core", "transformers", "megatron-core wheel"} <= {one.name for one in required}
    assert all(capability.usable for capability in required)


def test_what_is_reported_agrees_with_torch() -> None:
    import torch

    assert one("torch").version == torch.__version__
    assert module.torch_build() == (torch.version.cuda or "cpu")
    assert one("CUDA device").usable == torch.cuda.is_available()
    assert one("gloo").usable == torch.distributed.is_gloo_available()


def test_the_adam_that_is_named_is_the_one_that_megatron_core_takes() -> None:
    import torch
    from megatron.core import optimizer

    assert (adam() == "torch AdamW") == (optimizer.Adam is torch.optim.AdamW)


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import sys; from megatron_patch.backend.capabilities import capabilities; capabilities();"
        "sys.exit(bool({'torch', 'megatron.core', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_package_that_is_missing_names_the_command_that_installs_it() -> None:
    found = module._requirement(Requirement("no-such-package>=1"))
    assert (found.version, found.usable) == (None, False)
    assert found.fix.startswith("pip install 'no-such-package>=1'")


def test_a_version_outside_the_declared_range_is_not_usable() -> None:
    found = module._requirement(Requirement("megatron-core<0.1"))
    assert found.usable is False and "outside <0.1" in found.note


# ---------------------------------------------------------------- devices


def test_gpus_are_read_from_nvidia_smi(machine: Path) -> None:
    nvidia_smi(machine, f"{H100}; {H100}")
    assert gpus() == (Gpu("NVIDIA H100 80GB HBM3", 9.0, 81559 / 1024),) * 2


def test_a_gpu_that_shares_its_memory_with_the_host_is_still_a_gpu(machine: Path) -> None:
    nvidia_smi(machine, "echo 'NVIDIA GB10, 12.1, [N/A]'")
    assert gpus()[0].compute_capability == 12.1


def test_a_machine_whose_driver_does_not_answer_has_an_unknown_gpu(machine: Path) -> None:
    nvidia_smi(machine, "exec sleep 30")
    assert gpus() is None
    assert one("CUDA device").usable is None


def test_a_machine_whose_driver_fails_has_none(machine: Path) -> None:
    nvidia_smi(machine, "exit 9")
    assert gpus() == ()


def test_a_gpu_under_a_cpu_build_of_torch_names_the_fix(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(machine, H100)
    monkeypatch.setattr(module, "torch_build", lambda: "cpu")
    found = one("CUDA device")
    assert found.usable is False and "no CUDA" in found.note and "TORCH_SPEC" in found.fix


def test_a_gpu_under_a_cuda_build_of_torch_is_usable(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(machine, H100)
    monkeypatch.setattr(module, "torch_build", lambda: "13.0")
    assert one("CUDA device").usable and one("NCCL").usable


# ---------------------------------------------------------------- optional packages


def test_pypis_apex_is_told_from_nvidias(machine: Path) -> None:
    install(
        machine, "apex", "0.9.10.dev0", {"apex/__init__.py": "raise ImportError('pyramid')", "apex/ext/form.py": ""}
    )
    found = one("apex")
    assert found.usable is False and "not NVIDIA apex" in found.note and "pip uninstall apex" in found.fix
    assert adam() == "torch AdamW"


def test_nvidias_apex_on_a_gpu_brings_its_adam(machine: Path) -> None:
    nvidia_smi(machine, A100)
    files = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "", "apex/multi_tensor_apply/__init__.py": ""}
    install(machine, "apex", "0.1", files)
    assert one("apex").usable and adam() == "NVIDIA apex FusedAdam"


@pytest.mark.parametrize(("gpu", "words"), [(H100, "FP8 possible"), (A100, "FP8 not possible")])
def test_fp8_depends_on_the_compute_capability(machine: Path, gpu: str, words: str) -> None:
    nvidia_smi(machine, gpu)
    files = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch/__init__.py": ""}
    install(machine, "transformer-engine", "2.9", files)
    found = one("Transformer Engine")
    assert found.usable and words in found.note and found.version == "2.9"
    assert adam() == "Transformer Engine FusedAdam"


def test_transformer_engine_without_its_torch_part_is_not_usable(machine: Path) -> None:
    nvidia_smi(machine, H100)
    install(machine, "transformer-engine", "2.9", {"transformer_engine/__init__.py": ""})
    assert one("Transformer Engine").usable is False
    assert "[te]" in one("Transformer Engine").fix


def test_every_kernel_has_a_reason() -> None:
    found = {capability.name: capability for capability in capabilities()}
    table = kernels(found)
    assert [kernel.operation for kernel in table][:3] == ["core attention", "norm", "linear"]
    assert all(kernel.why for kernel in table)
