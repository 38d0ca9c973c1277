"""The record of a model family, and the translation of a Hugging Face ``config.json`` by it.

A family says, as data, how config fields become `TransformerConfig` fields, which fields have no effect on the
computation, and one reversible rule per weight. `Family.describe` turns a config into an `Architecture`; a field that
the family neither honours nor lists as inert is refused by name, so nothing that changes behaviour is ever ignored.

It knows weights.py and the names of megatron-core's config fields: no GPTModel, no arguments, no disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from megatron_patch.weights import Rule, fill

# Fields of any Hugging Face config that do not change what the model computes.
# fmt: off
_INERT = frozenset({
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
    "_model_name_or_path", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "unk_token_id", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "tokenizer_class",
    "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder",
    "is_decoder", "auto_map", "unsloth_fixed", "unsloth_version", "_commit_hash", "_num_labels", "torchscript",
    "use_bfloat16", "tf_legacy_loss", "decoder_start_token_id", "decoder_bos_token_id",
    # of generation, which older versions of transformers wrote into config.json
    "max_length", "min_length", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "typical_p",
    "num_beams", "num_beam_groups", "diversity_penalty", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "early_stopping",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    "remove_invalid_values", "exponential_decay_length_penalty", "output_scores", "return_dict_in_generate",
    "gradient_checkpointing", "_attn_implementation", "attn_implementation",
    "_attn_implementation_autoset", "prefix", "finetuning_task", "transformers.js_config", "name_or_path",
})
# fmt: on


# And those that change nothing as long as they say nothing.
_UNUSED: Mapping[str, Callable[[Any], bool]] = {
    "pruned_heads": lambda value: not value,
    "tie_encoder_decoder": lambda value: value is False,
    "add_cross_attention": lambda value: value is False,
}

EMBEDDING = "embedding.word_embeddings.weight"
"""The embedding's internal name."""


class HFConfig:
    """A ``config.json`` that remembers which fields were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value, or `default` where it is missing or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def __contains__(self, name: str) -> bool:
        self._read.add(name)
        return name in self._values

    def require(self, names: Iterable[str]) -> None:
        """Raise a ValueError for a field that is missing; null will do."""
        if missing := [name for name in names if name not in self]:
            raise ValueError(f"config.json: the field {missing[0]!r} is missing")

    def __getitem__(self, name: str) -> Any:
        if (value := self.get(name)) is None:
            raise ValueError(f"config.json: the field {name!r} is missing")
        return value

    def unread(self) -> dict[str, Any]:
        """Fields that carry a value and were not asked for."""
        return {name: value for name, value in self._values.items() if name not in self._read and value is not None}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: which frequencies, as `rope_parameters` of a Hugging Face config names them."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What the type needs besides theta: factor, low_freq_factor, beta_fast, ..."""

    fraction: float = 1.0
    """The part of a head's channels that rotates: the first ones."""

    axes: int = 1
    """Of how many positions each token has one: with two, each turns one half of a head (weights.TwoAxes)."""


@dataclass(frozen=True)
class Positions:
    """Learned position embeddings."""

    rows: int
    offset: int = 0
    """The row of position 0."""


@dataclass(frozen=True)
class Swap:
    """Puts one of our layers in the place of one of megatron-core's in the layer spec."""

    at: str
    """Where, as a path of submodules: ``self_attention.linear_proj``; nothing for the layer itself."""

    layer: str
    """Which, as ``module.Class`` below megatron_patch.layers."""

    when: Callable[[HFConfig], bool] = lambda hf: True
    """Whether this config asks for it."""


@dataclass(frozen=True)
class Amendment:
    """Adds what megatron-core's model has no place for, once it is built."""

    function: str
    """Which of ours, as ``module.function`` below megatron_patch.layers; it is called with the model and `options`."""

    when: Callable[[HFConfig], bool] = lambda hf: True
    """Whether this config asks for it."""

    options: Callable[[HFConfig], Mapping[str, Any]] = lambda hf: {}
    """What else it is called with, by name."""


