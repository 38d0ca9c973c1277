"""A SentencePiece model as a transformers tokenizer that gives its ids exactly.

transformers 5 orders the merges of a tokenizer.model by id and puts no space before a text that begins with one. Both
change ids of real models: Llama's and Mistral's pieces of several spaces have low ids and the lowest of scores. Here
merges are ordered by score, and the space is put as sentencepiece puts it, which is what the tokenizer.json files that
were published with those models do.

`exact` is for a directory with a tokenizer.model alone. What `tokenizers` cannot repeat exactly (unigram models, tables
of characters to normalise, pieces of one score) the `sentencepiece` library itself reads; see `obstacle`. It knows
neither corpora nor models.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_patch.tokenizer.sentencepiece_model import (
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    is_proto,
    load_proto,
    processor,
)

MODEL, JSON = "tokenizer.model", "tokenizer.json"
_CLASSES = ("LlamaTokenizer", "TokenizersBackend")
"""Classes of transformers that read a tokenizer.model as it stands: its ids, and no rules of their own."""
KEPT = ("chat_template", "model_max_length", "padding_side", "truncation_side", "model_input_names")
"""What of a directory's settings a tokenizer that is made anew takes over, beside roles."""
_FIRST = (
    pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
    pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False),
)
"""Puts SPACE before a text. The first of the two would not do it before a blank; but there is none left by then."""
_RUNS = (*range(1, 70), 129)
"""Lengths of runs of one character, on which pieces of such runs must prove that their order is right."""


# --------------------------------------------------------------------------------------------------------- a directory


def exact(hf: Any, directory: Path) -> Any:
    """The tokenizer that transformers made of a directory, made to give the ids of its SentencePiece model.

    It comes back as it is where it was not made of tokenizer.model, or is of a class that changes the model's ids or
    reads text by rules of its own.
    """
    file = directory / MODEL
    if type(hf).__name__ not in _CLASSES or (directory / JSON).exists() or not (file.is_file() and is_proto(file)):
        return hf
    proto = load_proto(file)
    if hf.convert_ids_to_tokens(list(range(len(proto.pieces)))) != [one.piece for one in proto.pieces]:
        return hf
    if hf.init_kwargs.get("add_prefix_space") is False:
        proto.normalizer_spec.add_dummy_prefix = False
    made = None if obstacle(proto) else _made_fast(hf, proto)
    return made if made is not None and _proven(made, proto) else _made_slow(hf, file, proto)


def _made_fast(hf: Any, proto: ModelProto) -> Any:
    """The same object with another backend: its class, roles and chat template stay what they are."""
    made = backend(proto, everywhere=bool(getattr(hf, "legacy", False)))
    made.add_tokens([token for _, token in _added(hf, proto)])
    made.post_processor = hf.backend_tokenizer.post_processor
    hf._tokenizer = made  # transformers has no public way to change it
    return hf


def _added(hf: Any, proto: ModelProto) -> Iterator[tuple[int, AddedToken]]:
    """Tokens to look for in a text; the model's own symbols sentencepiece finds itself."""
    for number, token in sorted(hf.added_tokens_decoder.items()):
        own = number < len(proto.pieces) and proto.pieces[number].type == USER_DEFINED
        if token.special or not own:
            flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
            yield number, AddedToken(token.content, special=token.special, normalized=False, **flags)


def _proven(hf: Any, proto: ModelProto) -> bool:
    """Whether both give the same ids for runs of every character that has pieces of its runs."""
    runs = (one.piece for one in proto.pieces if one.type == NORMAL and len(one.piece) > 1)
    letters = {piece[0] for piece in runs if piece.strip(piece[0]) == ""}
    texts = [letter.replace(SPACE, " ") * length for letter in sorted(letters) for length in _RUNS]
    texts = [f"a{text}b" if text[0] == " " else text for text in texts]
    options = {"add_special_tokens": False, "split_special_tokens": True}
    return not texts or hf(texts, **options)["input_ids"] == processor(proto).encode(texts)


def _made_slow(hf: Any, file: Path, proto: ModelProto) -> Any:
    """A tokenizer that leaves all text to sentencepiece; a special token inside a text begins another text."""
    from megatron_patch.tokenizer.published import PublishedSentencePiece, Specials

    roles = {role: str(token) for role, token in hf.special_tokens_map.items() if isinstance(token, str)}
    kept = {name: getattr(hf, name) for name in KEPT if getattr(hf, name, None) is not None}
    before, behind = (
        [roles[f"{name}_token"]] * bool(getattr(hf, f"add_{name}_token", False)) for name in ("bos", "eos")
    )
    options = roles | kept | {"clean_up_tokenization_spaces": False}
    return PublishedSentencePiece(file, None, Specials(dict(_added(hf, proto)), options, before, behind))


