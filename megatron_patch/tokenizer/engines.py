"""Tokenizer engines behind one interface: texts to one flat array of ids, and the number of ids of each text.

    recipe = choose("model/", "auto", documents=texts)    # in the parent: transformers is loaded, engines are proven
    ids, lengths = recipe.build().encode_batch(texts)     # in a worker: neither torch nor transformers

The reference is Hugging Face's tokenizer with special tokens as text (`Tokenizer.encode_batch`). The others repeat its
work in their own code, several times as fast (benchmarks/engines.py), and none of them is trusted: an engine is used
only after it gave the same ids for the first documents and for texts made to be hard, and one document in a thousand is
encoded twice while it runs. What is chosen depends on what is installed and on the tokenizer, never on a clock.

It does not know files of documents, processes or dtypes of a dataset.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from megatron_patch.tokenizer.byte_letters import byte_of, letters
from megatron_patch.tokenizer.encoder import EncoderRecipe
from megatron_patch.tokenizer.hf import Tokenizer, load_tokenizer

PROOF_DOCUMENTS = 2000
PROOF_CHARACTERS = 300_000
"""The proof ends after this many characters, if these come before PROOF_DOCUMENTS: it costs Hugging Face's speed."""
CHECK_EVERY = 1000
"""One document in so many is encoded by Hugging Face's tokenizer as well."""
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
"""Environment of a worker that has sisters, to be set before `build`: threads inside each would only compete."""

Encoded = tuple[np.ndarray, np.ndarray]
"""Ids of all texts (uint32), one after the other, and the number of ids of each (int64)."""
_Encode = Callable[[list[str]], Encoded]
FindFault = Callable[["EngineRecipe", list[str], Encoded], "str | None"]
_PLAIN = '{"version":"1.0","truncation":null,"padding":null,'
"""How a serialised backend begins that neither cuts nor pads."""
_GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class EngineMismatch(RuntimeError):
    """An engine gave other ids than Hugging Face's tokenizer, or failed, in the middle of a run."""


@dataclass(frozen=True)
class EngineRecipe:
    """What a process needs to rebuild an engine; small enough to be sent to every worker."""

    name: str
    """One of NAMES."""
    version: str
    """Version of the package that does the work."""
    reference: EncoderRecipe
    """Hugging Face's tokenizer."""
    prefix: tuple[int, ...] = ()
    """What the tokenizer puts before every text by its own configuration (Llama's BOS)."""
    suffix: tuple[int, ...] = ()
    """What it puts after every text."""
    sentencepiece_file: str | None = None
    """The SentencePiece model of the directory, if it has one."""
    stand_ins: int | None = None
    """Where a byte-level vocabulary lacks single bytes (Hugging Face drops them): the first id of their stand-ins."""
    proof: str = field(default="", compare=False)
    """What the engine was proven on, for a report."""

    def build(self, check_every: int = CHECK_EVERY) -> Engine:
        """The engine at work in this process; ValueError if it cannot read this tokenizer."""
        return Engine(self, check_every)


