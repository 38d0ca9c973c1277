"""SentencePiece models as protos: read from files, and at work.

It knows neither transformers nor what a model is extended with.
"""

from __future__ import annotations

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces."""
SPACE = "▁"
"""How a space is written in pieces."""


def load_proto(path: str | Path) -> ModelProto:
    """The model in a file; a ValueError names the file where it is none."""
    try:
        proto = ModelProto.FromString(Path(path).read_bytes())
    except Exception as error:  # protobuf's DecodeError has no stable place to import it from
        raise ValueError(f"{path} is no SentencePiece model: {error}") from error
    if not proto.pieces:
        raise ValueError(f"{path} is no SentencePiece model: it has no pieces")
    return proto


def is_proto(path: str | Path) -> bool:
    """Whether a file is a SentencePiece model; some tokenizer.model files are lists of tiktoken."""
    try:
        return bool(load_proto(path))
    except ValueError:
        return False


def processor(proto: ModelProto, *, bare: bool = False) -> SentencePieceProcessor:
    """The model at work.

    Args:
        bare: encode pieces, not texts: nothing is put before them and nothing normalised.
    """
    if bare:
        proto = ModelProto.FromString(proto.SerializeToString())
        proto.normalizer_spec.CopyFrom(type(proto.normalizer_spec)(name="identity"))
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
    return SentencePieceProcessor(model_proto=proto.SerializeToString())
