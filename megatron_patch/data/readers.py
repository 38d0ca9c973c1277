"""Files to documents: JSON lines, JSON arrays, parquet and plain text, as they are or compressed (.gz, .zst).

Reading happens in two steps: `read_records` cuts a file, or a part of it, into records; `record_text` makes the text of
one record, or raises `BadRecord`. A file that cannot be read to its end raises `DamagedInput`: what comes behind the
damage would be lost without a word.

It does not know tokenizers, how files are shared out, nor what becomes of a bad record.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

import ijson
import orjson
import zstandard

_JSON_SUFFIXES = (".jsonl", ".json")
_TEXT_SUFFIXES = (".txt",)
_COMPRESSIONS = (".gz", ".zst")
_PARQUET = ".parquet"
SUFFIXES = (
    *(kind + packed for kind in _JSON_SUFFIXES + _TEXT_SUFFIXES for packed in ("", *_COMPRESSIONS)),
    _PARQUET,
)
STDIN = Path("-")
"""Stands for standard input: JSON lines."""

MAX_DOCUMENT_BYTES = 1 << 30
"""A record beyond this is refused: it is a corpus taken for one document, and it would fill the memory."""

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
_ROWS = 256
"""Rows of a parquet file that are in memory as objects at a time."""


class Record(NamedTuple):
    """One document as it lies in a file, and where."""

    path: str
    line: int
    """Number of its first line, from 1; of the item of a JSON array; of the row of a parquet file."""
    data: bytes = b""
    """Its bytes, in files of lines."""
    value: Any = None
    """The item or row, in the others."""
    unit: str = ""
    """What `line` counts, if not lines: "item" or "row"."""

    @property
    def place(self) -> str:
        """FILE:LINE, for messages."""
        return place(self.path, self.line, self.unit)


def place(path: str, line: int, unit: str = "") -> str:
    """FILE:LINE, or FILE: item 3."""
    return f"{path}: {unit} {line}" if unit else f"{path}:{line}"


class BadRecord(ValueError):
    """A record that is no document. `reason` is one of a few phrases to count by; `detail` tells the rest."""

    def __init__(self, record: Record, reason: str, detail: str = "") -> None:
        super().__init__(f"{record.place}: {reason}{detail and f': {detail}'}")
        self.reason, self.detail = reason, detail


class DamagedInput(OSError):
    """Input that cannot be read to its end, or that holds what is no document where nothing may be left out."""


# ---------------------------------------------------------------------------------------------------------------- files


def expand_inputs(inputs: Iterable[str], stdin: bool = False) -> tuple[Path, ...]:
    """The files that names, globs and directories stand for.

    Order is that of the names given; what one name expands to is sorted with numbers as numbers (part2 before part10).
    Raises ValueError naming every name that stands for nothing, every file of unknown kind or given twice.

    Args:
        stdin: whether "-" stands for standard input, which `open_stream` does not open.
    """
    files, problems = [], []
    for name in inputs:
        found = [STDIN] if stdin and name == str(STDIN) else _expand(name)
        if not found:
            problems.append(f"{name!r} matches no file (in a directory, only {', '.join(SUFFIXES)} count)")
        files += found
    if not files and not problems:
        problems.append("no input given")
    unknown = [path for path in files if path != STDIN and not path.name.endswith(SUFFIXES)]
    problems += [f"{path} is none of {', '.join(SUFFIXES)}" for path in unknown]
    if any(is_parquet(path) for path in files) and find_spec("pyarrow") is None:
        problems.append("reading .parquet needs pyarrow, which is not installed; pip install pyarrow")
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
    """The decompressed bytes of an open file. What is wrong with its compression becomes DamagedInput with its path."""
    try:
        if path.suffix == ".gz":
            yield gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            yield io.BufferedReader(_ZstdFile(raw), _CHUNK)
        else:
            yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DamagedInput(f"{path}: cannot decompress, is the file complete? ({error})") from error


# -------------------------------------------------------------------------------------------------------------- records


@lru_cache
def is_json(path: str | Path) -> bool:
    """Whether a file holds JSON (and not plain text, nor rows)."""
    return Path(path) == STDIN or any(suffix in _JSON_SUFFIXES for suffix in Path(path).suffixes[-2:])


@lru_cache
def is_parquet(path: str | Path) -> bool:
    """Whether a file holds rows."""
    return Path(path).suffix == _PARQUET


def is_compressed(path: str | Path) -> bool:
    """Whether a file must be decompressed from its beginning."""
    return Path(path).suffix in _COMPRESSIONS


def is_array(path: str | Path, stream: IO[bytes]) -> bool:
    """Whether a file is one JSON array, which a .jsonl never is; the stream stays where it is."""
    if ".json" not in Path(path).suffixes[-2:]:
        return False
    peeked: bytes = stream.peek(64)  # type: ignore[attr-defined]  # of BufferedReader and GzipFile, all that come here
    return peeked.removeprefix(_BOM).lstrip().startswith(b"[")


def read_records(path: Path, stream: IO[bytes], txt_document: str) -> Iterator[Record]:
    """Cuts one decompressed file into records. Blank lines of JSON, and between paragraphs, belong to none."""
    name = str(path)
    if is_parquet(path):
        return read_rows(name, stream)
    if is_array(path, stream):
        return _items(name, stream)
    if is_json(path) or txt_document == "line":
        return (Record(name, number, line) for number, line in read_lines(name, stream) if line.strip())
    if txt_document == "paragraph":
        return _paragraphs(name, stream)
    return _whole_file(name, stream)


def read_lines(path: str, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without line ends; a byte-order mark at the start of the stream is dropped."""
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        _refuse_giant(path, number, line)
        yield number, (line.removeprefix(_BOM) if number == 1 else line).rstrip(b"\r\n")