class Engine:
    """An engine in one process."""

    def __init__(self, recipe: EngineRecipe, check_every: int = CHECK_EVERY) -> None:
        self.name = recipe.name
        self._recipe = recipe
        self._encode = _KINDS[recipe.name].build(recipe)
        self._around = ((), ()) if recipe.name == "hf" else (recipe.prefix, recipe.suffix)
        self._check_every = 0 if recipe.name == "hf" else check_every
        self._seen = 0
        self._reference: Callable[[Sequence[str]], list[list[int]]] | None = None

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of all texts, as `Tokenizer.encode_batch` would give them, and how many each has.

        Raises EngineMismatch if a spot check finds other ids or the engine itself fails.
        """
        texts = list(texts)
        try:
            ids, lengths = self.encode_unchecked(texts)
        except BaseException as error:
            if self.name == "hf" or not _is_failure(error):
                raise
            raise EngineMismatch(
                f"engine {self.name} failed: {_one_line(error)}; --engine hf does without it"
            ) from None
        self._spot_check(texts, ids, lengths)
        return ids, lengths

    def encode_unchecked(self, texts: list[str]) -> Encoded:
        """The same without spot checks; raises whatever the engine raises."""
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        ids, lengths = _wrap(*self._encode(texts), *self._around)
        if self._recipe.stand_ins is None or ids.size == 0 or ids.max() < self._recipe.stand_ins:
            return ids, lengths
        return self._without_stand_ins(texts, ids, lengths)

    def _without_stand_ins(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> Encoded:
        """Lets Hugging Face's tokenizer encode the texts that have a byte which the vocabulary lacks."""
        parts = _split(ids, lengths)
        lacking = [i for i, part in enumerate(parts) if max(part, default=0) >= self._recipe.stand_ins]
        for i, right in zip(lacking, self._expected([texts[i] for i in lacking]), strict=True):
            parts[i] = right
        return _flat(parts)

    def _expected(self, texts: list[str]) -> list[list[int]]:
        if self._reference is None:  # late: most runs of a few documents never need it
            self._reference = self._recipe.reference.build()
        return self._reference(texts)

    def _spot_check(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> None:
        before, self._seen = self._seen, self._seen + len(texts)
        if not self._check_every or before // self._check_every == self._seen // self._check_every:
            return
        checked = range(self._check_every - 1 - before % self._check_every, len(texts), self._check_every)
        ends = np.cumsum(lengths)
        for i in checked:
            got, expected = ids[ends[i] - lengths[i] : ends[i]].tolist(), self._expected([texts[i]])[0]
            if got != expected:
                raise EngineMismatch(
                    f"engine {self.name} {_difference(texts[i], got, expected)}; nothing it wrote can be trusted: "
                    "--engine hf does without it"
                )


def choose(
    tokenizer: Tokenizer | str | Path,
    name: str = "auto",
    documents: Iterable[str] = (),
    find_fault: FindFault | None = None,
    *,
    trust_remote_code: bool = False,
    warn: Callable[[str], None] | None = None,
) -> EngineRecipe:
    """The engine for a tokenizer (a loaded one or its directory), proven on hard texts and on the first documents.

    auto takes the fastest engine that is installed and equal to Hugging Face; `warn` gets a line about each that was
    installed and is not, by default on standard error. `find_fault` is `fault`, or does that in another process. Raises
    ValueError for an engine that was asked for by name and is unknown, not installed, unable to read this tokenizer or
    not equal.
    """
    if name not in ("auto", *NAMES):
        raise ValueError(f"engine {name!r} is unknown; choose auto, {', '.join(NAMES)}")
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer, trust_remote_code)
    recipe = _recipe(tokenizer)
    if name == "hf":
        return recipe
    proof = _Proof(tokenizer, documents, find_fault or fault)
    if name != "auto":
        return _named(recipe, name, proof)
    for candidate in _candidates(recipe):
        problem = proof.problem(candidate)
        if problem is None:
            return replace(candidate, proof=proof.extent)
        (warn or _print)(f"warning: engine {candidate.name} is not used: it {problem}")
    return recipe


def installed(name: str) -> bool:
    """Whether the package of an engine is here."""
    return importlib.util.find_spec(_KINDS[name].package) is not None


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------- choosing


def _recipe(tokenizer: Tokenizer) -> EngineRecipe:
    """The recipe of the reference; the other engines' differ in the name."""
    prefix, suffix = _around(tokenizer)
    reference = tokenizer.encoder_recipe()
    return EngineRecipe(
        "hf", version("tokenizers"), reference, prefix, suffix, _sentencepiece_file(Path(tokenizer.directory)),
        _stand_ins(tokenizer, reference), "it is the reference",
    )  # fmt: skip


