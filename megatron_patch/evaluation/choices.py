"""`megatron-patch choices`: what a model answers, by what it finds most likely.

A question of several choices is answered by the choice of the largest log-likelihood behind the question. `acc` counts
right answers; `acc_norm` and `acc_bytes` those by log-likelihood per character and per byte of the answer, which is
fairer to long ones. A text is answered by its last word: `acc` counts those whose every token is the model's first
choice, `perplexity` is exp of -log p of the word, on average. All are defined as in EleutherAI's
lm-evaluation-harness. With n questions the standard error is the sample's deviation / sqrt(n); that of the perplexity
follows from that of its logarithm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_patch.checkpoint.directory import write_text
from megatron_patch.evaluation.arguments import ChoicesArgs
from megatron_patch.evaluation.likelihood import judge
from megatron_patch.evaluation.questions import Form, Question, read_questions, with_description, with_examples


@dataclass(frozen=True)
class Figure:
    """A mean over questions."""

    value: float
    standard_error: float | None
    """None for a single question."""


@dataclass(frozen=True)
class Marks:
    """What was found on the questions of a subject."""

    subject: str
    """Or total."""
    questions: int
    figures: dict[str, Figure]
    """By name: acc, acc_norm, acc_bytes of choices; acc, perplexity of texts."""


@dataclass(frozen=True)
class ChoicesReport:
    """What was asked, how, and what was found."""

    load: str
    """The checkpoint."""
    tokenizer: str
    """The tokenizer's directory."""
    num_fewshot: int
    """Examples before each question."""
    dtype: str
    """Of the computation."""
    processes: int
    """How many shared the work."""
    rows: tuple[Marks, ...]
    """For each subject."""
    total: Marks
    """Over all questions."""


@dataclass(frozen=True)
class Answer:
    """What the model made of a question."""

    place: str
    subject: str
    log_likelihoods: tuple[float, ...]
    """Of each answer, in nats."""
    greedy: tuple[bool, ...]
    """Whether each is what the model would say itself."""
    gold: int
    """The right one."""
    found: dict[str, float]
    """1 or 0 for each accuracy; log_p of a last word."""


def ask(args: ChoicesArgs) -> tuple[ChoicesReport, list[Answer]] | None:
    """Ask everything; every process calls it, and only rank 0 gets an answer.

    Raises:
        ValueError: arguments, questions, tokenizer and model do not fit one another.
    """
    questions = _questions(args)
    with judge(args) as model:
        pairs = [(question.context, f" {answer}") for question in questions for answer in question.answers]
        found = model.continuations(pairs)
        is_first, processes = model.is_first, dist.get_world_size()
    if not is_first:
        return None
    ends = accumulate((len(question.answers) for question in questions), initial=0)
    bounds = zip(questions, pairwise(ends), strict=True)
    answers = [_answer(question, found[first:last]) for question, (first, last) in bounds]
    subjects = {answer.subject: [] for answer in answers}
    for answer in answers:
        subjects[answer.subject].append(answer)
    report = ChoicesReport(
        load=args.load,
        tokenizer=args.tokenizer_directory,
        num_fewshot=args.num_fewshot,
        dtype=args.dtype,
        processes=processes,
        rows=tuple(_marks(subject, of_it) for subject, of_it in subjects.items()),
        total=_marks("total", answers),
    )
    return report, answers


def _questions(args: ChoicesArgs) -> list[Question]:
    form = Form(args.score, args.answer_cue)
    questions = read_questions(args.data, form, args.limit)
    if args.num_fewshot:
        examples = read_questions(args.few_shot_data, form)
        if examples[0].has_choices != questions[0].has_choices:
            raise ValueError(f"{examples[0].place} is of another kind than {questions[0].place}")
        questions = with_examples(questions, examples, args.num_fewshot)
    return with_description(questions, args.description) if args.description else questions


def _answer(question: Question, found: Sequence[tuple[float, bool]]) -> Answer:
    log_p, greedy = (tuple(column) for column in zip(*found, strict=True))
    values = _accuracies(question, np.array(log_p)) if question.has_choices else {"acc": greedy[0], "log_p": log_p[0]}
    told = {name: float(value) for name, value in values.items()}
    return Answer(question.place, question.subject, log_p, greedy, question.gold, told)


def _accuracies(question: Question, log_p: np.ndarray) -> dict[str, bool]:
    lengths = {
        "acc": np.ones(len(log_p)),
        "acc_norm": np.array([len(answer) for answer in question.answers]),
        "acc_bytes": np.array([len(answer.encode()) for answer in question.answers]),
    }
    return {name: int((log_p / length).argmax()) == question.gold for name, length in lengths.items()}


def _marks(subject: str, answers: Sequence[Answer]) -> Marks:
    found = {name: _mean([answer.found[name] for answer in answers]) for name in answers[0].found}
    if log_p := found.pop("log_p", None):
        value = math.exp(min(-log_p.value, 700))
        error = None if log_p.standard_error is None else value * log_p.standard_error
        found["perplexity"] = Figure(value, error)
    return Marks(subject, len(answers), found)


def _mean(values: Sequence[float]) -> Figure:
    number = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(number) if number > 1 else None
    return Figure(float(np.mean(values)), error)


# --------------------------------------------------------------------------------------------------------------- output


def show(report: ChoicesReport) -> None:
    """Print the report as a table."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(Column("choices", overflow="fold"), box=None, pad_edge=False)
    for name in ("questions", *report.total.figures):
        table.add_column(name, justify="right", no_wrap=True)
    for row in [*report.rows, *([report.total] if len(report.rows) > 1 else [])]:
        table.add_row(Text(row.subject), f"{row.questions:,}", *map(_text, row.figures.values()))
    Console().print(table)
    print(f"\n{report.num_fewshot} examples before each question, {report.processes} processes, {report.dtype}")


def write_answers(answers: Sequence[Answer], output: str) -> None:
    """Write a JSON line for each question."""
    lines = (json.dumps(asdict(answer), ensure_ascii=False) for answer in answers)
    write_text(Path(output), "".join(line + "\n" for line in lines))


def _text(figure: Figure) -> str:
    value = f"{figure.value:.4f}" if figure.value < 10_000 else f"{figure.value:.4g}"
    return value if figure.standard_error is None else f"{value} ± {figure.standard_error:.4f}"
