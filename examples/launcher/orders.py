"""The orders of arguments that training scripts of cluster users know by heart, as data.

An argument has the name its users know and a role: what it is for here (see toolkits/positional.py). Where orders share
a script, a call is read as the one that its number of arguments and their values fit. It does not know how anything is
trained or started: see command.py and machines.py.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

from megatron_patch.data.arguments import parse_blend
from toolkits import positional
from toolkits.model_checkpoints_convertor import sizes
from toolkits.positional import MEGATRON_LM, NONE, PATCH, Role, one_of, whole

# -------------------------------------------------------------------------------------------------------- what is given


def indexed_prefixes(text: str) -> tuple[str, ...] | None:
    """What an argument says of indexed data, as `--data-path` takes it; None if it does not name any.

    A prefix, a blend (WEIGHT PREFIX WEIGHT PREFIX...), or a directory, which stands for all .bin and .idx in it.
    """
    if not _is_prefix(text) and Path(text).is_dir():  # beside a prefix, a directory of its name may hold its cache
        found = sorted(str(path.with_suffix("")) for path in Path(text).glob("*.idx"))
        return tuple(filter(_is_prefix, found)) or None
    return _blend(text, _is_prefix)


def record_sources(text: str) -> tuple[str, ...] | None:
    """What an argument says of records: files, directories, globs, with weights or without; None if nothing."""
    return _blend(text, lambda word: Path(word).exists() or bool(glob.glob(word)))


def sft_sources(text: str) -> tuple[str, ...] | None:
    """Records, or prefixes of what `megatron-patch sft-data` or the predecessor has tokenized."""
    return _blend(text, _is_stored) or record_sources(text)


def _blend(text: str, is_there: Callable[[str], bool]) -> tuple[str, ...] | None:
    if is_there(text):
        return (text,)  # which may have a blank in its name
    words = tuple(text.split())
    try:
        blend = parse_blend(words, "")
    except ValueError:
        return None
    return words if blend and all(map(is_there, blend.prefixes)) else None


def _is_prefix(text: str) -> bool:
    return all(Path(f"{text}{suffix}").is_file() for suffix in (".bin", ".idx"))


def _is_stored(text: str) -> bool:
    return _is_prefix(text) or _is_prefix(f"{text}_ids")


def number(text: str) -> float:
    """A finite number; nan where a text is none."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _at_least(least: float) -> tuple[str, Callable[[str], bool]]:
    return f"must be a number of at least {least:g}", lambda text: number(text) >= least


# ---------------------------------------------------------------------------------------------------------------- roles

_DEGREE, _COUNT, _BOOL = whole(1), whole(0), one_of("true", "false")
_ABOVE_0 = ("must be a number above 0", lambda text: number(text) > 0)
_INDEXED = "the prefix of a .bin and .idx (without either), 'WEIGHT PREFIX WEIGHT PREFIX', or a directory of them"
_RECORDS = "a .json, .jsonl or .parquet file, a directory or a glob of them"
_OFFLOADS = "must be false, static, auto or a share between 0 and 1"
_TOKENIZERS = ("bloombpe-c", "bloombpe-h", "jiebabpe")
PLACES = ("dsw", "dlc", "slurm", "cpu")
ACTIVATIONS = ("sel", "full", "none", "false", "offload")
PRECISIONS = ("fp16", "bf16", "fp32", "fp8")

