"""Multi-token prediction: its logits equal those of transformers' own MtpModel, which reads the published names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.test_against_transformers import _positions, _run
from tests.tiny import hf_moe, tokens
from tests.zoo.runs import Layout, load

IDS = tokens()
LAYOUTS = {
    "TP1": Layout(),
    "TP2": Layout(2),
    "TP2+SP": Layout(2, sequence_parallel=True),
    "PP2": Layout(pipeline=2),
    "EP2": Layout(expert=2, data=2),
}


def logits(rank: int, world_size: int, root: str, layout: Layout) -> list[torch.Tensor]:
    """Whole logits of the token after the next and of the next one, on the ranks of the last stage."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    model = load(root, layout).eval()
    found: list[torch.Tensor] = []
    if model.post_process:
        keep = lambda module, inputs, output: found.append(output[0].transpose(0, 1).clone())  # noqa: E731  the loss
        model.output_layer.register_forward_hook(keep)  # is computed in place

    def forward(data: Any, model: torch.nn.Module) -> Any:
        next(data)
        return model(IDS, _positions(IDS), None, labels=IDS), lambda output, non_loss_data: output

    with torch.no_grad():
        _run(model, forward, 1, forward_only=True, collect_non_loss_data=True)
    return [gather_from_tensor_model_parallel_region(one.contiguous())[..., :200] for one in found]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as published: its last layer belongs to multi-token prediction."""
    place = tmp_path_factory.mktemp("mtp") / "hf"
    hf_moe("deepseek_yarn", num_hidden_layers=5).save_pretrained(place)
    weights, config = load_file(place / "model.safetensors"), json.loads((place / "config.json").read_text())
    norms = {
        f"model.layers.4.{name}.weight": 1 + 0.12 * torch.randn(48) for name in ("enorm", "hnorm", "shared_head.norm")
    }
    weights |= norms | {"model.layers.4.eh_proj.weight": 0.12 * torch.randn(48, 96)}
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps(config | dict(num_hidden_layers=4, num_nextn_predict_layers=1)))
    return place


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    main = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.4\..*"]  # of a published model the class knows them
    extra = MtpModel.from_pretrained(main).eval()
    with torch.no_grad():
        hidden = main.model(IDS).last_hidden_state
        following = extra.forward_layer(0, hidden, _positions(IDS), None, input_ids=IDS.roll(-1, dims=1))
        return [main.lm_head(following), main.lm_head(hidden)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(
    layout: str, pool: Any, checkpoint: Path, reference: list[torch.Tensor], tmp_path: Path
) -> None:
    from megatron_patch.checkpoint.convert import convert

    convert(str(checkpoint), str(tmp_path / "megatron"))
    following, following_main = pool.run(
        logits, LAYOUTS[layout].world_size, str(tmp_path / "megatron"), LAYOUTS[layout]
    )[-1]
    # At the last position there is no next token to go on from.
    assert (following[:, :-1] - reference[0][:, :-1]).abs().max() <= 1e-5
    assert (following_main - reference[1]).abs().max() <= 1e-5
