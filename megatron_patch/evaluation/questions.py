"""Questions of local files, each as a context and the answers that are scored behind it.

    {"question": "Which animal barks?", "A": "Cat", "B": "Dog", "answer": "B"}          C-Eval, MMLU; also as .csv
    {"ctx": "The sun rises in the", "choices": ["west", "east"], "label": 1}            HellaSwag, ARC
    {"text": "There was no answer, so she knocked again at the door"}                   LAMBADA: its last word

It knows files and texts: no tokens and no model.
"""

from __future__ import annotations

import csv
import glob
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_patch.data.readers import BadRecord, Record, expand_inputs, json_value, open_stream, read_records

_QUESTION = ("question", "query", "ctx")
_ANSWER = ("answer", "gold", "label")
_SPLIT = re.compile(r"[_-](train|dev|val|validation|test)$")
_CUE = "Answer:"


@dataclass(frozen=True)
class Form:
    """How a question is put."""

    score: Literal["auto", "letter", "text"] = "auto"
    """What an answer is: its letter, or its text; auto: the letter of choices that have one."""
    cue: str | None = None
    """Line below the question; by default one before letters, and none before texts."""


@dataclass(frozen=True)
class Question:
    """One question."""

    place: str
    """FILE:LINE."""
    subject: str
    context: str
    """What comes before the answer."""
    answers: tuple[str, ...]
    """What may come behind it and a space; of a text its last word alone."""
    gold: int
    """Which of them is right."""

    @property
    def has_choices(self) -> bool:
        """Whether there are answers to choose from."""
        return len(self.answers) > 1


def read_questions(names: Sequence[str], form: Form, limit: int | None = None) -> list[Question]:
    """The questions of files; of each subject so many at most, the first ones.

    Raises:
        ValueError: there is none; or a record is none, or not of the same kind as the first; it names file and line.
    """
    found: list[Question] = []
    counts: dict[str, int] = {}
    for record in _records(names):
        question = _question(record, form)
        if question.has_choices != (found or [question])[0].has_choices:
            raise BadRecord(record, f"is of another kind than {found[0].place}: one has choices, the other a text")
        counts[question.subject] = counts.get(question.subject, 0) + 1
        if limit is None or counts[question.subject] <= limit:
            found.append(question)
    if not found:
        raise ValueError(f"no question in {', '.join(names)}")
    return found


def with_examples(questions: Sequence[Question], examples: Sequence[Question], number: int) -> list[Question]:
    """Each question behind the first examples of its subject, with their answers; of any where all have one subject.

    Raises:
        ValueError: there are not so many.
    """
    subjects: dict[str, list[Question]] = {}
    for example in examples:
        subjects.setdefault(example.subject, []).append(example)
    any_subject = examples if len(subjects) == 1 else []
    found = []
    for question in questions:
        shown = subjects.get(question.subject, any_subject)[:number]
        if len(shown) < number:
            raise ValueError(
                f"--num-fewshot {number}: --few-shot-data has {len(shown)} of subject {question.subject!r}"
            )
        before = "".join(f"{example.context} {example.answers[example.gold]}\n\n" for example in shown)
        found.append(replace(question, context=before + question.context))
    return found


def with_description(questions: Sequence[Question], description: str) -> list[Question]:
    """Each question behind a paragraph; {subject} in it is filled in."""
    return [
        replace(one, context=f"{description.replace('{subject}', one.subject.replace('_', ' '))}\n\n{one.context}")
        for one in questions
    ]


# ---------------------------------------------------------------------------------------------------------------- files


def _records(names: Sequence[str]) -> Iterator[Record]:
    tables = [name for name in names if name.endswith(".csv")]
    for path in (path for name in tables for path in sorted(glob.glob(name, recursive=True)) or [name]):
        yield from _table(path)
    others = [name for name in names if name not in tables]
    for path in expand_inputs(others) if others else ():
        with path.open("rb") as raw, open_stream(raw, path) as stream:
            yield from read_records(path, stream, "line")


def _table(path: str) -> Iterator[Record]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows, line = csv.DictReader(file), 2
        try:
            for row in rows:
                record = Record(path, line, value=row)
                if None in row or None in row.values():
                    raise BadRecord(record, f"does not have the {len(rows.fieldnames or ())} columns of the first line")
                yield record
                line = rows.line_num + 1
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8: {error}") from None


def _subject(record: Record, value: Mapping[str, Any]) -> str:
    named = value.get("subject")
    return named if isinstance(named, str) and named else _SPLIT.sub("", Path(record.path).name.partition(".")[0])


# ---------------------------------------------------------------------------------------------------------- one of them


def _question(record: Record, form: Form) -> Question:
    value = json_value(record)
    subject = _subject(record, value)
    asked = [name for name in _QUESTION if name in value]
    if not asked and "text" in value:
        context, _, word = _string(record, value, "text").rpartition(" ")
        if not context.strip():
            raise BadRecord(record, "text has no word before its last one")
        return Question(record.place, subject, context, (word,), 0)
    if not asked:
        raise BadRecord(record, "is no question", f"give {', '.join(_QUESTION)} and choices, or a text")
    question, letters = _string(record, value, asked[0]), _letters(record, value)
    choices = letters or _listed(record, value)
    gold = _gold(record, value, len(choices))
    names = string.ascii_uppercase[: len(choices)]
    if form.score == "letter" or (form.score == "auto" and letters):
        lines = [f"{name}. {choice}" for name, choice in zip(names, choices, strict=True)]
        return Question(record.place, subject, "\n".join([question, *lines, form.cue or _CUE]), tuple(names), gold)
    context = "\n".join([question, form.cue] if form.cue else [question])
    return Question(record.place, subject, context, tuple(choices), gold)


def _letters(record: Record, value: Mapping[str, Any]) -> list[str]:
    """The choices under A, B, ...; a table has empty cells behind the last one."""
    names = list(string.ascii_uppercase)
    number = next(index for index, name in enumerate(names) if value.get(name) in (None, ""))
    return [_string(record, value, name) for name in names[:number]] if number > 1 else []


def _listed(record: Record, value: Mapping[str, Any]) -> list[str]:
    found = value.get("choices")
    if not isinstance(found, list) or len(found) < 2:
        raise BadRecord(record, "has no choices", "give A, B and so on, or a list of at least two under choices")
    return [_string(record, dict(enumerate(found)), index) for index in range(len(found))]


def _gold(record: Record, value: Mapping[str, Any], number: int) -> int:
    names = [name for name in _ANSWER if name in value]
    if not names:
        raise BadRecord(record, "has no answer", f"give {', '.join(_ANSWER)}")
    answer, letters = value[names[0]], string.ascii_uppercase[:number]
    text = str(answer).strip()
    if isinstance(answer, str) and len(text) == 1 and text in letters:
        return letters.index(text)
    if not isinstance(answer, bool) and text.isdecimal() and int(text) < number:
        return int(text)
    raise BadRecord(record, f"{names[0]} {answer!r} is neither one of {', '.join(letters)} nor 0..{number - 1}")


def _string(record: Record, value: Mapping[Any, Any], key: str | int) -> str:
    found = value[key]
    if not isinstance(found, str) or not found.strip():
        what = f"choice {key}" if isinstance(key, int) else key
        raise BadRecord(record, f"{what} is no text", repr(found))
    return found.strip()
