"""Proof that an extended model is its base with more rows: `megatron-patch vocab verify`.

    report = verify(VocabVerifyArgs(base="model/", model="grown/"))

First the files: tokens, numbers of rows, every bit of what must not have changed, and the new rows computed again. Then
both models run in transformers, one after the other: on old tokens, hidden states and old logits must be the same bits,
and each new logit the one that its row's recipe gives. Of Megatron checkpoints the files alone are looked at. It does
not know megatron-core.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_patch.checkpoint.sharding import same_bits
from megatron_patch.tokenizer import load_tokenizer
from megatron_patch.vocab.arguments import VocabVerifyArgs
from megatron_patch.vocab.initialise import Model, Recipe, open_huggingface
from megatron_patch.vocab.note import EXTENSION, INITIALISATION, read_note
from megatron_patch.vocab.subpieces import Growth, compare

_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """All of them, in the order in which they were tried."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def table(self) -> Iterator[tuple[str, str]]:
        """Names and values for a table."""
        yield from ((check.name, f"{'ok' if check.ok else 'FAILED'}: {check.detail}") for check in self.checks)


def verify(args: VocabVerifyArgs) -> VerifyReport:
    """Compares the two; ValueError if one cannot be read, or `init` has not written the second."""
    args.validate()
    base, grown = _opened(args)
    note = read_note(grown.folder, INITIALISATION)
    if not note:
        raise ValueError(f"--model {args.model!r} holds no {INITIALISATION}: it was not written by `vocab init`")
    old, new = load_tokenizer(base.folder), load_tokenizer(grown.folder)
    growth = compare(old, new, base.rows, read_note(grown.folder, EXTENSION).get("reserved", ()))
    counts = {int(i): count for i, count in (note["counts"] or {}).items()}
    recipe = Recipe(
        growth, grown.rows, note["method"], note["seed"], base.std, [counts.get(i, 0) for i in range(base.rows)]
    )
    checks = [*_rows(args, grown, growth), *_bits(base, grown, recipe)]
    if args.wants_logits and all(check.ok for check in checks):
        checks += _logits(args, base, grown, recipe)
    return VerifyReport(tuple(checks))


def _opened(args: VocabVerifyArgs) -> tuple[Model, Model]:
    if not args.is_megatron:
        return open_huggingface(args.base), open_huggingface(args.model)
    from megatron_patch.vocab.megatron import open_megatron

    ways = (args.hf_config, args.trust_pickle)
    return open_megatron(args.base, *ways), open_megatron(args.model, None, args.trust_pickle)


# ------------------------------------------------------------------------------------------------------------ the files


def _rows(args: VocabVerifyArgs, grown: Model, growth: Growth) -> Iterator[Check]:
    kept, fresh = len(growth.old_ids), len(growth.sources)
    yield Check("tokens", True, f"{kept:,} have their old id, {fresh:,} are new")
    stated = grown.config[grown.architecture.family.vocab_size]
    yield Check("rows as config.json says", stated == grown.rows, f"{grown.rows:,} rows, config.json has {stated:,}")
    yield Check("a row for each token", grown.rows >= growth.size, f"{grown.rows:,} rows, {growth.size:,} ids")
    size = args.tensor_model_parallel_size
    padded = "as it is" if grown.rows % (128 * size) == 0 else "which Megatron pads further"
    yield Check("tensor parallel", grown.rows % size == 0, f"{grown.rows:,} rows / {size} ranks, {padded}")


