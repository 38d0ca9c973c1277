"""The order of arguments that fine-tuning data scripts of cluster users know by heart, as data.

An argument has the name its users know and a role: what it is for here (see toolkits/positional.py). It does not know
how samples are made: see command.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from toolkits import positional
from toolkits.positional import Role, one_of, whole
from toolkits.pretrain_data_preprocessing.tokenizer_names import LOAD, MEGATRON_NAMES

TRUE, FALSE = ("true", "True", "1"), ("false", "False", "0")

ROLES: Mapping[str, Role] = MappingProxyType(
    {
        "input": Role(
            "conversations to read", "must be a file or directory that exists", lambda text: Path(text).exists()
        ),
        "tokenizer": Role("compared with the tokenizer itself", *one_of(*MEGATRON_NAMES)),
        "seq_length": Role("most tokens of a sample, or of a pack", *whole(2)),
        "output": Role(
            "prefix of the files to write",
            "must be a prefix, the first part of a file name: no directory",
            lambda text: bool(Path(text).name) and not text.endswith("/") and not Path(text).is_dir(),
        ),
        "load": LOAD,
        "packing": Role("whether samples are joined to packs", *one_of(*TRUE, *FALSE)),
    }
)

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "input_data_path": "input",
        "tokenizer": "tokenizer",
        "seq_len": "seq_length",
        "output_data_path": "output",
        "load_dir": "load",
        "default_packing": "packing",
    }
)
"""Name of an argument -> its role."""


@dataclass(frozen=True)
class Order(positional.Order):
    """One order of arguments."""

    roles: ClassVar[Mapping[str, Role]] = ROLES
    roles_of_names: ClassVar[Mapping[str, str]] = NAMES


ORDERS: Mapping[str, Order] = positional.by_word(
    Order("sft", "input_data_path tokenizer seq_len output_data_path load_dir default_packing", optional=1)
)
"""Every order, by the word that names it."""