@dataclass(frozen=True)
class Family:
    """What one lineage of models needs, as data."""

    name: str
    hf_types: tuple[str, ...]
    """Values of ``model_type`` in config.json that belong to this family."""

    models: str
    """Published models of it."""

    special: str
    """What is special about it, for the table of families."""

    config: Mapping[str, str | Callable[[HFConfig], Any]]
    """TransformerConfig field <- config field, or a function of the config."""

    weights: tuple[Rule, ...]
    """One rule a weight; see weights.py."""

    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """TransformerConfig fields that are the same for every member."""

    matches: Callable[[Mapping[str, Any]], bool] = lambda values: True
    """Tells its config.json from those of other families with the same ``model_type``."""

    reference: str = "transformers"
    """What its tests compare it with: transformers, or a plain module of ours (``tests/reference``)."""

    required: tuple[str, ...] = ()
    """Config fields that must be there, if only as null, since transformers takes another value for a missing one."""

    vocab_size: str = "vocab_size"
    """The config field with the number of rows of the embedding."""

    max_position_embeddings: str | Callable[[HFConfig], int] = "max_position_embeddings"
    """The config field with the longest text it is meant for."""

    activation: Callable[[HFConfig], str] = lambda hf: hf.get("hidden_act", "silu")
    """The Hugging Face name of the MLP's activation function."""

    rope: Callable[[HFConfig], Rope | None] = lambda hf: None
    """Its rotary embedding, if any."""

    positions: Callable[[HFConfig], Positions | None] = lambda hf: None
    """Its learned position embeddings, if any."""

    tied: Callable[[HFConfig], bool] = lambda hf: hf.get("tie_word_embeddings", False)
    """Whether the output layer shares the embedding's weight."""

    swaps: tuple[Swap, ...] = ()
    """Layers of ours in place of megatron-core's."""

    amendments: tuple[Amendment, ...] = ()
    """What is added to the model as a whole."""

    inert: Mapping[str, Callable[[Any], bool]] = field(default_factory=lambda: MappingProxyType({}))
    """Config fields that have no effect as long as their value passes the test."""

    ignored_weights: tuple[str, ...] = ()
    """Regular expressions of checkpoint tensors that are no parameters (such as rotary buffers)."""

    tied_weights: tuple[str, ...] = ()
    """Checkpoint tensors that merely repeat the embedding when it is tied."""

    repeated_weights: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Checkpoint tensors of each multi-token prediction layer that merely repeat another: their pattern -> its name."""

    quantized: Callable[[HFConfig], str] = lambda hf: ""
    """Why the weights of this config are in no format that can be converted, although its model can be planned."""

    def describe(self, values: Mapping[str, Any]) -> Architecture:
        """Translate a config.json.

        Raises:
            ValueError: a field is missing, has a value we do not honour, or is one this family does not know.
        """
        hf = HFConfig(values)
        hf.require(self.required)
        config = {name: _value(hf, source) for name, source in self.config.items()}
        architecture = Architecture(
            family=self,
            config=MappingProxyType({**self.fixed, **config}),
            activation=self.activation(hf),
            vocab_size=hf[self.vocab_size],
            max_position_embeddings=_value(hf, self.max_position_embeddings),
            rope=self.rope(hf),
            positions=self.positions(hf),
            tied=self.tied(hf),
            swaps=tuple(swap for swap in self.swaps if swap.when(hf)),
            amendments=tuple((one.function, one.options(hf)) for one in self.amendments if one.when(hf)),
            plan_only=self.quantized(hf),
        )
        self._refuse_unknown(hf)
        return architecture

    def _refuse_unknown(self, hf: HFConfig) -> None:
        for name, value in hf.unread().items():
            inert = {**_UNUSED, **self.inert}
            if name in _INERT or (name in inert and inert[name](value)):
                continue
            raise ValueError(f"config.json: family {self.name} does not honour {name}={value!r}; refusing to ignore it")


def _value(hf: HFConfig, source: str | Callable[[HFConfig], Any]) -> Any:
    return source(hf) if callable(source) else hf[source]


@dataclass(frozen=True)
class Architecture:
    """One model: a family's translation of one config.json. Says what to build, not where."""

    family: Family
    config: Mapping[str, Any]
    """TransformerConfig fields, without anything that depends on the parallel layout or precision."""

    activation: str
    vocab_size: int
    """Rows of the embedding, before padding."""

    max_position_embeddings: int
    rope: Rope | None
    positions: Positions | None
    tied: bool
    swaps: tuple[Swap, ...]
    amendments: tuple[tuple[str, Mapping[str, Any]], ...]
    """Functions of ours and what they are called with, besides the model."""

    plan_only: str = ""
    """Why this model may be planned (a dry run) but its weights not be converted; empty where they may."""

    @property
    def num_attention_heads(self) -> int:
        return self.config["num_attention_heads"]

    @property
    def num_query_groups(self) -> int:
        return self.config["num_query_groups"]

    @property
    def kv_channels(self) -> int:
        return self.config["kv_channels"]

    @property
    def num_layers(self) -> int:
        """Layers of the decoder, without those for multi-token prediction."""
        return self.config["num_layers"]

    @property
    def moe_layers(self) -> tuple[bool, ...]:
        """Which of the decoder's layers are mixtures of experts."""
        pattern = self.config.get("moe_layer_freq", [1] * self.num_layers)
        return tuple(bool(self.config.get("num_moe_experts") and layer) for layer in pattern)

    @property
    def repeats(self) -> dict[str, str]:
        """Hugging Face tensors that can only repeat another one -> that one."""
        embedding = next(rule.hf[0] for rule in self.family.weights if rule.internal == EMBEDDING)
        extra = range(self.config.get("mtp_num_layers") or 0)
        return dict.fromkeys(self.family.tied_weights if self.tied else (), embedding) | {
            fill(pattern, [layer], self.num_layers): original
            for pattern, original in self.family.repeated_weights.items()
            for layer in extra
        }


