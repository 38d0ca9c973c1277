"""What a user may say about fine-tuning data: the flags of `sft-data`, and those that `finetune` shares with it.

Each `..._problems` tells all that can be known before heavy imports. This module imports neither torch nor
transformers. It does not know how any of it is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_patch.data.arguments import RecordArgs, raise_problems

SftFormat = Literal["auto", "alpaca", "sharegpt", "messages", "prompt"]
OWN_TEMPLATE = "tokenizer"
"""Stands for the tokenizer's own chat template."""
TEMPLATE_FOLDER = Path(__file__).parent / "chat_templates"


def named_templates() -> tuple[str, ...]:
    """Names of the chat templates that come with this package."""
    return tuple(sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.jinja")))


def template_choices() -> str:
    """What --chat-template may be, for messages."""
    return f"{OWN_TEMPLATE} (its own), a file, or one of {', '.join(named_templates())}"


def template_problems(name: str) -> list[str]:
    """What is wrong with a --chat-template."""
    if name in (OWN_TEMPLATE, *named_templates()) or Path(name).is_file():
        return []
    return [f"--chat-template {name!r}: no such file or name; give {template_choices()}"]


@dataclass(frozen=True)
class SftFormatArgs:
    """How records of conversations are read and made samples."""

    sft_format: SftFormat = "auto"
    """What the records are. alpaca: instruction (or query), input, output (or content, response), and system, history.
    sharegpt: conversations of from and value. messages: role and content, and loss (or weight), tool_calls, tools.
    prompt: prompt and completion. auto: told by the keys of the first records of each file."""
    columns: tuple[str, ...] = ()
    """Columns that have other names: OLD=NEW, as in question=instruction answer=output."""
    chat_template: str = OWN_TEMPLATE
    """The tokenizer's own chat template (tokenizer), a file with a Jinja template, or the name of a family whose base
    models come without one: alpaca-like instruction, baichuan, baichuan2, chatglm3, chatml, deepseek, deepseek3, glm4,
    llama2, llama3, mistral, plain (no markers), qwen."""
    truncation: Literal["right", "left", "drop"] = "right"
    """What becomes of a sample of more than --seq-length tokens: its end is cut off (right), its beginning (left), or
    it is left out (drop). Each is counted. A sample with no token left to learn is left out in any case."""

    @property
    def column_names(self) -> dict[str, str]:
        """Old name -> new name."""
        pairs = (one.partition("=")[::2] for one in self.columns)
        return {old: new for old, new in pairs}

    def format_problems(self) -> list[str]:
        """Everything that is wrong with these arguments."""
        problems = [
            f"--columns {one!r}: give OLD=NEW, as in question=instruction"
            for one in self.columns
            if not all(one.partition("="))
        ]
        return problems + template_problems(self.chat_template)


@dataclass(frozen=True, kw_only=True)
class SftDataArgs(SftFormatArgs, RecordArgs):
    """Turn conversations into tokenized samples for `finetune`, with a mask of what is to be learned.

    Loss is on assistants' turns alone, the token that ends a turn included. Exit codes: 0 done; 1 failed (what was
    finished is kept, run it again to go on); 2 wrong arguments; 3 more bad records than --max-errors.
    """

    input: tuple[str, ...]
    """Files, directories or quoted globs of conversations: .jsonl (an object a line), .json (lines, or one array), each
    also as .gz or .zst; .parquet."""
    output_prefix: str
    """Where to write: PREFIX_ids.bin and .idx, PREFIX_mask.bin and .idx, PREFIX.json."""
    tokenizer_model: str
    """Hugging Face directory that holds the tokenizer."""
    seq_length: int
    """Most tokens of a sample; with --packing, of a pack."""
    packing: bool = False
    """Join samples to packs of --seq-length tokens, best fit, the longest first. In training they do not see one
    another. Without it each sample is a pack of its own; `finetune` can pack either anew."""
    examples: int = 1
    """Samples to print, what is to be learned between [[ and ]]."""

    @property
    def json_keys(self) -> tuple[str, ...]:
        """A ledger counts by keys; conversations have one."""
        return ("conversation",)

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = [*self.format_problems(), *self.record_problems(), *self._path_problems()]
        for name, least in (("seq_length", 2), ("examples", 0)):
            if getattr(self, name) < least:
                problems.append(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        raise_problems(problems)

    def _path_problems(self) -> list[str]:
        from megatron_patch.data.readers import expand_inputs

        problems = []
        try:
            files = expand_inputs(self.input)
        except ValueError as error:
            problems.append(f"--input: {error}")
        else:
            problems += [
                f"--input: {path}: conversations are no plain text" for path in files if ".txt" in path.suffixes
            ]
        if not Path(self.tokenizer_model).is_dir():
            problems.append(f"--tokenizer-model {self.tokenizer_model!r}: no such directory")
        taken = [Path(f"{self.output_prefix}{suffix}") for suffix in (".json", "_ids.idx")]
        taken = [path for path in taken if path.exists()]
        if taken and not self.overwrite and not self.is_begun:
            problems.append(f"--output-prefix: {taken[0]} exists; --overwrite replaces it")
        return problems
