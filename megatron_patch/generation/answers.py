"""The file of answers: kept as they come, written in the order of the prompts once all are there.

    with Answers(Path("out.jsonl"), plan, overwrite=False) as answers:
        answers.done                      # {index: answer} of a run that was killed
        answers.add(3, {"completion": ...})
        answers.write(prompts)            # out.jsonl, by a rename

Beside the output lies ``.out.jsonl.partial`` meanwhile: what is being made in its first line, then a line for each
answer. What a run leaves there, however it ends, the next one of the same plan goes on with. It knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from io import SEEK_END
from pathlib import Path
from typing import Any, BinaryIO

from megatron_patch.checkpoint.directory import changes, locked, partial_of, write_text
from megatron_patch.generation.prompts import Prompt


class Answers:
    """A context manager; without an output nothing is written.

    Args:
        plan: what is being made, as JSON.
        overwrite: begin anew, and replace the output if there is one.
    """

    def __init__(self, output: Path | None, plan: Mapping[str, Any], overwrite: bool = False) -> None:
        self.done: dict[int, dict[str, Any]] = {}
        """Answers so far, by the index of their prompts."""
        self._output, self._plan, self._overwrite = output, json.loads(json.dumps(plan)), overwrite
        self._file: BinaryIO | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Answers:
        """Raises ValueError if another process is at it, or what was begun is not the same."""
        if self._output is not None:
            partial = partial_of(self._output)
            with ExitStack() as stack:
                self._file = stack.enter_context(partial.open("r+b" if partial.exists() else "x+b"))
                stack.enter_context(locked(partial))
                self._begin(partial)
                self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, index: int, answer: dict[str, Any]) -> None:
        """Keep an answer; it survives the process."""
        self.done[index] = answer
        if self._file is not None:
            self._append([index, answer])

    def write(self, prompts: Sequence[Prompt]) -> None:
        """Put everything in its place: a line for each prompt, its own fields first."""
        if self._output is not None:
            lines = ({**prompt.fields, **self.done[prompt.index]} for prompt in prompts)
            write_text(self._output, "".join(_line(line) for line in lines))
            partial_of(self._output).unlink()

    def _begin(self, partial: Path) -> None:
        """Take over what is there, or begin."""
        content = b"" if self._overwrite else self._file.read()
        whole = content[: content.rfind(b"\n") + 1]  # a process that was killed may have torn its last line
        self._file.truncate(len(whole))
        self._file.seek(0, SEEK_END)
        if not whole:
            self._append(self._plan)
            return
        plan, *answers = (_parsed(line, f"{partial}:{number}") for number, line in enumerate(whole.splitlines(), 1))
        if plan != self._plan:
            differences = "; ".join(changes(plan, self._plan))
            raise ValueError(f"{partial} was begun with something else: {differences}. --overwrite begins anew")
        self.done = dict(answers)

    def _append(self, value: Any) -> None:
        self._file.write(_line(value).encode())
        self._file.flush()


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _parsed(line: bytes, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: is damaged ({error}); --overwrite begins anew") from None
