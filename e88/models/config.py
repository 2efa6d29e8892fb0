"""Model configurations: frozen, keyword-only, no torch.

A model is `ModelConfig(dim, depth, mixer=...)`; the mixer's own config decides its kind (`e88`, `gated_deltanet`,
`mamba2`, `attention`). `to_dict` / `from_dict` are the one serialised form, in records, checkpoints and TOML.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from e88.errors import UserError, unknown_name

# Options of mixers that are newer than the first records; their defaults are what was done before.
LATER = {"qk_norm", "a_low", "a_high"}
DECAY_MODES = ("mamba", "sigmoid", "constant", "none")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(isinstance(value, int) and value >= 1, f"{name} must be a positive integer, got {value!r}")


def _as_floats(config: Any) -> None:
    """Whole numbers in fields of type float become floats, so that equal configurations are written down alike."""
    for f in dataclasses.fields(config):
        if f.type == "float" and isinstance(value := getattr(config, f.name), int):
            object.__setattr__(config, f.name, float(value))


@dataclass(frozen=True, kw_only=True)
class E88Config:
    """Options of the E88 layer. Defaults are the plain January form: no gate, convolution, norm or write gate.

    a_low, a_high: of the decay exp(-A softplus(a)) of `mamba`, between which A begins, uniformly; the lower, the longer
    the states remember.
    """

    kind: ClassVar[str] = "e88"
    n_heads: int
    n_state: int = 32
    expand_v: float = 1.0
    decay: str = "mamba"
    gate: bool = False
    conv: int = 0
    head_norm: bool = False
    write_gate: bool = False
    tie_kv: bool = False
    linear_state: bool = False
    a_low: float = 1.0
    a_high: float = 16.0

    def __post_init__(self) -> None:
        _as_floats(self)
        _positive(self, "n_heads", "n_state")
        _require(self.n_state <= 256, f"n_state {self.n_state} is above 256; use more heads of a smaller state")
        _require(self.decay in DECAY_MODES, f"decay '{self.decay}' is not one of {', '.join(DECAY_MODES)}")
        width = self.n_state * self.expand_v
        _require(width >= 1 and width == int(width), f"n_state * expand_v = {width} must be a whole number >= 1")
        _require(width <= 256, f"n_state * expand_v = {width:g} is above 256; lower expand_v")
        _require(self.conv == 0 or 2 <= self.conv <= 8, f"conv must be 0 (off) or a width of 2 to 8, got {self.conv}")
        low, high = self.a_low, self.a_high
        _require(0 < low <= high <= 1000, f"a_low and a_high must be 0 < low <= high <= 1000, got {low} and {high}")
        plain = (low, high) == (E88Config.a_low, E88Config.a_high)
        _require(self.decay == "mamba" or plain, f"decay '{self.decay}' has no A; leave out a_low and a_high")
        _require(not self.tie_kv or self.expand_v == 1, "tie_kv needs expand_v = 1, since k and v are one vector")

    @property
    def head_k_dim(self) -> int:
        return self.n_state

    @property
    def head_v_dim(self) -> int:
        return int(self.n_state * self.expand_v)

    @property
    def d_inner(self) -> int:
        """Width of the concatenated heads, H * n_state (the guides' d_inner)."""
        return self.n_heads * self.n_state


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig:
    """Gated DeltaNet (Yang et al., 2024), with the parameters of flash-linear-attention's layer."""

    kind: ClassVar[str] = "gated_deltanet"
    n_heads: int
    head_dim: int = 128
    expand_v: float = 1.0
    conv: int = 4
    gate: bool = True

    def __post_init__(self) -> None:
        _as_floats(self)
        _positive(self, "n_heads", "head_dim")
        width = self.head_dim * self.expand_v
        _require(width >= 1 and width == int(width), f"head_dim * expand_v = {width} must be a whole number >= 1")
        _require(self.head_dim <= 256, f"head_dim {self.head_dim} is above 256, which the rival's kernels refuse")
        _require(self.conv == 0 or 2 <= self.conv <= 8, f"conv must be 0 (off) or a width of 2 to 8, got {self.conv}")

    @property
    def head_v_dim(self) -> int:
        return int(self.head_dim * self.expand_v)


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Mamba2 (Dao and Gu, 2024), with the parameters of mamba-ssm's layer. d_inner = expand * dim."""

    kind: ClassVar[str] = "mamba2"
    d_state: int = 128
    head_dim: int = 64
    expand: int = 2
    n_groups: int = 1
    conv: int = 4
    chunk: int = 256

    def __post_init__(self) -> None:
        _positive(self, "d_state", "head_dim", "expand", "n_groups", "chunk")
        _require(2 <= self.conv <= 8, f"conv must be a width of 2 to 8, got {self.conv}")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal multi-head attention with rotary positions: the Transformer's mixer.

    qk_norm: queries and keys at a root mean square of one, so that no rate makes their products large.
    """

    kind: ClassVar[str] = "attention"
    n_heads: int
    rope_theta: float = 10_000.0
    qk_norm: bool = False

    def __post_init__(self) -> None:
        _as_floats(self)
        _positive(self, "n_heads")
        _require(self.rope_theta > 0, f"rope_theta must be positive, got {self.rope_theta}")


MixerConfig = E88Config | GatedDeltaNetConfig | Mamba2Config | AttentionConfig
MIXER_CONFIGS: dict[str, type] = {c.kind: c for c in (E88Config, GatedDeltaNetConfig, Mamba2Config, AttentionConfig)}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model: embedding, `depth` blocks of mixer (and SwiGLU MLP where `mlp_hidden` > 0), tied head.

    dim: width of the residual stream. vocab_size: 256 for bytes. mlp_hidden: inner width of the MLP, 0 for none.
    output_gain: what the final norm's weight, and with it the logits, begins at; 0 for min(1, 256 / dim), the output
    multiplier of muP (Yang et al., 2022) for a base width of 256.
    branch_gain: what the output projections of mixers and MLPs begin at, over their usual size. Where branches add
    little to the residual stream, the tied head of a wide model begins by predicting each token to follow itself:
    either gain is a remedy.
    hybrid: what every `hybrid_every`-th block has in place of `mixer`, such as attention, or E88 with larger states.
    """

    dim: int
    depth: int
    mixer: MixerConfig
    vocab_size: int = 256
    mlp_hidden: int = field(default=0)
    output_gain: float = 1.0
    branch_gain: float = 1.0
    hybrid: MixerConfig | None = None
    hybrid_every: int = 0

    def __post_init__(self) -> None:
        _as_floats(self)
        _positive(self, "dim", "depth", "vocab_size")
        _require(0 <= self.output_gain <= 100, f"output_gain must be from 0 (by width) to 100, got {self.output_gain}")
        _require(0 < self.branch_gain <= 100, f"branch_gain must be above 0, at most 100, got {self.branch_gain}")
        _require(isinstance(self.mlp_hidden, int) and self.mlp_hidden >= 0, "mlp_hidden must be an integer >= 0")
        _check_width(self.dim, self.mixer)
        if self.hybrid is None:
            _require(self.hybrid_every == 0, "hybrid_every needs hybrid, the other mixer")
        else:
            _check_width(self.dim, self.hybrid)
            ok = isinstance(self.hybrid_every, int) and 2 <= self.hybrid_every <= self.depth
            _require(ok, f"hybrid_every must be from 2 to depth = {self.depth}, got {self.hybrid_every}")

    @property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """The mixer of each block."""
        every = self.hybrid_every
        return tuple(
            self.hybrid if self.hybrid is not None and block % every == 0 else self.mixer
            for block in range(1, self.depth + 1)
        )

    def parts(self) -> list[ModelConfig]:
        """A model of one mixer for each mixer of this one, with as many blocks as have it."""
        if self.hybrid is None:
            return [self]
        blocks = self.depth // self.hybrid_every
        alone = dataclasses.replace(self, depth=self.depth - blocks, hybrid=None, hybrid_every=0)
        return [alone, dataclasses.replace(alone, depth=blocks, mixer=self.hybrid)]

    def with_mixer(self, mixer: MixerConfig, **changes: Any) -> ModelConfig:
        """This model with another mixer of the same kind, and `changes`. A hybrid of that kind, unless it is among the
        changes, goes along in what it had as the mixer had it."""
        old, hybrid = self.mixer, self.hybrid
        if hybrid is not None and hybrid.kind == mixer.kind == old.kind:
            shared = [f.name for f in dataclasses.fields(old) if getattr(hybrid, f.name) == getattr(old, f.name)]
            changes = {"hybrid": dataclasses.replace(hybrid, **{n: getattr(mixer, n) for n in shared}), **changes}
        return dataclasses.replace(self, mixer=mixer, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form; `from_dict` gives back an equal config."""
        data = dataclasses.asdict(self)
        data["mixer"] = _mixer_dict(self.mixer)
        # Runs of the time before these options keep their ids.
        if self.branch_gain == 1:
            del data["branch_gain"]
        if self.hybrid is None:
            del data["hybrid"], data["hybrid_every"]
        else:
            # What it lacks it would have from the mixer.
            data["hybrid"] = _mixer_dict(self.hybrid, keep=data["mixer"])
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The config of a mapping; unknown or missing keys raise UserError naming the nearest known key.

        What `hybrid` does not say it has from a mixer of its own kind.
        """
        data = dict(data)
        data["mixer"] = build_mixer_config(data.get("mixer"))
        if "hybrid" in data:
            data["hybrid"] = build_mixer_config(data["hybrid"], data["mixer"])
        return build_config(cls, data)


def _mixer_dict(mixer: MixerConfig, keep: Collection[str] = ()) -> dict[str, Any]:
    """The saved form of a mixer: options of `LATER` only where they are not the default, or are to be kept."""
    data = {"kind": mixer.kind, **dataclasses.asdict(mixer)}
    dropped = {key for key in data.keys() & LATER if key not in keep and data[key] == getattr(type(mixer), key)}
    return {key: value for key, value in data.items() if key not in dropped}


def _check_width(dim: int, mixer: MixerConfig) -> None:
    """UserError where a mixer cannot have a stream of width `dim`."""
    if isinstance(mixer, Mamba2Config):
        inner = mixer.expand * dim
        _require(
            inner % mixer.head_dim == 0,
            f"expand * dim = {inner} is not a multiple of head_dim {mixer.head_dim}; change dim or head_dim",
        )
        heads = inner // mixer.head_dim
        _require(heads % mixer.n_groups == 0, f"{heads} heads do not divide into n_groups = {mixer.n_groups}")
    if isinstance(mixer, AttentionConfig):
        ok = dim % mixer.n_heads == 0 and (dim // mixer.n_heads) % 2 == 0
        _require(ok, f"dim {dim} does not divide into {mixer.n_heads} heads of an even width; change n_heads")


def build_mixer_config(given: Any, other: MixerConfig | None = None) -> MixerConfig:
    """A mixer's config from a mapping with its kind; what that lacks comes from `other` where that is of its kind."""
    if not isinstance(given, Mapping) or "kind" not in given:
        raise UserError(f"a mixer needs a kind, one of {', '.join(MIXER_CONFIGS)}")
    options = dict(given)
    kind = options.pop("kind")
    if kind not in MIXER_CONFIGS:
        raise unknown_name("mixer kind", str(kind), MIXER_CONFIGS)
    if other is not None and other.kind == kind:
        options = {**dataclasses.asdict(other), **options}
    built: MixerConfig = build_config(MIXER_CONFIGS[kind], options)
    return built


_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def build_config(cls: type, data: Mapping[str, Any]) -> Any:
    """`cls(**data)` for a dataclass, with one-line errors for unknown, missing and wrongly typed keys."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in data.items():
        if key not in fields:
            raise unknown_name(f"{cls.__name__} key", key, fields)
        kind = str(fields[key].type)
        expected = _TYPES.get(kind)
        wrong_bool = isinstance(value, bool) and kind in ("int", "float")
        if expected is not None and (not isinstance(value, expected) or wrong_bool):
            raise UserError(f"{cls.__name__} key '{key}' must be of type {kind}, got {value!r}")
    required = [name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in data]
    if missing:
        raise UserError(f"{cls.__name__} is missing {', '.join(missing)}")
    return cls(**data)
