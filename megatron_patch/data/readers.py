"""Text files to documents: JSON lines and plain text, as they are or compressed (.gz, .zst).

Reading happens in two steps, so that the cheap one can run in one process and the other in many: `read_records` cuts
files into raw records (path, line, bytes); `record_text` makes the text of one record, or raises `BadRecord`.

It does not know tokenizers, nor what becomes of a bad record.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson
import zstandard

_JSON_SUFFIXES = (".jsonl", ".json")
_TEXT_SUFFIXES = (".txt",)
_COMPRESSIONS = (".gz", ".zst")
SUFFIXES = tuple(kind + packed for kind in _JSON_SUFFIXES + _TEXT_SUFFIXES for packed in ("", *_COMPRESSIONS))

MAX_DOCUMENT_BYTES = 1 << 30
"""A record beyond this is refused: it is a corpus taken for one document, and it would fill the memory."""

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20


class Record(NamedTuple):
    """The raw bytes of one document and where they are from."""

    path: str
    line: int
    """Number of its first line, from 1."""
    data: bytes

    @property
    def place(self) -> str:
        """FILE:LINE, for messages."""
        return f"{self.path}:{self.line}"


class BadRecord(ValueError):
    """A record that is no document. `reason` is one of a few phrases to count by; the message tells the rest."""

    def __init__(self, record: Record, reason: str, detail: str = "") -> None:
        super().__init__(f"{record.place}: {reason}{detail and f': {detail}'}")
        self.reason = reason


# ---------------------------------------------------------------------------------------------------------------- files


def expand_inputs(inputs: Iterable[str]) -> tuple[Path, ...]:
    """The files that names, globs and directories stand for.

    Order is that of the names given; what one name expands to is sorted with numbers as numbers (part2 before part10).
    Raises ValueError naming every name that stands for nothing, every file of unknown kind or given twice.
    """
    files, problems = [], []
    for name in inputs:
        found = _expand(name)
        if not found:
            problems.append(f"{name!r} matches no file (in a directory, only {', '.join(SUFFIXES)} count)")
        files += found
    if not files and not problems:
        problems.append("no input given")
    problems += [f"{path} is none of {', '.join(SUFFIXES)}" for path in files if not path.name.endswith(SUFFIXES)]
    problems += [f"{path} is given {n} times" for path, n in Counter(map(Path.resolve, files)).items() if n > 1]
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(files)


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.name.endswith(SUFFIXES)]
    else:
        found = [Path(match) for match in glob.glob(name, recursive=True)]
    return sorted((file for file in found if file.is_file()), key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdigit() and part.isascii() else (-1, part) for part in parts]


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a .zst file of one or more frames.

    zstandard's own stream reader takes a file that was cut off in mid-frame for a complete one.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        # Corpora are often packed with --long=31, beyond the library's default window.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._packed = b""
        self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain and self._advance():
            pass
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def _advance(self) -> bool:
        """Decompresses the next piece; False at the end of the file."""
        piece, self._packed = self._packed or self._raw.read(_CHUNK // 8), b""
        if not piece:
            if self._frame is not None:
                raise EOFError("the file ends within a zstd frame")
            return False
        self._frame = self._frame or self._decompressor.decompressobj()
        self._plain = self._frame.decompress(piece)
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True


@contextmanager
def open_stream(raw: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of an open file. What is wrong with its compression becomes a ValueError with its path."""
    try:
        if path.suffix == ".gz":
            yield gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            yield io.BufferedReader(_ZstdFile(raw), _CHUNK)
        else:
            yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ValueError(f"{path}: cannot decompress, is the file complete? ({error})") from error


# -------------------------------------------------------------------------------------------------------------- records


def is_json(path: str) -> bool:
    """Whether a file holds JSON lines (and not plain text)."""
    return any(suffix in _JSON_SUFFIXES for suffix in Path(path).suffixes[-2:])


def read_records(path: Path, stream: IO[bytes], txt_document: str) -> Iterator[Record]:
    """Cuts one decompressed file into records. Blank lines of JSON, and between paragraphs, belong to none."""
    name = str(path)
    if is_json(name) or txt_document == "line":
        return (Record(name, number, line) for number, line in _lines(name, stream) if line.strip())
    if txt_document == "paragraph":
        return _paragraphs(name, stream)
    return _whole_file(name, stream)


def _lines(path: str, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without line ends; a byte-order mark at the start of the file is dropped."""
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        _refuse_giant(path, number, line)
        yield number, (line.removeprefix(_BOM) if number == 1 else line).rstrip(b"\r\n")


def _paragraphs(path: str, stream: IO[bytes]) -> Iterator[Record]:
    block: list[bytes] = []
    start = 1
    for number, line in _lines(path, stream):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield Record(path, start, b"\n".join(block))
            block = []
    if block:
        yield Record(path, start, b"\n".join(block))


def _whole_file(path: str, stream: IO[bytes]) -> Iterator[Record]:
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    _refuse_giant(path, 1, data)
    yield Record(path, 1, data.removeprefix(_BOM))


def _refuse_giant(path: str, line: int, data: bytes) -> None:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"{path}:{line}: a single document of more than {MAX_DOCUMENT_BYTES} bytes; "
            "is this one document per line, or a text file that --txt-document paragraph or line should divide?"
        )


def record_text(record: Record, key: str) -> str:
    """The text of a record, `key` naming it in JSON. Raises BadRecord if there is none."""
    text = _json_text(record, key) if is_json(record.path) else _decode(record)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        detail = f"character {error.start + 1} of the text is half a character"
        raise BadRecord(record, "lone surrogate", detail) from None
    return text


def _decode(record: Record) -> str:
    try:
        return record.data.decode()
    except UnicodeDecodeError as error:
        line = record.line + record.data.count(b"\n", 0, error.start)
        place = f"byte {error.start + 1}" if line == record.line else f"byte {error.start + 1}, in line {line}"
        raise BadRecord(record, "invalid UTF-8", place) from None


def _json_text(record: Record, key: str) -> str:
    value = _json_value(record)
    if not isinstance(value, dict):
        raise BadRecord(record, "not a JSON object", f"one object per line is needed, this is {_kind(value)}")
    if key not in value:
        keys = ", ".join(map(repr, value)) or "none"
        raise BadRecord(record, f"no key {key!r}", f"the keys are {keys}")
    if not isinstance(value[key], str):
        raise BadRecord(record, f"key {key!r} is no string", f"it is {_kind(value[key])}")
    return value[key]


def _json_value(record: Record) -> Any:
    try:
        return orjson.loads(record.data)
    except orjson.JSONDecodeError:
        pass
    # The strict parser also refuses what the standard library reads: NaN elsewhere in the object, a lone surrogate.
    text = _decode(record)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRecord(record, "broken JSON", _json_hint(record, error)) from None


def _json_hint(record: Record, error: Exception) -> str:
    if record.line == 1 and record.data.lstrip().startswith(b"["):
        return "the file seems to be one JSON array; write one object per line"
    return str(error)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
