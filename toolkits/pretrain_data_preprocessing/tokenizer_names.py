"""The names that data scripts call tokenizers by, and what can be known of the tokenizer in a directory.

A name decides how the output is called. Which tokenizer is used is decided by the directory alone; where its own files
say that it is another one than the name promises, `contradiction` tells. It does not load tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from megatron_patch.checkpoint.directory import read_json
from megatron_patch.tokenizer.hf import tokenizer_files
from toolkits.positional import Role

_GLM, _LLAMA, _QWEN, _MISTRAL = ("glm", "chatglm"), ("llama",), ("qwen",), ("mistral", "mixtral")
_DEEPSEEK, _FALCON, _STARCODER = ("deepseek",), ("falcon", "refinedweb"), ("gpt_bigcode", "starcoder")

KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "jiebabpe": (), "bloombpe": ("bloom",), "glmchinesebpe": _GLM, "glm130bbpe": _GLM, "llamabpe": _LLAMA,
        "falconbpe": _FALCON, "galacticabpe": ("opt", "galactica"), "starcoderbpe": _STARCODER, "qwenbpe": _QWEN,
        "mistralbpe": _MISTRAL,
        "Qwen2Tokenizer": _QWEN, "Qwen3Tokenizer": _QWEN, "DeepSeekV2Tokenizer": _DEEPSEEK,
        "DeepSeekV3Tokenizer": _DEEPSEEK, "LLamaTokenizer": _LLAMA, "LLama2Tokenizer": _LLAMA,
        "LLama3Tokenizer": _LLAMA, "GPT2BPETokenizer": (),
        "JiebaBPETokenizer": (), "BloomTokenizerFromHF": ("bloom",), "GLM10BZHTokenizerFromHF": _GLM,
        "IcetkGLM130BTokenizer": _GLM, "FalconTokenizer": _FALCON, "OPTTokenizer": ("opt", "galactica"),
        "StarcoderTokenizerFromHF": _STARCODER, "QwenTokenizer": _QWEN, "MistralTokenizer": _MISTRAL,
        "DeepSeekTokenizer": _DEEPSEEK, "BaichuanTokenizer": ("baichuan",), "YiTokenizer": ("yi", "llama"),
    }
)  # fmt: skip
"""Name -> how the kind of its models begins; empty where any tokenizer may be meant."""

BPE_NAMES = tuple(name for name in KINDS if name.endswith("bpe"))
MEGATRON_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "Qwen2Tokenizer": "qwen2", "Qwen3Tokenizer": "qwen3", "DeepSeekV2Tokenizer": "deepseekv2",
        "DeepSeekV3Tokenizer": "deepseekv3", "LLamaTokenizer": "llama", "LLama2Tokenizer": "llama2",
        "LLama3Tokenizer": "llama3", "GPT2BPETokenizer": "",
    }
)  # fmt: skip
"""Name -> its part of the output's name; empty: the data set's own name takes that place."""

_SAY_NOTHING = ("llama", "gpt2", "pretrained", "codellama", "auto")
"""Tokenizer classes that models of other kinds use as well."""


def tokenizer_directory(path: str) -> str | None:
    """Where the tokenizer of a path is: the directory itself, what a checkpoint carries, or a file's own directory."""
    given = Path(path)
    for folder in (given, given / "huggingface", *([given.parent] if given.is_file() else [])):
        try:
            tokenizer_files(folder)
        except ValueError:
            continue
        return str(folder)
    return None


LOAD = Role(
    "the tokenizer's directory, or a checkpoint that carries one",
    "must be a directory with a tokenizer in it: tokenizer.json, tokenizer.model, vocab.json or the like",
    lambda text: Path(text).is_dir() and tokenizer_directory(text) is not None,
)


def has_chat_template(directory: str) -> bool:
    """Whether a directory's tokenizer has a chat template of its own."""
    template, config = (Path(directory) / name for name in ("chat_template.jinja", "tokenizer_config.json"))
    return template.is_file() or bool(config.is_file() and read_json(config).get("chat_template"))


def kind_of(directory: str) -> str | None:
    """What kind of model a directory's tokenizer belongs to by its own files; None if they do not tell."""
    config, tokenizer = (Path(directory) / name for name in ("config.json", "tokenizer_config.json"))
    kind = read_json(config).get("model_type") if config.is_file() else None
    if kind:
        return str(kind)
    name = str(read_json(tokenizer).get("tokenizer_class") or "") if tokenizer.is_file() else ""
    stem = re.sub(r"Tokenizer(Fast)?$", "", name).lower()
    return stem if stem and not stem.startswith(_SAY_NOTHING) else None


def contradiction(name: str, directory: str, names: Iterable[str]) -> tuple[bool, str]:
    """Whether a name is certainly another tokenizer's, and what to tell about it; an empty text if nothing.

    names: those to choose from. It is certain where one of them is the name of the directory's kind.
    """
    kind, kinds = kind_of(directory), KINDS.get(name, ())
    if kind is None or not kinds or _is_of(kind, kinds):
        return False, ""
    fitting = [other for other in names if KINDS.get(other) and _is_of(kind, KINDS[other])]
    what = f"but {directory} holds the tokenizer of a {kind} model"
    return (True, f"{what}; give {' or '.join(fitting)}") if fitting else (False, f"{what}; that tokenizer is used")


def _is_of(kind: str, kinds: tuple[str, ...]) -> bool:
    return kind.lower().startswith(kinds)
