"""What a user may say about vocabulary extension: the flags of `vocab train | analyze | merge | init | verify`.

Each `validate` checks what can be known before heavy imports and reports all problems at once. This module imports
neither torch nor transformers. It does not know how any of it is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_patch.checkpoint.directory import is_megatron
from megatron_patch.data.arguments import raise_problems

Method = Literal["mean", "weighted", "first", "last", "random"]


def _at_least(flag: str, value: int, least: int) -> list[str]:
    return [] if value >= least else [f"--{flag} {value}: must be at least {least}"]


def _directory(flag: str, value: str, holding: str = "") -> list[str]:
    path = Path(value)
    if not path.is_dir():
        return [f"--{flag} {value!r}: no such directory"]
    return [] if not holding or (path / holding).is_file() else [f"--{flag} {value!r}: holds no {holding}"]


def _place(flag: str, value: str, overwrite: bool) -> list[str]:
    path = Path(value)
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    return [f"--{flag} {value!r} exists; give --overwrite to replace it, or another place"] * (taken and not overwrite)


def _texts(flag: str, names: tuple[str, ...], required: bool = True) -> list[str]:
    from megatron_patch.data.readers import expand_inputs

    if not names and not required:
        return []
    try:
        expand_inputs(names)
    except ValueError as error:
        return [f"--{flag}: {error}"]
    return []


@dataclass(frozen=True)
class VocabTrainArgs:
    """Learn new pieces from one's own text, for `merge` to take: a SentencePiece model, or the next merges of a
    byte-level base."""

    input: tuple[str, ...]
    """Files, directories or quoted globs: .jsonl, .json or .txt, each also as .gz or .zst, or .parquet."""
    output: str
    """The file to write: new.model for SentencePiece, new.json for a byte-level base."""
    base: str | None = None
    """Hugging Face directory of the base. A byte-level BPE (tokenizer.json, as Llama 3, Qwen and DeepSeek have it) must
    be given, for its own merges are continued; a SentencePiece model is trained alike with and without."""
    vocab_size: int = 20_000
    """Pieces to learn. Those that the base has, or that the script filter leaves out, are dropped by `merge`."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """How pieces are found. unigram is for SentencePiece alone, takes some thirty times as long and leaves more pieces
    that no text ever uses."""
    character_coverage: float = 0.9995
    """SentencePiece: share of the text's characters that become pieces; the rarest are left to the base's byte pieces.
    """
    text_key: str = "text"
    """Key of the JSON objects whose string is the document."""
    max_lines: int = 0
    """Train on a random sample of this many lines (0: all of them). Memory grows with them."""
    threads: int = 1
    """Threads of the training. The result does not depend on it."""
    overwrite: bool = False
    """Replace an existing model file."""

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = _texts("input", self.input) + _place("output", self.output, self.overwrite)
        problems += _at_least("vocab-size", self.vocab_size, 8) + _at_least("threads", self.threads, 1)
        problems += _at_least("max-lines", self.max_lines, 0)
        if not 0 < self.character_coverage <= 1:
            problems.append(f"--character-coverage {self.character_coverage}: must lie above 0 and at most at 1")
        if self.base is not None:
            problems += _directory("base", self.base)
        elif not self.output.endswith(".model"):
            problems.append(f"--output {self.output!r}: must end in .model; .json is for a byte-level --base")
        raise_problems(problems)

    def require_kind(self, byte_level: bool) -> None:
        """Raises ValueError where these arguments do not go with the kind of the base."""
        kind, ending = ("a byte-level base", ".json") if byte_level else ("SentencePiece", ".model")
        problems = [f"--output {self.output!r}: must end in {ending} for {kind}"] * (not self.output.endswith(ending))
        if byte_level and self.model_type != "bpe":
            problems.append(f"--model-type {self.model_type}: a byte-level base is continued with bpe")
        raise_problems(problems)


@dataclass(frozen=True)
class VocabMergeArgs:
    """Append the pieces that `train` has learned to a base tokenizer, so that old text keeps its ids."""

    base: str
    """Hugging Face directory of the base tokenizer, SentencePiece (tokenizer.model) or byte-level BPE (tokenizer.json);
    or a SentencePiece file."""
    new: str
    """What `train` has written for such a base."""
    output: str
    """Directory to write: tokenizer.json and tokenizer_config.json, and tokenizer.model for SentencePiece, all saying
    the same."""
    script: Literal["cjk", "any"] = "cjk"
    """Which new pieces to take. cjk: Chinese, Japanese and Korean characters and their punctuation only, so that all
    other text keeps its ids exactly. any: all of them."""
    corpus: tuple[str, ...] = ()
    """Text on which pieces must prove useful, and on which transformers must agree with the library that the base was
    made with; best the one that `train` read."""
    min_count: int = 1
    """Drop pieces that --corpus uses less often than this."""
    max_new: int = 0
    """Take no more than so many new pieces, the best first (0: all)."""
    check_documents: int = 2000
    """Documents of --corpus on which the two libraries are compared (0: all)."""
    pad_multiple: int = 128
    """Pad the vocabulary with named reserved rows to a multiple of this: Megatron's is 128 times the tensor parallel
    size."""
    text_key: str = "text"
    """Key of the JSON objects whose string is the document."""
    overwrite: bool = False
    """Replace an existing directory."""

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = [f"--base {self.base!r}: no such directory or file"] * (not Path(self.base).exists())
        problems += [f"--new {self.new!r}: no such file"] * (not Path(self.new).is_file())
        problems += _place("output", self.output, self.overwrite) + _texts("corpus", self.corpus, required=False)
        problems += _at_least("pad-multiple", self.pad_multiple, 1) + _at_least("min-count", self.min_count, 0)
        problems += _at_least("max-new", self.max_new, 0) + _at_least("check-documents", self.check_documents, 0)
        raise_problems(problems)


@dataclass(frozen=True)
class VocabAnalyzeArgs:
    """Measure, before anyone spends GPU time, what an extended tokenizer saves on held-out text."""

    base: str
    """Directory of the old tokenizer; any kind."""
    new: str
    """Directory of the extended tokenizer."""
    held_out: tuple[str, ...]
    """Text that neither was trained on: files, directories or quoted globs."""
    text_key: str = "text"
    """Key of the JSON objects whose string is the document."""
    max_documents: int = 20_000
    """Documents to read (0: all)."""
    json: str | None = None
    """Also write the report as JSON here."""
    png: str | None = None
    """Also draw tokens per character, old and new, here."""

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = _directory("base", self.base) + _directory("new", self.new) + _texts("held-out", self.held_out)
        problems += _at_least("max-documents", self.max_documents, 0)
        if self.png is not None and not self.png.endswith(".png"):
            problems.append(f"--png {self.png!r}: must end in .png")
        raise_problems(problems)


@dataclass(frozen=True)
class VocabInitArgs:
    """Give the tokens that a new tokenizer adds to a model their rows in the embedding and the output layer."""

    base: str
    """The model: a Hugging Face directory with its old tokenizer, or a Megatron checkpoint (torch_dist or legacy: its
    root, or the directory of one iteration)."""
    tokenizer: str
    """Directory of the extended tokenizer, which must give every old token its old id."""
    output: str
    """Directory to write, in the format of --base. Hugging Face: weight files without a changed tensor are hard-linked.
    Megatron: a release of the same layout, weights only."""
    method: Method = "mean"
    """What a new row is made of: the rows of the old tokens that its text is made of (mean; weighted by how often
    --corpus has them; the first; the last), or random numbers."""
    corpus: tuple[str, ...] = ()
    """Text whose old tokens --method weighted counts."""
    text_key: str = "text"
    """Key of the JSON objects whose string is the document."""
    pad_multiple: int = 128
    """Rows are padded to a multiple of this: Megatron's is 128 times the tensor parallel size."""
    seed: int = 1234
    """Seed of --method random."""
    copy: bool = False
    """Copy the weight files that do not change, instead of hard-linking them."""
    hf_config: str | None = None
    """Directory with the model's config.json and old tokenizer, for a Megatron --base that does not carry them."""
    trust_pickle: bool = False
    """Read a legacy --base that needs full unpickling. A pickle can run any code: trust its maker."""
    overwrite: bool = False
    """Replace an existing directory."""

    @property
    def is_megatron(self) -> bool:
        """Whether the model is a Megatron checkpoint."""
        return is_megatron(self.base)

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = _model("base", self.base) + _directory("tokenizer", self.tokenizer)
        problems += _place("output", self.output, self.overwrite) + _at_least("pad-multiple", self.pad_multiple, 1)
        problems += _texts("corpus", self.corpus, required=self.method == "weighted")
        problems += _megatron_only(self.is_megatron, self.hf_config, self.trust_pickle)
        if self.copy and self.is_megatron:
            problems.append("--copy is for a Hugging Face --base: a Megatron checkpoint is written anew, all of it")
        if self.corpus and self.method != "weighted":
            problems.append(f"--corpus has no meaning with --method {self.method}; it is for weighted")
        raise_problems(problems)


