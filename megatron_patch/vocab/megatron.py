"""Rows for new tokens in a Megatron checkpoint, torch_dist or legacy, as it stands: `megatron-patch vocab init`.

    model, recipe, files = write_grown(VocabInitArgs(base="checkpoint/", tokenizer="merged/", output="grown/"))

It is a conversion into the same format, layout and naming, whose source has more rows than the checkpoint that it reads
from. Padded rows are left out and made anew; every other tensor streams through. What is written is what converting the
grown Hugging Face model would have written. It knows no way of making rows.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.directory import CONFIG, read_json
from megatron_patch.checkpoint.formats import MegatronSource
from megatron_patch.checkpoint.huggingface import TensorInfo
from megatron_patch.checkpoint.manifest import Checker
from megatron_patch.checkpoint.opening import like, open_source
from megatron_patch.checkpoint.whole import describe
from megatron_patch.progress import Progress
from megatron_patch.vocab.arguments import VocabInitArgs
from megatron_patch.vocab.initialise import Model, Recipe, make_recipe, vocabulary_rules, write_companions


def open_megatron(path: str | Path, hf_config: str | Path | None = None, trust_pickle: bool = False) -> Model:
    """A Megatron checkpoint, its tensors by their internal names; ValueError if it cannot be read."""
    source = open_source(path, hf_config=hf_config, trust_pickle=trust_pickle)
    source.check_convertible()
    architecture = source.model.architecture
    names = dict.fromkeys(rule.internal for rule in vocabulary_rules(architecture))
    parts = {name: number for number, name in enumerate(names)}
    return Model(source.config_folder, read_json(source.config_folder / CONFIG), architecture, source, parts)


def write_grown(args: VocabInitArgs) -> tuple[Model, Recipe, tuple[str, ...]]:
    """Writes the grown checkpoint; returns what it was made of and the names of its weight files."""
    model = open_megatron(args.base, args.hf_config, args.trust_pickle)
    recipe = make_recipe(args, model)
    with tempfile.TemporaryDirectory() as folder, Progress("vocab init", None, "B") as progress:
        write_companions(args, model, recipe, Path(folder))
        source = GrownSource(model, recipe, Path(folder))
        convert(source, args.output, like(model.weights), overwrite=args.overwrite, progress=progress.reach)
    root = Path(args.output)
    files = (*root.glob("release/*.distcp"), *root.glob("release/mp_rank_*/*.pt"))
    return model, recipe, tuple(sorted(str(file.relative_to(root)) for file in files))


class GrownSource(MegatronSource):
    """A checkpoint with more rows.

    Args:
        model: the checkpoint itself.
        recipe: for its tensors with a row for each token.
        folder: config.json of the grown model, its tokenizer and other files that are no weights.
    """

    def __init__(self, model: Model, recipe: Recipe, folder: Path) -> None:
        self._base: MegatronSource = model.weights
        self._parts, self._recipe = model.parts, recipe
        # The notes of the conversion that made the checkpoint are about its own rows; `read` compares those.
        self._checker, self.config_folder, self.weights_folder = Checker(self._base.weights_folder), folder, folder
        self.path, self.kind, self.ignored = self._base.path, self._base.kind, self._base.ignored
        self.model = describe(read_json(folder / CONFIG))
        infos = self._base.infos
        self.infos = {one.name: TensorInfo(infos[one.name].dtype, one.shape) for one in self.model.claims.values()}

    def read(self, name: str) -> Tensor:
        tensor = self._base.read(name)
        self._checker.check(name, tensor)
        return self._recipe.grow(tensor, self._parts[name]) if name in self._parts else tensor

    def expect(self, name: str) -> None:
        self._base.expect(name)

    def origin(self, name: str) -> str:
        return self._base.origin(name)

    def identity(self) -> Any:
        return self._base.identity()
