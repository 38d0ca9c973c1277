"""From a call in one of the orders to the `megatron-patch` command that does it, what starts it on which machines, and
what became of each argument.

Nothing is ignored without a word: every argument and environment variable of ours has an effect, is named as not
needed, or is refused with the reason. Does not run anything, and knows no order: it sees roles (orders.py) and values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from examples.launcher.machines import ONE_COPY, PROCESSES, Machines, machines
from examples.launcher.orders import Order, indexed_prefixes, number, record_sources, sft_sources
from megatron_patch.checkpoint import directory
from toolkits import positional
from toolkits.model_checkpoints_convertor import sizes
from toolkits.model_checkpoints_convertor.orders import DTYPES
from toolkits.positional import NONE, choice_problems, is_number
from toolkits.pretrain_data_preprocessing.tokenizer_names import has_chat_template

ENVIRONMENT = {
    PROCESSES: "processes on each node, whatever ENV says; without it GPUs, or TP x PP where there are none",
    "HF_CONFIG": "directory with config.json and tokenizer, for PRETRAIN_CHECKPOINT_PATH=none: random weights",
    "MP_AC_LAYERS": "with AC=full: layers that are recomputed as one (default 1)",
    "MP_SFT_PACKING": "true: as many records in a row of SEQ_LEN as fit; false: one in a row of PAD_LEN",
    "MP_DATASET_TYPE": "idxmap or raw, compared with what the data sets are",
    "MP_VP": "layers of a virtual stage; not supported",
    "MP_PP0_LAYERS": "layers of the first stage; not supported in training",
    "MP_SAVE_SAFE_TENSORS": "true is not supported; `megatron-patch convert` writes them from the checkpoint",
    "CHAT_TEMPLATE": "finetuning: a name or file (default: the tokenizer's own, or instruction where it has none)",
    "TEXT_KEY": "evaluation: key of the records' text (default text, or content where there is no text)",
    "LAUNCH_ARGS": "more flags for the command, such as '--keep-last 2 --num-workers 2'",
    "RECIPE": "file to write the command to, as a recipe for `megatron-patch COMMAND --config FILE`",
    "DRY_RUN": "1: stop after printing, as --dry-run at the end of the call does",
}
"""Environment variables that change a call, and how. What clusters set is read by machines.py."""

_BOOLS = ("true", "false")
_CHOICES = {
    "MP_SFT_PACKING": _BOOLS,
    "MP_DATASET_TYPE": ("idxmap", "raw"),
    "MP_SAVE_SAFE_TENSORS": _BOOLS,
    "DRY_RUN": ("0", "1"),
}
_TRAINING = ("pretrain", "finetune")


@dataclass(frozen=True)
class Launch(positional.Command):
    """What to run, and where."""

    where: Machines = field(kw_only=True)


@dataclass
class _Draft(positional.Draft[Order]):
    cluster: Mapping[str, str] = field(kw_only=True)
    """All environment variables."""

    where: Machines = field(default_factory=lambda: Machines(1))

    @property
    def kind(self) -> str:
        if self.order.kind == "either":
            return "finetune" if self.is_on("sft") else "pretrain"
        return self.order.kind

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The model's config.json, wherever it is; None if nowhere."""
        checkpoint = self.values["checkpoint"]
        source = self.environment.get("HF_CONFIG", "") if checkpoint == NONE else checkpoint
        try:
            return directory.read_config(source) if source else None
        except ValueError:
            return None

    @property
    def reads_records(self) -> bool:
        """Whether training data are records, and not tokenized."""
        train = self.given("sft_train", "either_train")
        return self.kind == "finetune" and record_sources(self.values[train]) is not None

    @property
    def packs(self) -> bool:
        """Whether records are packed; the predecessor did so only where it was told to."""
        return self.environment.get("MP_SFT_PACKING") == "true"

    def integer(self, role: str, default: int = 1) -> int:
        return int(self.values.get(role, default))

    def given(self, *roles: str) -> str:
        """The one of several roles that the order has; empty if none."""
        return next((role for role in roles if role in self.values), "")


