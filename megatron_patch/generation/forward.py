"""One step of a GPTModel with a key-value cache: new token ids in, the next token of each row out, on every rank.

Tensor-parallel ranks see the same gathered logits and choose alike. Pipeline stages pass hidden states on; the last one
chooses and tells the others. It knows neither rows that come and go nor when a text ends. Shapes: B rows, S new tokens,
V padded vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_patch.generation.params import SamplingParams
from megatron_patch.generation.sampling import choose
from megatron_patch.layers.cache import KVCache


@dataclass(frozen=True)
class Forward:
    """A model, and how tokens are chosen from its logits."""

    model: GPTModel
    params: SamplingParams
    wants_logprobs: bool

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode, and computes logits for the last position alone."""
        was_training = self.model.training
        self.model.eval()
        # Nobody asks for logits inside a prompt.
        layer = self.model.output_layer if self.model.post_process else None
        hook = layer and layer.register_forward_pre_hook(lambda _module, inputs: (inputs[0][-1:], *inputs[1:]))
        try:
            yield
        finally:
            if hook:
                hook.remove()
            self.model.train(was_training)

    def next_tokens(
        self, cache: KVCache, tokens_BS: Tensor, seen_BV: Tensor | None, draws_B: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The next token of each row [B], and the logarithm of its probability [B] if that is wanted.

        Args:
            cache: what the rows hold already; it is attached to the model.
            seen_BV: which tokens each row holds, for a repetition penalty.
            draws_B: a random number for each row, for sampling.
        """
        output = self._run(cache, tokens_BS)
        if self.model.post_process:
            logits_BV = output[:, -1]
            tokens_B = choose(logits_BV, self.params, seen_BV, draws_B)
            logprobs_B = _logprobs(logits_BV, tokens_B) if self.wants_logprobs else None
        else:
            dist.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
            tokens_B = tokens_BS.new_empty(tokens_BS.shape[0])
            logprobs_B = output.new_empty(tokens_B.shape, dtype=torch.float) if self.wants_logprobs else None
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            _broadcast(tokens_B)
            if logprobs_B is not None:
                _broadcast(logprobs_B)
        return tokens_B, logprobs_B

    def _run(self, cache: KVCache, tokens_BS: Tensor) -> Tensor:
        """Logits [B, 1, V] from the last stage, hidden states [S, B, H] from the others."""
        model, (num_rows, num_new) = self.model, tokens_BS.shape
        if not model.pre_process:
            shape, dtype = (num_new, num_rows, model.config.hidden_size), model.config.pipeline_dtype
            hidden_SBH = tokens_BS.new_empty(shape, dtype=dtype)
            dist.recv(hidden_SBH, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden_SBH)
        with cache.step(num_new):
            return model(tokens_BS, cache.positions_SB().T, None, runtime_gather_output=True)


def _logprobs(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    """Of the model itself: before temperature, penalty and filters, in single precision."""
    return logits_BV.float().log_softmax(-1).gather(1, tokens_B[:, None])[:, 0]


def _broadcast(tensor: Tensor) -> None:
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(tensor, parallel_state.get_pipeline_model_parallel_last_rank(), group)
