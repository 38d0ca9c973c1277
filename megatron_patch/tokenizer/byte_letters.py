"""GPT-2's letters for bytes, in which byte-level tokenizers spell their tokens.

It knows no tokenizer.
"""

from __future__ import annotations

from functools import cache


@cache
def letters() -> tuple[str, ...]:
    """The letter of each byte: printable bytes are shown as they are and the others from U+0100 on."""
    shown = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in shown else next(others)) for byte in range(256))


@cache
def byte_of() -> dict[str, int]:
    """The byte of each letter."""
    return {letter: byte for byte, letter in enumerate(letters())}