def command(order: Order, values: Mapping[str, str], environment: Mapping[str, str]) -> Launch:
    """The command for a call, and where it runs.

    Raises:
        ValueError: arguments or environment variables that contradict each other, the checkpoint, the cluster, or what
            is supported; all that is found in one step is named.
    """
    ours = {name: environment[name] for name in ENVIRONMENT if environment.get(name)}
    draft = _Draft(order, values, ours, cluster=environment)
    draft.effects |= dict.fromkeys(ENVIRONMENT, f"not needed: it is not about `megatron-patch {draft.kind}`")
    draft.problems += choice_problems(environment, _CHOICES)
    for steps in (_REFUSALS, (_where, _checkpoint), (*_COMMON, *_STEPS[draft.kind])):
        for step in steps if not draft.problems else ():
            step(draft)
    if draft.problems:
        raise ValueError("\n".join(draft.problems))
    extra = draft.more_flags("LAUNCH_ARGS")
    draft.effects["RECIPE"] = "written"
    draft.effects["sft"] = f"`megatron-patch {draft.kind}`"
    draft.effects["DRY_RUN"] = "stop after printing" if environment.get("DRY_RUN") == "1" else "no"
    return _assembled(draft, (*draft.flags, *order.style.split(), *extra))


def _assembled(draft: _Draft, flags: tuple[str, ...]) -> Launch:
    where = draft.where
    launcher: tuple[str, ...] = ("megatron-patch",)
    argv: tuple[str, ...] = (draft.kind, *flags)
    if where.nodes > 1:
        launcher = ("torchrun", *where.torchrun, "-m", "megatron_patch")
    elif where.processes > 1:
        argv = (draft.kind, "--nproc-per-node", str(where.processes), *flags)
    warnings = [*([where.warning] if where.warning else []), *draft.warnings]
    return Launch(argv, draft.effects, tuple(warnings), launcher=launcher, where=where)


# ------------------------------------------------------------------------------------- what is not supported, by name


def _context_parallel(draft: _Draft) -> None:
    draft.effects["cp"] = "no context parallelism"
    if draft.integer("cp") > 1:
        draft.refuse("cp", "context parallelism is not supported yet; choose 1, and TP with SP=true for long samples")


def _precision_refused(draft: _Draft) -> None:
    if draft.values["precision"] == "fp8":
        why = "FP8 takes Transformer Engine's layers, which are not used here yet; choose bf16"
        draft.refuse("precision", why)


def _offloading(draft: _Draft) -> None:
    draft.effects["offload"] = "the optimizer stays on the device"
    if draft.values.get("recompute") == "offload":
        draft.refuse("recompute", "activations on the CPU are not supported yet; choose full, sel or none")
    if draft.values.get("offload", "false") != "false" and number(draft.values["offload"]) != 0:
        draft.refuse("offload", "the optimizer on the CPU is not supported yet; choose false, and DO=true to share it")


def _benchmark(draft: _Draft) -> None:
    if draft.values.get("prompts") == NONE:
        draft.refuse("prompts", "a benchmark without prompts is not supported; give a .jsonl or .txt file")


def _variables_refused(draft: _Draft) -> None:
    reasons = {
        "MP_VP": "virtual pipeline stages are not supported in training yet; unset it",
        "MP_PP0_LAYERS": "an uneven first stage is not supported in training yet; unset it",
    }
    for name, why in reasons.items():
        if name in draft.environment:
            draft.refuse(name, why)
    draft.effects["MP_SAVE_SAFE_TENSORS"] = "no safetensors: `megatron-patch convert` writes them"
    if draft.environment.get("MP_SAVE_SAFE_TENSORS") == "true":
        draft.refuse("MP_SAVE_SAFE_TENSORS", "`megatron-patch convert` writes them from the checkpoint; unset it")


_REFUSALS = (_context_parallel, _precision_refused, _offloading, _benchmark, _variables_refused)


# ----------------------------------------------------------------------------------------------------- where it runs


