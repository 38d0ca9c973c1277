"""From a call in one of the orders to the `megatron-patch` command that does it, and what became of each argument.

Nothing is ignored without a word: every argument and environment variable of ours has an effect, is named as not
needed, or is refused. Does not run anything, and knows no order: it sees roles (orders.py) and their values.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint.directory import is_megatron, read_config, read_json
from toolkits.model_checkpoints_convertor import sizes
from toolkits.model_checkpoints_convertor.orders import DTYPES, Order
from toolkits.positional import NONE, Command, Draft, choice_problems, whole

ENVIRONMENT = {
    "CKPT_FORMAT": "format of the Megatron checkpoint to write: torch_dist or legacy, whatever the order's own is",
    "NAMING": "parameter names of a legacy checkpoint: local, te or 2023, whatever the order's own are",
    "HF_CONFIG": "directory with the model's config.json and tokenizer, for the way back, where the order has none",
    "MP_PP0_LAYERS": "legacy: layers of the first pipeline stage",
    "MODEL_PARALLEL_ARGS": "layout flags of Megatron-LM for the order `distributed`; only legacy has a layout",
    "CONVERT_ARGS": "more flags for the command, such as '--overwrite --workers 4' or '--trust-pickle'",
    "DRY_RUN": "1: stop after printing, as --dry-run at the end of the call does",
}
"""Environment variables that change a call, and how."""

_CHOICES = {"CKPT_FORMAT": ("torch_dist", "legacy"), "NAMING": ("local", "te", "2023"), "DRY_RUN": ("0", "1")}
_LAYOUT = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
}
_LAYOUT_FLAGS = (*_LAYOUT.values(), "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers")
_UNUSED_BY_VERIFY = "not needed: CHECK_ONLY converts nothing"


class _Draft(Draft[Order]):
    @property
    def to_huggingface(self) -> bool:
        return self.is_on("to_huggingface")

    @property
    def target_format(self) -> str:
        own = "legacy" if self.order.naming else "torch_dist"
        return "huggingface" if self.to_huggingface else self.environment.get("CKPT_FORMAT") or own

    @property
    def unused(self) -> str:
        """Why what describes a layout of files says nothing here."""
        if self.to_huggingface:
            return "not needed: the checkpoint itself says it"
        return "not needed: torch_dist loads at any size"

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The model's config.json, wherever it is; None if nowhere."""
        if _carries_config(self.values["source"]):
            return read_config(self.values["source"])
        folder = _config_folder(self)
        return read_json(Path(folder) / "config.json") if folder else None


def command(order: Order, values: Mapping[str, str], environment: Mapping[str, str]) -> Command:
    """The command for a call.

    Raises:
        ValueError: arguments or environment variables that contradict each other, the checkpoint, or what is supported.
    """
    draft = _Draft(order, values, {name: environment[name] for name in ENVIRONMENT if environment.get(name)})
    draft.problems += choice_problems(environment, _CHOICES)
    for step in _STEPS:
        if not draft.problems:
            step(draft)
    if draft.problems:
        raise ValueError("\n".join(draft.problems))
    extra = draft.more_flags("CONVERT_ARGS")
    name = "verify" if draft.is_on("check_only") else "convert"
    return Command((name, *draft.flags, *extra), draft.effects, tuple(draft.warnings))


# ------------------------------------------------------------------------------------------------- where from, where to


def _paths(draft: _Draft) -> None:
    source = draft.values["source"]
    found = _is_checkpoint(source)
    if draft.to_huggingface and not found and _carries_config(source):
        wants = f"{draft.order.name('to_huggingface')}=true wants a Megatron checkpoint"
        draft.refuse("source", f"a Hugging Face directory, but {wants}; to convert to Megatron give false")
    elif not draft.to_huggingface and (found or not _carries_config(source)):
        back = "; mg2hf is for the way back" if "to_huggingface" in draft.values else ""
        what = f"it is a Megatron checkpoint{back}" if found else "config.json is missing"
        draft.refuse("source", f"must be a Hugging Face directory, but {what}")
    draft.use("source", "--source", source)
    draft.use("target", "--target", draft.values["target"])