ROLES: Mapping[str, Role] = MappingProxyType(
    {
        "env": Role("where: dsw one node, dlc and slurm a cluster's nodes, cpu no GPU", *one_of(*PLACES)),
        "megatron_lm": MEGATRON_LM,
        "patch": PATCH,
        "size": Role(
            "the model's size; compared with config.json, which decides",
            "must have a size in it, such as 7B, 0.5B, 8x7B or A3B",
            lambda text: sizes.promised(text) is not None,
        ),
        "micro_batch": Role("samples that one process handles at once", *_DEGREE),
        "global_batch": Role("samples of one iteration, over all processes", *_DEGREE),
        "lr": Role("peak learning rate", *_ABOVE_0),
        "min_lr": Role("learning rate at the end", *_at_least(0)),
        "seq_len": Role("tokens in a sample", *_DEGREE),
        "source_len": Role("tokens of the source in a sample", *_DEGREE),
        "target_len": Role("tokens of the target in a sample", *_DEGREE),
        "gen_len": Role("tokens of a sample that are generated after a prefix", *_COUNT),
        "pad_len": Role("tokens to which a record is cut or padded", *_COUNT),
        "extra_vocab_size": Role("rows that were appended to the vocabulary", *_COUNT),
        "precision": Role("precision", *one_of(*PRECISIONS)),
        "tp": Role("tensor parallel size", *_DEGREE),
        "pp": Role("pipeline parallel size", *_DEGREE),
        "cp": Role("context parallel size; 1 is supported", *_DEGREE),
        "ep": Role("expert parallel size", *_DEGREE),
        "etp": Role("expert tensor parallel size", *_DEGREE),
        "recompute": Role("activations: sel or full recomputes, none keeps (false does, too)", *one_of(*ACTIVATIONS)),
        "distributed_optimizer": Role("share the optimizer's state among data-parallel processes", *_BOOL),
        "flash": Role("flash attention", *_BOOL),
        "sequence_parallel": Role("split activations along the sequence, with TP above 1", *_BOOL),
        "transformer_engine": Role("layers of Transformer Engine", *_BOOL),
        "experts": Role("whether the model is a mixture of experts; config.json decides", *_BOOL),
        "sft": Role("true: finetune, lengths in iterations; false: pretrain, in tokens", *_BOOL),
        "offload": Role(
            "the optimizer on the CPU; false is supported",
            _OFFLOADS,
            lambda text: text in ("false", "static", "auto") or 0 <= number(text) <= 1,
        ),
        "save_interval": Role("iterations between two checkpoints", *_DEGREE),
        "indexed": Role(
            "indexed data to train on",
            f"must be {_INDEXED}; text goes through `megatron-patch preprocess` first",
            lambda text: indexed_prefixes(text) is not None,
        ),
        "indexed_valid": Role(
            "indexed data to validate on",
            f"must be {_INDEXED}, or none",
            lambda text: text == NONE or indexed_prefixes(text) is not None,
        ),
        "sft_train": Role(
            "records to finetune on",
            f"must be {_RECORDS}, or the prefix of tokenized ones",
            lambda text: sft_sources(text) is not None,
        ),
        "sft_valid": Role(
            "records to validate on",
            f"must be {_RECORDS}, the prefix of tokenized ones, or none",
            lambda text: text == NONE or sft_sources(text) is not None,
        ),
        "either_train": Role(
            "what to train on: indexed data, or with SFT=true records",
            f"must be {_INDEXED}; with SFT=true {_RECORDS}",
            lambda text: (indexed_prefixes(text) or sft_sources(text)) is not None,
        ),
        "either_valid": Role(
            "what to validate on, of the same kind",
            f"must be {_INDEXED}; with SFT=true {_RECORDS}; or none",
            lambda text: text == NONE or (indexed_prefixes(text) or sft_sources(text)) is not None,
        ),
        "scored": Role(
            "what to score: text, or indexed data",
            f"must be {_RECORDS}, a .txt file, or {_INDEXED}",
            lambda text: (indexed_prefixes(text) or record_sources(text)) is not None,
        ),
        "checkpoint": Role(
            "Megatron checkpoint to start from; none: random weights",
            "must be a directory that exists, or none",
            lambda text: text == NONE or Path(text).is_dir(),
        ),
        "train_tokens": Role("tokens to train; // GLOBAL_BATCH_SIZE // SEQ_LEN iterations", *_DEGREE),
        "warmup_tokens": Role("tokens of the warm-up; // GLOBAL_BATCH_SIZE // SEQ_LEN iterations", *_COUNT),
        "train_iters": Role("iterations to train", *_DEGREE),
        "warmup_iters": Role("iterations of the warm-up", *_COUNT),
        "train_length": Role("tokens to train, or iterations with SFT=true", *_DEGREE),
        "warmup_length": Role("tokens of the warm-up, or iterations with SFT=true", *_COUNT),
        "epochs": Role("passes over the data", *_DEGREE),
        "output": Role(
            "directory for checkpoint/ and tensorboard/", "must not be a file", lambda text: not Path(text).is_file()
        ),
        "tokenizer": Role("tokenizer's name; the checkpoint's own is used", *one_of(*_TOKENIZERS)),
        "top_k": Role("draw from this many of the likeliest tokens; 0: off", *_COUNT),
        "top_p": Role(
            "draw from the likeliest tokens up to this probability; 0: off",
            "must be a number between 0 and 1",
            lambda text: 0 <= number(text) <= 1,
        ),
        "temperature": Role("logits are divided by it; 0: always the likeliest token", *_at_least(0)),
        "repetition_penalty": Role("1: none; 1.1 to 1.5 make repetition rarer", *_ABOVE_0),
        "input_len": Role("tokens of a prompt", *_COUNT),
        "output_len": Role("most tokens to generate", *_DEGREE),
        "prompts": Role(
            "JSON lines with the prompt under `query`, or a .txt file with one in a line",
            "must be a .jsonl or .txt file that exists",
            lambda text: text == NONE or (text.endswith((".jsonl", ".txt")) and Path(text).is_file()),
        ),
        "completions": Role(
            "file to write, JSON lines", "must not be a directory", lambda text: not Path(text).is_dir()
        ),
    }
)  # fmt: skip

