"""The work of `megatron-patch generate`: from validated arguments to the file of answers.

Prompts and tokenizer are read before weights are, by every process. The first process alone knows the file of answers,
and tells the others what is done already.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_patch.checkpoint.directory import is_huggingface, locate, read_json
from megatron_patch.checkpoint.formats import Source, file_states
from megatron_patch.checkpoint.logits import load_model
from megatron_patch.checkpoint.opening import open_weights
from megatron_patch.generation.answers import Answers
from megatron_patch.generation.arguments import GenerateArgs
from megatron_patch.generation.chat import Chat
from megatron_patch.generation.engine import PromptError
from megatron_patch.generation.prompts import Prompt, Reader
from megatron_patch.generation.text import Completion, generate_text
from megatron_patch.progress import Progress
from megatron_patch.tokenizer import Tokenizer, load_tokenizer
from megatron_patch.training.initialize import parallel

_SAME = (
    "max_new_tokens", "stop", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "logprobs", "chat",
    "system", "prompt_key", "messages_key", "parse_special_tokens", "dtype",
)  # fmt: skip
"""Arguments that answers depend on; batch size and parallel layout are not among them."""
_DIGITS = 16
"""Of a digest, to tell things apart by."""


@dataclass(frozen=True)
class _Job:
    """What is known before weights are read."""

    args: GenerateArgs
    prompts: list[Prompt]
    source: Path | Source
    tokenizer: Tokenizer
    chat: Chat | None
    ends: tuple[int, ...]
    """Tokens that end a text."""

    @staticmethod
    def of(args: GenerateArgs) -> _Job:
        reader = Reader(args.prompt_key, args.chat, args.messages_key, args.system, args.logprobs)
        prompts = reader.read(args.prompt, args.prompts_file)
        source = open_weights(args.load, hf_config=args.hf_config, trust_pickle=args.trust_pickle)
        tokenizer = load_tokenizer(args.tokenizer_directory, args.trust_remote_code)
        chat = Chat(tokenizer, args.chat_template) if args.chat else None
        ends = (*eos_token_ids(Path(args.model_directory), tokenizer), *(chat.end_ids if chat else ()))
        return _Job(args, prompts, source, tokenizer, chat, tuple(dict.fromkeys(ends)))

    def plan(self) -> dict[str, Any]:
        """What answers depend on, as JSON; a run that was killed goes on only if all of it is the same."""
        return {
            "prompts": _digest([prompt.fields for prompt in self.prompts]),
            "checkpoint": _digest(_weights(self.args.load)),
            "tokenizer": self.tokenizer.fingerprint[:_DIGITS],
            "chat template": self.chat and _digest(self.chat.source),
            "end of text": self.ends,
            **{name: getattr(self.args, name) for name in _SAME},
        }


def answer(args: GenerateArgs) -> None:
    """Answer every prompt, and write or print it; every process calls it.

    Raises:
        ValueError: arguments, prompts, tokenizer and model do not fit one another, or what a killed run left is of
            another plan.
    """
    job, is_first = _Job.of(args), os.environ.get("RANK", "0") == "0"
    output = Path(args.output) if args.output and is_first else None
    with Answers(output, job.plan(), args.overwrite) as answers:
        with parallel(args.tensor_model_parallel_size, args.pipeline_model_parallel_size):
            _compute(job, answers, quiet=not is_first)
        if is_first and output:
            answers.write(job.prompts)
        elif is_first:
            _show(job.prompts, answers.done)


def _compute(job: _Job, answers: Answers, quiet: bool) -> None:
    """Answer what is not answered yet."""
    args, done = job.args, [set(answers.done)]
    dist.broadcast_object_list(done, src=0)
    waiting = [prompt for prompt in job.prompts if prompt.index not in done[0]]
    (model,) = load_model(job.source, getattr(torch, args.dtype))
    with _named(waiting), _Report(len(job.prompts), len(done[0]), quiet) as report:

        def finish(prompt: Prompt, completion: Completion) -> None:
            answers.add(prompt.index, completion.fields())
            report.finish(completion)

        generate_text(
            model,
            job.tokenizer,
            waiting,
            args.params,
            max_new_tokens=args.max_new_tokens,
            eos_token_ids=job.ends,
            stop=args.stop,
            chat=job.chat,
            logprobs=args.logprobs,
            batch_size=args.batch_size,
            parse_special_tokens=args.parse_special_tokens,
            on_step=report.step,
            on_finish=finish,
        )


@contextmanager
def _named(prompts: Sequence[Prompt]) -> Iterator[None]:
    """The engine knows a prompt by its number; its user, by where it stands."""
    try:
        yield
    except PromptError as error:
        raise ValueError(f"{prompts[error.index].place}: the prompt {error.problem}") from None


# -------------------------------------------------------------------------------------------------------- what is there


def eos_token_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends a text: `eos_token_id` of the model's generation_config.json, else of its tokenizer."""
    file = folder / "generation_config.json"
    value = read_json(file).get("eos_token_id") if file.is_file() else None
    if value is None:
        value = [] if tokenizer.eos is None else tokenizer.eos
    return tuple(value) if isinstance(value, list) else (value,)


def _weights(load: str) -> dict[str, list[int]]:
    """Size and time of every file with weights."""
    if is_huggingface(load):
        folder, patterns = Path(load), ("*.safetensors", "*.bin")
    else:
        folder, patterns = locate(load)[1], ("**/*",)
    files = (file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    return file_states(folder, (str(file.relative_to(folder)) for file in files))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:_DIGITS]


# ------------------------------------------------------------------------------------------------------ what is said


class _Report:
    """Prompts that are finished, and how fast tokens come; a summary at the end."""

    def __init__(self, num_prompts: int, num_done: int, quiet: bool) -> None:
        self._quiet, self._before, self._tokens = quiet, num_done, 0
        self._reasons: Counter[str] = Counter()
        self._progress = Progress("generate", num_prompts - num_done, "prompts", quiet)

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._progress.__exit__()
        if not self._quiet and kind is None:
            print(f"generate: {self._summary()}", file=sys.stderr, flush=True)

    def step(self, num_tokens: int) -> None:
        self._tokens += num_tokens
        self._progress(0, f"{self._tokens:,} tokens, {self._rate():.1f} tokens/s")

    def finish(self, completion: Completion) -> None:
        self._reasons[completion.finish_reason] += 1
        self._progress(1)

    def _rate(self) -> float:
        return self._tokens / self._progress.seconds

    def _summary(self) -> str:
        reasons = ", ".join(f"{number} {reason}" for reason, number in self._reasons.most_common())
        before = f" ({self._before} were there already)" * bool(self._before)
        number = self._reasons.total()
        prompts = f"{number} prompt{'s' * (number != 1)}{before}" + f": {reasons}" * bool(reasons)
        return f"{prompts}; {self._tokens:,} tokens in {self._progress.seconds:.1f} s, {self._rate():.1f} tokens/s"


def _show(prompts: Sequence[Prompt], answers: Mapping[int, dict[str, Any]]) -> None:
    """Print prompts and completions."""
    for number, prompt in enumerate(prompts, 1):
        answer = answers[prompt.index]
        rule = f"--- {number} of {len(prompts)}: {answer['num_tokens']} tokens, {answer['finish_reason']} "
        print(f"{rule:-<100}\n{prompt.text}{answer['completion']}")