def _where(draft: _Draft) -> None:
    """Machines and processes; a model's processes come first."""
    tensor, pipeline = draft.integer("tp"), draft.integer("pp")
    experts = draft.integer("ep") * draft.integer("etp", tensor)
    fewest = pipeline * (math.lcm(tensor, experts) if "ep" in draft.values else tensor)
    try:
        where = machines(draft.values["env"], draft.cluster, fewest)
    except ValueError as error:
        draft.problems += str(error).splitlines()
        return
    if draft.kind == "generate":
        if where.nodes > 1:
            draft.refuse("env", f"generation runs on one node, not on {where.nodes}")
        where = replace(where, processes=fewest, note=ONE_COPY)
    draft.where = where
    draft.effects["env"] = where.describe()
    draft.effects[PROCESSES] = f"{where.processes} on each node"


# ---------------------------------------------------------------------------------------------------- the model


def _checkpoint(draft: _Draft) -> None:
    path = draft.values["checkpoint"]
    draft.effects["HF_CONFIG"] = f"not needed: {draft.order.name('checkpoint')} is a checkpoint with its own config"
    if path == NONE:
        _from_scratch(draft)
    elif not directory.is_huggingface(path) and not directory.is_megatron(path):
        draft.refuse("checkpoint", "no Megatron checkpoint (latest_checkpointed_iteration.txt is missing)")
    elif not directory.is_huggingface(path):
        _megatron_checkpoint(draft, path)
    else:
        draft.use("checkpoint", "--load", path)


def _from_scratch(draft: _Draft) -> None:
    folder = draft.environment.get("HF_CONFIG")
    if draft.kind not in _TRAINING:
        draft.refuse("checkpoint", f"`megatron-patch {draft.kind}` needs a checkpoint")
    elif not folder:
        why = "random weights need the environment variable HF_CONFIG: a directory with config.json and tokenizer"
        draft.refuse("checkpoint", why)
    elif not (Path(folder) / "config.json").is_file():
        draft.refuse("HF_CONFIG", "must be a directory with a config.json")
    else:
        draft.use("HF_CONFIG", "--hf-config", folder)
        draft.effects["checkpoint"] = f"random weights: {draft.effects['HF_CONFIG']}"


def _megatron_checkpoint(draft: _Draft, path: str) -> None:
    try:
        _, iteration_directory, iteration = directory.locate(path)
    except ValueError as error:
        draft.refuse("checkpoint", str(error))
        return
    if not directory.carries_config(path) and not directory.carries_config(iteration_directory):
        folder = Path(path) / directory.HUGGINGFACE
        draft.refuse("checkpoint", f"does not say what model it is: put config.json and the tokenizer into {folder}")
    else:
        goes_on = draft.kind == "pretrain" and iteration is not None
        why = f": goes on from its iteration {iteration}, optimizer and all" if goes_on else ""
        draft.use("checkpoint", "--load", path, why=why)


def _size(draft: _Draft) -> None:
    name = draft.values["size"]
    draft.effects["size"] = "not needed: config.json decides"
    if draft.config is None:
        return
    if count := sizes.estimated(draft.config):
        draft.effects["size"] += f"; it makes about {sizes.rounded(count)}"
    if why := sizes.mismatch(name, draft.config):
        draft.warnings.append(
            f"{draft.order.name('size')}={name!r} {why}; is this the right model? config.json decides"
        )


def _experts(draft: _Draft) -> None:
    """MOE; EP and ETP are parallel sizes."""
    count = sizes.num_experts(draft.config or {})
    draft.effects["experts"] = f"not needed: config.json decides: {f'{count} experts' if count else 'no experts'}"
    if draft.is_on("experts") and not count:
        draft.refuse("experts", "making a mixture of experts of a dense model is not supported; choose false")
    for role in ("ep", "etp"):
        if role not in draft.values:
            continue
        name = {"ep": "--expert-model-parallel-size", "etp": "--expert-tensor-parallel-size"}[role]
        if count:
            draft.use(role, name, draft.values[role])
        elif draft.integer(role) > 1 and not (role == "etp" and draft.integer("etp") == draft.integer("tp")):
            draft.refuse(role, "the model has no experts; choose 1")
        else:
            draft.effects[role] = "not needed: the model has no experts"