# ------------------------------------------------------------------------------------------ pieces that families share


_Source = str | Callable[[HFConfig], Any]


def sizes(
    layers: _Source, hidden: _Source, heads: _Source, attention_dropout: str = "attention_dropout"
) -> dict[str, Any]:
    """TransformerConfig fields of a model whose heads all have keys and values of their own.

    Args:
        layers, hidden, heads, attention_dropout: the config fields.
    """
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": lambda hf: _value(hf, hidden) // _value(hf, heads),
        "attention_dropout": lambda hf: hf.get(attention_dropout, 0.0),
        "init_method_std": lambda hf: hf.get("initializer_range", 0.02),
    }


def either(name: str, older: str) -> Callable[[HFConfig], Any]:
    """A field that older configs call otherwise."""

    def value(hf: HFConfig) -> Any:
        found, before = hf.get(name), hf.get(older)
        if None not in (found, before) and found != before:
            raise ValueError(f"config.json: {older}={before!r} must equal {name}={found!r}")
        return hf[name] if before is None else before

    return value


def only(value: Any, *names: str) -> dict[str, Callable[[Any], bool]]:
    """Config fields that have no effect as long as they have this value."""
    return dict.fromkeys(names, lambda found: found == value)


def anything(*names: str) -> dict[str, Callable[[Any], bool]]:
    """Config fields that have no effect, whatever their value."""
    return dict.fromkeys(names, lambda found: True)


_ROPE_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "ntk_steps": ("original_max_position_embeddings",),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
_YARN_OPTIONAL = "attention_factor beta_fast beta_slow mscale mscale_all_dim truncate original_max_position_embeddings"
_ROPE_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "dynamic": ("original_max_position_embeddings",),
    "yarn": tuple(_YARN_OPTIONAL.split()),
}


def rope_from_config(
    hf: HFConfig,
    default_theta: float = 10000.0,
    default_length: int | None = None,
    default_fraction: float | None = None,
) -> Rope:
    """Read ``rope_parameters`` (transformers 5), or ``rope_theta`` with ``rope_scaling`` (before).

    Args:
        default_theta: where the config says nothing.
        default_length: instead of ``max_position_embeddings`` where that is missing.
        default_fraction: of a family that honours ``partial_rotary_factor``, where that is missing.

    Raises:
        ValueError: an unknown type, a parameter that is missing or that the type does not have.
    """
    given = {**hf.get("rope_scaling", {}), **hf.get("rope_parameters", {})}
    legacy = given.pop("type", None)
    kind = given.pop("rope_type", None) or legacy or "default"
    theta = given.pop("rope_theta", None) or hf.get("rope_theta", default_theta)
    hf.get("rope_theta")
    fraction = 1.0
    if default_fraction is not None:
        fraction = hf.get("partial_rotary_factor", default_fraction)
        fraction = given.pop("partial_rotary_factor", None) or fraction
    if kind not in _ROPE_REQUIRED:
        raise ValueError(f"config.json: rope_type={kind!r} is not supported; choose one of {', '.join(_ROPE_REQUIRED)}")
    if missing := [name for name in _ROPE_REQUIRED[kind] if given.get(name) is None]:
        raise ValueError(f"config.json: rope_type={kind!r} needs {', '.join(missing)}")
    known = {*_ROPE_REQUIRED[kind], *_ROPE_OPTIONAL.get(kind, ())}
    if unknown := sorted(name for name, value in given.items() if name not in known and value is not None):
        raise ValueError(f"config.json: rope_type={kind!r} does not honour {', '.join(unknown)}")
    parameters = MappingProxyType({name: value for name, value in given.items() if value is not None})
    length = hf.get("max_position_embeddings", default_length) or hf["max_position_embeddings"]
    return Rope(kind, float(theta), length, parameters, fraction)
