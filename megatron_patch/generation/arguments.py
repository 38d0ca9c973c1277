"""What a user may say about generation: the flags of `generate`.

`validate` checks what can be known before heavy imports and reports all problems at once. This module imports neither
torch nor transformers. It does not know how any of it is done.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from megatron_patch.checkpoint.arguments import LoadArgs
from megatron_patch.data.sft.arguments import OWN_TEMPLATE, template_problems
from megatron_patch.generation.params import SamplingParams

_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class GenerateArgs(LoadArgs):
    """Continue prompts, or answer them as turns of a chat, with a checkpoint in any tensor and pipeline parallel
    layout."""

    prompt: tuple[str, ...] = ()
    """A prompt; may be given several times."""
    prompts_file: str | None = None
    """File of prompts instead: .txt with one in a line, or .jsonl with one JSON object in a line."""
    prompt_key: str = "prompt"
    """Key of the JSON objects whose string is the prompt. An object's own `max_new_tokens` and `seed` count before the
    flags; its `stop` (a string or a list) counts as well as --stop."""
    output: str | None = None
    """Write JSON lines to this file: each prompt's own fields, `completion`, `num_tokens` and `finish_reason` (eos,
    stop or length). A killed run goes on when the same command is given again. Without it, everything is printed."""
    overwrite: bool = False
    """Begin anew, and replace the output file if it exists."""
    chat: bool = False
    """A prompt is a user's turn, or a conversation under --messages-key, and is put into the chat template."""
    chat_template: str = OWN_TEMPLATE
    """For --chat: the tokenizer's own chat template (tokenizer), a file with a Jinja template, or the name of one, as
    for `finetune`."""
    system: str | None = None
    """For --chat: system message of conversations that have none."""
    messages_key: str = "messages"
    """For --chat: key of the JSON objects whose list of turns is the conversation."""
    max_new_tokens: int = 64
    """Most tokens to generate for a prompt; fewer where the model ends its text."""
    stop: tuple[str, ...] = ()
    """A completion ends before this text; may be given several times."""
    logprobs: bool = False
    """Also write `tokens` and `logprobs`: each generated token, and the natural logarithm of the probability that the
    model gave it (of the logits in float32, before temperature, penalty and filters)."""
    temperature: float = SamplingParams.temperature
    """Logits are divided by it before drawing; 0 is greedy: always the most likely token."""
    top_k: int = SamplingParams.top_k
    """Draw from this many of the most likely tokens; 0 draws from all."""
    top_p: float = SamplingParams.top_p
    """Draw from the smallest set of likely tokens whose probabilities reach this sum; 1 draws from all."""
    repetition_penalty: float = SamplingParams.repetition_penalty
    """Make tokens that a text already holds less likely by this factor; 1 is none."""
    seed: int = SamplingParams.seed
    """Of the random draws. The same seed gives the same text in every parallel layout and batch size."""
    batch_size: int = 8
    """Prompts computed at a time; one that is finished makes room for the next."""
    parse_special_tokens: bool = False
    """Read special tokens that are spelled out in a prompt (such as </s>) as control tokens, not as text."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the computation."""
    tensor_model_parallel_size: int = 1
    """Over how many processes each layer is split."""
    pipeline_model_parallel_size: int = 1
    """Over how many stages the layers are spread."""

    @property
    def params(self) -> SamplingParams:
        """How tokens are chosen."""
        return SamplingParams(**{one.name: getattr(self, one.name) for one in fields(SamplingParams)})

    def validate(self) -> None:
        """Raises ValueError naming everything that is wrong with these arguments."""
        problems = [*self.load_problems(), *self._prompt_problems(), *self._output_problems()]
        problems += self._chat_problems()
        counts = ("max_new_tokens", "batch_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
        for name in counts:
            if getattr(self, name) < 1:
                problems.append(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        try:
            _ = self.params
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))

    def check_world(self, num_processes: int) -> None:
        """Raises ValueError unless the layout takes exactly this many processes."""
        tensor, pipeline = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        if tensor * pipeline != num_processes:
            raise ValueError(
                f"--tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size {pipeline} takes "
                f"{tensor * pipeline} processes, not {num_processes}; choose --nproc-per-node {tensor * pipeline}"
            )

    def _prompt_problems(self) -> list[str]:
        if bool(self.prompt) == bool(self.prompts_file):
            return ["give the prompts: either --prompt TEXT (again for each) or --prompts-file FILE"]
        if self.prompts_file is None:
            return []
        if not self.prompts_file.endswith(_SUFFIXES):
            return [f"--prompts-file {self.prompts_file}: must end in {' or '.join(_SUFFIXES)}"]
        return [] if Path(self.prompts_file).is_file() else [f"--prompts-file {self.prompts_file}: no such file"]

    def _output_problems(self) -> list[str]:
        if self.output is None:
            return []
        path = Path(self.output)
        if path.is_dir() or not path.absolute().parent.is_dir():
            return [f"--output {self.output}: must be a file in a directory that exists"]
        if path.exists() and not self.overwrite:
            return [f"--output {self.output}: exists; give --overwrite to replace it, or another name"]
        return []

    def _chat_problems(self) -> list[str]:
        problems = ["--stop: must not be empty"] if "" in self.stop else []
        if self.logprobs and self.output is None:
            problems.append("--logprobs: is written to --output FILE; give one")
        if self.chat:
            problems += template_problems(self.chat_template)
            if self.parse_special_tokens:
                problems.append("--parse-special-tokens is not for --chat: there a user's text is always text")
            return problems
        defaults = {one.name: one.default for one in fields(self)}
        idle = [name for name in ("chat_template", "system", "messages_key") if getattr(self, name) != defaults[name]]
        return problems + [f"--{name.replace('_', '-')} is for --chat, which is not given" for name in idle]