# fmt: off
NAMES: Mapping[str, str] = MappingProxyType({
    "ENV": "env", "MEGATRON_PATH": "megatron_lm", "MEGATRON_PATCH_PATH": "patch", "MODEL_SIZE": "size",
    "BATCH_SIZE": "micro_batch", "BS": "micro_batch", "GLOBAL_BATCH_SIZE": "global_batch", "LR": "lr",
    "MIN_LR": "min_lr", "SEQ_LEN": "seq_len", "S_T_SEQ_LEN": "seq_len", "SOURCE_SEQ_LEN": "source_len",
    "TARGET_SEQ_LEN": "target_len", "GEN_LEN": "gen_len", "PAD_LEN": "pad_len", "EXTRA_VOCAB_SIZE": "extra_vocab_size",
    "PR": "precision", "TP": "tp", "PP": "pp", "CP": "cp", "EP": "ep", "EMP": "ep", "ETP": "etp", "AC": "recompute",
    "DO": "distributed_optimizer", "FL": "flash", "SP": "sequence_parallel", "TE": "transformer_engine",
    "MOE": "experts", "SFT": "sft", "OPTIMIZER_OFFLOAD": "offload", "SAVE_INTERVAL": "save_interval",
    "DATASET_PATH": "indexed", "TRAIN_DATASET_PATH": "sft_train", "VALID_DATASET_PATH": "sft_valid",
    "PRETRAIN_CHECKPOINT_PATH": "checkpoint", "CHECKPOINT_PATH": "checkpoint", "TRAIN_TOKENS": "train_tokens",
    "WARMUP_TOKENS": "warmup_tokens", "TRAIN_ITERS": "train_iters", "LR_WARMUP_ITERS": "warmup_iters",
    "TRAIN_TOKENS_OR_ITERS": "train_length", "WARMUP_TOKENS_OR_ITERS": "warmup_length", "EPOCH": "epochs",
    "OUTPUT_BASEPATH": "output", "TOKENIZER": "tokenizer", "TOP_K": "top_k", "TOP_P": "top_p",
    "TEMPERATURE": "temperature", "REPETITION_PENALTY": "repetition_penalty", "INPUT_SEQ_LEN": "input_len",
    "OUTPUT_SEQ_LEN": "output_len", "INPUT_FILE": "prompts", "OUTPUT_FILE": "completions",
})
"""Name of an argument -> its role, where an order does not say otherwise (`NAME=role`)."""
# fmt: on


# --------------------------------------------------------------------------------------------------------------- orders

Kind = Literal["pretrain", "finetune", "either", "generate", "evaluate"]


@dataclass(frozen=True)
class Order(positional.Order):
    """One order of arguments, the command it becomes, and the flags that its scripts have always had."""

    roles: ClassVar[Mapping[str, Role]] = ROLES
    roles_of_names: ClassVar[Mapping[str, str]] = NAMES

    kind: Kind
    """The command; `either`: what SFT says."""

    style: str = ""
    """Flags that no argument gives."""

    split: str = "99,1,0"
    """Shares of training, validation and test, where one data set is given for all."""


