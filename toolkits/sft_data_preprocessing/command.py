"""From a call in the order to the `megatron-patch sft-data` command that does it, and what became of each argument.

Nothing is ignored without a word: every argument and environment variable of ours has an effect, or is refused. Does
not run anything, and knows no order: it sees roles (orders.py) and their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megatron_patch.data.sft.arguments import OWN_TEMPLATE
from toolkits.positional import Command, Draft, choice_problems
from toolkits.pretrain_data_preprocessing.tokenizer_names import (
    MEGATRON_NAMES,
    contradiction,
    has_chat_template,
    tokenizer_directory,
)
from toolkits.sft_data_preprocessing.orders import TRUE, Order

ENVIRONMENT = {
    "CHAT_TEMPLATE": "the chat template: tokenizer (its own), a file, or a family's name; see sft-data --help",
    "SFT_FORMAT": "what the records are (alpaca, sharegpt, messages, prompt), where their keys do not tell",
    "WORKERS": "number of processes; without it, one a core",
    "SFT_DATA_ARGS": "more flags for the command, such as '--truncation drop --on-error quarantine --overwrite'",
    "DRY_RUN": "1: stop after printing, as --dry-run at the end of the call does",
}
"""Environment variables that change a call, and how."""

TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "Qwen2Tokenizer": "qwen", "Qwen3Tokenizer": "chatml", "DeepSeekV2Tokenizer": "deepseek",
        "DeepSeekV3Tokenizer": "deepseek3", "LLamaTokenizer": "llama2", "LLama2Tokenizer": "llama2",
        "LLama3Tokenizer": "llama3",
    }
)  # fmt: skip
"""Tokenizer's name -> the template of its family, for a base model that comes without one."""

_CHOICES = {"SFT_FORMAT": ("auto", "alpaca", "sharegpt", "messages", "prompt"), "DRY_RUN": ("0", "1")}


def command(order: Order, values: Mapping[str, str], environment: Mapping[str, str]) -> Command:
    """The command for a call.

    Raises:
        ValueError: arguments or environment variables that contradict each other or the tokenizer.
    """
    draft = Draft(order, values, {name: environment[name] for name in ENVIRONMENT if environment.get(name)})
    draft.problems += choice_problems(environment, _CHOICES)
    directory = tokenizer_directory(values["load"]) or values["load"]
    draft.use("input", "--input", values["input"])
    draft.use("seq_length", "--seq-length", values["seq_length"])
    draft.use("output", "--output-prefix", values["output"])
    draft.effects["output"] += ": PREFIX_ids, PREFIX_mask and PREFIX.json"
    draft.use("load", "--tokenizer-model", directory)
    _tokenizer(draft, directory)
    _packing(draft)
    _template(draft, directory)
    _rest(draft)
    if draft.problems:
        raise ValueError("\n".join(draft.problems))
    extra = draft.more_flags("SFT_DATA_ARGS")
    return Command(("sft-data", *draft.flags, *extra), draft.effects, tuple(draft.warnings))


def _tokenizer(draft: Draft[Order], directory: str) -> None:
    name = draft.values["tokenizer"]
    is_certain, text = contradiction(name, directory, tuple(MEGATRON_NAMES))
    if text:
        (draft.problems if is_certain else draft.warnings).append(f"{draft.order.name('tokenizer')}={name!r}, {text}")
    draft.effects["tokenizer"] = f"compared; {draft.order.name('load')} decides"


def _packing(draft: Draft[Order]) -> None:
    if draft.values.get("packing", "false") in TRUE:
        draft.use("packing", "--packing")
    else:
        draft.effects["packing"] = "each sample is a pack of its own; fine-tuning can still pack them"


def _template(draft: Draft[Order], directory: str) -> None:
    name, asked = draft.values["tokenizer"], draft.environment.get("CHAT_TEMPLATE")
    if asked:
        draft.use("CHAT_TEMPLATE", "--chat-template", asked)
        return
    if has_chat_template(directory):
        draft.flags += ["--chat-template", OWN_TEMPLATE]
        draft.effects["tokenizer"] += "; its own chat template"
    elif name in TEMPLATES:
        draft.flags += ["--chat-template", TEMPLATES[name]]
        draft.effects["tokenizer"] += f"; it has no chat template, so that of its family, {TEMPLATES[name]}"
    else:
        why = f"the tokenizer has no chat template, and {name} is of no family that has one"
        draft.refuse("load", f"{why}; set the environment variable CHAT_TEMPLATE")


def _rest(draft: Draft[Order]) -> None:
    if "SFT_FORMAT" in draft.environment:
        draft.use("SFT_FORMAT", "--sft-format", draft.environment["SFT_FORMAT"])
    draft.use_workers()
    draft.effects["DRY_RUN"] = "stop after printing" if draft.environment.get("DRY_RUN") == "1" else "no"