def for_documents(backend: Tokenizer) -> str:
    """The backend serialised, so that it gives the same ids for texts in which special tokens are text.

    Where `backend` marks the beginning of a text in its own way, that is the beginning of all there is; so it can be
    spelled as in the files that were published with Llama and Mistral, which all engines can read.
    """
    content, first = backend.to_str(), pre_tokenizers.Sequence(list(_FIRST))
    if backend.pre_tokenizer is None or _serialised(backend.pre_tokenizer) != _serialised(first):
        return content
    settings = json.loads(content)
    if not all(token["special"] for token in settings["added_tokens"]):
        return content
    settings["pre_tokenizer"] = None
    settings["normalizer"]["normalizers"].insert(-1, _serialised(normalizers.Prepend(SPACE)))
    return json.dumps(settings, ensure_ascii=False)


def _serialised(part: Any) -> Any:
    return json.loads(part.__getstate__())


# --------------------------------------------------------------------------------------------------------- the backend


def obstacle(proto: ModelProto) -> str:
    """Why `tokenizers` may give other ids than sentencepiece, or nothing."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    scores = {one.piece: one.score for one in proto.pieces if one.type == NORMAL}
    times = Counter(scores.values())
    tied = [piece for piece, score in scores.items() if times[score] > 1 and piece.strip(SPACE)]
    unused = [one.piece for one in proto.pieces if one.type == UNUSED]
    reasons = {
        "it is no BPE": trainer.model_type != TrainerSpec.BPE,
        "it normalises by a table": normalizer.precompiled_charsmap or proto.denormalizer_spec.precompiled_charsmap,
        "its spaces stand behind words, or as they are": _odd_spaces(proto),
        "pieces have one score, and the leftmost of them comes first": tied,
        "unused pieces are on the way to others": [piece for piece in unused if any(_halves(piece, scores))],
        "its own symbols are cut out of a text behind the space before it": (
            any(one.type == USER_DEFINED for one in proto.pieces)
        ),
    }
    return "; ".join(reason for reason, found in reasons.items() if found)


def _odd_spaces(proto: ModelProto) -> bool:
    return proto.trainer_spec.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces


def backend(proto: ModelProto, *, everywhere: bool = False) -> Tokenizer:
    """Vocabulary, merges and spaces; neither special tokens nor symbols that are to be found in a text first.

    Args:
        everywhere: put a space before each text between special tokens (`legacy` of Llama's tokenizer), not only
            before the first. That is always done where spaces around a text are taken away.

    Raises:
        ValueError: the model does something that `tokenizers` cannot do at all.
    """
    if _odd_spaces(proto):
        raise ValueError("a SentencePiece model with spaces behind words, or as they are, has no tokenizer.json")
    made = Tokenizer(
        models.BPE(
            vocab={one.piece: number for number, one in enumerate(proto.pieces)},
            merges=merges(proto),
            unk_token=next(one.piece for one in proto.pieces if one.type == UNKNOWN),
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    made.normalizer, steps = _spaces(proto, everywhere)
    if steps:
        made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = _decoder(proto)
    return made


def merges(proto: ModelProto) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the piece of the highest score first, as sentencepiece takes them.

    Among pieces of one score it takes the leftmost. For runs of spaces, which Llama gives one score, that is the same
    as the longest first.
    """
    scores = {one.piece: one.score for one in proto.pieces if one.type in (NORMAL, USER_DEFINED)}
    pairs = [pair for piece in scores for pair in _halves(piece, scores)]

    def rank(pair: tuple[str, str]) -> tuple[float, int]:
        piece = "".join(pair)
        return -scores[piece], 0 if piece.strip(SPACE) else -len(piece)

    return sorted(pairs, key=rank)


def _halves(piece: str, known: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
    return (pair for pair in halves if pair[0] in known and pair[1] in known)


def _spaces(proto: ModelProto, everywhere: bool) -> tuple[normalizers.Normalizer, list[pre_tokenizers.PreTokenizer]]:
    """How a text is brought to the letters of pieces, and its beginning marked."""
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:  # spaces only: line ends stay
        ends = rf"\A +|[ {SPACE}]+\z"
        steps += [normalizers.Replace(Regex(ends), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        everywhere = True  # what comes first can no longer be told after that
    if spec.add_dummy_prefix and everywhere:
        steps.append(normalizers.Prepend(SPACE))
    normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if not spec.add_dummy_prefix or everywhere:
        return normalizer, []
    return normalizer, list(_FIRST)


def _decoder(proto: ModelProto) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else steps)