def _vocabulary(draft: _Draft) -> None:
    draft.effects["extra_vocab_size"] = "not needed: config.json has the vocabulary; it is padded by itself"
    draft.effects["tokenizer"] = "not needed: the checkpoint carries its tokenizer"


def _checkouts(draft: _Draft) -> None:
    draft.effects["megatron_lm"] = f"not needed: megatron-core {version('megatron-core')} is an installed package"
    draft.effects["patch"] = "not needed: this checkout does it"


# ------------------------------------------------------------------------------------------------ how it is computed


def _layout(draft: _Draft) -> None:
    draft.use("tp", "--tensor-model-parallel-size", draft.values["tp"])
    if "pp" in draft.values:
        draft.use("pp", "--pipeline-model-parallel-size", draft.values["pp"])
    if draft.is_on("sequence_parallel") and draft.integer("tp") > 1:
        draft.use("sequence_parallel", "--sequence-parallel")
    else:
        off = "not needed: TP is 1" if draft.is_on("sequence_parallel") else "no"
        draft.effects["sequence_parallel"] = off


def _kernels(draft: _Draft) -> None:
    draft.effects["flash"] = "not needed: torch picks a flash kernel wherever there is one"
    draft.effects["transformer_engine"] = "megatron-core's own layers"
    if draft.is_on("transformer_engine"):
        draft.warnings.append(
            f"{draft.order.name('transformer_engine')}=true: Transformer Engine's layers are not used yet;"
            " megatron-core's own compute the same, and weights load into either"
        )


def _recompute(draft: _Draft) -> None:
    asked, layers = draft.values["recompute"], draft.environment.get("MP_AC_LAYERS", "1")
    draft.effects["MP_AC_LAYERS"] = f"not needed: {draft.order.name('recompute')} is not full"
    if not is_number(layers) or int(layers) < 1:
        draft.refuse("MP_AC_LAYERS", "must be a whole number of at least 1")
    elif asked == "full":
        flags = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", layers)
        draft.use("recompute", *flags)
        draft.effects["MP_AC_LAYERS"] = f"--recompute-num-layers {layers}"
    elif asked == "sel":
        draft.use("recompute", "--recompute-granularity", "selective")
    else:
        draft.effects["recompute"] = "all activations are kept"


def _training_precision(draft: _Draft) -> None:
    asked = draft.values["precision"]
    if asked == "fp32":
        draft.effects["precision"] = "fp32 throughout"
    else:
        draft.use("precision", f"--{asked}")


def _dtype(draft: _Draft) -> None:
    draft.use("precision", "--dtype", DTYPES[draft.values["precision"]])


def _optimizer(draft: _Draft) -> None:
    draft.use("lr", "--lr", draft.values["lr"])
    draft.use("min_lr", "--min-lr", draft.values["min_lr"])
    if number(draft.values["min_lr"]) > number(draft.values["lr"]):
        draft.refuse("min_lr", f"must not be above {draft.order.name('lr')}={draft.values['lr']}")
    if draft.is_on("distributed_optimizer"):
        draft.use("distributed_optimizer", "--use-distributed-optimizer")
    else:
        draft.effects["distributed_optimizer"] = "no"


def _only_trained(draft: _Draft) -> None:
    for role in ("recompute", "distributed_optimizer"):
        draft.effects[role] = f"not needed: `megatron-patch {draft.kind}` does not train"


# --------------------------------------------------------------------------------------- how much data, and how long


