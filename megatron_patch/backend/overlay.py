"""Lets *unmodified* megatron-core run on CPU + gloo; does nothing where CUDA is available.

megatron-core names the CUDA device in three ways: as a constant (``device="cuda"``, ``"torch.cuda.FloatTensor"``),
through ``torch.cuda.*`` calls, and through ``Tensor.cuda()``. `install` puts an import hook in place that, for modules
below ``megatron.core`` only,

1. exchanges those constants, and in functions the attribute name ``cuda`` for ``cpu``, in the compiled code as each
   module is loaded (the files on disk stay as they are),
2. binds the module's global name ``torch`` to a stand-in whose ``cuda`` and ``cpu`` namespaces both answer, for the
   CPU, what ``torch.cuda`` would,
3. rebinds the handful of functions that neither of the two reaches (`_AFTER_IMPORT`).

Nothing global is patched: ``torch`` itself, and every other library in the process, sees no difference.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from inspect import CO_OPTIMIZED
from types import CodeType, ModuleType
from typing import Any

_CORE = "megatron.core"
_CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


def install() -> None:
    """Put the import hook in place (idempotent; without CUDA megatron-core must not have been imported before)."""
    if any(isinstance(finder, _CoreFinder) for finder in sys.meta_path):
        return
    if _CORE in sys.modules and _on_cpu():
        raise ImportError("import megatron_patch before megatron.core: without CUDA core is adapted as it loads")
    sys.meta_path.insert(0, _CoreFinder())


def _on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


class _CoreFinder(MetaPathFinder):
    """Finds megatron-core's modules where they are, and hands them to `_CoreLoader` when there is no CUDA."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _CORE and not fullname.startswith(_CORE + "."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader) and _on_cpu():
            spec.loader = _CoreLoader(spec.loader.name, spec.loader.path)
        return spec


class _CoreLoader(SourceFileLoader):
    """Loads a module of megatron-core with its CUDA constants exchanged."""

    def get_code(self, fullname: str) -> CodeType | None:
        code = super().get_code(fullname)
        return code and translate(code)

    def exec_module(self, module: ModuleType) -> None:
        with warnings.catch_warnings():
            # Every process would repeat what `megatron-patch doctor` says once.
            warnings.filterwarnings("ignore", "(Transformer Engine and )?Apex (are|is) not installed", UserWarning)
            super().exec_module(module)
        import torch

        if module.__dict__.get("torch") is torch:
            module.torch = _torch_on_cpu()
        _AFTER_IMPORT.get(module.__name__, lambda _: None)(module)


def translate(code: CodeType) -> CodeType:
    """The same code with `_CONSTANTS` exchanged, and the attribute ``cuda`` where it runs after import."""
    consts = tuple(_translate_constant(value) for value in code.co_consts)
    names = code.co_names
    if code.co_flags & CO_OPTIMIZED:  # a function; modules and classes run while `torch` still is the real one
        names = tuple("cpu" if name == "cuda" else name for name in names)
    return code.replace(co_consts=consts, co_names=names)


def _translate_constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return translate(value)
    if isinstance(value, tuple):
        return tuple(_translate_constant(item) for item in value)
    return _CONSTANTS.get(value, value) if isinstance(value, str) else value


# ------------------------------------------------------------------------------------------------- the torch stand-in

_STAND_IN: ModuleType | None = None


def _torch_on_cpu() -> ModuleType:
    """A module that is torch in everything but ``torch.cuda`` (also found as ``torch.cpu``); built once."""
    global _STAND_IN
    if _STAND_IN is None:
        import torch

        cuda = _variant(torch.cuda, **_cuda_on_cpu())
        _STAND_IN = _variant(torch, cuda=cuda, cpu=cuda)
    return _STAND_IN


def _variant(module: ModuleType, **changes: Any) -> ModuleType:
    # A copied namespace keeps attribute look-ups as fast as torch's own; late additions fall through to the original.
    copy = ModuleType(module.__name__, module.__doc__)
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update(changes)
    copy.__getattr__ = lambda name: getattr(module, name)
    return copy


def _cuda_on_cpu() -> dict[str, Any]:
    import torch

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        return None

    class Stream(torch.cpu.Stream):
        def record_event(self) -> torch.cpu.Event:  # torch's own returns None, which nobody can wait for
            return torch.cpu.Event()

    return dict(
        current_device=lambda: torch.device("cpu"),
        synchronize=nothing,
        empty_cache=nothing,
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        Stream=Stream,
        stream=lambda *_: nullcontext(),
        current_stream=torch.cpu.current_stream,
        default_stream=torch.cpu.current_stream,
    )


# -------------------------------------------------------------------------------- what constants and names do not reach


def _disable_compilation(jit: ModuleType) -> None:
    # torch.compile on CPU would start a C++ compiler for functions of three lines.
    jit.disable_jit_fuser()


def _rng_on_cpu(random: ModuleType) -> None:
    import torch

    random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)


def _scaler_on_cpu(grad_scaler: ModuleType) -> None:
    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        self._scale = state["scale"].cpu()
        self._growth_tracker, self._hysteresis_tracker = state["growth_tracker"], state["hysteresis_tracker"]

    grad_scaler.DynamicGradScaler.load_state_dict = load_state_dict


def _scaling_in_place(utils: ModuleType) -> None:
    import torch

    def local_multi_tensor_scale(_chunk: Any, _flag: Any, tensor_lists: Any, scale: float) -> None:
        # core's goes through a temporary copy of all gradients, 4 % of a training step of a small model.
        for source, target in zip(*tensor_lists, strict=True):
            if source is target:
                target.mul_(scale)
            else:
                target.copy_(torch.mul(source, scale))

    utils.local_multi_tensor_scale = local_multi_tensor_scale


def _splits_on_cpu(moe_utils: ModuleType) -> None:
    import torch

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # core turns split sizes into numbers as they leave the GPU, and hands gloo tensors if they never were there.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _uneven_on_gloo(mappings: ModuleType) -> None:
    """Gathering and reduce-scattering of parts that differ in length, which gloo refuses: pad all to the longest."""
    import torch

    even_gather, even_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def pad(part: Any, length: int) -> Any:
        return torch.cat((part, part.new_zeros(length - len(part), *part.shape[1:])))

    def gather(input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(input_, group, None, use_global_buffer)
        longest = max(1, *output_split_sizes)
        parts = even_gather(pad(input_, longest), group).split(longest)
        return torch.cat([part[:length] for part, length in zip(parts, output_split_sizes, strict=True)])

    def scatter(input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(input_, group, None, use_global_buffer)
        longest = max(1, *input_split_sizes)
        parts = torch.cat([pad(part, longest) for part in input_.split(input_split_sizes)])
        return even_scatter(parts, group)[: input_split_sizes[group.rank()]]

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, scatter


_AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "megatron.core.jit": _disable_compilation,
    "megatron.core.tensor_parallel.random": _rng_on_cpu,
    "megatron.core.optimizer.grad_scaler": _scaler_on_cpu,
    "megatron.core.utils": _scaling_in_place,
    "megatron.core.transformer.moe.moe_utils": _splits_on_cpu,
    "megatron.core.tensor_parallel.mappings": _uneven_on_gloo,
}
