"""The orders of arguments that conversion scripts of cluster users know by heart, as data, and the check of a call.

An order is a tuple of arguments; an argument has the name its users know and a role: what it is for here (see
toolkits/positional.py). It does not know what a conversion is: see command.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

from toolkits import positional
from toolkits.model_checkpoints_convertor import sizes
from toolkits.positional import MEGATRON_LM, NONE, Role, one_of, whole

DTYPES = MappingProxyType({"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"})

_SIZE = (
    "must have a size in it, such as 7B, llama2-13b, 0.5B, 8x7B or A3B",
    lambda text: sizes.promised(text) is not None,
)
_COUNT, _DEGREE, _BOOL = whole(0), whole(1), one_of("true", "false")

ROLES: Mapping[str, Role] = MappingProxyType(
    {
        "megatron_lm": MEGATRON_LM,
        "source": Role("what to convert", "must be a directory that exists", lambda text: Path(text).is_dir()),
        "clip": Role(
            "a vision tower to merge with the language model",
            "must be none: merging a vision tower is not supported",
            lambda text: text == NONE,
        ),
        "target": Role("directory to make", "must not be a file", lambda text: not Path(text).is_file()),
        "tp": Role("tensor parallel size", *_DEGREE),
        "pp": Role("pipeline parallel size", *_DEGREE),
        "ep": Role("expert parallel size", *_DEGREE),
        "etp": Role("expert tensor parallel size", *_DEGREE),
        "size": Role("the model's size; compared with config.json, which decides", *_SIZE),
        "extra_vocab_size": Role("rows to append to the vocabulary; 0: exactly its own", *_COUNT),
        "to_huggingface": Role("false: Hugging Face -> Megatron; true: the way back", *_BOOL),
        "check": Role("compare source and target afterwards", *_BOOL),
        "check_only": Role("only compare source and target, convert nothing", *_BOOL),
        "dtype": Role("precision to write", *one_of(*DTYPES)),
        "transformer_engine": Role("names of Transformer Engine's layers, or of megatron-core's own", *_BOOL),
        "config": Role(
            "the Hugging Face model, whose config and tokenizer the way back may need",
            "must be a directory with a config.json, or none",
            lambda text: text == NONE or (Path(text) / "config.json").is_file(),
        ),
        "num_experts": Role("experts: 0 or 1 for a dense model, or as in config.json", *_COUNT),
        "experts_topk": Role("experts a token meets: 0, 1 or as in config.json", *_COUNT),
        "expert_splits": Role("parts to cut an MLP into; only 0 and 1 are supported", *_COUNT),
        "moe_width": Role("width of an expert: 0, 1 or as in config.json", *_COUNT),
        "world_size": Role("number of processes; one is enough here", *_DEGREE),
        "use_cuda": Role("whether to use GPUs; none is needed here", *_BOOL),
    }
)

# fmt: off
NAMES: Mapping[str, str] = MappingProxyType({
    "MEGATRON_PATH": "megatron_lm", "MODEL_SIZE": "size", "MN": "size",
    "SOURCE_CKPT_PATH": "source", "LOAD_DIR": "source", "SOURCE_LLM_CKPT_PATH": "source",
    "SOURCE_CLIP_CKPT_PATH": "clip",
    "TARGET_CKPT_PATH": "target", "SAVE_DIR": "target", "MG_CKPT_PATH": "target",
    "HF_CKPT_PATH": "config", "HG_CKPT_PATH": "config", "HF_DIR": "config",
    "TP": "tp", "PP": "pp", "EP": "ep", "ETP": "etp", "EXTRA_VOCAB_SIZE": "extra_vocab_size",
    "mg2hf": "to_huggingface", "MG2HF": "to_huggingface", "CHECK": "check", "CHECK_ONLY": "check_only",
    "PR": "dtype", "USE_TE": "transformer_engine", "USE_CUDA": "use_cuda", "WS": "world_size",
    "NUM_EXPERTS": "num_experts", "EXPERTS_TOPK": "experts_topk", "NUM_EXPERT_SPLITS": "expert_splits",
    "NUM_SPLITS": "expert_splits", "MOE_INTERMEDIATE_SIZE": "moe_width",
})
"""Name of an argument -> its role, where an order does not say otherwise (`NAME=role`)."""
# fmt: on


@dataclass(frozen=True)
class Order(positional.Order):
    """One order of arguments and what it writes in the direction of Megatron."""

    roles: ClassVar[Mapping[str, Role]] = ROLES
    roles_of_names: ClassVar[Mapping[str, str]] = NAMES

    naming: Literal["2023", "te"] | None
    """Parameter names of the legacy checkpoint it writes; None: it writes torch_dist."""


_2023 = "MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP"
_2023_HF = "MEGATRON_PATH HF_CKPT_PATH=source MG_CKPT_PATH TP PP"
_MCORE = "MODEL_SIZE SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP"
_MOE = (
    "MODEL_SIZE HG_CKPT_PATH MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP EXTRA_VOCAB_SIZE"
    " NUM_EXPERTS EXPERTS_TOPK EP"
)

ORDERS: Mapping[str, Order] = positional.by_word(
    Order("2023", f"{_2023} MN EXTRA_VOCAB_SIZE mg2hf", "2023"),
    Order("2023-hf-mg", f"{_2023_HF} MN EXTRA_VOCAB_SIZE mg2hf", "2023"),
    Order("2023-short", f"{_2023} mg2hf", "2023"),
    Order("2023-one-way", _2023_HF, "2023"),
    Order("2023-one-way-mn", f"{_2023_HF} MN EXTRA_VOCAB_SIZE", "2023"),
    Order("hf2te", f"{_2023} MN EXTRA_VOCAB_SIZE", "te"),
    Order("mcore-experts", f"{_MOE} NUM_EXPERT_SPLITS mg2hf", "te"),
    Order("mcore-mistral", f"{_MOE} mg2hf WS", "te", optional=1),
    Order("mcore-llama3_1", f"{_MCORE} mg2hf CHECK CHECK_ONLY PR HF_CKPT_PATH", "te", optional=1),
    Order("mcore-dense", f"{_MCORE} mg2hf HF_CKPT_PATH", "te", optional=1),
    Order("mcore-ep", f"{_MCORE} EP mg2hf HF_CKPT_PATH", "te", optional=1),
    Order("mcore-upcycle", f"{_MCORE} EP NUM_EXPERTS NUM_SPLITS MOE_INTERMEDIATE_SIZE", "te"),
    Order("mcore-ep-pr-te", f"{_MCORE} EP PR USE_TE MG2HF HF_CKPT_PATH", "te", optional=1),
    Order("mcore-pr-te", f"{_MCORE} PR USE_TE MG2HF HF_CKPT_PATH", "te", optional=1),
    Order("mcore-etp-ep-pr", f"{_MCORE} ETP EP PR MG2HF HF_CKPT_PATH", "te", optional=1),
    Order("mcore-ep-pr", f"{_MCORE} EP PR MG2HF HF_CKPT_PATH", "te", optional=1, older="mcore-ep"),
    Order("mcore-vl", f"{_MCORE} MG2HF PR HF_CKPT_PATH", "te", optional=1),
    Order(
        "mcore-llava",
        "MODEL_SIZE SOURCE_LLM_CKPT_PATH SOURCE_CLIP_CKPT_PATH TARGET_CKPT_PATH TP PP mg2hf PR HF_CKPT_PATH",
        "te",
        optional=1,
    ),
    Order("distributed", "MODEL_SIZE LOAD_DIR SAVE_DIR MG2HF USE_CUDA PR HF_DIR", None, optional=1),
)
"""Every order, by the word that names it."""


def read(word: str, values: Sequence[str]) -> tuple[Order, dict[str, str]]:
    """The order a call is in, and its values by role; ValueError names every wrong argument."""
    return positional.read(ORDERS, word, values)


def closest(order: Order, values: Sequence[str]) -> Order:
    """The order, or the older one under the same name, that fits a call best."""
    return positional.closest(ORDERS, order, values)