def _around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts around a text. Where that is no prefix and suffix, the proof fails."""
    full, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    start = next(starts, 0)
    return tuple(full[:start]), tuple(full[start + len(bare) :])


def _candidates(recipe: EngineRecipe) -> Iterator[EngineRecipe]:
    """Engines that are here and made for this kind of tokenizer, the fastest first."""
    for name, kind in _KINDS.items():
        if name != "hf" and installed(name) and kind.suits(recipe):
            yield replace(recipe, name=name, version=version(kind.package))


def _named(recipe: EngineRecipe, name: str, proof: _Proof) -> EngineRecipe:
    kind = _KINDS[name]
    if not installed(name):
        raise ValueError(f"engine {name} is not installed: pip install {kind.package}, or choose auto")
    candidate = replace(recipe, name=name, version=version(kind.package), proof=proof.extent)
    problem = proof.problem(candidate)
    if problem is not None:
        raise ValueError(f"engine {name} {problem}; choose auto")
    return candidate


def fault(
    recipe: EngineRecipe,
    texts: list[str],
    expected: Encoded,
    build: Callable[[EngineRecipe], Engine] = EngineRecipe.build,
) -> str | None:
    """What is wrong with an engine that is to give these ids, as the end of a sentence; None if nothing is."""
    doing = "cannot read this tokenizer"
    try:
        encode = build(recipe).encode_unchecked
        doing = "fails on the texts of the proof"
        ids, lengths = encode(texts)
    except BaseException as error:
        if not _is_failure(error):
            raise
        return f"{doing} ({_one_line(error)})"
    if np.array_equal(lengths, expected[1]) and np.array_equal(ids, expected[0]):
        return None
    pairs = zip(texts, _split(ids, lengths), _split(*expected), strict=True)
    return next(_difference(text, got, wanted) for text, got, wanted in pairs if got != wanted)


class _Proof:
    """The first documents and the hard texts, with Hugging Face's ids for them."""

    def __init__(self, tokenizer: Tokenizer, documents: Iterable[str], find_fault: FindFault) -> None:
        self._find_fault = find_fault
        first, hard = _first(documents), hard_texts(tokenizer.hf.get_added_vocab())
        self.texts = [*hard, *first]
        self.expected = _flat(tokenizer.encode_batch(self.texts))
        self.extent = f"equal to transformers on the first {len(first)} documents and {len(hard)} hard texts"

    def problem(self, recipe: EngineRecipe) -> str | None:
        """See `fault`."""
        return self._find_fault(recipe, self.texts, self.expected)


def _first(documents: Iterable[str]) -> list[str]:
    found: list[str] = []
    size = 0
    for document in documents:
        found.append(document)
        size += len(document)
        if len(found) == PROOF_DOCUMENTS or size >= PROOF_CHARACTERS:
            break
    return found


def _difference(text: str, got: list[int], expected: list[int]) -> str:
    """Where two lists of ids part, short enough for a line."""
    pairs = enumerate(zip(got, expected, strict=False))
    at = next((i for i, (one, other) in pairs if one != other), min(len(got), len(expected)))
    shown = text if len(text) <= 120 else f"{text[:117]}..."
    lists = (
        f"[{', '.join(map(str, ids[at : at + 12]))}{', ...' if len(ids) > at + 12 else ''}]" for ids in (got, expected)
    )
    return "gives {} instead of {} from id {} on for {!r}".format(*lists, at, shown)


