"""From a parameter target to shapes: balanced E88 configurations, and rivals matched to the same target.

A count is affine in depth and, for E88, in heads, so every width is solved in whole numbers before a config is built:
what is returned is always within the tolerance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from e88.errors import UserError, unknown_name
from e88.models.config import AttentionConfig, E88Config, GatedDeltaNetConfig, Mamba2Config, MixerConfig, ModelConfig
from e88.sizing.advice import Hardware, hardware
from e88.sizing.closed_form import block_params, count_params
from e88.sizing.units import human_count

TOLERANCE = 0.01
N_STATES = (16, 24, 32, 48, 64, 80, 96, 128)
MAX_DEPTH = 128
# dim/(H*n_state) that both guides call balanced: the sizing guide's 0.8-1.2 lies inside the balanced guide's 0.5-2.
BALANCED_INVERSE = (0.8, 1.2)
# dim/depth. E88: between the best of the dimension sweep (1792 x 38) and of the benchmark (2176 x 32). Rivals: the
# shapes of the 500M baselines.
ASPECTS = {"e88": (47.0, 68.0), "mamba2": (50.0, 50.0), "gated_deltanet": (69.3, 69.3), "attention": (85.3, 85.3)}
ASPECT_REACH = 4.0  # Widths beyond this factor of the aspect band are not searched.
KIND_NAMES = {
    "e88": "e88",
    "gated_deltanet": "gated_deltanet",
    "gdn": "gated_deltanet",
    "mamba2": "mamba2",
    "attention": "attention",
    "transformer": "attention",
}
RIVALS: dict[str, MixerConfig] = {
    "gated_deltanet": GatedDeltaNetConfig(n_heads=1, expand_v=2.0),
    "mamba2": Mamba2Config(),
    "attention": AttentionConfig(n_heads=1),
}
RANKING = (
    "score (lower is better) = balance: 1 at the edge of the band that both guides call balanced; nearness: 0.5 "
    "at the edge of the tolerance; n_state: 1 for a factor 2 off the recommended; aspect: 1 for a factor 2 off "
    "dim/depth 47-68; alignment: 0.25 where H*n is not a multiple of 64"
)


@dataclass(frozen=True)
class Candidate:
    """A configuration found, its exact count, and the penalties that rank it (lower is better)."""

    config: ModelConfig
    params: int
    penalties: dict[str, float]

    @property
    def score(self) -> float:
        """The sum of the penalties."""
        return sum(self.penalties.values())


def mixer_kind(name: str) -> str:
    """The mixer kind of a name such as `gdn` or `transformer`. UserError if unknown."""
    if name.lower() not in KIND_NAMES:
        raise unknown_name("model kind", name, KIND_NAMES)
    return KIND_NAMES[name.lower()]


def solve(
    target: int,
    *,
    template: E88Config | None = None,
    dim: int | None = None,
    depth: int | None = None,
    n_heads: int | None = None,
    n_state: int | None = None,
    vocab_size: int = 256,
    mlp_hidden: int = 0,
    on: Hardware | None = None,
    tolerance: float = TOLERANCE,
    top: int = 5,
) -> list[Candidate]:
    """Balanced E88 configurations within `tolerance` of `target` parameters, best first, one per dim and n_state.

    template: the layer's options (gate, conv, ...); its n_heads and n_state are ignored. dim, depth, n_heads and
    n_state fix what they name and leave the rest to the search. on: whose n_state to prefer.
    Ranking: see `RANKING`. UserError where nothing fits, naming the nearest count that a balanced shape reaches.
    """
    if dim is not None and depth is not None and n_heads is not None and n_state is not None:
        raise UserError("dim, depth, n_heads and n_state leave nothing to search; drop one, or drop the target")
    options = template or E88Config(n_heads=1)
    # A wide value head rules out the largest states.
    states = [n for n in N_STATES if n * options.expand_v <= 256 and float(n * options.expand_v).is_integer()]
    shapes = [
        ModelConfig(
            dim=width,
            depth=1,
            mixer=dataclasses.replace(options, n_heads=n_heads or max(round(width / state), 1), n_state=state),
            vocab_size=vocab_size,
            mlp_hidden=mlp_hidden,
        )
        for width in (_widths() if dim is None else (dim,))
        for state in (states if n_state is None else (n_state,))
    ]
    shapes = [s for s in shapes if dim is not None or _plausible(s, target, depth)]
    wish = _Wish(target, tolerance, depth, n_heads)
    recommended = on or hardware(None)
    found = [candidate for shape in shapes if (candidate := wish.best(shape, recommended)) is not None]
    if not found:
        raise wish.nothing_found(shapes)
    return sorted(found, key=lambda c: c.score)[:top]


def matched(
    kind: str,
    target: int,
    tolerance: float = TOLERANCE,
    *,
    depth: int | None = None,
    vocab_size: int = 256,
    options: MixerConfig | None = None,
) -> ModelConfig:
    """The best shape of a kind (`mamba2`, `gdn`, `transformer`, `e88`) within `tolerance` of `target` parameters.

    Rivals are built strong: Mamba2 with mamba-ssm's defaults, Gated DeltaNet with gate, convolution and
    expand_v 2, the Transformer with a SwiGLU MLP near 8/3 of dim. Nearness is weighed against dim/depth and the
    rival's usual inner width. options: a mixer of that kind, which the shape's equals in all but heads and head
    widths; E88 keeps its n_state too. UserError where nothing fits.
    """
    kind = mixer_kind(kind)
    if kind == "e88":
        find = partial(solve, target, depth=depth, vocab_size=vocab_size, tolerance=tolerance, top=1)
        found = find(template=options, n_state=options.n_state) if isinstance(options, E88Config) else find()
        return found[0].config
    options = options or RIVALS[kind]
    shapes: list[tuple[float, ModelConfig]] = []
    for heads_off in (0, 1):
        for shape, unusual in _rival_shapes(options, target, depth, vocab_size, heads_off):
            for layers in _depths(shape, block_params(shape), target, tolerance, depth):
                config = dataclasses.replace(shape, depth=layers)
                near = abs(count_params(config) - target) / (tolerance * target)
                shapes.append((near / 2 + _off_band(shape.dim / layers, *ASPECTS[kind]) + unusual, config))
        if shapes:
            break
    else:
        where = "" if depth is None else f" at depth {depth}"
        raise UserError(f"no {kind} shape{where} within {tolerance:.1%} of {human_count(target)} parameters")
    return min(shapes, key=lambda pair: pair[0])[1]


def _widths() -> Iterator[int]:
    yield from range(32, 256, 16)
    yield from range(256, 1024, 32)
    yield from range(1024, 16385, 64)


def _base(shape: ModelConfig) -> int:
    """Parameters outside the blocks: tied embedding and final norm."""
    return (shape.vocab_size + 1) * shape.dim


def _plausible(shape: ModelConfig, target: int, depth: int | None) -> bool:
    """Whether a width is worth searching: near its aspect band, or near the depth asked for."""
    layers = (target - _base(shape)) / block_params(shape)
    if depth is not None:
        return depth / 2 <= layers <= depth * 2
    low, high = ASPECTS[shape.mixer.kind]
    return layers > 0 and low / ASPECT_REACH <= shape.dim / layers <= high * ASPECT_REACH


def _depths(shape: ModelConfig, block: int, target: int, tolerance: float, depth: int | None) -> Iterable[int]:
    """Depths at which blocks of `block` parameters bring the count within the tolerance."""
    low = max(math.ceil((target * (1 - tolerance) - _base(shape)) / block), 1)
    high = min(math.floor((target * (1 + tolerance) - _base(shape)) / block), MAX_DEPTH)
    if depth is not None:
        return (depth,) if low <= depth <= high else ()
    return range(low, high + 1)


def _off_band(value: float, low: float, high: float) -> float:
    """Distance of `value` from a band, in factors of two; 0 inside."""
    return max(math.log2(low / value), math.log2(value / high), 0.0)


@dataclass(frozen=True)
class _Wish:
    """What is asked of an E88 search, apart from its widths."""

    target: int
    tolerance: float
    depth: int | None
    n_heads: int | None

    def heads(self, shape: ModelConfig) -> Iterator[tuple[int, int]]:
        """(heads, parameters of a block) for every head count that both guides call balanced."""
        mixer = shape.mixer
        assert isinstance(mixer, E88Config)
        low, high = BALANCED_INVERSE
        fewest = max(math.ceil(shape.dim / (high * mixer.n_state)), 1)
        most = math.floor(shape.dim / (low * mixer.n_state))
        if self.n_heads is not None:
            fewest, most = max(fewest, self.n_heads), min(most, self.n_heads)
        if fewest <= most:
            one, two = (block_params(_with_heads(shape, heads, 1)) for heads in (1, 2))
            for heads in range(fewest, most + 1):
                yield heads, one + (heads - 1) * (two - one)

    def best(self, shape: ModelConfig, recommended: Hardware) -> Candidate | None:
        """The best depth and head count of a width and n_state; None where none comes near enough."""
        best: tuple[float, int, int, int, dict[str, float]] | None = None
        for heads, block in self.heads(shape):
            for depth in _depths(shape, block, self.target, self.tolerance, self.depth):
                params = _base(shape) + depth * block
                penalties = self.penalties(shape, heads, depth, params, recommended)
                score = sum(penalties.values())
                if best is None or score < best[0]:
                    best = (score, heads, depth, params, penalties)
        return None if best is None else Candidate(_with_heads(shape, best[1], best[2]), best[3], best[4])

    def penalties(
        self, shape: ModelConfig, heads: int, depth: int, params: int, recommended: Hardware
    ) -> dict[str, float]:
        """What `RANKING` says."""
        mixer = shape.mixer
        assert isinstance(mixer, E88Config)
        inner = heads * mixer.n_state
        return {
            "balance": abs(math.log2(inner / shape.dim)) / math.log2(1 / BALANCED_INVERSE[0]),
            "nearness": abs(params - self.target) / (self.tolerance * self.target) / 2,
            "n_state": _off_band(mixer.n_state, recommended.low, recommended.high),
            "aspect": _off_band(shape.dim / depth, *ASPECTS["e88"]),
            "alignment": 0.0 if inner % 64 == 0 else 0.25,
        }

    def nothing_found(self, shapes: Iterable[ModelConfig]) -> UserError:
        """The error, naming the balanced shape that comes nearest."""
        wish = f"no balanced E88 shape within {self.tolerance:.1%} of {human_count(self.target)} parameters"
        reached = []
        for shape in shapes:
            for heads, block in self.heads(shape):
                ideal = round((self.target - _base(shape)) / block)
                depth = self.depth or min(max(ideal, 1), MAX_DEPTH)
                params = _base(shape) + depth * block
                reached.append((abs(params - self.target), params, _with_heads(shape, heads, depth)))
        if not reached:
            return UserError(f"{wish}: nothing near it has dim/(n_heads*n_state) within 0.8-1.2; fix fewer values")
        _, params, config = min(reached, key=lambda near: near[0])
        assert isinstance(config.mixer, E88Config)
        return UserError(
            f"{wish}; nearest is {human_count(params)} at dim {config.dim}, depth {config.depth}, "
            f"{config.mixer.n_heads} heads of {config.mixer.n_state}: fix fewer values or change the target"
        )


def _with_heads(shape: ModelConfig, heads: int, depth: int) -> ModelConfig:
    assert isinstance(shape.mixer, E88Config)
    return dataclasses.replace(shape, depth=depth, mixer=dataclasses.replace(shape.mixer, n_heads=heads))


def _rival_shapes(
    options: MixerConfig, target: int, depth: int | None, vocab_size: int, heads_off: int
) -> Iterator[tuple[ModelConfig, float]]:
    """(shape at depth 1, penalty for an unusual inner width) of a rival; the head width follows the model's."""
    for dim in _widths():
        for mixer, hidden, unusual in _rival_mixers(options, dim, heads_off):
            shape = ModelConfig(dim=dim, depth=1, mixer=mixer, vocab_size=vocab_size, mlp_hidden=hidden)
            # The first of a width is typical of them all.
            if not _plausible(shape, target, depth):
                break
            yield shape, unusual


