"""EleutherAI's lm-evaluation-harness with Megatron checkpoints, in any parallel layout.

    import lm_eval, megatron_patch.evaluation.harness
    lm_eval.simple_evaluate(model="megatron-patch", model_args="load=CHECKPOINT", tasks=["lambada_openai"])

Every process runs the same harness on the same requests: the model below them shares the work, and each gets the same
answers, so to the harness they are one process. Answers are those of its own Hugging Face backend (`HFLM`): where a
context ends, what stands for an empty one, what is left out of a long one, how a generated text ends. Needs `lm_eval`,
which is in the extra `harness`; it does not need its Hugging Face backend.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import torch.distributed as dist
from jinja2.exceptions import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table, warning_once
from megatron.core import parallel_state

from megatron_patch.checkpoint.directory import write_text
from megatron_patch.evaluation.arguments import HarnessArgs, ScoringArgs
from megatron_patch.evaluation.likelihood import judge
from megatron_patch.generation.engine import generate
from megatron_patch.generation.job import eos_token_ids
from megatron_patch.generation.params import SamplingParams
from megatron_patch.generation.stops import Stops
from megatron_patch.progress import Progress

# It would tell its maker of every file that is loaded, be it a local one.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

_LOGGER = logging.getLogger(__name__)
_MAX_NEW_TOKENS = 256
"""Where a task does not say; HFLM's."""
_BOOTSTRAP = 100_000
"""The harness's own number of draws for standard errors without a formula."""


@dataclass(frozen=True)
class _Prompt:
    """A request for text."""

    ids: tuple[int, ...]
    until: tuple[str, ...]
    max_new_tokens: int
    params: SamplingParams