def _items(path: str, stream: IO[bytes]) -> Iterator[Record]:
    """The items of a JSON array, one at a time."""
    number = 0
    if stream.peek(3).startswith(_BOM):  # type: ignore[attr-defined]
        stream.read(len(_BOM))
    try:
        for number, value in enumerate(ijson.items(stream, "item", use_float=True), start=1):
            yield Record(path, number, value=value, unit="item")
    except (ijson.JSONError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise DamagedInput(
            f"{path}: the JSON array breaks off behind item {number}: {why}; what follows cannot be told apart"
        ) from None


def read_rows(path: str, stream: IO[bytes], groups: range | None = None) -> Iterator[Record]:
    """The rows of a parquet file, or of some of its row groups, numbered from the first one read."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(stream)
        chosen = range(file.num_row_groups) if groups is None else groups
        number = 0
        for batch in file.iter_batches(_ROWS, row_groups=list(chosen)):
            for value in batch.to_pylist():
                number += 1
                yield Record(path, number, value=value, unit="row")
    except pyarrow.ArrowException as error:
        raise DamagedInput(f"{path}: cannot be read as parquet, is the file complete? ({error})") from None


def _paragraphs(path: str, stream: IO[bytes]) -> Iterator[Record]:
    block: list[bytes] = []
    start = 1
    for number, line in read_lines(path, stream):
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


# ---------------------------------------------------------------------------------------------------------------- texts

SURROGATE = "lone surrogate"
LAYOUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"records": {}, "wudao": {"text": ("title", "content")}}
)
"""Layout -> text that it offers -> keys whose strings it is, a line end between them; only the last must be there."""


def record_text(record: Record, key: str, layout: str = "records", repaired: Counter[str] | None = None) -> str:
    """The text of a record, `key` naming it in JSON. Raises BadRecord if there is none.

    Half a character (a surrogate without its other half, which JSON can spell) becomes U+FFFD; `repaired` counts it.
    """
    if is_json(record.path) or is_parquet(record.path):
        text = _joined(record, json_value(record), LAYOUTS[layout].get(key, (key,)))
    else:
        text = _decode(record)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        if repaired is not None:
            repaired[SURROGATE] += 1
    return text


def json_value(record: Record) -> dict[str, Any]:
    """The object of a record of JSON or parquet; BadRecord if it is none."""
    value = _parsed(record) if record.value is None else record.value
    if not isinstance(value, dict):
        raise BadRecord(record, "not a JSON object", f"one object per line is needed, this is {_kind(value)}")
    return value


def _joined(record: Record, value: dict[str, Any], keys: tuple[str, ...]) -> str:
    present = [key for key in keys[:-1] if value.get(key)]
    return "\n".join(_string(record, value, key) for key in (*present, keys[-1]))


def _string(record: Record, value: dict[str, Any], key: str) -> str:
    if key not in value:
        keys = ", ".join(map(repr, value)) or "none"
        raise BadRecord(record, f"no key {key!r}", f"the keys are {keys}")
    if not isinstance(value[key], str):
        raise BadRecord(record, f"key {key!r} is no string", f"it is {_kind(value[key])}")
    return value[key]


def _decode(record: Record) -> str:
    try:
        return record.data.decode()
    except UnicodeDecodeError as error:
        line = record.line + record.data.count(b"\n", 0, error.start)
        at = f"byte {error.start + 1}" if line == record.line else f"byte {error.start + 1}, in line {line}"
        raise BadRecord(record, "invalid UTF-8", at) from None


def _parsed(record: Record) -> Any:
    try:
        return orjson.loads(record.data)
    except orjson.JSONDecodeError:
        pass
    # The strict parser also refuses what the standard library reads: NaN elsewhere in the object, a lone surrogate.
    text = _decode(record)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        hint = "; is the file one JSON array? name it .json" if record.line == 1 and text.startswith("[") else ""
        raise BadRecord(record, "broken JSON", f"{error}{hint}") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
