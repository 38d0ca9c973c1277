"""What the files of a legacy checkpoint call the parameters of a model: one table a scheme, from internal names.

    naming_for("te", "grouped").key("decoder.layers.0.input_layernorm.weight", [0], names)
    -> "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"

A key's ``/`` stands for a dict inside of a dict. This module knows names only: no tensors, no ranks, no disk.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from megatron_patch.weights import fill

FILE = "model_optim_rng.pt"
OLDER_FILE = "model_rng.pt"
EXTRA_STATE = "_extra_state"

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT = re.compile(r"(.*\.experts\.)local_experts\.\*\.(.*)")
_LINEARS = r"(.*\.)?(linear_\w+|eh_proj|output_layer)"


def numbers_of(name: str) -> list[int]:
    """The numbers of layer and expert in an internal name."""
    return [int(number) for number in _NUMBER.findall(name)]


@dataclass(frozen=True)
class Naming:
    """The names in the files of one lineage of Megatron."""

    name: str
    modules: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Module -> where its parameters stand in a file, ``*`` for each number. Empty: every module keeps its name."""

    fused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Norm -> the linear that takes it in, where the same layer has such a linear."""

    grouped: bool = False
    """Whether the experts of a rank are one module with a numbered weight for each."""

    tied_head: str = "output_layer.weight"
    """What the last stage calls its copy of a tied embedding."""

    linears: str = _LINEARS
    """Regular expression of the modules that have an ``_extra_state``, which is empty without FP8."""

    file: str = FILE

    def has(self, name: str) -> bool:
        """Whether this scheme has a name for a parameter."""
        return not self.modules or _NUMBER.sub("*", name).rpartition(".")[0] in self.modules

    def key(self, name: str, numbers: Sequence[int], names: Collection[str]) -> str:
        """The key of a parameter.

        Args:
            name: its internal name.
            numbers: of its layer and expert, as they are in the file.
            names: all internal names of the model.

        Raises:
            ValueError: this scheme has no name for it.
        """
        pattern = _NUMBER.sub("*", name)
        module, _, parameter = pattern.rpartition(".")
        if self.modules:
            if not self.has(name):
                raise ValueError(f"naming={self.name!r} has no name for the parameter {name}")
            return fill(self.modules[module] + parameter, numbers)
        if linear := self._linear_around(name, names):
            norm = f"{self._norm_of(name)}.{parameter}"
            return fill(f"{pattern.removesuffix(norm)}{linear}.layer_norm_{parameter}", numbers)
        if self.grouped and (expert := _EXPERT.fullmatch(pattern)):
            return fill(f"{expert[1]}{expert[2]}*", numbers)
        return fill(pattern, numbers)

    def _norm_of(self, name: str) -> str | None:
        module = name.rpartition(".")[0]
        return next((norm for norm in self.fused if module.endswith(f".{norm}")), None)

    def _linear_around(self, name: str, names: Collection[str]) -> str | None:
        norm = self._norm_of(name)
        if norm is None:
            return None
        layer = name.rpartition(".")[0].removesuffix(norm)
        return self.fused[norm] if f"{layer}{self.fused[norm]}.weight" in names else None

    def extra_state(self, key: str) -> str | None:
        """The ``_extra_state`` that stands beside a key, if one does."""
        module = key.rpartition(".")[0]
        return f"{module}.{EXTRA_STATE}" if re.fullmatch(self.linears, module) else None


_LAYER = "language_model/encoder/layers.*."

# The down projections of latent attention are plain where the other linears are local.
LOCAL = Naming("local", linears=r"(?!.*_down_proj$)" + _LINEARS)

TE = Naming(
    "te",
    fused=MappingProxyType(
        {
            "input_layernorm": "self_attention.linear_qkv",
            "pre_mlp_layernorm": "mlp.linear_fc1",
            "self_attention.q_layernorm": "self_attention.linear_q_up_proj",
            "self_attention.kv_layernorm": "self_attention.linear_kv_up_proj",
        }
    ),
)

MEGATRON_2023 = Naming(
    "2023",
    modules=MappingProxyType(
        {
            "embedding.word_embeddings": "language_model/embedding/word_embeddings/",
            "embedding.position_embeddings": "language_model/embedding/position_embeddings/",
            "decoder.layers.*.input_layernorm": _LAYER + "input_layernorm.",
            "decoder.layers.*.self_attention.linear_qkv": _LAYER + "self_attention.query_key_value.",
            "decoder.layers.*.self_attention.linear_proj": _LAYER + "self_attention.dense.",
            "decoder.layers.*.pre_mlp_layernorm": _LAYER + "post_attention_layernorm.",
            "decoder.layers.*.mlp.linear_fc1": _LAYER + "mlp.dense_h_to_4h.",
            "decoder.layers.*.mlp.linear_fc2": _LAYER + "mlp.dense_4h_to_h.",
            "decoder.final_layernorm": "language_model/encoder/final_layernorm.",
            "output_layer": "language_model/output_layer/",
        }
    ),
    tied_head="word_embeddings_for_head/weight",
    linears=r"(?!)",  # nothing of 2023 has one
    file=OLDER_FILE,
)


def _reworded(naming: Naming, old: str, new: str) -> Naming:
    modules = {module: place.replace(old, new) for module, place in naming.modules.items()}
    return replace(naming, modules=MappingProxyType(modules))


# The names of norms at the end of 2023, and those of the time when the encoder was called a transformer.
_LATE_2023 = _reworded(MEGATRON_2023, "_layernorm.", "_norm.")
_BEFORE_2023 = _reworded(MEGATRON_2023, "/encoder/", "/transformer/")

READABLE: tuple[Naming, ...] = (
    LOCAL,
    TE,
    replace(TE, grouped=True),
    MEGATRON_2023,
    _LATE_2023,
    _BEFORE_2023,
)
"""Every scheme that a checkpoint may have."""

_WRITTEN = {one.name: one for one in (LOCAL, TE, MEGATRON_2023)}
_EXPERTS = ("sequential", "grouped")


def naming_for(name: str = "local", expert_layout: str | None = None) -> Naming:
    """The scheme to write.

    Raises:
        ValueError: there is no such scheme.
    """
    if name not in _WRITTEN:
        raise ValueError(f"naming={name!r} is not known; choose one of {', '.join(_WRITTEN)}")
    if expert_layout not in (None, *_EXPERTS):
        raise ValueError(f"expert_layout={expert_layout!r} is not known; choose one of {', '.join(_EXPERTS)}")
    if expert_layout == "grouped" and name != TE.name:
        raise ValueError(f"expert_layout='grouped' exists with naming='te' only, not {name!r}")
    return replace(_WRITTEN[name], grouped=expert_layout == "grouped")