def _batch(draft: _Draft) -> None:
    draft.use("micro_batch", "--micro-batch-size", draft.values["micro_batch"])
    if "global_batch" not in draft.values:
        return
    draft.use("global_batch", "--global-batch-size", draft.values["global_batch"])
    replicas = max(1, draft.where.world_size // (draft.integer("tp") * draft.integer("pp")))
    step = draft.integer("micro_batch") * replicas
    if draft.integer("global_batch") % step:
        micro = draft.order.name("micro_batch")
        draft.refuse("global_batch", f"must be a multiple of {micro} x {replicas} data-parallel processes = {step}")


def _samples(draft: _Draft) -> None:
    """SEQ_LEN, PAD_LEN and their kin."""
    draft.effects["gen_len"] = "not needed: what is generated begins at the text's own start token"
    if "source_len" in draft.values:
        length = draft.integer("source_len") + draft.integer("target_len")
        draft.use("source_len", "--seq-length", str(length), why=": source and target")
        draft.effects["target_len"] = draft.effects["source_len"]
        return
    sequence, padded = draft.order.name("seq_len"), draft.values.get("pad_len", "0")
    if draft.reads_records and not draft.packs and padded != "0":
        draft.use("pad_len", "--seq-length", padded, why=": longer records are cut there")
        draft.effects["seq_len"] = f"not needed: a row holds one record, of {draft.order.name('pad_len')} tokens"
    else:
        draft.use("seq_len", "--seq-length", draft.values["seq_len"])
        rows = {"finetune": "packed or tokenized records fill", "evaluate": "windows have"}
        why = rows.get(draft.kind, "indexed data fills")
        draft.effects["pad_len"] = f"not needed: {why} {sequence}"


def _packing(draft: _Draft) -> None:
    if not draft.reads_records:
        draft.effects["MP_SFT_PACKING"] = "not needed: rows are as they were tokenized"
    elif draft.packs:
        draft.effects["MP_SFT_PACKING"] = "records are packed, and do not see one another"
    else:
        draft.use("MP_SFT_PACKING", "--no-packing")


def _duration(draft: _Draft) -> None:
    if "epochs" in draft.values:
        draft.use("epochs", "--epochs", draft.values["epochs"])
        return
    train = draft.given("train_tokens", "train_iters", "train_length")
    warmup = draft.given("warmup_tokens", "warmup_iters", "warmup_length")
    in_tokens = draft.kind == "pretrain"
    iters, warmup_iters = (_iterations(draft, role) if in_tokens else draft.integer(role) for role in (train, warmup))
    if iters < 1:
        batch = draft.integer("global_batch") * draft.integer("seq_len")
        draft.refuse(train, f"less than one iteration: GLOBAL_BATCH_SIZE x SEQ_LEN = {batch} tokens")
    elif warmup_iters >= iters:
        draft.refuse(warmup, f"a warm-up of {warmup_iters} iterations must end before the last of {iters}")
    draft.use(train, "--train-iters", str(iters), why=_division(draft, train) if in_tokens else "")
    draft.use(warmup, "--lr-warmup-iters", str(warmup_iters), why=_division(draft, warmup) if in_tokens else "")
    _decay(draft, iters, warmup_iters, in_tokens)


def _decay(draft: _Draft, iters: int, warmup_iters: int, in_tokens: bool) -> None:
    """Finetuning by iterations has always ended the decay before the run."""
    decay = iters - warmup_iters
    if not in_tokens and warmup_iters < decay < iters:
        draft.flags += ["--lr-decay-iters", str(decay)]


def _iterations(draft: _Draft, role: str) -> int:
    return draft.integer(role) // draft.integer("global_batch") // draft.integer("seq_len")


def _division(draft: _Draft, role: str) -> str:
    return f": {draft.values[role]} // {draft.values['global_batch']} // {draft.values['seq_len']}"


# ------------------------------------------------------------------------------------------------------- which data


def _indexed_data(draft: _Draft) -> None:
    train, valid = draft.given("indexed", "either_train"), draft.given("indexed_valid", "either_valid")
    prefixes = indexed_prefixes(draft.values[train])
    draft.effects["MP_DATASET_TYPE"] = "indexed data"
    if prefixes is None:
        draft.refuse(train, f"pretraining reads indexed data: {draft.order.roles['indexed'].rule}")
        return
    if draft.environment.get("MP_DATASET_TYPE") == "raw":
        draft.refuse("MP_DATASET_TYPE", f"{draft.order.name(train)} is indexed data; unset it")
    held_out = draft.values.get(valid, NONE)
    if held_out in (NONE, draft.values[train]):
        draft.use(train, "--data-path", *prefixes, why=f" --split {draft.order.split}")
        draft.flags += ["--split", draft.order.split]
        draft.effects[valid] = f"not needed: --split {draft.order.split} cuts it from the training data"
    elif (others := indexed_prefixes(held_out)) is None:
        draft.refuse(valid, f"pretraining reads indexed data: {draft.order.roles['indexed_valid'].rule}")
    else:
        draft.use(train, "--train-data-path", *prefixes)
        draft.use(valid, "--valid-data-path", *others)


def _conversations(draft: _Draft) -> None:
    train, valid = draft.given("sft_train", "either_train"), draft.given("sft_valid", "either_valid")
    sources = sft_sources(draft.values[train]) or ()
    kind = "raw" if draft.reads_records else "idxmap"
    draft.effects["MP_DATASET_TYPE"] = "records" if draft.reads_records else "tokenized records"
    if draft.environment.get("MP_DATASET_TYPE", kind) != kind:
        draft.refuse("MP_DATASET_TYPE", f"{draft.order.name(train)} is {kind}; unset it")
    draft.use(train, "--train-data", *sources)
    _chat_template(draft, train)
    held_out = draft.values.get(valid, NONE)
    if held_out == NONE:
        draft.effects[valid] = "no validation"
    else:
        draft.use(valid, "--valid-data", *(sft_sources(held_out) or ()))


def _chat_template(draft: _Draft, train: str) -> None:
    """The predecessor had a prompt of its own, that of Alpaca; a model's own template is better where there is one."""
    draft.effects["CHAT_TEMPLATE"] = "not needed: records are tokenized already"
    if not draft.reads_records:
        return
    named = draft.environment.get("CHAT_TEMPLATE") or ("" if _has_chat_template(draft) else "instruction")
    draft.effects["CHAT_TEMPLATE"] = "the tokenizer's own"
    if named:
        draft.use("CHAT_TEMPLATE", "--chat-template", named)
        draft.effects[train] += f" --chat-template {named}"


def _has_chat_template(draft: _Draft) -> bool:
    checkpoint = Path(draft.values["checkpoint"])
    folders = [
        Path(draft.environment.get("HF_CONFIG", "")),
        checkpoint / "huggingface",
        checkpoint.parent / "huggingface",
    ]
    folder = next(one for one in folders[0 if str(checkpoint) == NONE else 1 :] if one.is_dir())
    return has_chat_template(str(folder))


def _scored_data(draft: _Draft) -> None:
    if prefixes := indexed_prefixes(draft.values["scored"]):
        draft.use("scored", "--data-path", *prefixes)
        draft.effects["TEXT_KEY"] = "not needed: indexed data"
        return
    sources = record_sources(draft.values["scored"]) or ()
    key = draft.environment.get("TEXT_KEY") or _text_key(draft, sources)
    draft.use("scored", "--data", *sources)
    if key:
        draft.use("TEXT_KEY", "--text-key", key)
        draft.effects["scored"] += f" --text-key {key}"


def _text_key(draft: _Draft, sources: tuple[str, ...]) -> str:
    """The key of the first record's text; empty for files that have none."""
    keys = _keys_of_first_record(sources[0])
    found = [key for key in ("text", "content") if key in keys]
    if keys and not found:
        why = f"its records have {', '.join(keys)}; say which is text, in the environment variable TEXT_KEY"
        draft.refuse("scored", why)
    return found[0] if found else ""


def _keys_of_first_record(source: str) -> list[str]:
    """Keys of a JSON file's first object; none where it is no such file."""
    if not source.endswith((".json", ".jsonl")) or not Path(source).is_file():
        return []
    with open(source, encoding="utf-8", errors="replace") as file:
        head = file.read(1 << 20).lstrip("\ufeff[ \t\r\n")
    try:
        value, _ = json.JSONDecoder().raw_decode(head)
    except ValueError:
        return []
    return list(value) if isinstance(value, dict) else []


# ------------------------------------------------------------------------------------------------------------ results


def _output(draft: _Draft) -> None:
    """Checkpoints and events go where the predecessor put them: runs with other arguments do not meet."""
    base, name = Path(draft.values["output"]), _run_name(draft)
    draft.use("output", "--save", str(base / "checkpoint" / name))
    draft.flags += ["--tensorboard-dir", str(base / "tensorboard" / name)]
    if "save_interval" in draft.values:
        draft.use("save_interval", "--save-interval", draft.values["save_interval"])


_IN_NAMES = {
    "lr": "lr", "min_lr": "minlr", "micro_batch": "bs", "global_batch": "gbs", "seq_len": "seqlen", "precision": "pr",
    "tp": "tp", "pp": "pp", "ep": "ep", "recompute": "ac", "distributed_optimizer": "do", "sequence_parallel": "sp",
    "epochs": "epochs", "train_tokens": "tt", "train_iters": "ti", "train_length": "tl", "warmup_tokens": "wt",
    "warmup_iters": "wi", "warmup_length": "wl",
}  # fmt: skip


def _run_name(draft: _Draft) -> str:
    family = str((draft.config or {}).get("model_type", "model"))
    parts = [f"{short}-{draft.values[role]}" for role, short in _IN_NAMES.items() if role in draft.values]
    return "-".join([draft.kind, family, draft.values["size"].replace("/", "_"), *parts])


# --------------------------------------------------------------------------------------------------------- generation


def _sampling(draft: _Draft) -> None:
    top_k, top_p = draft.integer("top_k"), number(draft.values["top_p"])
    if top_k and top_p:
        both = f"{draft.order.name('top_p')}={draft.values['top_p']}"
        draft.refuse("top_k", f"this or {both} must be 0; `megatron-patch generate` itself takes both")
    draft.use("top_k", "--top-k", str(top_k))
    draft.use("top_p", "--top-p", draft.values["top_p"] if top_p else "1", why="" if top_p else ": off")
    draft.use("temperature", "--temperature", draft.values["temperature"])
    draft.use("repetition_penalty", "--repetition-penalty", draft.values["repetition_penalty"])


def _prompts(draft: _Draft) -> None:
    file = draft.values["prompts"]
    draft.use("prompts", "--prompts-file", file)
    if file.endswith(".jsonl"):
        draft.flags += ["--prompt-key", "query"]
        draft.effects["prompts"] += " --prompt-key query"
    elif "query" in _keys_of_first_line(file):
        draft.refuse("prompts", "holds JSON objects with `query`; give it a name that ends in .jsonl")
    draft.use("completions", "--output", draft.values["completions"])


def _keys_of_first_line(file: str) -> list[str]:
    with open(file, encoding="utf-8", errors="replace") as lines:
        try:
            value = json.loads(lines.readline(1 << 20))
        except ValueError:
            return []
    return list(value) if isinstance(value, dict) else []


def _generated_lengths(draft: _Draft) -> None:
    draft.use("micro_batch", "--batch-size", draft.values["micro_batch"])
    draft.use("output_len", "--max-new-tokens", draft.values["output_len"])
    draft.effects["input_len"] = "not needed: prompts are read whole"
    draft.effects["seq_len"] = "not needed: the model's own positions are the limit"
    draft.effects["pad_len"] = "not needed: rows are as long as their prompts"


_COMMON: tuple[Callable[[_Draft], None], ...] = (
    _size, _vocabulary, _checkouts, _layout, _kernels,
)  # fmt: skip
_SHARED_TRAINING = (_experts, _recompute, _training_precision, _optimizer, _batch, _samples, _duration, _output)
_STEPS: Mapping[str, tuple[Callable[[_Draft], None], ...]] = {
    "pretrain": (_indexed_data, *_SHARED_TRAINING),
    "finetune": (_conversations, *_SHARED_TRAINING, _packing),
    "generate": (_prompts, _sampling, _generated_lengths, _dtype),
    "evaluate": (_scored_data, _batch, _samples, _dtype, _only_trained),
}