def _is_checkpoint(source: str) -> bool:
    """Whether a directory is a Megatron checkpoint in any format, or its release/ or iter_0000010/."""
    path = Path(source)
    named = path.name == "release" or path.name.startswith("iter_")
    return is_megatron(path) or any(path.glob("mp_rank_*")) or (named and not (path / "config.json").is_file())


def _carries_config(source: str) -> bool:
    path = Path(source)
    return any(
        (folder / "config.json").is_file() for folder in (path, path / "huggingface", path.parent / "huggingface")
    )


def _config(draft: _Draft) -> None:
    given = draft.values.get("config", NONE)
    whose = "the checkpoint carries its own" if draft.to_huggingface else "the source has its own"
    draft.effects["config"] = draft.effects["HF_CONFIG"] = f"not needed: {whose} config and tokenizer"
    if not draft.to_huggingface or _carries_config(draft.values["source"]):
        return
    if folder := _config_folder(draft):
        draft.effects["config"] = draft.effects["HF_CONFIG"] = f"not needed: {folder} has them"
        draft.flags += ["--hf-config", folder]
        draft.effects["config" if folder == given else "HF_CONFIG"] = shlex.join(["--hf-config", folder])
    else:
        has_place = any(one.role == "config" for one in draft.order.arguments)
        give = f"{draft.order.name('config')}, or " if has_place else ""
        what = f"give {give}the environment variable HF_CONFIG: a directory that has it"
        draft.refuse("source", f"this checkpoint does not carry the model's config.json; {what}")


def _config_folder(draft: _Draft) -> str | None:
    """Where a checkpoint that does not carry its config has it from."""
    given, named = draft.values.get("config", NONE), draft.environment.get("HF_CONFIG")
    if given != NONE:
        return given
    if named and not (Path(named) / "config.json").is_file():
        raise ValueError(f"environment variable HF_CONFIG={named!r}: must be a directory with a config.json")
    beside = Path(draft.values["source"]).parent  # the predecessor put it beside release/
    return named or (str(beside) if (beside / "config.json").is_file() else None)


def _megatron_lm(draft: _Draft) -> None:
    draft.effects["megatron_lm"] = f"not needed: megatron-core {version('megatron-core')} is an installed package"


# --------------------------------------------------------------------------------------------------- how it is written


def _format(draft: _Draft) -> None:
    own, naming = draft.order.naming, draft.environment.get("NAMING")
    draft.effects["to_huggingface"] = f"--target-format {draft.target_format}"
    draft.flags += ["--target-format", draft.target_format]
    draft.effects["CKPT_FORMAT"] = f"--target-format {draft.target_format}"
    if draft.target_format != "legacy":
        why = "not needed: Hugging Face has its own names" if draft.to_huggingface else draft.unused
        draft.effects["transformer_engine"] = draft.effects["NAMING"] = why
        if draft.to_huggingface:
            draft.effects["CKPT_FORMAT"] = "not needed: it is about writing Megatron checkpoints"
        return
    asked = {"true": "te", "false": "local"}.get(draft.values.get("transformer_engine", ""))
    chosen = naming or asked or own or "te"
    draft.flags += ["--naming", chosen]
    draft.effects["transformer_engine"] = draft.effects["NAMING"] = f"--naming {chosen}"
    draft.effects["to_huggingface"] += f" --naming {chosen}"
    if asked and asked != chosen:
        draft.effects["transformer_engine"] = f"overridden: NAMING={naming}"


def _layout(draft: _Draft) -> None:
    for role in (role for role in _LAYOUT if role in draft.values):
        if draft.target_format == "legacy":
            draft.use(role, _LAYOUT[role], draft.values[role])
        else:
            draft.effects[role] = draft.unused
    _first_stage(draft)
    _layout_flags(draft)


def _first_stage(draft: _Draft) -> None:
    layers = draft.environment.get("MP_PP0_LAYERS")
    rule, accepts = whole(1)
    if not layers or draft.target_format != "legacy":
        draft.effects["MP_PP0_LAYERS"] = draft.unused
    elif not accepts(layers):
        draft.refuse("MP_PP0_LAYERS", rule)
    elif int(draft.values.get("pp", 1)) == 1:
        draft.problems.append(f"environment variable MP_PP0_LAYERS={layers}: needs more than one pipeline stage (PP)")
    else:
        draft.use("MP_PP0_LAYERS", "--decoder-first-pipeline-num-layers", layers)