@dataclass(frozen=True)
class VocabVerifyArgs:
    """Prove that an extended model computes what its base does, and that its new rows are what they should be."""

    base: str
    """The model that was extended."""
    model: str
    """What `init` wrote."""
    level: Literal["rows", "logits"] | None = None
    """rows: names, shapes and every bit of the weights. logits: also load both models with transformers, one after the
    other, and compare hidden states and logits. Without it: logits for Hugging Face directories, which alone can have
    them, and rows for Megatron checkpoints."""
    tensor_model_parallel_size: int = 1
    """The rows must be divisible by this."""
    samples: int = 4
    """Sequences of old tokens to run."""
    length: int = 32
    """Tokens in each."""
    hf_config: str | None = None
    """Directory with the model's config.json and old tokenizer, for a Megatron --base that does not carry them."""
    trust_pickle: bool = False
    """Read legacy checkpoints that need full unpickling. A pickle can run any code: trust its maker."""
    json: str | None = None
    """Also write the report as JSON here."""

    @property
    def is_megatron(self) -> bool:
        """Whether the models are Megatron checkpoints."""
        return is_megatron(self.base)

    @property
    def wants_logits(self) -> bool:
        """Whether the models are to run."""
        return self.level == "logits" or (self.level is None and not self.is_megatron)

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = _model("base", self.base) + _model("model", self.model)
        problems += _at_least("samples", self.samples, 1) + _at_least("length", self.length, 1)
        problems += _at_least("tensor-model-parallel-size", self.tensor_model_parallel_size, 1)
        problems += _megatron_only(self.is_megatron, self.hf_config, self.trust_pickle)
        if not problems and self.is_megatron != is_megatron(self.model):
            problems.append(f"--base {self.base!r} and --model {self.model!r} must be of one format")
        if self.level == "logits" and self.is_megatron:
            problems.append("--level logits is for Hugging Face directories; choose rows, or convert both")
        raise_problems(problems)


def _model(flag: str, value: str) -> list[str]:
    return [] if is_megatron(value) else _directory(flag, value, "config.json")


def _megatron_only(megatron: bool, hf_config: str | None, trust_pickle: bool) -> list[str]:
    given = [name for name, value in (("hf-config", hf_config), ("trust-pickle", trust_pickle)) if value]
    problems = [f"--{name} is for a Megatron --base" for name in given if not megatron]
    return problems + (_directory("hf-config", hf_config, "config.json") if hf_config else [])
