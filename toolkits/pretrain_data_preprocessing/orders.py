"""The orders of arguments that data scripts of cluster users know by heart, as data.

An argument has the name its users know and a role: what it is for here (see toolkits/positional.py). It does not know
how data is made: see command.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

from toolkits import positional
from toolkits.positional import MEGATRON_LM, PATCH, Role, one_of
from toolkits.pretrain_data_preprocessing.tokenizer_names import BPE_NAMES, LOAD, MEGATRON_NAMES


def keys(text: str) -> tuple[str, ...]:
    """The keys in one argument, between commas or blanks."""
    return tuple(text.replace(",", " ").split())


def are_keys(text: str) -> bool:
    """Whether one argument holds keys that can name data sets."""
    found = keys(text)
    return bool(found) and len(set(found)) == len(found) and "/" not in text


ROLES: Mapping[str, Role] = MappingProxyType(
    {
        "megatron_lm": MEGATRON_LM,
        "patch": PATCH,
        "input": Role("text to read", "must be a file or directory that exists", lambda text: Path(text).exists()),
        "data_dir": Role(
            "the corpus as it was published: arrays of objects with title and content",
            "must be a directory that exists",
            lambda text: Path(text).is_dir(),
        ),
        "bpe": Role("how the output is called; compared with the tokenizer itself", *one_of(*BPE_NAMES)),
        "tokenizer": Role("how the output is called; compared with the tokenizer itself", *one_of(*MEGATRON_NAMES)),
        "keys": Role(
            "keys of the JSON objects, each a data set of its own",
            "must be one key or several, each once, with commas or blanks between them and no '/'",
            are_keys,
        ),
        "output": Role("directory to write to", "must not be a file", lambda text: not Path(text).is_file()),
        "load": LOAD,
        "dataset_name": Role(
            "how the output is called where the tokenizer's name does not say it",
            "must be a name without '/'",
            lambda text: "/" not in text,
        ),
    }
)

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "MEGATRON_PATH": "megatron_lm",
        "MEGATRON_PATCH_PATH": "patch",
        "input_data_dir": "input",
        "data_dir": "data_dir",
        "tokenizer": "bpe",
        "json_keys": "keys",
        "output_data_dir": "output",
        "load_dir": "load",
        "dataset_name": "dataset_name",
    }
)
"""Name of an argument -> its role, where an order does not say otherwise (`NAME=role`)."""


@dataclass(frozen=True)
class Order(positional.Order):
    """One order of arguments and the defaults that go with it."""

    roles: ClassVar[Mapping[str, Role]] = ROLES
    roles_of_names: ClassVar[Mapping[str, str]] = NAMES

    key: str = "text"
    """Key of the text, where no argument says it."""

    layout: Literal["records", "wudao"] = "records"
    clean: Literal["basic", "none"] = "none"
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Tokenizers whose output is not called wudao_<tokenizer>."""


_PRETRAINING = "input_data_dir tokenizer output_data_dir load_dir"
_RENAMED = MappingProxyType({"llamabpe": "wudao_llama3bpe", "mistralbpe": "SlimPajama_mistralbpe"})

ORDERS: Mapping[str, Order] = positional.by_word(
    Order("pretraining-2023", f"MEGATRON_PATH MEGATRON_PATCH_PATH {_PRETRAINING}"),
    Order("pretraining", f"MEGATRON_PATCH_PATH {_PRETRAINING}", "content", renamed=_RENAMED, older="pretraining-2023"),
    Order(
        "pretraining-megatron",
        "input_data_dir tokenizer=tokenizer json_keys output_data_dir load_dir dataset_name",
        optional=1,
    ),
    Order(
        "wudao",
        "data_dir output_data_dir load_dir",
        layout="wudao",
        clean="basic",
        optional=2,
        hint="the directory is an argument now; it used to be written inside the script",
    ),
)
"""Every order, by the word that names it."""