def _layout_flags(draft: _Draft) -> None:
    words = draft.environment.get("MODEL_PARALLEL_ARGS", "").split()
    if "tp" in draft.values:
        draft.effects["MODEL_PARALLEL_ARGS"] = "not needed: the order itself has TP and PP"
    elif draft.target_format != "legacy":
        draft.effects["MODEL_PARALLEL_ARGS"] = draft.unused
    elif unknown := [word for word in words[::2] if word not in _LAYOUT_FLAGS]:
        choices = ", ".join(_LAYOUT_FLAGS)
        draft.problems.append(f"environment variable MODEL_PARALLEL_ARGS: unknown {unknown[0]!r}; choose of {choices}")
    else:
        draft.use("MODEL_PARALLEL_ARGS", *words)


def _vocabulary(draft: _Draft) -> None:
    if (rows := draft.values.get("extra_vocab_size")) is None:
        return
    if draft.target_format == "legacy":
        draft.use("extra_vocab_size", "--extra-vocab-size", rows)
    elif draft.to_huggingface:
        draft.effects["extra_vocab_size"] = "not needed: rows beyond the true vocabulary are cut"
    else:
        draft.effects["extra_vocab_size"] = "not needed: torch_dist is padded when it is loaded"


def _dtype(draft: _Draft) -> None:
    if precision := draft.values.get("dtype"):
        draft.use("dtype", "--dtype", DTYPES[precision])


# ----------------------------------------------------------------------------------------------- what is only compared


def _size(draft: _Draft) -> None:
    if (name := draft.values.get("size")) is None:
        return
    draft.effects["size"] = "not needed: config.json decides"
    count = sizes.estimated(draft.config or {})
    if count:
        draft.effects["size"] += f"; it makes about {sizes.rounded(count)}"
    if draft.config and (why := sizes.mismatch(name, draft.config)):
        draft.warnings.append(
            f"{draft.order.name('size')}={name!r} {why}; is this the right model? config.json decides"
        )


_EXPERTS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], int]]] = {
    "num_experts": (
        "making a mixture of experts of a dense model, or changing the number of experts",
        sizes.num_experts,
    ),
    "experts_topk": ("changing how many experts a token meets", sizes.experts_topk),
    "expert_splits": ("splitting an MLP into parts", lambda config: 1),
    "moe_width": ("changing the width of an expert", sizes.moe_width),
}


def _experts(draft: _Draft) -> None:
    for role, (change, of) in _EXPERTS.items():
        if role not in draft.values:
            continue
        draft.effects[role] = "not needed: config.json decides"
        real = of(draft.config) if draft.config is not None else None
        if real is not None and int(draft.values[role]) not in (0, 1, real):
            draft.problems.append(
                f"{draft.order.name(role)}={draft.values[role]}: {change} is not supported; the model has {real}:"
                " give that, or 0 to take the model as it is"
            )


def _not_needed(draft: _Draft) -> None:
    draft.effects["clip"] = "none"
    draft.effects["world_size"] = "not needed: one process does it; --workers in CONVERT_ARGS adds more"
    draft.effects["use_cuda"] = "not needed: conversion needs no GPU"


# ---------------------------------------------------------------------------------------------------------- the proof


def _check(draft: _Draft) -> None:
    if draft.is_on("check_only"):
        kept = {"--source", "--target", "--hf-config"}
        pairs = zip(draft.flags[::2], draft.flags[1::2], strict=True)
        draft.flags = [word for pair in pairs if pair[0] in kept for word in pair]
        used = ("source", "target", "config", "HF_CONFIG", "size")
        draft.effects = {name: text if name in used else _UNUSED_BY_VERIFY for name, text in draft.effects.items()}
        draft.effects["check"], draft.effects["check_only"] = _UNUSED_BY_VERIFY, "megatron-patch verify"
        return
    draft.effects["check_only"] = "no"
    draft.effects["check"] = "no"
    if draft.is_on("check"):
        draft.use("check", "--verify")


_STEPS: tuple[Callable[[_Draft], None], ...] = (
    _paths,
    _config,
    _megatron_lm,
    _format,
    _layout,
    _vocabulary,
    _dtype,
    _experts,
    _size,
    _not_needed,
    _check,
)