def _is_failure(error: BaseException) -> bool:
    """Whether it comes from the engine: an Exception, or the panic of a Rust extension."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


# ----------------------------------------------------------------------------------------------------------- hard texts


_SCRIPTS = (
    "今天天气很好，我们去公园散步。", "繁體中文與简体字混排", "日本語のテキスト、カタカナ", "한국어 텍스트",
    "Русский текст", "نص عربي ٣٤٥", "עברית", "हिन्दी पाठ ६७८", "ข้อความไทย", "Ελληνικά", "𠮷野家 𪚥 𝒳𝟙",
    "１２３４５６７ ＡＢｃ％，．", "Ⅷ①㈱㎏½²", "3.14159 1,234,567 1234567890123", "e\u0301 é ﬁ ſ İ ı ß Å A\u030a ㄱ각",
    "don't I'M we'LL they'Re 'S 'ſ ’s", "def f(x):\n    return x ** 2  # a_b-c\n", "https://a.b/c?d=e&f=%20#g",
    "👩‍👩‍👧 👍🏽 🇨🇳🇫🇷 1️⃣ ☺️ 🏴‍☠️", "\ufffd\ufffda\ufffd", "camelCaseHTTPServer_v2", "《“引号”》——……！？",
    "…\u00ad\u200d\ufe0f",
)  # fmt: skip
_GLUE = ("", " ", "  ", "\n", "\r\n", " \n\n ", "\t", "\u3000", "\x00", "\u200b", "\ufeff", " \u00a0")
_ODD = tuple(
    chr(code)
    for code in (*range(0x21), *range(0x7F, 0xA1), 0xAD, 0x1680, 0x180E, *range(0x2000, 0x2010), 0x2028, 0x2029, 0x202E,
                 0x202F, 0x205F, 0x2060, 0x2581, 0x3000, 0xE000, 0xFEFF, 0xFFFC, 0xFFFD, 0xFFFE, 0xFFFF, 0x10FFFF)
)  # fmt: skip
_RUNS = (
    " ",
    "\n",
    "\r\n",
    "\t",
    " \n",
    "\u3000",
    "a",
    "A",
    "0",
    "９",
    "-",
    "=",
    ".",
    "中",
    "！",
    "é",
    "😀",
    "ab",
    "\x00",
)
_SPECIAL = ("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[CLS]", "[MASK]", "<0x0A>")


def hard_texts(added_tokens: Iterable[str] = ()) -> list[str]:
    """Texts that tell tokenizers apart: scripts, blanks, control characters, long words, special tokens spelled out.

    The same ones every time. A lone surrogate is no text for any engine: readers put U+FFFD in its place, as here.
    """
    texts = ["", *_SCRIPTS, *(glue + one + glue for one in _SCRIPTS for glue in _GLUE)]
    texts += [one + glue + other for one, other in zip(_SCRIPTS, _SCRIPTS[1:], strict=False) for glue in _GLUE]
    texts += [f"a{odd}b {odd}{odd} 中{odd}1{odd}" for odd in _ODD]
    texts += [f"a{run * length}b{run * length}" for run in _RUNS for length in (2, 3, 4, 7, 8, 16, 17, 33, 130)]
    texts += [run * 10_000 for run in (" ", "\n", "x", "中", "ab", "1", "=", "天气")]
    texts += [f"{token}x {token} 中{token}{token}\n" for token in dict.fromkeys((*_SPECIAL, *added_tokens))]
    dice = random.Random(0)
    pool = (*_SCRIPTS, *_GLUE, *_ODD, *_RUNS, *_SPECIAL)
    texts += ["".join(dice.choices(pool, k=dice.randint(2, 9))) for _ in range(300)]
    planes = ((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x3000, 0x3100), (0x4E00, 0xA000), (0x1F300, 0x1FA00))
    texts += ["".join(chr(dice.randrange(*dice.choice(planes))) for _ in range(40)) for _ in range(300)]
    return texts


# ------------------------------------------------------------------------------------------------------------- id lists


def _flat(ids: list[list[int]]) -> Encoded:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.uint32, int(lengths.sum())), lengths


def _split(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def _wrap(ids: np.ndarray, lengths: np.ndarray, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> Encoded:
    """Puts prefix and suffix around the ids of every text."""
    if not prefix and not suffix:
        return ids, lengths
    ends = np.cumsum(lengths)
    places = [ends - lengths] * len(prefix) + [ends] * len(suffix)
    # One row a text: at equal places `insert` keeps the order, so a suffix goes before the next text's prefix.
    around = np.insert(ids, np.stack(places, 1).ravel(), np.tile(np.array([*prefix, *suffix], ids.dtype), len(lengths)))
    return around, lengths + len(prefix) + len(suffix)


# -------------------------------------------------------------------------------------------------------------- engines


def _hf(recipe: EngineRecipe) -> _Encode:
    encode = recipe.reference.build()
    return lambda texts: _flat(encode(texts))


def _fastokens(recipe: EngineRecipe) -> _Encode:
    import fastokens

    # Parsing and writing megabytes again is a third of the start.
    as_is = recipe.stand_ins is None and (recipe.reference.backend_json or "").startswith(_PLAIN)
    content = recipe.reference.backend_json if as_is else _dumps(_content(recipe))
    backend = fastokens.Tokenizer.from_json_str(content)

    def encode(texts: list[str]) -> Encoded:
        ids, offsets = backend.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64))

    return encode


def _gigatoken(recipe: EngineRecipe) -> _Encode:
    import gigatoken

    # It always reads the special tokens that it knows: those that are to be text, it must not know.
    content = _content(recipe)
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    backend = gigatoken.Tokenizer.from_json(_dumps(content))

    def encode(texts: list[str]) -> Encoded:
        layout = backend.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        return np.asarray(layout.content.data, np.uint32)[offsets[0] : offsets[-1]], np.diff(offsets)

    return encode


def _tiktoken(recipe: EngineRecipe) -> _Encode:
    import tiktoken

    content = _content(recipe)
    kept = {token["content"]: token["id"] for token in content["added_tokens"] if not token["special"]}
    encoding = tiktoken.Encoding(
        "own", pat_str=_words(content), mergeable_ranks=_ranks(content), special_tokens=kept
    )  # fmt: skip
    names, nfc = set(kept), _normalizer(content) == "NFC"

    def encode(texts: list[str]) -> Encoded:
        texts = [unicodedata.normalize("NFC", text) for text in texts] if nfc else texts
        parts = [encoding.encode_to_numpy(text, allowed_special=names, disallowed_special=()) for text in texts]
        return np.concatenate(parts), np.array([part.size for part in parts], np.int64)

    return encode


def _sentencepiece(recipe: EngineRecipe) -> _Encode:
    from sentencepiece import SentencePieceProcessor

    if recipe.sentencepiece_file is None:
        raise ValueError("its directory holds no SentencePiece model")
    processor = SentencePieceProcessor(model_file=recipe.sentencepiece_file)
    return lambda texts: _flat(processor.encode(texts, num_threads=1))


def _dumps(content: dict[str, Any]) -> str:
    return orjson.dumps(content).decode()


def _content(recipe: EngineRecipe) -> dict[str, Any]:
    """tokenizer.json without cutting and padding, with a stand-in for every byte that its vocabulary lacks."""
    if recipe.reference.backend_json is None:
        raise ValueError("it has no tokenizer.json, and transformers cannot make one")
    content = orjson.loads(recipe.reference.backend_json) | {"truncation": None, "padding": None}
    if recipe.stand_ins is not None:
        vocabulary = content["model"]["vocab"]
        vocabulary |= {letter: recipe.stand_ins + i for i, letter in enumerate(_lacking(vocabulary))}
    return content


def _stand_ins(tokenizer: Tokenizer, reference: EncoderRecipe) -> int | None:
    if '"ByteLevel"' not in (reference.backend_json or ""):
        return None
    model = tokenizer.hf.backend_tokenizer.model
    drops = type(model).__name__ == "BPE" and model.unk_token is None
    return tokenizer.vocab_size if drops and _lacking(tokenizer.hf.get_vocab()) else None


def _lacking(vocabulary: Mapping[str, int]) -> list[str]:
    return [letter for letter in letters() if letter not in vocabulary]


def _words(content: Mapping[str, Any]) -> str:
    """The expression that cuts a text into words, where it is one: GPT-2's own, or a Split before the bytes."""
    step = content["pre_tokenizer"] or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    *splits, last = steps
    if last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
        if not splits and last["use_regex"]:
            return _GPT2_WORDS
        if len(splits) == 1 and not last["use_regex"] and splits[0]["type"] == "Split":
            pattern, split = splits[0]["pattern"].get("Regex"), splits[0]
            if pattern and split["behavior"] == "Isolated" and not split["invert"]:
                return pattern
    raise ValueError("its words are not cut by a single regular expression")


