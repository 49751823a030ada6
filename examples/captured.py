"""Greedy decoding of a Kimi Linear model of transformers, a step as one CUDA graph.

A decoding step is some hundred launches, each of which costs the host more than most of them cost a
GPU. transformers' StaticCache keeps states, latents and lengths where they are, so that a captured
step can be replayed for every token; the step itself chooses the token and moves on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache


@contextlib.contextmanager
def _experts_that_do_not_wait(model: PreTrainedModel) -> Iterator[None]:
    """Of transformers' ways to run experts the one whose launches do not depend on the router."""
    before = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


class Decoder:
    """Prompts of a batch, padded on the left, and the tokens after them, one step at a time.

    `tokens` [B, 1] and `logits` [B, vocabulary] are the latest ones, in buffers that every step
    overwrites.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, ids: Tensor, mask: Tensor, new_tokens: int) -> None:
        self.model, self.ids, self.mask = model, ids, mask
        B, width = ids.shape
        self.cache = StaticCache(config=model.config, max_cache_len=width + new_tokens)
        hidden = torch.finfo(model.dtype).min
        # What a new token sees of the cache: added to scores, zero for prompts and what came since.
        seen = torch.full((B, 1, 1, width + new_tokens), hidden, dtype=model.dtype)
        self._seen_first = seen.to(ids.device)
        self._seen_first[..., :width].masked_fill_(mask[:, None, None, :] != 0, 0)
        self._seen = torch.empty_like(self._seen_first)
        self._length = torch.full((1,), width, device=ids.device)
        self.tokens = ids.new_empty(B, 1)
        self.logits = torch.empty(B, model.config.vocab_size, dtype=model.dtype, device=ids.device)
        self._graph = None

    @torch.no_grad()
    def prefill(self) -> None:
        """Reads the prompts, into the same buffers every time, and chooses their next tokens."""
        self.cache.reset()
        output = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._seen.copy_(self._seen_first)
        self._length.fill_(self.ids.shape[1])
        self._choose(output.logits)

    def step(self) -> None:
        """The next token of every prompt; a replay of the graph once there is one."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()

    def capture(self) -> None:
        """Captures a step; the next call must be `prefill`, as this moves the buffers on."""
        self.prefill()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what libraries set up at their first calls
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph

    @torch.no_grad()
    def _step(self) -> None:
        self._seen.index_fill_(3, self._length, 0)
        with _experts_that_do_not_wait(self.model):
            output = self.model(
                input_ids=self.tokens,
                # As transformers takes it without a look at its values, which would wait as well.
                attention_mask={"full_attention": self._seen, "linear_attention": None},
                position_ids=self._length[None],
                past_key_values=self.cache,
                use_cache=True,
            )
        self._length.add_(1)
        self._choose(output.logits)

    def _choose(self, logits: Tensor) -> None:
        self.logits.copy_(logits[:, -1])
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))
