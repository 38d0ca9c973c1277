"""What a user may say about evaluation: the flags of `evaluate`.

`validate` checks what can be known before heavy imports and reports all problems at once. This module imports neither
torch nor transformers. It does not know how any of it is done.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from megatron_patch.checkpoint.directory import huggingface_directory, is_huggingface, is_megatron, locate
from megatron_patch.data.arguments import raise_problems
from megatron_patch.training.arguments import ParallelArgs, too_small

_COUNTS = ("micro_batch_size", "seq_length", "stride", "max_documents", "distributed_timeout_minutes")


@dataclass(frozen=True)
class EvaluateArgs:
    """Loss and perplexity of a checkpoint on text or indexed data: per token, byte and character, in any parallel
    layout. Every token of a document is scored exactly once, given those before it in the document; the first one given
    the token that begins a text (BOS, or else the end-of-document token)."""

    load: str
    """Hugging Face directory; or a Megatron checkpoint: its root, or the directory of one iteration."""
    data: tuple[str, ...] = ()
    """Text: files, directories or quoted globs as `preprocess` reads them; paragraphs of a .txt are its documents. Each
    name has a row of its own in the report."""
    text_key: str = "text"
    """Key of the JSON objects whose string is the document."""
    data_path: tuple[str, ...] = ()
    """Indexed datasets: their prefixes, without .bin or .idx. Each has a row of its own."""
    max_documents: int | None = None
    """Score only so many documents of each, the first ones."""
    tokenizer_model: str | None = None
    """Hugging Face directory with the tokenizer (default: the checkpoint's own)."""
    seq_length: int | None = None
    """Most tokens that the model sees at once (default: as many as it has positions for, at most 2048). Figures of
    long documents depend on it: compare like with like."""
    stride: int | None = None
    """Tokens by which the window moves on in a longer document (default: --seq-length, the fastest). All but the first
    --seq-length tokens are scored with at least --seq-length minus this many before them."""
    append_eod: bool = False
    """Score the end-of-document token after every document, too. Without it, it is left out of indexed data as well."""
    begin_with: Literal["auto", "bos", "eod"] = "auto"
    """What the first token of a document is given: what the tokenizer itself puts before a text, or else its BOS token,
    or else the end-of-document token (auto); or one of the two."""
    micro_batch_size: int = 4
    """Windows that one process handles at once. The figures do not depend on it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the computation; the loss is computed in float32 from its logits."""
    tensor_model_parallel_size: int = 1
    """Over how many processes each layer is split; processes beyond all these sizes share the windows."""
    pipeline_model_parallel_size: int = 1
    """Over how many stages the layers are spread."""
    expert_model_parallel_size: int = 1
    """Over how many processes the experts are spread."""
    expert_tensor_parallel_size: int | None = None
    """Over how many processes each expert is split (default: as many as the other layers)."""
    sequence_parallel: bool = False
    """Split activations along the sequence where tensor parallelism would repeat them."""
    distributed_timeout_minutes: int = 10
    """How long a process waits for the others."""
    hf_config: str | None = None
    """Directory with the model's config.json and tokenizer, for a Megatron checkpoint that does not carry them."""
    trust_pickle: bool = False
    """Read a legacy checkpoint that needs full unpickling. A pickle can run any code: trust its maker."""
    trust_remote_code: bool = False
    """Let the tokenizer's directory run Python code of its own."""
    json: str | None = None
    """Also write the report to this file."""

    @property
    def layout(self) -> ParallelArgs:
        """How the processes share the work, as training has it."""
        names = {field.name for field in fields(self)} & {field.name for field in fields(ParallelArgs)}
        return ParallelArgs(**{name: getattr(self, name) for name in names})

    @property
    def tokenizer_directory(self) -> str:
        """Where the tokenizer lies."""
        if self.tokenizer_model or self.hf_config:
            return self.tokenizer_model or str(self.hf_config)
        return self.load if is_huggingface(self.load) else str(huggingface_directory(locate(self.load)[0]))

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = [*self._place_problems(), *self._data_problems(), *self.layout.problems(), *self._window_problems()]
        raise_problems([*problems, *too_small(self, _COUNTS)])

    def check_world(self, num_processes: int) -> None:
        """Raises ValueError unless the layout fits this many processes."""
        layout = self.layout
        model = layout.model_parallel_size
        if num_processes % model:
            raise ValueError(
                f"--tensor-model-parallel-size {layout.tensor_model_parallel_size} x --pipeline-model-parallel-size "
                f"{layout.pipeline_model_parallel_size} takes {model} processes, or a multiple of that, not "
                f"{num_processes}; choose --nproc-per-node {model}"
            )
        stage = num_processes // layout.pipeline_model_parallel_size
        if stage % layout.expert_parallel_size:
            raise ValueError(
                f"--expert-model-parallel-size {layout.expert_model_parallel_size}: the experts take "
                f"{layout.expert_parallel_size} processes, which must divide the {stage} of a pipeline stage"
            )

    def _place_problems(self) -> list[str]:
        problems = []
        if not Path(self.load).is_dir():
            problems.append(f"--load {self.load}: no such directory")
        elif not is_huggingface(self.load) and not is_megatron(self.load):
            kinds = "a Hugging Face directory (config.json) nor a Megatron checkpoint"
            problems.append(f"--load {self.load}: neither {kinds} (latest_checkpointed_iteration.txt)")
        elif self.hf_config and is_huggingface(self.load):
            problems.append(f"--hf-config is for a Megatron checkpoint; {self.load} has its own config.json")
        if self.hf_config and not (Path(self.hf_config) / "config.json").is_file():
            problems.append(f"--hf-config {self.hf_config}: no directory with a config.json")
        if self.tokenizer_model and not Path(self.tokenizer_model).is_dir():
            problems.append(f"--tokenizer-model {self.tokenizer_model}: no such directory")
        if self.json and (Path(self.json).is_dir() or not Path(self.json).absolute().parent.is_dir()):
            problems.append(f"--json {self.json}: must be a file in a directory that exists")
        return problems

    def _data_problems(self) -> list[str]:
        if not self.data and not self.data_path:
            return ["give what to score: --data FILE for text, --data-path PREFIX for indexed data"]
        names = [*self.data, *self.data_path]
        problems = [f"{name} is given {names.count(name)} times" for name in {*names} if names.count(name) > 1]
        files = [f"{prefix}{suffix}" for prefix in self.data_path for suffix in (".idx", ".bin")]
        return problems + [f"--data-path: {name} does not exist" for name in files if not Path(name).is_file()]

    def _window_problems(self) -> list[str]:
        length, tensor = self.seq_length, self.tensor_model_parallel_size
        if length is None:
            return []
        problems = []
        if self.stride is not None and self.stride > length:
            problems.append(f"--stride {self.stride}: must be at most --seq-length {length}, or tokens would be missed")
        if self.sequence_parallel and tensor > 1 and length % tensor:
            problems.append(
                f"--seq-length {length}: --sequence-parallel needs a multiple of --tensor-model-parallel-size {tensor}"
            )
        return problems
