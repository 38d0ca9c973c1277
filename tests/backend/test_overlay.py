"""The CPU overlay lets megatron-core run, and nobody else notices."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_patch.backend import overlay

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the overlay does nothing")


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)


def test_transformers_gives_the_same_logits_before_and_after_core_is_adapted() -> None:
    done = _python(
        "import torch, tempfile\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, AutoModelForCausalLM\n"
        "sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)\n"
        "place = tempfile.mkdtemp()\n"
        "LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes)).save_pretrained(place)\n"
        "def logits():\n"
        "    model = AutoModelForCausalLM.from_pretrained(place)\n"
        "    with torch.no_grad():\n"
        "        return model(torch.arange(20)[None]).logits\n"
        "before = logits()\n"
        "import megatron_patch.model, megatron_patch.training.loop\n"
        "from megatron.core.tensor_parallel import random\n"
        "assert random.torch is not torch, 'the overlay is not in place'\n"
        "assert torch.equal(before, logits())\n"
        "assert torch.nn.functional.relu.__module__.startswith('torch')\n"
    )
    assert done.returncode == 0, done.stderr


def test_torch_itself_is_left_alone() -> None:
    done = _python(
        "import torch\n"
        "before = {m: dict(vars(m)) for m in (torch, torch.cuda, torch.cpu, torch.Tensor, torch.distributed)}\n"
        "import megatron_patch.training.loop\n"
        "for module, names in before.items():\n"
        "    now = vars(module)\n"
        "    changed = {n for n, v in names.items() if n[:2] != '__' and now.get(n) is not v}\n"
        "    assert not changed - {'_initialized', 'compiler'}, (module, changed)\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_core_first_is_refused_with_the_remedy() -> None:
    done = _python("import megatron.core, megatron_patch")
    assert done.returncode != 0 and "import megatron_patch before megatron.core" in done.stderr


def test_importing_megatron_patch_imports_neither_torch_nor_core() -> None:
    done = _python("import sys, megatron_patch; assert not {'torch', 'megatron'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_with_cuda_core_is_loaded_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = overlay._CoreFinder()
    import megatron

    assert isinstance(finder.find_spec("megatron.core", megatron.__path__).loader, overlay._CoreLoader)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not isinstance(finder.find_spec("megatron.core", megatron.__path__).loader, overlay._CoreLoader)
    assert finder.find_spec("torch", None) is None


def test_constants_and_attributes_are_exchanged_also_in_nested_functions() -> None:
    def outer(tensor: SimpleNamespace) -> tuple[object, ...]:
        def inner() -> object:
            return tensor.cuda()

        return inner(), "cuda", ("torch.cuda.HalfTensor", "cuda"), "cuda:0"

    outer.__code__ = overlay.translate(outer.__code__)
    tensor = SimpleNamespace(cuda=lambda: "GPU", cpu=lambda: "CPU")
    assert outer(tensor) == ("CPU", "cpu", ("torch.HalfTensor", "cpu"), "cuda:0")


def test_scaling_gradients_in_place_equals_cores_own() -> None:
    from megatron.core.utils import local_multi_tensor_scale

    gradients = [torch.randn(5), torch.randn(3, 2)]
    expected = [g * 0.5 for g in gradients]
    local_multi_tensor_scale(0, None, [gradients, gradients], 0.5)
    assert all(map(torch.equal, gradients, expected))
    wide = [torch.empty(5), torch.empty(3, 2)]
    local_multi_tensor_scale(0, None, [[g.bfloat16() for g in gradients], wide], 1.0)
    assert all(torch.equal(w, g.bfloat16().float()) for w, g in zip(wide, gradients, strict=True))