def _rival_mixers(options: MixerConfig, dim: int, heads_off: int) -> Iterator[tuple[MixerConfig, int, float]]:
    """(mixer, mlp_hidden, penalty) of each shape of a rival at one width, the most usual first.

    heads_off: how many heads more or fewer Gated DeltaNet may have than fill the width.
    """
    width = 128 if dim >= 768 else 64 if dim >= 256 else 32
    if isinstance(options, Mamba2Config):
        head_dim = 64 if dim >= 512 else 32
        if options.expand * dim % (head_dim * options.n_groups) == 0:
            yield dataclasses.replace(options, head_dim=head_dim), 0, 0.0
            # The library's d_state of 128 is most of a small model; one that was asked for stays.
            if dim < 512 and options is RIVALS["mamba2"]:
                yield dataclasses.replace(options, head_dim=head_dim, d_state=64), 0, 0.5
    elif isinstance(options, GatedDeltaNetConfig) and dim % (width // 2) == 0:
        for heads in range(max(dim // width - heads_off, 1), -(-dim // width) + heads_off + 1):
            mixer = dataclasses.replace(options, n_heads=heads, head_dim=width)
            yield mixer, 0, abs(math.log2(heads * width / dim))
    elif isinstance(options, AttentionConfig) and dim % (width // 2) == 0:
        # Half the head width where it does not divide dim: 64 is as usual as 128.
        heads = dim // (width if dim % width == 0 else width // 2)
        attention = dataclasses.replace(options, n_heads=heads)
        step, ideal = (64 if dim >= 256 else 16), 8 / 3 * dim
        hiddens = range(step * round(0.85 * ideal / step), round(1.15 * ideal) + 1, step)
        for hidden in sorted(hiddens, key=lambda h: abs(h - ideal)):
            yield attention, hidden, abs(math.log2(hidden / ideal))
