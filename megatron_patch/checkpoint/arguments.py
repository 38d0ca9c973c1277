"""What a user may say about conversion and its proof: the flags of `convert` and `verify`.

Each `validate` checks what can be known before heavy imports and reports all problems at once. This module imports
neither torch nor transformers. It does not know how any of it is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_patch.checkpoint.directory import huggingface_directory, is_huggingface, is_megatron, locate

DType = Literal["float32", "bfloat16", "float16"]


Format = Literal["huggingface", "torch_dist", "legacy"]
Naming = Literal["local", "te", "2023"]
Level = Literal["names", "checksums", "logits"]

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "make_vocab_size_divisible_by",
    "workers",
)
"""Fields that, where given, must be at least 1."""

_LEGACY_ONLY = (
    "naming",
    "expert_layout",
    "make_vocab_size_divisible_by",
    "extra_vocab_size",
    "replicate_kv_heads",
)
"""Fields that change how a legacy checkpoint is written, and nothing else."""


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
class LoadArgs:
    """Which checkpoint of whatever format, and which tokenizer."""

    load: str
    """Hugging Face directory; or a Megatron checkpoint: its root, or the directory of one iteration."""
    tokenizer_model: str | None = None
    """Hugging Face directory with the tokenizer (default: the checkpoint's own)."""
    hf_config: str | None = None
    """Directory with the model's config.json and tokenizer, for a Megatron checkpoint that does not carry them."""
    trust_pickle: bool = False
    """Read a legacy checkpoint that needs full unpickling. A pickle can run any code: trust its maker."""
    trust_remote_code: bool = False
    """Let the tokenizer's directory run Python code of its own."""

    @property
    def model_directory(self) -> str:
        """Where config.json, generation_config.json and the like lie."""
        if self.hf_config or is_huggingface(self.load):
            return self.hf_config or self.load
        return str(huggingface_directory(locate(self.load)[0]))

    @property
    def tokenizer_directory(self) -> str:
        """Where the tokenizer lies."""
        return self.tokenizer_model or self.model_directory

    def load_problems(self) -> list[str]:
        """What is wrong with these places."""
        problems = _source_problems("--load", self.load)
        if not problems and self.hf_config and is_huggingface(self.load):
            problems.append(f"--hf-config is for a Megatron checkpoint; {self.load} has its own config.json")
        if self.hf_config and not (Path(self.hf_config) / "config.json").is_file():
            problems.append(f"--hf-config {self.hf_config}: no directory with a config.json")
        if self.tokenizer_model and not Path(self.tokenizer_model).is_dir():
            problems.append(f"--tokenizer-model {self.tokenizer_model}: no such directory")
        return problems


def _size_problems(args: object, names: tuple[str, ...]) -> list[str]:
    values = {name: getattr(args, name) for name in names}
    return [
        f"{_flag(name)} {value}: must be at least 1"
        for name, value in values.items()
        if value is not None and value < 1
    ]


@dataclass(frozen=True)
class ConvertArgs:
    """Convert a checkpoint between Hugging Face, Megatron torch_dist (loads at any TP and PP) and Megatron legacy
    (mp_rank_XX files), or reshard one. What the source is, is seen. Weights stream through; everything is checked
    before anything is written, and the target appears whole or not at all."""

    source: str
    """Hugging Face directory; or a Megatron checkpoint: its root, or the directory of one iteration."""
    target: str
    """Directory to make."""
    target_format: Format | None = None
    """What to write. Without it: torch_dist from Hugging Face, huggingface from Megatron."""
    tensor_model_parallel_size: int = 1
    """Legacy: over how many files each layer is split. torch_dist loads at any size."""
    pipeline_model_parallel_size: int = 1
    """Legacy: over how many stages the layers are spread."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Legacy: model chunks per stage (interleaved pipeline)."""
    expert_model_parallel_size: int = 1
    """Legacy: over how many groups the experts are spread."""
    expert_tensor_parallel_size: int | None = None
    """Legacy: over how many files each expert is split: 1 or the tensor parallel size, which is the default."""
    decoder_first_pipeline_num_layers: int | None = None
    """Legacy: layers of the first stage, where the stages are not equal."""
    decoder_last_pipeline_num_layers: int | None = None
    """Legacy: layers of the last stage, where the stages are not equal."""
    pipeline_model_parallel_layout: str | None = None
    """Legacy: Megatron's layout string, such as Et*3|t*4|t*4L: embedding, layers and loss of each stage."""
    naming: Naming | None = None
    """Legacy: parameter names of megatron-core's local layers (the default), of its Transformer Engine layers, or of
    Megatron-LM in 2023 (language_model.encoder.layers...)."""
    expert_layout: Literal["sequential", "grouped"] | None = None
    """Legacy: one tensor per expert named by its module (the default), or numbered in one grouped module."""
    make_vocab_size_divisible_by: int | None = None
    """Legacy: the vocabulary is padded to a multiple of this (128 without it) times the tensor parallel size."""
    extra_vocab_size: int | None = None
    """Legacy: pad the vocabulary by exactly so many rows instead."""
    replicate_kv_heads: bool = False
    """Legacy, with more files than key/value heads: repeat the heads, one a file, instead of cutting them as
    megatron-core does."""
    dtype: DType | None = None
    """Cast every tensor. Without it each keeps its own dtype."""
    max_shard_size: str | None = None
    """Hugging Face: size of the files to write, such as 5GB. Without it: the original files again, or 5GB."""
    hf_config: str | None = None
    """Directory with the model's config.json and tokenizer, for a Megatron checkpoint that does not carry them."""
    trust_pickle: bool = False
    """Read a legacy checkpoint that needs full unpickling. A pickle can run any code: trust its maker."""
    workers: int = 1
    """Processes that share the work on this machine. On several machines: start it under torchrun."""
    dry_run: bool = False
    """Print the plan (tensors, files, bytes, memory, time) and write nothing; weights are not read or needed."""
    disk_speed: str = "500MB"
    """Bytes a second that the dry run's time estimate assumes for reading and for writing."""
    resume: bool = False
    """Continue a conversion that was killed: the same command again; what is whole is not done again."""
    overwrite: bool = False
    """Replace the target if it is a checkpoint (never one that holds training iterations)."""
    verify: bool = False
    """Compare source and target afterwards (as `megatron-patch verify` does); exit code 1 if they differ."""
    json: str | None = None
    """Also write the report (or the dry run's plan, tensor by tensor) to this file."""

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = _source_problems("--source", self.source) + _size_problems(self, _SIZES)
        if Path(self.target).is_file():
            problems.append(f"--target {self.target}: is a file")
        if self.hf_config and not (Path(self.hf_config) / "config.json").is_file():
            problems.append(f"--hf-config {self.hf_config}: no directory with a config.json")
        if (self.extra_vocab_size or 0) < 0:
            problems.append(f"--extra-vocab-size {self.extra_vocab_size}: must be at least 0")
        problems += self._misplaced()
        if problems:
            raise ValueError("\n".join(problems))

    def _misplaced(self) -> list[str]:
        """Options that have no effect on the format to be written; ignoring them would mislead."""
        written = self.target_format or ("torch_dist" if is_huggingface(self.source) else "huggingface")
        given = [name for name in _LEGACY_ONLY if getattr(self, name) not in (None, False)]
        problems = [f"{_flag(name)} is for --target-format legacy, not {written}" for name in given]
        problems = [] if written == "legacy" else problems
        if self.hf_config and is_huggingface(self.source):
            problems.append(f"--hf-config is for a Megatron --source; {self.source} has its own config.json")
        if self.max_shard_size and written != "huggingface":
            problems.append(f"--max-shard-size is for writing Hugging Face files, not {written}")
        return problems


@dataclass(frozen=True)
class VerifyArgs:
    """Prove that two checkpoints are the same model, in any two formats and layouts: by names and shapes, bit for bit,
    or by logits, loss and top-1 on text against transformers. Exit code 1 if they differ or a bound is broken."""

    source: str
    """Hugging Face directory or Megatron checkpoint."""
    target: str
    """The other one."""
    level: Level | None = None
    """How deep: names (and shapes); checksums (every tensor, bit by bit); logits (one of the two must be a Hugging Face
    directory). Without it: logits for a Hugging Face and a Megatron checkpoint, else checksums."""
    hf_config: str | None = None
    """Directory with the model's config.json, for a Megatron checkpoint that does not carry it."""
    trust_pickle: bool = False
    """Read a legacy checkpoint that needs full unpickling. A pickle can run any code: trust its maker."""
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
        both = not problems and [is_huggingface(self.source), is_huggingface(self.target)]
        if self.level == "logits" and both and sum(both) != 1:
            problems.append("--level logits compares a Hugging Face directory with a Megatron checkpoint")
        if self.max_tokens < 2:
            problems.append(f"--max-tokens {self.max_tokens}: the loss needs at least 2 tokens")
        problems += [f"--text-file {path}: no such file" for path in self.text_file if not Path(path).is_file()]
        problems += _size_problems(self, ("tensor_model_parallel_size", "pipeline_model_parallel_size"))
        if problems:
            raise ValueError("\n".join(problems))

    def texts(self) -> list[tuple[str, str]] | None:
        """(name, text) of everything the user named; None for the built-in ones."""
        given = [(f"--text {i}", text) for i, text in enumerate(self.text, 1)]
        return given + [(Path(path).name, Path(path).read_text("utf-8")) for path in self.text_file] or None
