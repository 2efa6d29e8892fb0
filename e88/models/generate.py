"""Sampling, one token after the other, from a state of constant size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from e88.errors import UserError
from e88.models.lm import LanguageModel, LMState


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 takes the likeliest token. top_k 0 and top_p 1 are off; both are applied to the tempered logits."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top-k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1, got {self.top_p}")


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """logits [B, N] -> one token a row, [B] int64."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
        # A token stays while the mass before it is below top_p, so the likeliest always stays.
        drop = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(drop.scatter(-1, order, drop), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


@torch.inference_mode()
def stream(
    model: LanguageModel,
    prompt: list[int],
    *,
    state: LMState | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    chunk: int = 1024,
) -> Iterator[tuple[int, LMState]]:
    """Yield tokens without end, each with the state that holds all tokens before it.

    The prompt is read in parallel chunks of `chunk` tokens, so that memory does not grow with it. To go on later,
    keep the state and pass the last token yielded as the next prompt. Raises UserError for an empty prompt.
    """
    if not prompt:
        raise UserError("the prompt is empty; give at least one byte to start from")
    device = model.embedding.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    sampling = sampling or Sampling()
    if state is None:
        state = model.init_state(1, device)
    logits = None
    for start in range(0, len(prompt), chunk):
        tokens = torch.tensor([prompt[start : start + chunk]], device=device)
        logits, state = model.prefill(tokens, state)
    assert logits is not None
    while True:
        token = sample(logits, sampling, generator)
        yield int(token), state
        logits, state = model.step(token, state)
