"""What a user may say about evaluation: the flags of `evaluate`, `choices` and `harness`.

`validate` checks what can be known before heavy imports and reports all problems at once. This module imports neither
torch nor transformers. It does not know how any of it is done.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from megatron_patch.checkpoint.arguments import LoadArgs
from megatron_patch.data.arguments import raise_problems
from megatron_patch.training.arguments import ParallelArgs, too_small


@dataclass(frozen=True)
class ScoringArgs(LoadArgs):
    """Whatever scores text by a checkpoint: which one it is, and how it is run."""

    seq_length: int | None = None
    """Most tokens that the model sees at once (default: as many as it has positions for); of what is longer, the
    beginning is left out."""
    micro_batch_size: int = 4
    """Rows that one process handles at once. The figures do not depend on it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the computation; the loss is computed in float32 from its logits."""
    tensor_model_parallel_size: int = 1
    """Over how many processes each layer is split; processes beyond all these sizes share the rows."""
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
    json: str | None = None
    """Also write the report to this file."""

    @property
    def layout(self) -> ParallelArgs:
        """How the processes share the work, as training has it."""
        names = {field.name for field in fields(self)} & {field.name for field in fields(ParallelArgs)}
        return ParallelArgs(**{name: getattr(self, name) for name in names})

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        raise_problems(self.problems())

    def problems(self) -> list[str]:
        """Everything that is wrong with the model and how it is run."""
        length, tensor = self.seq_length, self.tensor_model_parallel_size
        problems = [*self.load_problems(), *self.layout.problems(), *_file_problems("--json", self.json)]
        if self.sequence_parallel and length is not None and tensor > 1 and length % tensor:
            problems.append(
                f"--seq-length {length}: --sequence-parallel needs a multiple of --tensor-model-parallel-size {tensor}"
            )
        return [*problems, *too_small(self, ("micro_batch_size", "seq_length", "distributed_timeout_minutes"))]

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


@dataclass(frozen=True)
class EvaluateArgs(ScoringArgs):
    """Loss and perplexity of a checkpoint on text or indexed data: per token, byte and character, in any parallel
    layout. Every token of a document is scored exactly once, given those before it in the document; the first one given
    the token that begins a text (BOS, or else the end-of-document token)."""

    data: tuple[str, ...] = ()
    """Text: files, directories or quoted globs as `preprocess` reads them; paragraphs of a .txt are its documents. Each
    name has a row of its own in the report."""
    text_key: str = "text"
    """Key of the JSON objects whose string is the document."""
    data_path: tuple[str, ...] = ()
    """Indexed datasets: their prefixes, without .bin or .idx. Each has a row of its own."""
    max_documents: int | None = None
    """Score only so many documents of each, the first ones."""
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

    def problems(self) -> list[str]:
        """Everything that is wrong with these values."""
        problems = [*super().problems(), *self._data_problems(), *too_small(self, ("stride", "max_documents"))]
        if self.stride and self.seq_length and self.stride > self.seq_length:
            limit = f"--seq-length {self.seq_length}"
            problems.append(f"--stride {self.stride}: must be at most {limit}, or tokens would be missed")
        return problems

    def _data_problems(self) -> list[str]:
        if not self.data and not self.data_path:
            return ["give what to score: --data FILE for text, --data-path PREFIX for indexed data"]
        names = [*self.data, *self.data_path]
        problems = [f"{name} is given {names.count(name)} times" for name in {*names} if names.count(name) > 1]
        files = [f"{prefix}{suffix}" for prefix in self.data_path for suffix in (".idx", ".bin")]
        return problems + [f"--data-path: {name} does not exist" for name in files if not Path(name).is_file()]


@dataclass(frozen=True)
class ChoicesArgs(ScoringArgs):
    """Accuracy of a checkpoint on local questions, without network: the choice that it finds most likely (C-Eval, MMLU,
    ARC, HellaSwag), or the last word of a text (LAMBADA)."""

    data: tuple[str, ...] = ()
    """Questions: .jsonl, .json or .parquet (also .gz, .zst) or .csv with a header; files, directories or quoted globs.
    A question has `question` (or `query`, `ctx`), its choices as `A`, `B`, ... or a list `choices`, and `answer` (or
    `gold`, `label`): a letter, or an index from 0. An object with a `text` alone asks for its last word. `subject`, or
    else the file's name without _val, _dev, _test, gives it its row in the report."""
    score: Literal["auto", "letter", "text"] = "auto"
    """What is scored as an answer: its letter, below the question and all choices; or its text, right behind the
    question. auto: letters for choices under A, B, ..., texts for those in a list."""
    answer_cue: str | None = None
    """Line that asks for the answer, below the question (default: "Answer:" for letters, none for texts)."""
    description: str | None = None
    """Paragraph before everything else; {subject} in it stands for the subject."""
    few_shot_data: tuple[str, ...] = ()
    """Questions that are shown with their answers, of the same forms; those of the same subject."""
    num_fewshot: int = 0
    """How many of them, the first ones, are shown before each question."""
    limit: int | None = None
    """Ask only so many questions of each subject, the first ones."""
    output: str | None = None
    """Also write a JSON line for each question to this file: its place, the log-likelihoods, what was chosen."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values."""
        problems = [*super().problems(), *too_small(self, ("limit",)), *_file_problems("--output", self.output)]
        if not self.data:
            problems.append("give the questions: --data FILE")
        if self.num_fewshot < 0:
            problems.append(f"--num-fewshot {self.num_fewshot}: must not be negative")
        if bool(self.few_shot_data) != bool(self.num_fewshot):
            problems.append("--few-shot-data and --num-fewshot go together: what is shown, and how much of it")
        return problems


@dataclass(frozen=True)
class HarnessArgs(ScoringArgs):
    """Tasks of EleutherAI's lm-evaluation-harness with a checkpoint, in any parallel layout."""

    tasks: tuple[str, ...] = ()
    """Names of tasks, groups or tags, or YAML files of tasks."""
    include_path: tuple[str, ...] = ()
    """Directories with YAML files of further tasks."""
    num_fewshot: int | None = None
    """Examples before each question (default: what each task says)."""
    limit: int | None = None
    """Ask only so many questions of each task, the first ones."""
    apply_chat_template: bool = False
    """Put questions into the tokenizer's chat template; examples become turns."""
    system_instruction: str | None = None
    """System message, or what stands before everything else without a chat template."""
    samples: str | None = None
    """Also write a JSON line for each question to this file: the document, requests, answers and metrics."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values."""
        problems = [*super().problems(), *too_small(self, ("limit",)), *_file_problems("--samples", self.samples)]
        if not self.tasks:
            problems.append("give what to run: --tasks NAME")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            problems.append(f"--num-fewshot {self.num_fewshot}: must not be negative")
        missing = [folder for folder in self.include_path if not Path(folder).is_dir()]
        problems += [f"--include-path {folder}: no such directory" for folder in missing]
        if find_spec("lm_eval") is None:
            problems.append("lm_eval is not installed; pip install 'megatron-patch[harness]'")
        return problems


def _file_problems(flag: str, name: str | None) -> list[str]:
    if name and (Path(name).is_dir() or not Path(name).absolute().parent.is_dir()):
        return [f"{flag} {name}: must be a file in a directory that exists"]
    return []
