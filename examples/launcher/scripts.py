"""The scripts in the folders of the families: which there are, which orders each takes, and their text.

    python examples/launcher/scripts.py            names them
    python examples/launcher/scripts.py --write    writes them, and the tables in the READMEs, after a change here

Every script is the same call with other orders; what differs between families is in the checkpoints. A test compares
the files with this table.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

# A script starts with its own folder on the path. In front, since the predecessor's package has the same name as ours.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.launcher.orders import ORDERS, Order

EXAMPLES = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")

_PRETRAIN = "pretrain,pretrain-2023,pretrain-te-2023"
_PRETRAIN_2023 = "pretrain-2023,pretrain,pretrain-te-2023"
_PRETRAIN_TE_2023 = "pretrain-te-2023,pretrain-2023,pretrain"
_FINETUNE, _FINETUNE_2023 = "finetune,finetune-2023", "finetune-2023,finetune"
_GENERATE, _GENERATE_2023 = "generate,generate-2023", "generate-2023,generate"
_EVALUATE = "evaluate,evaluate-2023,evaluate-te-2023"
_EVALUATE_2023 = "evaluate-2023,evaluate,evaluate-te-2023"
_EVALUATE_TE_2023 = "evaluate-te-2023,evaluate-2023,evaluate"

_2024 = MappingProxyType(
    {
        "pretrain_megatron": _PRETRAIN,
        "finetune_megatron": _FINETUNE,
        "text_generation_megatron": _GENERATE,
        "evaluate_megatron": _EVALUATE,
    }
)
_2023 = MappingProxyType(
    {
        "pretrain_megatron": _PRETRAIN_2023,
        "finetune_megatron": _FINETUNE_2023,
        "text_generation_megatron": _GENERATE_2023,
        "evaluate_megatron": _EVALUATE_2023,
    }
)
_READ = MappingProxyType({"text_generation_megatron": _GENERATE, "evaluate_megatron": _EVALUATE})


@dataclass(frozen=True)
class Family:
    """A folder."""

    folder: str
    title: str
    size: str
    """An example's MODEL_SIZE."""
    name: str
    """As its scripts end: run_pretrain_megatron_<name>.sh."""
    kinds: Mapping[str, str]
    """Beginning of a script's name, after run_ -> its orders, the folder's own first."""
    others: Mapping[str, str] = field(default_factory=dict)
    """Scripts whose names are built otherwise -> their orders."""


_GA, _MCORE_GA = {"run_finetune_megatron_{}_withGA.sh": "finetune-ga"}, "run_finetune_mcore_{}_withGA.sh"
_MCORE_2024 = {"run_pretrain_mcore_{}.sh": "pretrain-moe", _MCORE_GA: "finetune-ga-moe"}
_2024_EVALUATE = {"run_evaluate_mcore_{}.sh": "evaluate"}

