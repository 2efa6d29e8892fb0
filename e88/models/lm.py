"""The language model around a mixer: one class for E88 and its rivals.

B batch, T time, D model width, N vocabulary
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e88.layers.common import ResidualRMSNorm
from e88.layers.mixer import State, backends_for, build_mixer
from e88.models.config import MixerConfig, ModelConfig
from e88.ops.backends import triton_serves
from e88.ops.norms import wide

LMState = list[State]
INIT_STD = 0.02
BASE_DIM = 256
RESIDUAL_OUTPUTS = ("o_proj", "out_proj", "down_proj")


class MLP(nn.Module):
    """SwiGLU: W_down(silu(W_gate x) * W_up x), without biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up_proj(x)
        if triton_serves(gate_up):
            from e88.ops.triton.swiglu import swiglu

            return self.down_proj(swiglu(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """A mixer, and an MLP where the model has one, each behind its norm and added to the residual stream.

    What a branch adds reaches the stream in the next norm, which reads both; `add` is what the block before left.
    """

    def __init__(self, config: ModelConfig, mixer: MixerConfig) -> None:
        super().__init__()
        self.norm = ResidualRMSNorm(config.dim)
        self.mixer = build_mixer(config.dim, mixer)
        self.mlp_norm = ResidualRMSNorm(config.dim) if config.mlp_hidden else None
        self.mlp = MLP(config.dim, config.mlp_hidden) if config.mlp_hidden else None

    def forward(
        self, h: Tensor, add: Tensor | None, state: State | None, return_state: bool
    ) -> tuple[Tensor, Tensor, State | None]:
        """h, add [B, T, D] -> the stream, what to add to it next, and the mixer's state."""
        h, x = self.norm(h, add)
        y, new_state = self.mixer(x, state, return_state=return_state)
        return *self._mlp(h, y), new_state

    def step(self, h: Tensor, add: Tensor | None, state: State, inplace: bool) -> tuple[Tensor, Tensor, State]:
        """As forward, for one token: h, add [B, D]."""
        if self.mixer.joined is None:
            h, x = self.norm(h, add)
            y, new_state = self.mixer.step(x, state)
        else:
            h, p = self.norm.project(h, add, self.mixer.joined)
            y, new_state = self.mixer.step_joined(p, state, inplace=inplace)
        return *self._mlp(h, y), new_state

    def init_state(self, batch: int, device: torch.device | None) -> State:
        return self.mixer.init_state(batch, device=device)

    def _mlp(self, h: Tensor, add: Tensor) -> tuple[Tensor, Tensor]:
        if self.mlp is None or self.mlp_norm is None:
            return h, add
        h, x = self.mlp_norm(h, add)
        return h, self.mlp(x)


class LanguageModel(nn.Module):
    """Embedding, blocks, final RMSNorm, head tied with the embedding. Residual stream in float32, or float64 if that is
    what the parameters are.

    Keep the parameters in float32 and compute in bf16 through autocast: an update of 3e-4 on a bf16 weight near 1 is
    rounded away. Matrices that are in bf16, as for decoding, work under autocast only.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, mixer) for mixer in config.mixers)
        self.norm = ResidualRMSNorm(config.dim)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Embedding N(0, 0.02); each branch's output projection shrunk by sqrt(branches), as GPT-2 does; both gains as
        the config says."""
        nn.init.normal_(self.embedding.weight, std=INIT_STD)
        nn.init.constant_(self.norm.weight, self.config.output_gain or min(1.0, BASE_DIM / self.config.dim))
        branches = self.config.depth * (2 if self.config.mlp_hidden else 1)
        for name, module in self.named_modules():
            if name.rsplit(".", 1)[-1] in RESIDUAL_OUTPUTS and isinstance(module, nn.Linear):
                module.weight.mul_(self.config.branch_gain / math.sqrt(branches))

    def set_backend(self, name: str) -> None:
        """Have every mixer that knows this backend use it, and the others `auto`. UserError where none knows it."""
        chosen = backends_for((mixer.kind for mixer in self.config.mixers), name)
        for block, mixer in zip(self.blocks, self.config.mixers, strict=True):
            block.mixer.backend = chosen[mixer.kind]  # type: ignore[union-attr]

    def hidden(
        self, tokens: Tensor, state: LMState | None = None, return_state: bool = False
    ) -> tuple[Tensor, LMState]:
        """tokens [B, T] -> normalised residual stream [B, T, D], and the state after them (empty unless asked for)."""
        h, add = wide(self.embedding(tokens)), None
        states: LMState = []
        for i, block in enumerate(self.blocks):
            h, add, new_state = block(h, add, None if state is None else state[i], return_state)
            if return_state:
                states.append(new_state)
        return self.norm(h, add)[1], states

    def forward(self, tokens: Tensor, state: LMState | None = None) -> Tensor:
        """tokens [B, T] int64 -> logits [B, T, N]."""
        return F.linear(self.hidden(tokens, state)[0], self.embedding.weight)

    def nll(self, windows: Tensor) -> Tensor:
        """windows [B, T + 1] int64 -> negative log likelihood of the last T tokens, nats, [B, T] float32."""
        return self._score(self.hidden(windows[:, :-1])[0], windows)

    def nll_from(self, windows: Tensor, state: LMState | None) -> tuple[Tensor, LMState]:
        """As nll, of windows that follow the text behind `state` (None: none), and the state after them, with which the
        windows that begin with their last token go on."""
        h, states = self.hidden(windows[:, :-1], state, return_state=True)
        return self._score(h, windows), states

    def _score(self, h: Tensor, windows: Tensor) -> Tensor:
        logits = F.linear(h, self.embedding.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(len(windows), -1)

    def init_state(self, batch: int, device: torch.device | None = None) -> LMState:
        """The state before the first token."""
        return [block.init_state(batch, device) for block in self.blocks]  # type: ignore[operator]

    def prefill(self, tokens: Tensor, state: LMState | None = None) -> tuple[Tensor, LMState]:
        """tokens [B, T] in one parallel pass -> logits of the last [B, N] and the state after it."""
        h, states = self.hidden(tokens, state, return_state=True)
        return F.linear(h[:, -1], self.embedding.weight), states

    def step(self, token: Tensor, state: LMState, *, inplace: bool = False) -> tuple[Tensor, LMState]:
        """One token [B] -> logits [B, N] and the new state, which `inplace` may write over the old one."""
        h, add = wide(self.embedding(token)), None
        states: LMState = []
        for block, block_state in zip(self.blocks, state, strict=True):
            h, add, new_state = block.step(h, add, block_state, inplace)  # type: ignore[operator]
            states.append(new_state)
        return self.norm.project(h, add, self.embedding.weight)[1], states
