"""`megatron-patch preprocess` with the flags of Megatron-LM's and the predecessor's preprocess_data.py.

    python preprocess_data.py --input wudao.jsonl --json-keys text --output-prefix datasets/wudao \\
        --patch-tokenizer-type Qwen2Tokenizer --load qwen2-7b-hf --workers 16 --append-eod [--dry-run]

Prints what became of each flag and the command that does the same, and runs that. Flags of `megatron-patch preprocess`
that the script never had (--clean, --dedup, --shuffle, ...) are passed on. --help lists the others and what becomes of
each. It does not read data.
"""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path

# A script starts with its own folder on the path. In front, since the predecessor's package has the same name as ours.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_patch.data.arguments import PreprocessArgs
from megatron_patch.launch.main import main as megatron_patch
from toolkits.positional import Command, choice_problems, fail, finish, report
from toolkits.pretrain_data_preprocessing import flags
from toolkits.pretrain_data_preprocessing.tokenizer_names import (
    BPE_NAMES,
    KINDS,
    contradiction,
    kind_of,
    tokenizer_directory,
)

NAME = "preprocess_data.py"
TYPES = tuple(name for name in KINDS if name not in BPE_NAMES)
_TOKENIZER = ("--tokenizer-model", "--load", "--vocab-file", "--merge-file")
"""Where the tokenizer may be, the first that is given first."""


def main(argv: list[str] | None = None) -> int:
    """Runs a call and returns its exit code; 2 for a user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\n{flags.usage()}")
        return 0
    dry_run = "--dry-run" in words or os.environ.get("DRY_RUN") == "1"
    try:
        given, rest = flags.read([word for word in words if word != "--dry-run"])
        plan = command(given, rest)
    except ValueError as error:
        return fail(NAME, str(error))
    rows = [(name, " ".join(values), plan.effects[name]) for name, values in given.items()]
    print(report(NAME, [*rows, *_passed_on(rest)], plan), flush=True)
    return finish(NAME, plan, dry_run, {"preprocess": PreprocessArgs}, megatron_patch)


def _passed_on(rest: list[str]) -> list[tuple[str, str, str]]:
    """A row for each of our own flags."""
    starts = [*(i for i, word in enumerate(rest) if word.startswith("--")), len(rest)]
    return [(rest[i], " ".join(rest[i + 1 : j]), "passed on") for i, j in pairwise(starts)]


def command(given: dict[str, list[str]], rest: list[str]) -> Command:
    """The command for a call; ValueError names everything that is refused."""
    problems = _problems(given, rest)
    effects = {flag.name: flag.unused for flag in flags.FLAGS if flag.unused}
    directory, warning = _tokenizer(given, effects, problems)
    if problems:
        raise ValueError("\n".join(problems))
    argv = ["preprocess"]
    for flag in flags.FLAGS:
        if flag.name in given and flag.becomes and flag.name not in _TOKENIZER:
            argv += [flag.becomes, *given[flag.name]]
            effects[flag.name] = " ".join([flag.becomes, *given[flag.name]])
    warnings = [warning] if warning else []
    if "--json-keys" not in given:
        warnings.append("--json-keys is not given: text; the predecessor's last script of this name read content")
    return Command((*argv, "--tokenizer-model", directory, *rest), effects, tuple(warnings))


def _problems(given: dict[str, list[str]], rest: list[str]) -> list[str]:
    problems = [f"{flag.name}: {flag.refused}" for flag in flags.FLAGS if flag.refused and flag.name in given]
    problems += [f"{name} is missing" for name in ("--input", "--output-prefix") if name not in given]
    implementation = given.get("--dataset-impl", ["mmap"])[0]
    if implementation != "mmap":
        problems.append(f"--dataset-impl {implementation}: choose mmap; megatron-core reads nothing else")
    (kind,) = given.get("--tokenizer-type", [""])
    if kind in flags.REFUSED_TYPES:
        problems.append(f"--tokenizer-type {kind}: {flags.REFUSED_TYPES[kind]}")
    problems += choice_problems(os.environ, {"DRY_RUN": ("0", "1")})
    ours = {f"--{name.replace('_', '-')}" for name in PreprocessArgs.__dataclass_fields__}
    starts = [*rest[:1], *(word for word in rest[1:] if word.startswith("--"))]
    unknown = [word for word in starts if word.partition("=")[0] not in ours]
    return problems + [f"{word}: neither a flag of {NAME} nor of megatron-patch preprocess" for word in unknown]


def _tokenizer(given: dict[str, list[str]], effects: dict[str, str], problems: list[str]) -> tuple[str, str]:
    """The tokenizer's directory, and what to warn of."""
    places = [name for name in _TOKENIZER if name in given]
    if not places:
        problems.append("the tokenizer is missing: give --tokenizer-model (or --load) and its Hugging Face directory")
        return "", ""
    (place,) = given[places[0]]
    directory = tokenizer_directory(place)
    if directory is None:
        problems.append(
            f"{places[0]} {place!r}: no tokenizer of Hugging Face there (tokenizer.json, tokenizer.model, vocab.json"
            " with merges.txt or the like), and nothing is downloaded"
        )
        return "", ""
    effects |= {name: f"not needed: {places[0]} says it" for name in places}
    effects[places[0]] = f"--tokenizer-model {directory}"
    (name,) = given.get("--tokenizer-type", [""])
    is_certain, text = contradiction(name, directory, TYPES)
    if is_certain:
        problems.append(f"--tokenizer-type {name}, {text}")
    kind = kind_of(directory)
    effects["--tokenizer-type"] = f"the directory decides{f', a {kind} model' if kind else ''}"
    return directory, f"--tokenizer-type {name}, {text}" if text else ""


if __name__ == "__main__":  # its workers import this file again
    sys.exit(main())
