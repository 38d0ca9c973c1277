"""From a call in one of the orders to the `megatron-patch preprocess` command that does it, and what became of each
argument.

Nothing is ignored without a word: every argument and environment variable of ours has an effect, is named as not
needed, or is refused. Does not run anything, and knows no order: it sees roles (orders.py) and their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from toolkits.positional import Command, Draft, choice_problems
from toolkits.pretrain_data_preprocessing.orders import ROLES, Order, are_keys, keys
from toolkits.pretrain_data_preprocessing.tokenizer_names import (
    BPE_NAMES,
    MEGATRON_NAMES,
    contradiction,
    kind_of,
    tokenizer_directory,
)

ENVIRONMENT = {
    "LAYOUT": "records (objects with the text under a key) or wudao (title and content), whatever the order's own is",
    "JSON_KEYS": "keys of the text, each a data set of its own, where the order has no place for them",
    "CLEAN": "basic (nfc, control, zero-width), pai (the predecessor's whitelist, which also removes newlines) or none",
    "WORKERS": "number of processes; without it, one a core",
    "PREPROCESS_ARGS": "more flags for the command, such as '--dedup exact --on-error quarantine --overwrite'",
    "DRY_RUN": "1: stop after printing, as --dry-run at the end of the call does",
}
"""Environment variables that change a call, and how."""

CLEANING = {"basic": ("nfc", "control", "zero-width"), "pai": ("pai",), "none": ()}
_CHOICES = {"LAYOUT": ("records", "wudao"), "CLEAN": tuple(CLEANING), "DRY_RUN": ("0", "1")}
NOTHING_TO_PREPARE = """\
nothing to prepare, and nothing was written or deleted: the command above reads the corpus where it lies. No merging:
a directory is one input. No splitting: workers share the work by themselves. No zstd: .json is read as it is (and .zst
too, where you have it). Cleaning happens on the way. Give output_data_dir and load_dir as well, and it runs."""


class _Draft(Draft[Order]):
    @property
    def layout(self) -> str:
        return self.environment.get("LAYOUT") or self.order.layout

    @property
    def json_keys(self) -> tuple[str, ...]:
        """The keys that name the data sets."""
        if self.layout == "wudao":
            return ("text",)
        return keys(self.values.get("keys") or self.environment.get("JSON_KEYS") or self.order.key)


def command(order: Order, values: Mapping[str, str], environment: Mapping[str, str]) -> Command:
    """The command for a call.

    Raises:
        ValueError: arguments or environment variables that contradict each other or the tokenizer.
    """
    draft = _Draft(order, values, {name: environment[name] for name in ENVIRONMENT if environment.get(name)})
    draft.problems += choice_problems(environment, _CHOICES)
    for step in (_tokenizer, _input, _output, _keys, _cleaning, _Draft.use_workers, _not_needed):
        if not draft.problems:
            step(draft)
    if draft.problems:
        raise ValueError("\n".join(draft.problems))
    extra = draft.more_flags("PREPROCESS_ARGS")
    incomplete = "" if "load" in values else NOTHING_TO_PREPARE
    argv = ("preprocess", *draft.flags, "--append-eod", *extra)
    return Command(argv, draft.effects, tuple(draft.warnings), incomplete)


def _tokenizer(draft: _Draft) -> None:
    load = draft.values.get("load")
    if load is None and "output" in draft.values:
        draft.problems.append(
            f"{draft.order.name('load')} is missing: tokens are written to {draft.order.name('output')}="
            f"{draft.values['output']!r}, so the tokenizer's directory is needed; without both, the command is shown"
        )
        return
    directory = tokenizer_directory(load) if load else None
    for role, names in (("bpe", BPE_NAMES), ("tokenizer", tuple(MEGATRON_NAMES))):
        if directory and role in draft.values:
            _compare(draft, role, names, directory)


def _compare(draft: _Draft, role: str, names: tuple[str, ...], directory: str) -> None:
    name = draft.values[role]
    is_certain, text = contradiction(name, directory, names)
    if text:
        (draft.problems if is_certain else draft.warnings).append(f"{draft.order.name(role)}={name!r}, {text}")
    kind = kind_of(directory)
    who = (
        "names the output" if MEGATRON_NAMES.get(name, name) else f"{draft.order.name('dataset_name')} names the output"
    )
    draft.effects[role] = f"{who}; {draft.order.name('load')} decides{f', a {kind} model' if kind else ''}"


def _input(draft: _Draft) -> None:
    role = "input" if "input" in draft.values else "data_dir"
    draft.use(role, "--input", draft.values[role])
    if draft.layout != "records":
        draft.flags += ["--layout", draft.layout]
    if draft.order.layout != "records":
        draft.effects[role] += f" --layout {draft.layout}"
    draft.effects["LAYOUT"] = f"--layout {draft.layout}"


def _output(draft: _Draft) -> None:
    name = _output_name(draft)
    prefix = str(Path(draft.values.get("output", "OUTPUT_DATA_DIR")) / name)
    draft.use("output", "--output-prefix", prefix)
    draft.effects["output"] += f": {', '.join(f'{name}_{key}_document' for key in draft.json_keys)}"
    load = draft.values.get("load")
    draft.use("load", "--tokenizer-model", tokenizer_directory(load) or load if load else "LOAD_DIR")


def _output_name(draft: _Draft) -> str:
    if "bpe" in draft.values:
        return draft.order.renamed.get(draft.values["bpe"], f"wudao_{draft.values['bpe']}")
    if "tokenizer" not in draft.values:
        return "wudao"
    part, name = MEGATRON_NAMES[draft.values["tokenizer"]], draft.values.get("dataset_name")
    if part:
        draft.effects["dataset_name"] = f"not needed: {draft.values['tokenizer']} makes mmap_{part}_datasets"
    elif name:
        draft.effects["dataset_name"] = f"names the output: mmap_{name}_datasets"
    else:
        draft.problems.append(
            f"{draft.order.name('dataset_name')} is missing: with {draft.values['tokenizer']} it names the output,"
            " mmap_<dataset_name>_datasets"
        )
    return f"mmap_{part or name}_datasets"


def _keys(draft: _Draft) -> None:
    if draft.layout == "wudao":
        why = "not needed: with the layout wudao the text is title and content"
        draft.effects["keys"] = draft.effects["JSON_KEYS"] = why
        return
    if not are_keys(asked := draft.environment.get("JSON_KEYS", "text")):
        draft.problems.append(f"environment variable JSON_KEYS={asked!r}: {ROLES['keys'].rule}")
    draft.use("keys", "--json-keys", *draft.json_keys)
    in_order = "keys" in draft.values
    draft.effects["JSON_KEYS"] = "not needed: the order itself has json_keys" if in_order else draft.effects["keys"]


def _cleaning(draft: _Draft) -> None:
    steps = CLEANING[draft.environment.get("CLEAN") or draft.order.clean]
    if steps:
        draft.use("CLEAN", "--clean", *steps)
    else:
        draft.effects["CLEAN"] = "no cleaning"


def _not_needed(draft: _Draft) -> None:
    draft.effects["megatron_lm"] = f"not needed: megatron-core {version('megatron-core')} is an installed package"
    draft.effects["patch"] = "not needed: this checkout does it"
    draft.effects["DRY_RUN"] = "stop after printing" if draft.environment.get("DRY_RUN") == "1" else "no"
