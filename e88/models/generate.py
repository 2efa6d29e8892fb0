"""Sampling, one token after the other, from a state of constant size.

B rows, N vocabulary
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from e88.errors import UserError
from e88.models.lm import LanguageModel, LMState
from e88.ops.cuda.compile import overlapped
from e88.ops.norms import wide, wide_dtype

# Steps queued on a GPU ahead of the token that is read: enough to hide the host, too few to be felt.
AHEAD = 8


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
    """logits [B, N] -> one token a row, [B] int64; nothing in it waits for the device."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = (wide(logits) / sampling.temperature).softmax(-1).sort(dim=-1, descending=True)
        # A token stays while the mass before it is below top_p, so the likeliest always stays.
        drop = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(drop.scatter(-1, order, drop), float("-inf"))
    # Of clocks that ring after an exponential time at rates exp(logits / temperature), the first is drawn.
    times = torch.empty_like(logits, dtype=wide_dtype(logits.dtype)).exponential_(generator=generator)
    return torch.sub(logits, times.log_(), alpha=sampling.temperature).argmax(-1)


@torch.no_grad()
def prepare(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """Make a model ready for decoding, in place: matrices cast to `dtype`, projections of one input joined.

    Norms, decay parameters and short convolutions keep their dtype. The model can still read text in parallel, but no
    longer be trained.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
    for block in model.blocks:
        block.mixer.join_projections()  # type: ignore[operator, union-attr]
    return model.requires_grad_(False).eval()


class Decoder:
    """A model that reads a prompt and goes on from it, a token a step, in buffers that stay where they are.

    On a GPU one step with its sampling is a captured graph, replayed without waiting for the host; where a mixer's step
    cannot be captured it runs eagerly, and says why once. Attributes, read only: `token` [B], drawn last; `logits`
    [B, N], that it was drawn from; `state`, which has read every token before it; `reason`, why there is no graph.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        batch: int = 1,
        state: LMState | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.device = model.embedding.weight.device
        self.sampling = sampling or Sampling()
        self.token = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.logits: Tensor | None = None
        self.state = model.init_state(batch, self.device)
        if state is not None:
            self._keep([_like(given, empty) for given, empty in zip(state, self.state, strict=True)])
        self.reason: str | None = None if self.device.type == "cuda" else "it does not run on a GPU"
        self._generator = torch.Generator(device=self.device).manual_seed(seed)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given = True
        ahead = AHEAD if self.device.type == "cuda" else 1
        self._hosts = [torch.empty(batch, dtype=torch.int64, pin_memory=ahead > 1) for _ in range(ahead)]

    @torch.no_grad()
    def read(self, prompt: Tensor, *, chunk: int = 1024) -> None:
        """Read prompt [B, T], T >= 1, and draw the next token.

        After `tokens` it goes on from all of them: the last one given out, which the state has not read yet, is read
        first. A token that was drawn and not given out is forgotten. It is read in parallel chunks of `chunk` tokens,
        so that memory does not grow with it.
        """
        if prompt.shape[1] == 0:
            raise UserError("the prompt is empty; give at least one byte to start from")
        prompt = prompt.to(self.device)
        if self.logits is not None and self._given:
            prompt = torch.cat([self.token.unsqueeze(1), prompt], dim=1)
        logits = None
        for tokens in prompt.split(chunk, dim=1):
            with self._precision():
                logits, state = self.model.prefill(tokens, self.state)
            self._keep(state)
        assert logits is not None
        self._draw(logits)
        self._given = False

    def tokens(self, count: int) -> Iterator[Tensor]:
        """The next `count` tokens, [B] on the CPU each, as they come.

        Steps are queued ahead, so take them all: after fewer, the state has read tokens that were not given out.
        """
        queue: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        for started in range(count):
            queue.append(self._next(started))
            if len(queue) == len(self._hosts):
                yield _arrived(*queue.popleft())
        while queue:
            yield _arrived(*queue.popleft())

    @torch.no_grad()
    def advance(self) -> None:
        """Read `token` and draw the next one."""
        if self._graph is None and self.reason is None:
            self.reason = self._capture()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()

    def _next(self, number: int) -> tuple[Tensor, torch.cuda.Event | None]:
        """Start a step where the last token was given out; the next one's place on the host, and when it is there."""
        if self._given:
            self.advance()
        self._given = True
        host = self._hosts[number % len(self._hosts)]
        host.copy_(self.token, non_blocking=True)
        if self.device.type != "cuda":
            return host, None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return host, event

    def _step(self) -> None:
        with self._precision():
            logits, state = self.model.step(self.token, self.state, inplace=True)
        self._keep(state)
        self._draw(logits)

    def _draw(self, logits: Tensor) -> None:
        self.logits = logits
        self.token.copy_(sample(logits, self.sampling, self._generator))

    def _keep(self, state: LMState) -> None:
        """Bring the state into the buffers; one that grows takes their place."""
        for kept, new in zip(self.state, state, strict=True):
            for name, tensor in new.items():
                if tensor.shape != kept[name].shape:
                    kept[name] = tensor
                elif tensor is not kept[name]:
                    kept[name].copy_(tensor)

    def _precision(self) -> AbstractContextManager[object]:
        """Matrices in bf16 or fp16 compute in it; the residual stream and the state stay float32."""
        dtype = self.model.embedding.weight.dtype
        if dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=dtype, cache_enabled=False)

    def _capture(self) -> str | None:
        """Capture a step, leaving token, state and generator as they are; the reason where that cannot be."""
        token, state = self.token.clone(), [{name: x.clone() for name, x in part.items()} for part in self.state]
        shapes = [{name: x.shape for name, x in part.items()} for part in self.state]
        drawn = self._generator.get_state()
        side, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            # Twice: kernels are compiled, loaded and tuned outside the capture.
            self._step()
            self._step()
        current.wait_stream(side)
        pairs = zip(self.state, shapes, strict=True)
        grows = any(x.shape != shape[name] for part, shape in pairs for name, x in part.items())
        self.token.copy_(token)
        self.state = state if grows else self.state
        self._keep(state)
        self._generator.set_state(drawn)
        if grows:
            return _announce("its state grows with the text")
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        try:
            with overlapped(), torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            return _announce(str(error).splitlines()[0])
        self._graph = graph
        return None


def _like(given: dict[str, Tensor], empty: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(empty[name]) for name, tensor in given.items()}


def _arrived(host: Tensor, event: torch.cuda.Event | None) -> Tensor:
    if event is not None:
        event.synchronize()
    return host.clone()


def _announce(reason: str) -> str:
    warnings.warn(f"decoding runs without a CUDA graph, more slowly: {reason}", UserWarning, stacklevel=4)
    return reason
