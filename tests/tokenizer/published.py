"""Tiny directories as published for Baichuan, ChatGLM, GLM-4, GLM and Qwen, each with code that must not run."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import regex
import sentencepiece

from tests.tokenizer import make

HARD = (
    *(text[:300] for text in make.TEXTS),
    "\n\n\n  \n\t\t x\n",
    "a" + " " * 2 + "b" + " " * 81 + "c" + " " * 200,
    "１２３ ٣٤ 12345 it's IT'S I'ſ don’t",
    "<|im_start|>[gMASK]<sop>sop eop [CLS]<|extra_0|><n><|tab|><|blank_5|><image_7>",
    "philosophy \x00\x01\x1f\x7f\x85\xa0\u200b e\u0301",
    "",
)
"""Text that is hard on these tokenizers."""

MARKER = "ran"


def sp_model(file: Path, symbols: Sequence[str] = (), **options: object) -> sentencepiece.SentencePieceProcessor:
    """Trains a SentencePiece model of a few hundred pieces."""
    file.parent.mkdir(parents=True, exist_ok=True)
    settings = {"vocab_size": 620, "hard_vocab_limit": False, "model_type": "bpe", "byte_fallback": True}
    settings |= {"normalization_rule_name": "identity"} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make.corpus(40)), model_prefix=str(file.with_suffix("")), minloglevel=2,
        user_defined_symbols=list(symbols), **settings,
    )  # fmt: skip
    file.with_suffix(".vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


def ranks(file: Path) -> dict[bytes, int]:
    """Writes the tokens of a small byte-level BPE as tiktoken does; returns them."""
    words = [word.encode() for text in make.TEXTS for word in regex.findall(r" ?\p{L}{1,6}|  +|\n+", text)[:40]]
    tokens = [bytes([i]) for i in range(256)]
    for word in words:  # every beginning of a word: each is the one before and a byte
        tokens += [word[:end] for end in range(2, len(word) + 1)]
    tokens += [b"aa", b"aaa", b"xx", b"xxxx", b"ab", b"bc", b"abc", b"cd", b"bcd", b"whole\xff", b"12", b"123", b"1234"]
    found = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in found.items()))
    return found


def published_class(directory: Path, name: str, **config: object) -> Path:
    """Adds a tokenizer_config.json that names a class of the directory; its code leaves a mark when it runs."""
    directory.mkdir(parents=True, exist_ok=True)
    mark = directory / MARKER
    (directory / "tokenization_own.py").write_text(f"open({str(mark)!r}, 'w')\nclass {name}: pass\n")
    auto_map = {"AutoTokenizer": [f"tokenization_own.{name}", None]}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": name, "auto_map": auto_map} | config)
    )
    return directory


def plain_bpe(word: bytes, found: dict[bytes, int]) -> list[int]:
    """The rule of tiktoken in so many words: join the leftmost pair of the lowest rank until there is none."""
    if word in found:
        return [found[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(found[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in found]
        if not pairs:
            return [found[part] for part in parts]
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