_LINEAR = "--lr-decay-style linear --weight-decay 0.1 --eval-interval 100"
_COSINE = "--lr-decay-style cosine --weight-decay 0.1 --eval-interval 10000"
_EPOCHS = "--lr-decay-style cosine --weight-decay 0.1 --eval-interval 1000"

_OLD, _NEW = "ENV MEGATRON_PATH MEGATRON_PATCH_PATH", "ENV MEGATRON_PATCH_PATH"
_SIZES = "MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR TP PP AC DO FL SP"
_FT_SIZES = _SIZES.replace(" GLOBAL_BATCH_SIZE", "")
_CKPT_TOKENS = "PRETRAIN_CHECKPOINT_PATH TRAIN_TOKENS WARMUP_TOKENS OUTPUT_BASEPATH"
_TOKENS = f"SAVE_INTERVAL DATASET_PATH {_CKPT_TOKENS}"
_CHATGLM = (
    f"{_SIZES.replace(' SEQ_LEN', ' S_T_SEQ_LEN')} SAVE_INTERVAL TRAIN_DATASET_PATH=indexed"
    f" VALID_DATASET_PATH=indexed_valid {_CKPT_TOKENS}"
)
_EPOCH = "TRAIN_DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH EPOCH OUTPUT_BASEPATH"
_CKPT_ITERS = "PRETRAIN_CHECKPOINT_PATH TRAIN_ITERS LR_WARMUP_ITERS OUTPUT_BASEPATH"
_ITERS = f"SAVE_INTERVAL DATASET_PATH=sft_train {_CKPT_ITERS}"
_GA = f"SAVE_INTERVAL DATASET_PATH=sft_train VALID_DATASET_PATH {_CKPT_ITERS}"
_HEAD = "ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN PR TP PP"
_MCORE = (
    "AC OPTIMIZER_OFFLOAD SAVE_INTERVAL DATASET_PATH=either_train VALID_DATASET_PATH=either_valid"
    " PRETRAIN_CHECKPOINT_PATH TRAIN_TOKENS_OR_ITERS WARMUP_TOKENS_OR_ITERS OUTPUT_BASEPATH"
)
_SAMPLING = "TOP_K INPUT_SEQ_LEN OUTPUT_SEQ_LEN INPUT_FILE OUTPUT_FILE TOP_P TEMPERATURE REPETITION_PENALTY"
_PROMPTED = f"CHECKPOINT_PATH MODEL_SIZE TP BS SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR {_SAMPLING}"
_READ_SIZES = "MODEL_SIZE BATCH_SIZE SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR TP PP"
_SCORED = "DATASET_PATH=scored PRETRAIN_CHECKPOINT_PATH"
_SCORED_TE = f"{_READ_SIZES} AC DO FL SP TE {_SCORED}"

