"""What a user may say about fine-tuning data: the flags of `sft-data`, and those that `finetune` shares with it.

Each `..._problems` tells all that can be known before heavy imports. This module imports neither torch nor
transformers. It does not know how any of it is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_patch.data.arguments import SETTINGS, parse_limit, raise_problems

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
        known = self.chat_template in (OWN_TEMPLATE, *named_templates())
        if not known and not Path(self.chat_template).is_file():
            problems.append(f"--chat-template {self.chat_template!r}: no such file or name; give {template_choices()}")
        return problems


@dataclass(frozen=True)
class _Required:
    input: tuple[str, ...]
    """Files, directories or quoted globs of conversations: .jsonl (an object a line), .json (lines, or one array), each
    also as .gz or .zst; .parquet."""
    output_prefix: str
    """Where to write: PREFIX_ids.bin and .idx, PREFIX_mask.bin and .idx, PREFIX.json."""
    tokenizer_model: str
    """Hugging Face directory that holds the tokenizer."""
    seq_length: int
    """Most tokens of a sample; with --packing, of a pack."""


@dataclass(frozen=True)
class SftDataArgs(SftFormatArgs, _Required):
    """Turn conversations into tokenized samples for `finetune`, with a mask of what is to be learned.

    Loss is on assistants' turns alone, the token that ends a turn included. Exit codes: 0 done; 1 failed (what was
    finished is kept, run it again to go on); 2 wrong arguments; 3 more bad records than --max-errors.
    """

    packing: bool = False
    """Join samples to packs of --seq-length tokens, best fit, the longest first. In training they do not see one
    another. Without it each sample is a pack of its own; `finetune` can pack either anew."""
    workers: int = 1
    """Number of processes that tokenize. The output does not depend on it."""
    examples: int = 1
    """Samples to print, what is to be learned between [[ and ]]."""
    on_error: Literal["stop", "skip", "quarantine"] = "stop"
    """What to do at a record that is no conversation: stop; leave it out and count it; or also keep it, with file, line
    and reason, in PREFIX.quarantine.jsonl."""
    max_errors: str = "1%"
    """With --on-error skip or quarantine: write nothing and exit with code 3 if more records than this are bad, a
    number or a percentage of all. What was tokenized is kept: run again with a higher limit."""
    resume: Literal["auto", "never"] = "auto"
    """Whether to go on from what a killed or failed run with the same settings left in PREFIX.partial."""
    overwrite: bool = False
    """Replace existing samples of the same name."""
    log_interval: int = 10_000
    """Samples between two progress lines when the output is not a terminal."""
    trust_remote_code: bool = False
    """Let transformers run Python code that lies in the tokenizer's directory."""
    json: str | None = None
    """Also write the report to this file."""

    @property
    def json_keys(self) -> tuple[str, ...]:
        """A ledger counts by keys; conversations have one."""
        return ("conversation",)

    @property
    def partial_directory(self) -> Path:
        """Where the finished part of a run lies until it is whole."""
        return Path(f"{self.output_prefix}.partial")

    @property
    def quarantine_path(self) -> Path:
        """Where bad records go."""
        return Path(f"{self.output_prefix}.quarantine.jsonl")

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        raise_problems([*self.format_problems(), *self._number_problems(), *self._path_problems()])

    def _number_problems(self) -> list[str]:
        least: Mapping[str, int] = {"seq_length": 2, "workers": 1, "log_interval": 1, "examples": 0}
        problems = [
            f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {bound}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        try:
            parse_limit(self.max_errors)
        except ValueError as error:
            problems.append(f"--max-errors {error}")
        if self.on_error == "stop" and self.max_errors != SftDataArgs.max_errors:
            problems.append(f"--max-errors {self.max_errors} has no effect without --on-error skip or quarantine")
        return problems

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
        if self.json and not Path(self.json).parent.is_dir():
            problems.append(f"--json {self.json}: there is no directory {Path(self.json).parent}")
        if Path(self.output_prefix).name in ("", ".", "..") or self.output_prefix.endswith("/"):
            problems.append(f"--output-prefix {self.output_prefix!r}: must end in the first part of a file name")
        elif not self.overwrite and not self._is_begun():
            problems += [
                f"--output-prefix: {path} exists; --overwrite replaces it"
                for path in (Path(f"{self.output_prefix}.json"), Path(f"{self.output_prefix}_ids.idx"))
                if path.exists()
            ][:1]
        return problems

    def _is_begun(self) -> bool:
        """Whether a run that was ended early had leave to write here."""
        return self.resume == "auto" and (self.partial_directory / SETTINGS).is_file()