def _bits(base: Model, grown: Model, recipe: Recipe) -> Iterator[Check]:
    same_names = set(base.infos) == set(grown.infos) and base.tensors == grown.tensors
    differing = sorted(set(base.infos) ^ set(grown.infos))
    yield Check(
        "tensor names", same_names, f"{len(grown.infos):,}" + (f"; in one only: {differing[:5]}" if differing else "")
    )
    if not same_names:
        return
    others = [name for name in base.infos if name not in base.tensors]
    changed = [name for name in others if not same_bits(base.weights.read(name), grown.weights.read(name))]
    yield Check("other tensors", not changed, f"{len(changed)} of {len(others):,} differ {changed[:5] or ''}".strip())
    for name in base.tensors:
        old, new = base.weights.read(name), grown.weights.read(name)
        ids = list(recipe.growth.old_ids)
        yield Check(f"old rows of {name}", _equal_rows(old, new, ids), f"{len(ids):,}, every bit")
        expected, ids = recipe.grow(old, base.parts[name]), sorted(set(range(len(new))) - set(ids))
        yield Check(f"other rows of {name}", _equal_rows(expected, new, ids), f"{len(ids):,}, method {recipe.method}")


def _equal_rows(one: Tensor, other: Tensor, ids: list[int]) -> bool:
    blocks = torch.tensor(ids, dtype=torch.long).split(_ROWS_AT_A_TIME)
    return one.dtype == other.dtype and all(same_bits(one[block], other[block]) for block in blocks)


# ---------------------------------------------------------------------------------------------------------- the models


def _logits(args: VocabVerifyArgs, base: Model, grown: Model, recipe: Recipe) -> Iterator[Check]:
    ids, shape = torch.tensor(recipe.growth.old_ids), (args.samples, args.length)
    tokens = ids[torch.randint(len(ids), shape, generator=torch.Generator().manual_seed(0))]
    old_hidden, old_logits = _run(args.base, tokens)
    new_hidden, new_logits = _run(args.model, tokens)
    yield Check("hidden states", same_bits(old_hidden, new_hidden), f"{tokens.numel()} old tokens, every bit")
    yield Check("old logits", *_old_logits(old_logits[..., ids], new_logits[..., ids]))
    if recipe.method in ("mean", "weighted", "first", "last"):
        yield Check("new logits", *_new_logits(old_hidden, old_logits, new_logits, grown, recipe))


@torch.no_grad()
def _run(directory: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the output layer and what comes out of it, in fp32."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=torch.float32).eval()
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise ValueError(
            f"transformers cannot load {directory} ({error}); --level rows needs no transformers"
        ) from error
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = model(tokens).logits
    handle.remove()
    del model
    gc.collect()
    return seen[0], logits


def _old_logits(old: Tensor, new: Tensor) -> tuple[bool, str]:
    """The same bits; the largest difference where they are not."""
    if same_bits(old.contiguous(), new.contiguous()):
        return True, f"{old.shape[-1]:,} a token, every bit"
    return False, f"they differ by up to {(old - new).abs().max():.3g}"


def _new_logits(hidden: Tensor, old: Tensor, new: Tensor, grown: Model, recipe: Recipe) -> tuple[bool, str]:
    """Each new logit is the mean of its parts' logits, up to the rounding of its row to the stored dtype."""
    head = grown.weights.read(grown.tensors[-1 if grown.infos[grown.tensors[-1]].shape[1:] else -2])
    rounding = torch.finfo(head.dtype).eps / 2 + hidden.shape[-1] * torch.finfo(torch.float32).eps
    worst, checked, by_token = 0.0, 0, old.movedim(-1, 0)
    for number, parts in recipe.growth.sources.items():
        if parts:
            expected, bound = recipe.mix(by_token, parts), _bound(hidden, head, (number, *parts), rounding)
            worst = max(worst, float(((new[..., number] - expected).abs() / bound).max()))
            checked += 1
    return worst <= 1, f"{checked:,} tokens, at most {worst:.2f} of what rounding the row allows"


def _bound(hidden: Tensor, head: Tensor, ids: tuple[int, ...], rounding: float) -> Tensor:
    """How far rounding may move a dot product: by so much of the sum of its terms' sizes."""
    sizes = head[list(ids)].float().abs().amax(0)
    return rounding * (hidden.abs() @ sizes) + 1e-30
