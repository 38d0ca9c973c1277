"""Vocabulary files of tokenizers that were published as Python code, as data: one row a convention.

A row stands for the published class, so that its code need not run: which file holds the vocabulary, which special
tokens follow it, what goes around a text. Written from the published tokenizer classes of Baichuan, InternLM, ChatGLM,
GLM-4, GLM and Qwen and the files that come with them. It knows neither transformers nor how a vocabulary is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Convention:
    """How one kind of published directory is to be read."""

    names: tuple[str, ...]
    """Published classes that read such a directory. Where no class is named: the `model_type` of config.json, or ""."""
    file: str
    """The vocabulary: a file name or a pattern."""
    kind: Literal["sentencepiece", "tiktoken", "merges"]
    """What the file is. merges: vocab.json, with merges.txt beside it."""
    roles: Mapping[str, str]
    """Special tokens by role, where the directory does not say otherwise."""
    after: tuple[str, ...] = ()
    """Special tokens whose ids follow the vocabulary in this order."""
    prefix: tuple[str, ...] = ()
    """What goes before a text: special tokens or roles. The directory may switch bos_token off (`add_bos_token`)."""
    suffix: tuple[str, ...] = ()
    """What goes after a text. The directory may add eos_token (`add_eos_token`)."""
    split: str = ""
    """tiktoken: the expression that cuts a text into words."""
    nfc: bool = False
    """tiktoken: whether a text is brought to Unicode's NFC first."""
    image_tokens: int | None = None
    """ChatGLM-6B: number of ids before the vocabulary unless the directory says (`num_image_tokens`). Where it is set,
    line ends, tabs and runs of blanks are tokens of their own as well."""
    refused: tuple[str, ...] = ()
    """Options of the published class that change ids and are not offered here."""


@dataclass(frozen=True)
class Recognised:
    """A directory that follows a convention."""

    convention: Convention
    file: Path
    """The vocabulary."""
    settings: Mapping[str, Any]
    """What tokenizer_config.json and special_tokens_map.json say."""
    added: Mapping[str, int]
    """Ids of special tokens that the directory writes down."""


def _words(digits: str) -> str:
    """The expression of GPT-4's tokenizer with `digits` in place of its rule for numbers."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GLM_ROLES = {"cls_token": "[CLS]", "eos_token": "<|endoftext|>", "mask_token": "[MASK]"}
_CHAT = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

CONVENTIONS = (
    Convention(
        names=("BaichuanTokenizer", "BaiChuanTokenizer", "InternLMTokenizer", "baichuan", "internlm", ""),
        file="tokenizer.model", kind="sentencepiece", roles=_LLAMA_ROLES,
        prefix=("bos_token",), refused=("sp_model_kwargs",),
    ),
    Convention(  # ChatGLM2 has no use for ChatGLM3's four roles, but its embedding has rows for them too.
        names=("ChatGLMTokenizer",), file="tokenizer.model", kind="sentencepiece", roles=_LLAMA_ROLES,
        after=("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *_CHAT), prefix=("[gMASK]", "sop"),
    ),
    Convention(
        names=("ChatGLMTokenizer", "chatglm", ""), file="ice_text.model", kind="sentencepiece",
        roles={"bos_token": "<sop>", "eos_token": "<eop>", "unk_token": "<unk>", "mask_token": "[MASK]"},
        suffix=("[gMASK]", "bos_token"), image_tokens=20000, refused=("do_lower_case", "remove_space"),
    ),
    Convention(
        names=("GLMChineseTokenizer", "glm", ""), file="cog-pretrain.model", kind="sentencepiece", roles=_GLM_ROLES,
        prefix=("cls_token",), suffix=("eos_token",),
    ),
    Convention(
        names=("GLMGPT2Tokenizer", "glm"), file="vocab.json", kind="merges", roles=_GLM_ROLES,
        prefix=("cls_token",), suffix=("eos_token",), refused=("add_prefix_space",),
    ),
    Convention(
        names=("QWenTokenizer", "qwen", ""), file="*.tiktoken", kind="tiktoken", roles={"eos_token": "<|endoftext|>"},
        after=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
        split=_words(r"\p{N}"), nfc=True, refused=("extra_vocab_file",),
    ),
    Convention(
        names=("ChatGLM4Tokenizer",), file="tokenizer.model", kind="tiktoken", roles={"eos_token": "<|endoftext|>"},
        after=(
            "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *_CHAT,
            "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
        ),
        prefix=("[gMASK]", "<sop>"), split=_words(r"\p{N}{1,3}"),
    ),
)  # fmt: skip


def recognise(directory: Path) -> Recognised | None:
    """The convention that a directory follows; None if it is not one of ours (transformers may know it).

    Raises ValueError if the directory sets an option of the published class that is not offered here.
    """
    config = _json(directory / "tokenizer_config.json")
    names = [name for _, name in remote_classes(directory)] + [str(config.get("tokenizer_class") or "")]
    if not any(names):
        if (directory / "tokenizer.json").exists():
            return None
        names = [str(_json(directory / "config.json").get("model_type") or "")]
    for convention in CONVENTIONS:
        files = sorted(directory.glob(convention.file))
        if files and set(names) & set(convention.names):
            _check(config, convention)
            added = {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
            added = _json(directory / "added_tokens.json") | added
            return Recognised(convention, files[0], _json(directory / "special_tokens_map.json") | config, added)
    return None


def remote_classes(directory: Path) -> tuple[tuple[str, str], ...]:
    """Module and name of the Python classes that a directory wants its tokenizer to be read with."""
    auto_map = _json(directory / "tokenizer_config.json").get("auto_map") or ()
    classes = auto_map.get("AutoTokenizer") or () if isinstance(auto_map, dict) else auto_map
    classes = [classes] if isinstance(classes, str) else classes
    parts = (one.rpartition("--")[2].rpartition(".") for one in classes if one)
    return tuple((module, name) for module, _, name in parts)


def _check(config: Mapping[str, Any], convention: Convention) -> None:
    for option in convention.refused:
        if config.get(option):
            raise ValueError(
                f"tokenizer_config.json sets {option}={config[option]!r}, which is known only to the tokenizer's own "
                "code; give --trust-remote-code to run that"
            )


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds no JSON object")
    return content
