"""Named configurations: every row of the documents, our sizes, their rivals, and tiny ones for the CPU.

Names. The documents reuse labels, so: `E88_...` are the benchmark's and the balanced guide's rows, at depth 32; where
the two clash (b64n32, b32n64) the benchmark's, which ran, keeps the name and the guide's ends in `-guide`. Bare
`h..n..` are the sizing guide's, gated. `dim..`, `plan-...` are the scaling plan's, `state-...` the state analysis's.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from e88.errors import UserError, unknown_name
from e88.models.config import AttentionConfig, E88Config, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from e88.sizing.documents import BALANCED, BENCHMARK, PLAN, SIZING, STATE

OURS = "this project"


@dataclass(frozen=True)
class Preset:
    """A named configuration, one line about it, and the document it comes from."""

    name: str
    config: ModelConfig
    description: str
    source: str


def _e88(dim: int, depth: int, heads: int, n_state: int, gate: bool = False, conv: int = 0) -> ModelConfig:
    mixer = E88Config(n_heads=heads, n_state=n_state, gate=gate, conv=conv)
    return ModelConfig(dim=dim, depth=depth, mixer=mixer)


def _wide(dim: int, depth: int) -> ModelConfig:
    """The form of E88 that was best at 500M in a minute (docs/findings.md): convolution, gates, and a start with small
    logits and updates twice as loud."""
    mixer = E88Config(n_heads=dim // 32, n_state=32, conv=4, gate=True, write_gate=True)
    return ModelConfig(dim=dim, depth=depth, mixer=mixer, output_gain=0.0, branch_gain=2.0)


def _memory(model: ModelConfig, heads: int, n_state: int, every: int) -> ModelConfig:
    """The model with fewer and larger states in every so many blocks: for what lies far back (docs/findings.md)."""
    assert isinstance(model.mixer, E88Config)
    return replace(model, hybrid=replace(model.mixer, n_heads=heads, n_state=n_state), hybrid_every=every)


def _gdn(dim: int, depth: int, heads: int, head_dim: int = 128, expand_v: float = 2.0) -> ModelConfig:
    mixer = GatedDeltaNetConfig(n_heads=heads, head_dim=head_dim, expand_v=expand_v)
    return ModelConfig(dim=dim, depth=depth, mixer=mixer)


def _mamba2(dim: int, depth: int, d_state: int = 128, head_dim: int = 64) -> ModelConfig:
    return ModelConfig(dim=dim, depth=depth, mixer=Mamba2Config(d_state=d_state, head_dim=head_dim))


def _transformer(dim: int, depth: int, heads: int, mlp_hidden: int) -> ModelConfig:
    return ModelConfig(dim=dim, depth=depth, mixer=AttentionConfig(n_heads=heads), mlp_hidden=mlp_hidden)


def _ours() -> list[Preset]:
    """Our recommended shapes and matched rivals."""
    rows = [
        ("tiny-e88", _e88(192, 8, 6, 32, gate=True, conv=4), "1.5M for the CPU; gate and short convolution"),
        ("tiny-gdn", _gdn(192, 5, 3, head_dim=64), "Gated DeltaNet matched to tiny-e88 within 2 %"),
        ("tiny-mamba2", _mamba2(192, 6, d_state=64), "Mamba2 matched to tiny-e88 within 2 %"),
        ("tiny-transformer", _transformer(160, 5, 5, 416), "Transformer matched to tiny-e88 within 2 %"),
        ("e88-100m", _wide(1152, 15), "the form of e88-500m; not measured at this size"),
        ("gdn-100m", _gdn(1024, 12, 8), "strong Gated DeltaNet matched to e88-100m"),
        ("mamba2-100m", _mamba2(896, 20), "Mamba2 matched to e88-100m"),
        ("transformer-100m", _transformer(896, 11, 7, 2240), "Transformer matched to e88-100m"),
        ("e88-300m", _wide(1728, 20), "the form of e88-500m; not measured at this size"),
        ("gdn-300m", _gdn(1344, 20, 11), "strong Gated DeltaNet matched to e88-300m"),
        ("mamba2-300m", _mamba2(1344, 27), "Mamba2 matched to e88-300m"),
        ("transformer-300m", _transformer(1280, 15, 10, 3584), "Transformer matched to e88-300m"),
        ("e88-500m", _wide(2304, 19), "best in a minute on an H200: convolution, gates, small logits"),
        ("e88-500m-memory", _memory(_wide(2304, 19), 18, 128, 6), "best E88 in ten minutes: larger states in 3 blocks"),
        ("gdn-500m", _gdn(1664, 24, 13), "strong Gated DeltaNet: 13 heads of 128, expand_v 2"),
        ("mamba2-500m", _mamba2(1600, 32), "the benchmark's Mamba2"),
        ("transformer-500m", _transformer(1536, 18, 12, 4096), "Transformer near the 500M baselines"),
        ("gdn-500m-doc", _gdn(2304, 20, 18, expand_v=1.0), "the Gated DeltaNet that the benchmark really ran"),
        ("e88-1b", _wide(2816, 25), "the form of e88-500m; not measured at this size"),
        ("gdn-1b", _gdn(2112, 29, 16), "strong Gated DeltaNet matched to e88-1b"),
        ("mamba2-1b", _mamba2(2048, 39), "Mamba2 matched to e88-1b"),
        ("transformer-1b", _transformer(1920, 22, 15, 5376), "Transformer matched to e88-1b"),
    ]
    sources = {"mamba2-500m": BENCHMARK, "gdn-500m-doc": BENCHMARK}
    return [Preset(name, config, text, sources.get(name, OURS)) for name, config, text in rows]


def _benchmark() -> list[Preset]:
    rows = [
        ("b56n32", 2176, 56, 32),
        ("b60n32", 2048, 60, 32),
        ("b64n32", 1920, 64, 32),
        ("b40n48", 2048, 40, 48),
        ("b44n48", 1792, 44, 48),
        ("b28n64", 2176, 28, 64),
        ("b32n64", 1920, 32, 64),
    ]
    text = "ran in the 500M benchmark"
    return [Preset(f"E88_{tag}", _e88(dim, 32, h, n), text, BENCHMARK) for tag, dim, h, n in rows]


def _balanced_guide() -> list[Preset]:
    rows = [
        ("E88_b64n32-guide", 2048, 64, 32, "recommended; the benchmark's b64n32 has dim 1920"),
        ("E88_b48n32", 1536, 48, 32, "recommended at 300M"),
        ("E88_b32n64-guide", 2048, 32, 64, "recommended; the benchmark's b32n64 has dim 1920"),
        ("E88_b24n64", 1536, 24, 64, "recommended at 300M"),
        ("E88_b48n48", 2304, 48, 48, "recommended"),
        ("E88_b36n48", 1728, 36, 48, "recommended at 380M"),
        ("E88_h81n128", 384, 81, 128, "anti-pattern: extreme expansion"),
        ("E88_h100n64", 640, 100, 64, "anti-pattern: heavy expansion; also in the state analysis"),
        ("E88_h5n128", 6144, 5, 128, "anti-pattern: underutilized state; also in the state analysis"),
        ("guide-marginal", 512, 32, 32, "example of a marginal ratio; depth not printed, 32 assumed"),
    ]
    return [Preset(name, _e88(dim, 32, h, n), text, BALANCED) for name, dim, h, n, text in rows]


def _sizing_guide() -> list[Preset]:
    rows = [
        (1280, 20, 32, 32, "100M"),
        (1152, 20, 40, 32, "100M"),
        (1280, 20, 24, 48, "100M"),
        (2432, 20, 64, 32, "500M"),
        (2304, 20, 68, 32, "500M"),
        (2176, 20, 72, 32, "500M"),
        (2048, 20, 76, 32, "500M"),
        (2176, 20, 48, 48, "500M"),
        (1920, 20, 40, 64, "500M"),
        (2816, 24, 96, 32, "1B"),
        (2688, 24, 80, 48, "1B"),
        (2560, 24, 64, 64, "1B"),
    ]
    presets = [
        Preset(f"h{h}n{n}", _e88(dim, depth, h, n, gate=True), f"in the guide's {size} table", SIZING)
        for dim, depth, h, n, size in rows
    ]
    text = "anti-pattern: few heads at large dim; depth not printed, 20 assumed"
    return [*presets, Preset("guide-h20n32", _e88(8192, 20, 20, 32, gate=True), text, SIZING)]


def _plan() -> list[Preset]:
    rows = [
        ("dim1792-depth38", 1792, 38, 56, 32, "dimension sweep, ran: its best"),
        ("dim2560-depth18", 2560, 18, 80, 32, "dimension sweep, ran; heads not printed, dim/32"),
        ("dim2304-depth22", 2304, 22, 72, 32, "dimension sweep, ran; heads not printed, dim/32"),
        ("dim2048-depth28", 2048, 28, 64, 32, "dimension sweep, ran; heads not printed, dim/32"),
        ("dim1536-depth50", 1536, 50, 48, 32, "dimension sweep, ran; heads not printed, dim/32"),
        ("dim2048-n16", 2048, 32, 128, 16, "n_state sweep, ran"),
        ("dim2048-n24", 2048, 32, 85, 24, "n_state sweep, ran"),
        ("dim2048-n32", 2048, 32, 64, 32, "n_state sweep, ran: its best"),
        ("dim2048-n40", 2048, 32, 51, 40, "n_state sweep, planned"),
        ("dim2048-n48", 2048, 32, 42, 48, "n_state sweep, ran (planned with 43 heads)"),
        ("plan-n48", 2048, 32, 43, 48, "n_state sweep, as planned; ran with 42 heads"),
        ("plan-narrow", 1536, 48, 48, 32, "dimension sweep, planned"),
        ("plan-medium", 2048, 32, 64, 32, "dimension sweep, planned"),
        ("plan-wide", 2560, 24, 80, 32, "dimension sweep, planned; not 500M"),
        ("plan-wider", 3072, 18, 96, 32, "dimension sweep, planned; not 500M"),
        ("plan-depth16", 2048, 16, 64, 32, "depth sweep, planned: shallow"),
        ("plan-depth24", 2048, 24, 64, 32, "depth sweep, planned: medium"),
        ("plan-depth32", 2048, 32, 64, 32, "depth sweep, planned: deep"),
        ("plan-depth48", 2048, 48, 64, 32, "depth sweep, planned: deeper"),
        ("plan-100m", 1024, 20, 32, 32, "multi-scale, planned"),
        ("plan-300m", 1536, 28, 48, 32, "multi-scale, planned"),
        ("plan-500m", 2048, 32, 64, 32, "multi-scale, planned"),
        ("plan-1b", 2560, 40, 80, 32, "multi-scale, planned"),
    ]
    return [Preset(name, _e88(dim, depth, h, n), text, PLAN) for name, dim, depth, h, n, text in rows]


def _state_analysis() -> list[Preset]:
    """The document prints depth, heads and n_state; dim is the multiple of 32 that comes nearest to 500M ungated.

    h12n56 and h8n64 are limits that it names without a row of their own; depth 20 as for the other few-headed ones.
    """
    rows = [
        (16032, 20, 8, 48),
        (13792, 20, 8, 56),
        (16000, 20, 12, 32),
        (9216, 20, 12, 56),
        (12064, 20, 8, 64),
        (3584, 20, 36, 48),
        (1792, 20, 72, 48),
        (1504, 32, 81, 32),
    ]
    text = "dim not printed: derived for 500M, ungated, at the printed depth"
    return [Preset(f"state-h{h}n{n}", _e88(dim, depth, h, n), text, STATE) for dim, depth, h, n in rows]


PRESETS = {
    entry.name: entry
    for group in (_ours(), _benchmark(), _balanced_guide(), _sizing_guide(), _plan(), _state_analysis())
    for entry in group
}
_BY_LOWER = {name.lower(): name for name in PRESETS}


def find_preset(name: str) -> Preset:
    """The preset of this name in any case. UserError with the nearest names if there is none."""
    if name.lower() not in _BY_LOWER:
        # Without a near name the list of them all would fill the screen.
        if not difflib.get_close_matches(name, PRESETS, cutoff=0.5):
            raise UserError(f"unknown preset '{name}'; list the known ones with: e88 presets")
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[_BY_LOWER[name.lower()]]


def preset(name: str) -> ModelConfig:
    """The configuration of a preset, matched in any case. UserError with the nearest names if there is none."""
    return find_preset(name).config
