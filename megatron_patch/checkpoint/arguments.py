"""What a user may say about conversion and its proof: the flags of `convert` and `verify`.

Each `validate` checks what can be known before heavy imports and reports all problems at once. This module imports
neither torch nor transformers. It does not know how any of it is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_patch.checkpoint.directory import is_huggingface, is_megatron

DType = Literal["float32", "bfloat16", "float16"]


def _source_problems(flag: str, path: str) -> list[str]:
    if not Path(path).is_dir():
        return [f"{flag} {path}: no such directory"]
    if not is_huggingface(path) and not is_megatron(path):
        return [
            f"{flag} {path}: neither a Hugging Face directory (config.json) nor a Megatron checkpoint"
            " (latest_checkpointed_iteration.txt)"
        ]
    return []


@dataclass(frozen=True)
class ConvertArgs:
    """Hugging Face checkpoint -> Megatron checkpoint (torch_dist, loads at any TP and PP), and back. Which way is seen
    from --source. Weights stream through; everything is checked before anything is written."""

    source: str
    """Hugging Face directory; or a Megatron checkpoint: its root, or the directory of one iteration."""
    target: str
    """Directory to make. It appears whole or not at all."""
    overwrite: bool = False
    """Replace the target if it is a checkpoint (never one that holds training iterations)."""
    dtype: DType | None = None
    """Cast every tensor. Without it each keeps its own dtype."""
    max_shard_size: str | None = None
    """Size of the Hugging Face files to write, such as 5GB. Without it: the original files again, or 5GB."""
    verify: bool = False
    """Compare source and target afterwards (as `megatron-patch verify` does); exit code 1 if they differ."""

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = _source_problems("--source", self.source)
        if Path(self.target).is_file():
            problems.append(f"--target {self.target}: is a file")
        if self.max_shard_size and is_huggingface(self.source):
            problems.append("--max-shard-size is for writing Hugging Face files; --source is one already")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class VerifyArgs:
    """Prove that two checkpoints are the same model: Hugging Face against Megatron by logits, loss and top-1 on text;
    two Hugging Face directories tensor by tensor, bit for bit. Exit code 1 if a bound is broken."""

    source: str
    """Hugging Face directory or Megatron checkpoint."""
    target: str
    """The other one; at least one of the two is a Hugging Face directory."""
    text: tuple[str, ...] = ()
    """Texts to compare on. Without any: a paragraph of English and one of Chinese."""
    text_file: tuple[str, ...] = ()
    """Files of text to compare on, one text each (UTF-8)."""
    max_tokens: int = 512
    """Where a text is cut."""
    dtype: DType = "float32"
    """Of the computation; bounds are made for float32."""
    max_abs: float = 1e-3
    """Bound: largest absolute difference of two logits."""
    loss: float = 1e-5
    """Bound: absolute difference of the mean losses."""
    top1: float = 1.0
    """Bound: least share of positions where both put the same token first."""
    json: str | None = None
    """Also write the report to this file."""
    tensor_model_parallel_size: int = 1
    """Over how many processes each layer of the Megatron model is split."""
    pipeline_model_parallel_size: int = 1
    """Over how many stages its layers are spread."""

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = _source_problems("--source", self.source) + _source_problems("--target", self.target)
        if not problems and not (is_huggingface(self.source) or is_huggingface(self.target)):
            problems.append("--source and --target are both Megatron checkpoints; one must be a Hugging Face directory")
        if self.max_tokens < 2:
            problems.append(f"--max-tokens {self.max_tokens}: the loss needs at least 2 tokens")
        problems += [f"--text-file {path}: no such file" for path in self.text_file if not Path(path).is_file()]
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if getattr(self, name) < 1:
                problems.append(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if problems:
            raise ValueError("\n".join(problems))

    def texts(self) -> list[tuple[str, str]] | None:
        """(name, text) of everything the user named; None for the built-in ones."""
        given = [(f"--text {i}", text) for i, text in enumerate(self.text, 1)]
        return given + [(Path(path).name, Path(path).read_text("utf-8")) for path in self.text_file] or None