FAMILIES = (
    Family("llama", "LLaMA", "7B", "llama", _2023),
    Family(
        "llama2", "Llama 2", "7B", "llama", _2024,
        {**_GA, **_MCORE_2024, **_2024_EVALUATE, "run_mcore_llama2_70b.sh": "mcore"},
    ),
    Family(
        "llama3", "Llama 3", "8B", "llama", _2024,
        {**_GA, **_MCORE_2024, "run_pretrain_llama_70b.sh": "pretrain-ep-te"},
    ),
    Family("llama3_1", "Llama 3.1", "8B", "llama", _READ, {"run_mcore_llama3_1.sh": "mcore"}),
    Family("codellama", "Code Llama", "7B", "llama", _2024, _GA),
    Family("qwen", "Qwen", "7B", "qwen", _2024, _GA),
    Family(
        "qwen1_5", "Qwen1.5", "7B", "qwen", _2024,
        {**_GA, **_MCORE_2024, _MCORE_GA: "finetune-ga-moe-ep,finetune-ga-moe", **_2024_EVALUATE},
    ),
    Family(
        "qwen2", "Qwen2", "7B", "qwen", _READ,
        {
            "run_pretrain_qwen.sh": "pretrain-ep-te,pretrain-ep", "run_finetune_qwen.sh": "finetune-ep-te,finetune-ep",
            "run_mcore_qwen.sh": "mcore-ep", "run_mcore_qwen2_moe.sh": "mcore-etp-ep",
        },
    ),
    Family("qwen2_5", "Qwen2.5", "7B", "qwen", _READ, {"run_mcore_qwen.sh": "mcore"}),
    Family("qwq", "QwQ", "32B", "qwq", _READ, {"run_mcore_qwq.sh": "mcore"}),
    Family("qwen3", "Qwen3", "8B", "qwen", _READ, {"run_mcore_qwen3.sh": "mcore-etp-ep"}),
    Family(
        "baichuan", "Baichuan", "13B", "baichuan",
        {**_2023, "pretrain_megatron": _PRETRAIN_TE_2023, "evaluate_megatron": _EVALUATE_TE_2023},
    ),
    Family(
        "baichuan2", "Baichuan 2", "7B", "baichuan", _2024,
        {"run_finetune_megatron_{}_wgbs.sh": "finetune-wgbs-te-2023,finetune-ga"},
    ),
    Family(
        "bloom", "BLOOM", "7.1B", "bloom",
        {**_2023, "pretrain_megatron": "pretrain-bloom-2023", "text_generation_megatron": "generate-bloom-2023"},
    ),
    Family("falcon", "Falcon", "7B", "falcon", _2023),
    Family("falcon", "Falcon", "40B", "falcon40b", _2023),
    Family(
        "starcoder", "StarCoder", "16B", "starcoder",
        {
            "pretrain_megatron": "pretrain-2023", "text_generation_megatron": "generate-starcoder-2023",
            "evaluate_megatron": "evaluate-short-2023",
        },
        {
            "run_finetune_megatron_{}_wgbs.sh": "finetune-wgbs-2023",
            "run_finetune_megatron_{}_wogbs.sh": "finetune-2023",
        },
    ),
    Family("galactica", "Galactica", "6.7B", "galactica", _2023),
    Family(
        "chatglm", "ChatGLM", "6B", "chatglm",
        {
            **_READ, "pretrain_megatron": "pretrain-chatglm,pretrain-chatglm-2023",
            "finetune_megatron": "finetune-chatglm-2023",
        },
    ),
    Family(
        "glm130b", "GLM-130B", "130B", "glm130b",
        {
            **_READ, "pretrain_megatron": "pretrain-glm130b-2023", "evaluate_megatron": "evaluate-glm130b-2023",
        },
    ),
    Family("gpt3", "GPT-3", "1.7B", "gpt3", _2023, {"run_pretrain_megatron_{}_enwiki.sh": "pretrain-enwiki-2023"}),
    Family(
        "mistral", "Mistral", "7B", "mistral", _2024,
        {
            **_GA, **_MCORE_2024, **_2024_EVALUATE, "run_mcore_mistral.sh": "mcore-ep",
        },
    ),
    Family("mixtral", "Mixtral", "8x7B", "mixtral", _READ, {"run_mcore_mixtral.sh": "mcore-ep"}),
    Family("yi", "Yi", "6B", "yi", _2024),
    Family("deepseek", "DeepSeek LLM", "7B", "deepseek", _2024, _GA),
    Family(
        "deepseek_v2", "DeepSeek-V2", "A2.4B", "deepseek", _READ,
        {
            "run_pretrain_deepseek.sh": "pretrain-ep,pretrain-ep-te",
            "run_finetune_deepseek.sh": "finetune-ep,finetune-ep-te",
            "run_mcore_deepseek.sh": "mcore-ep",
        },
    ),
    Family("deepseek_v3", "DeepSeek-V3", "A37B", "deepseek", _READ, {"run_mcore_deepseek.sh": "mcore-etp-ep"}),
    Family(
        "moonlight", "Moonlight", "A3B", "moonlight", _READ,
        {"run_mcore_moonlight.sh": "mcore-etp-emp,mcore-etp-ep"},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Script:
    """One file."""

    family: Family
    name: str
    words: str
    """Its orders, as launch.py takes them."""

    @property
    def path(self) -> Path:
        """Where it lies."""
        return EXAMPLES / self.family.folder / self.name

    @property
    def orders(self) -> tuple[Order, ...]:
        """Those it takes, the folder's own first."""
        return tuple(ORDERS[word] for word in self.words.split(","))

    def example(self, order: Order) -> str:
        """A call in one of them, with names of this folder's directories."""
        values = {**_VALUES, "size": self.family.size, "checkpoint": f"ckpts/{self.family.folder}-{self.family.size}"}
        if order.kind == "either":
            values |= {"pad_len": "4096", "seq_len": "4096"}
        return " ".join(values[one.role] for one in order.arguments)

    @property
    def text(self) -> str:
        """The file."""
        lines = ["#!/bin/sh", f"# {self.family.title}: {_DOES[self.orders[0].kind]}", "#"]
        lines += [f"#   sh {self.name} {self.example(order)}" for order in self.orders[:2]]
        for order in self.orders:
            lines += ["#", f"# Order {order.word}, {order.counts} arguments:", *_wrapped(order)]
        lines += ["#", "# --dry-run behind the arguments: show what they mean and the command, and stop."]
        return "\n".join([*lines, *_CALL, f'launch {self.words} "$@"', ""])


_CALL = ('. "$(dirname -- "$(readlink -f -- "$0")")/../common.sh"',)
_DOES = {
    "pretrain": "pretrains on indexed data, from a checkpoint or from random weights.",
    "finetune": "finetunes on records (instructions, conversations).",
    "either": "pretrains on indexed data, or with SFT=true finetunes on records.",
    "generate": "continues the prompts of a file.",
    "evaluate": "loss and perplexity of a checkpoint on text or indexed data.",
}
# fmt: off
_VALUES = MappingProxyType({
    "env": "dsw", "megatron_lm": "none", "patch": "../..", "micro_batch": "1", "global_batch": "8", "lr": "1e-5",
    "min_lr": "1e-6", "seq_len": "2048", "source_len": "1024", "target_len": "1024", "gen_len": "128",
    "pad_len": "80", "extra_vocab_size": "0", "precision": "bf16", "tp": "1", "pp": "1", "cp": "1", "ep": "1",
    "etp": "1", "recompute": "sel", "distributed_optimizer": "true", "flash": "true", "sequence_parallel": "false",
    "transformer_engine": "false", "experts": "false", "sft": "false", "offload": "false", "save_interval": "1000",
    "indexed": "datasets/wudao_text_document", "indexed_valid": "none", "sft_train": "datasets/train.json",
    "sft_valid": "datasets/valid.json", "either_train": "datasets/wudao_text_document", "either_valid": "none",
    "scored": "datasets/held_out.jsonl", "train_tokens": "100000000", "warmup_tokens": "1000000",
    "train_iters": "1000", "warmup_iters": "100", "train_length": "100000000", "warmup_length": "1000000",
    "epochs": "2", "output": "output", "tokenizer": "bloombpe-h", "top_k": "10", "top_p": "0", "temperature": "1.0",
    "repetition_penalty": "1.2", "input_len": "512", "output_len": "512", "prompts": "datasets/prompts.jsonl",
    "completions": "output.jsonl",
})
"""Role -> its value in an example."""
# fmt: on


def _wrapped(order: Order) -> list[str]:
    """Its names, as comment lines."""
    names = " ".join(one.name for one in order.arguments)
    return textwrap.wrap(names, 110, initial_indent="#   ", subsequent_indent="#   ")


def scripts() -> Iterator[Script]:
    """All of them."""
    for family in FAMILIES:
        named = {f"run_{kind}_{family.name}.sh": words for kind, words in family.kinds.items()}
        named |= {pattern.format(family.name): words for pattern, words in family.others.items()}
        yield from (Script(family, name, words) for name, words in named.items())


def table_of_scripts() -> str:
    """Markdown: folder, script, orders."""
    rows = [f"| `{one.family.folder}` | `{one.name}` | {_codes(one.words)} |" for one in scripts()]
    return "\n".join(["| folder | script | orders |", "|---|---|---|", *rows])


def table_of_orders() -> str:
    """Markdown: order, number of arguments, names."""
    rows = [f"| `{one.word}` | {one.counts} | {one.signature} |" for one in ORDERS.values()]
    return "\n".join(["| order | count | arguments |", "|---|---|---|", *rows])


def _codes(words: str) -> str:
    return " ".join(f"`{word}`" for word in words.split(","))


def with_tables(text: str) -> str:
    """A README with its tables renewed."""
    for table in (table_of_scripts(), table_of_orders()):
        head = re.escape(table.splitlines()[0])
        text = re.sub(rf"^{head}\n(\|.*\n)+", lambda _, table=table: table + "\n", text, flags=re.MULTILINE)
    return text


def write() -> None:
    """Writes every script, and the tables in the READMEs."""
    for script in scripts():
        script.path.parent.mkdir(exist_ok=True)
        script.path.write_text(script.text)
        script.path.chmod(0o755)
    for readme in map(EXAMPLES.joinpath, READMES):
        readme.write_text(with_tables(readme.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    for script in scripts():
        print(script.path.relative_to(EXAMPLES), script.words)