def _normalizer(content: Mapping[str, Any]) -> str | None:
    step = content["normalizer"]
    kind = step and (step["type"] if step.get("normalizers") != [] else None)
    if kind not in (None, "NFC"):
        raise ValueError(f"its normalizer {kind} is not one of none and NFC")
    return kind


def _ranks(content: Mapping[str, Any]) -> dict[bytes, int]:
    """Tokens as bytes with their ids, which are tiktoken's ranks where merges come in the order of their ids."""
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ValueError("it is no byte-level BPE")
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    order = np.array([model["vocab"][left + right] for left, right in merges])
    if np.any(np.diff(order) < 0):
        raise ValueError("its merges are not in the order of their ids")
    added = {token["content"] for token in content["added_tokens"]}
    vocabulary = ((token, number) for token, number in model["vocab"].items() if token not in added)
    return {bytes(map(byte_of().__getitem__, token)): number for token, number in vocabulary}


def _sentencepiece_file(directory: Path) -> str | None:
    from megatron_patch.tokenizer.sentencepiece_model import is_proto

    return next((str(file) for file in sorted(directory.glob("*.model")) if is_proto(file)), None)


def _is_byte_level(recipe: EngineRecipe) -> bool:
    return '"ByteLevel"' in (recipe.reference.backend_json or "") and recipe.sentencepiece_file is None


class _Kind(NamedTuple):
    package: str
    """What must be installed."""
    build: Callable[[EngineRecipe], _Encode]
    """Makes the function that encodes texts without what goes around them."""
    suits: Callable[[EngineRecipe], bool]
    """Whether `auto` should try it."""


_KINDS = {
    "fastokens": _Kind("fastokens", _fastokens, _is_byte_level),
    "gigatoken": _Kind("gigatoken", _gigatoken, lambda recipe: recipe.reference.backend_json is not None),
    "tiktoken": _Kind("tiktoken", _tiktoken, _is_byte_level),
    "sentencepiece": _Kind("sentencepiece", _sentencepiece, lambda recipe: recipe.sentencepiece_file is not None),
    "hf": _Kind("tokenizers", _hf, lambda recipe: True),
}
"""The fastest first, as benchmarks/engines.py measures them on Chinese and English text."""
NAMES = tuple(_KINDS)