@register_model("megatron-patch")
class MegatronPatchLM(LM):
    """A checkpoint as the harness sees a model.

    Args:
        args: which checkpoint, and how it is run; instead of it, its fields by name, as `model_args` gives them.
        batch_size: another name of `micro_batch_size`, the harness's own.
    """

    def __init__(self, args: ScoringArgs | None = None, *, batch_size: int | None = None, **options: Any) -> None:
        super().__init__()
        if args is None:
            args = ScoringArgs(**options, **({} if batch_size is None else {"micro_batch_size": int(batch_size)}))
            args.validate()
            args.check_world(int(os.environ.get("WORLD_SIZE", "1")))
        self.args = args
        entered = contextlib.ExitStack()
        self.judge = entered.enter_context(judge(args, parse_special_tokens=True))
        self.tokenizer = self.judge.opened.tokenizer
        self.close = weakref.finalize(self, entered.close)

    # ------------------------------------------------------------------------------------------------------- likelihood

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log p of each (context, continuation), and whether greedy decoding would produce it."""
        return self.judge.continuations([request.args for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each text."""
        return self.judge.whole([request.args[0] for request in requests])

    # ------------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to one of the strings that end it."""
        prompts = [self._prompt(*request.args) for request in requests]
        answers: dict[int, str] = {}
        with Progress("generate", None, "tokens", quiet=not self.judge.is_first) as progress:
            for params in dict.fromkeys(prompt.params for prompt in prompts):
                numbers = [number for number, prompt in enumerate(prompts) if prompt.params == params]
                found = self._generate([prompts[number] for number in numbers], params, progress)
                texts = (self.tokenizer.hf.decode(ids, skip_special_tokens=True) for ids in found)
                answers |= zip(numbers, texts, strict=True)
        return [
            postprocess_generated_text(answers[number], list(prompt.until), None)
            for number, prompt in enumerate(prompts)
        ]

    def _prompt(self, context: str, options: Mapping[str, Any]) -> _Prompt:
        asked = normalize_gen_kwargs(dict(options), _MAX_NEW_TOKENS)
        most = asked.pop("max_gen_toks")
        room = self.judge.opened.seq_length - most
        if room < 1:
            raise ValueError(f"max_gen_toks={most}: must be less than --seq-length {self.judge.opened.seq_length}")
        eos = None if self.tokenizer.eos is None else self.tokenizer.decode([self.tokenizer.eos])
        until = handle_stop_sequences(asked.pop("until"), eos=eos)
        (ids,) = self.judge.encoding.encode([context])
        ids = ids or list(self.judge.encoding.begin)
        return _Prompt(tuple(ids[-room:]), tuple(filter(None, until)), most, _sampling(asked))

    def _generate(self, prompts: Sequence[_Prompt], params: SamplingParams, progress: Progress) -> list[list[int]]:
        """The new ids of prompts that are answered in the same way; data-parallel ranks share them."""
        group = parallel_state.get_data_parallel_group()
        # Experts on several ranks want every step of each other.
        ranks = 1 if parallel_state.get_expert_model_parallel_world_size() > 1 else group.size()
        numbers = range(group.rank() % ranks, len(prompts), ranks)
        mine = [prompts[number] for number in numbers]
        stops = {until: Stops(self.tokenizer, until) for until in {prompt.until for prompt in mine}}

        def is_finished(index: int, ids: Sequence[int]) -> bool:
            return stops[mine[index].until].is_finished(mine[index].ids, ids)

        found = generate(
            self.judge.model,
            [prompt.ids for prompt in mine],
            params,
            max_new_tokens=[prompt.max_new_tokens for prompt in mine],
            eos_token_ids=eos_token_ids(Path(self.args.model_directory), self.tokenizer),
            batch_size=self.args.micro_batch_size,
            seeds=[(params.seed, number) for number in numbers],
            is_finished=is_finished,
            on_step=progress,
        )
        shares = [found]
        if ranks > 1:
            shares = [[] for _ in range(ranks)]
            dist.all_gather_object(shares, found, group=group)
        return [shares[number % ranks][number // ranks] for number in range(len(prompts))]

    # ------------------------------------------------------------------------------------------------------------- chat

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's chat template, or the one of that name."""
        if not chat_template:
            return None
        return self.tokenizer.hf.get_chat_template(None if chat_template is True else chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without its system message where the template refuses that."""
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self.tokenizer.hf.apply_chat_template(chat_history, **options)
        except TemplateError:  # raise_exception(...) of the template itself
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            warning_once(_LOGGER, "the chat template refuses a system message, which is left out")
            return self.tokenizer.hf.apply_chat_template(others, **options)

    @property
    def tokenizer_name(self) -> str:
        """Tells this tokenizer from others in the names of cached requests."""
        return self.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What the harness notes down beside its results."""
        names = ("load", "dtype", "tensor_model_parallel_size", "pipeline_model_parallel_size")
        told = {name: getattr(self.args, name) for name in names}
        return {**told, "seq_length": self.judge.opened.seq_length, "processes": dist.get_world_size()}


def _sampling(options: dict[str, Any]) -> SamplingParams:
    """How tokens are chosen, as a task's generation_kwargs have it once lengths and ends are taken out."""
    do_sample, known = options.pop("do_sample", False), {"temperature", "top_k", "top_p", "repetition_penalty"}
    if others := sorted({*options} - known):
        raise ValueError(f"generation_kwargs: {', '.join(others)} not supported; known are {', '.join(sorted(known))}")
    if not do_sample:  # as in transformers, what shapes the draws then has no say
        options = {name: value for name, value in options.items() if name == "repetition_penalty"}
    return SamplingParams(**options)


# ---------------------------------------------------------------------------------------------------------- the command


def run(args: HarnessArgs) -> dict[str, Any] | None:
    """Run the tasks; every process calls it, and only rank 0 gets the harness's results.

    Raises:
        ValueError: there is no such task.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    with contextlib.nullcontext() if is_first else _silent():
        manager = _tasks(args)
        names = _names(manager, args.tasks)
        lm = MegatronPatchLM(args)
        try:
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=names,
                num_fewshot=args.num_fewshot,
                limit=args.limit,
                apply_chat_template=args.apply_chat_template,
                system_instruction=args.system_instruction,
                task_manager=manager,
                log_samples=args.samples is not None,
                bootstrap_iters=_BOOTSTRAP if is_first else 0,
            )
        finally:
            lm.close()
    return results if is_first else None


def show(results: dict[str, Any], args: HarnessArgs) -> None:
    """Print the harness's own tables, and write the files that were asked for."""
    samples = results.pop("samples", {})
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if args.json:
        write_text(Path(args.json), _json(results, indent=2) + "\n")
    if args.samples:
        lines = (_json({"task": task, **sample}) for task, found in samples.items() for sample in found)
        write_text(Path(args.samples), "".join(line + "\n" for line in lines))


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, default=handle_non_serializable)


def _tasks(args: HarnessArgs) -> TaskManager:
    """Those of the user's directories if they are enough: to list the harness's own takes seconds."""
    local = TaskManager(include_path=list(args.include_path), include_defaults=False)
    if all(Path(name).is_file() or name in local.all_subtasks for name in args.tasks):
        return local
    return TaskManager(include_path=list(args.include_path))


def _names(manager: TaskManager, tasks: Sequence[str]) -> list[str]:
    found = {name: [name] if Path(name).is_file() else manager.match_tasks([name]) for name in tasks}
    if missing := [name for name, names in found.items() if not names]:
        raise ValueError(f"--tasks {' '.join(missing)}: no such task; --include-path DIR names a place of your own")
    return [name for names in found.values() for name in names]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """For ranks whose words another one says."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