# fmt: off
ORDERS: Mapping[str, Order] = positional.by_word(
    # Pretraining, 2023
    Order("pretrain-2023", f"{_OLD} {_SIZES} {_TOKENS}", "pretrain", _LINEAR, "98,2,0"),
    Order("pretrain-te-2023", f"{_OLD} {_SIZES} TE {_TOKENS}", "pretrain", _LINEAR, "98,2,0"),
    Order("pretrain-bloom-2023", f"{_OLD} {_SIZES.replace(' PAD_LEN', '')} {_TOKENS}", "pretrain", _LINEAR, "98,2,0"),
    Order("pretrain-chatglm-2023", f"{_OLD} {_CHATGLM}", "pretrain", _LINEAR, "98,2,0"),
    Order(
        "pretrain-glm130b-2023",
        f"{_OLD} MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE SEQ_LEN GEN_LEN LR MIN_LR PR TP PP AC DO FL SP {_TOKENS}",
        "pretrain", _LINEAR, "98,2,0",
    ),
    Order(
        "pretrain-enwiki-2023",
        f"ENV MEGATRON_PATH MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PR TP PP AC DO FL SP {_TOKENS}",
        "pretrain", _LINEAR, "98,2,0",
    ),
    # Pretraining, 2024
    Order("pretrain", f"{_NEW} {_SIZES} TE {_TOKENS}", "pretrain", _LINEAR),
    Order("pretrain-chatglm", f"{_NEW} {_CHATGLM}", "pretrain", _LINEAR),
    Order("pretrain-moe", f"{_NEW} {_SIZES} TE MOE {_TOKENS}", "pretrain", _COSINE),
    Order("pretrain-ep", f"{_HEAD} EP AC DO FL SP {_TOKENS}", "pretrain", _COSINE),
    Order("pretrain-ep-te", f"{_HEAD} EP AC DO FL SP TE {_TOKENS}", "pretrain", _COSINE),
    # Both, since 2024
    Order("mcore", f"{_HEAD} CP SP DO FL SFT {_MCORE}", "either", _COSINE),
    Order("mcore-ep", f"{_HEAD} CP EP SP DO FL SFT {_MCORE}", "either", _COSINE),
    Order("mcore-etp-ep", f"{_HEAD} CP ETP EP SP DO FL SFT {_MCORE}", "either", _COSINE),
    Order("mcore-etp-emp", f"{_HEAD} CP ETP EMP SP DO SFT {_MCORE}", "either", _COSINE),
    # Finetuning
    Order("finetune-2023", f"{_OLD} {_FT_SIZES} {_EPOCH}", "finetune", _EPOCHS),
    Order(
        "finetune-chatglm-2023",
        f"{_OLD} MODEL_SIZE BATCH_SIZE SOURCE_SEQ_LEN TARGET_SEQ_LEN LR MIN_LR PR TP PP AC DO FL SP {_EPOCH}",
        "finetune", _EPOCHS,
    ),
    Order("finetune-wgbs-2023", f"{_OLD} {_SIZES} {_ITERS}", "finetune", _LINEAR),
    Order("finetune-wgbs-te-2023", f"{_OLD} {_SIZES} TE {_ITERS}", "finetune", _LINEAR),
    Order("finetune", f"{_NEW} {_FT_SIZES} TE {_EPOCH}", "finetune", _EPOCHS),
    Order("finetune-ga", f"{_NEW} {_SIZES} TE {_GA}", "finetune", _COSINE),
    Order("finetune-ga-moe", f"{_NEW} {_SIZES} TE MOE {_GA}", "finetune", _COSINE),
    Order("finetune-ga-moe-ep", f"{_NEW} {_SIZES} TE MOE EP {_GA}", "finetune", _COSINE),
    Order("finetune-ep", f"{_HEAD} EP AC DO FL SP {_GA}", "finetune", _COSINE),
    Order("finetune-ep-te", f"{_HEAD} EP AC DO FL SP TE {_GA}", "finetune", _COSINE),
    # Generation
    Order("generate-2023", f"{_OLD} {_PROMPTED}", "generate"),
    Order(
        "generate-bloom-2023",
        f"{_OLD} TOKENIZER CHECKPOINT_PATH MODEL_SIZE TP BS SEQ_LEN PR {_SAMPLING}", "generate",
    ),
    Order("generate-starcoder-2023", f"{_OLD} {_PROMPTED.replace(' EXTRA_VOCAB_SIZE', '')}", "generate"),
    Order("generate", f"{_NEW} {_PROMPTED}", "generate"),
    # Evaluation
    Order("evaluate-2023", f"{_OLD} {_READ_SIZES} {_SCORED}", "evaluate"),
    Order("evaluate-te-2023", f"{_OLD} {_SCORED_TE}", "evaluate"),
    Order("evaluate-short-2023", f"{_OLD} MODEL_SIZE BATCH_SIZE SEQ_LEN PR TP PP {_SCORED}", "evaluate"),
    Order("evaluate-glm130b-2023", f"{_OLD} MODEL_SIZE BATCH_SIZE SEQ_LEN GEN_LEN PR TP PP {_SCORED}", "evaluate"),
    Order("evaluate", f"{_NEW} {_SCORED_TE}", "evaluate"),
)
"""Every order, by the word that names it."""
# fmt: on


def orders_of(words: str) -> Mapping[str, Order]:
    """Every order, and one under the given words (`pretrain,pretrain-2023`) that stands for those of a script."""
    first, *others = words.split(",")
    if not others or not {first, *others} <= set(ORDERS):
        return ORDERS
    return {**ORDERS, words: replace(ORDERS[first], older=" ".join(others))}
