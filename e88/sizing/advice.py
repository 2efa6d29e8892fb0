"""What the two guides say about a shape: verdicts, warnings, and the n_state they recommend for a piece of hardware.

The guides use inverse ratios, H*n_state/dim (balanced configuration guide) and dim/(H*n_state) (sizing guide), and
draw their bands differently, so every verdict carries the guide's name. Where a guide is silent or was wrong, the text
says so.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from importlib import resources

from e88.errors import unknown_name
from e88.models.config import E88Config, ModelConfig

BALANCED_RULE = "H*n/dim 0.5-2 balanced, 2-4 marginal, >4 bottleneck"
SIZING_RULE = "dim/(H*n) >2 severe bottleneck, 1.2-2 mild, 0.8-1.2 balanced, 0.5-0.8 over-provisioned, <0.5 wasteful"

# Between the guide's "heavy expansion" (ratio 10) and "extreme expansion" (ratio 27), halfway on a log scale.
EXTREME_RATIO = 16.0
LOGGING_ERROR = (
    "the state analysis says that training diverges with 36+ heads: that is a logging error (the printed loss was "
    "multiplied by the number of accumulation steps; all five runs trained)"
)


@dataclass(frozen=True)
class Hardware:
    """n_state recommended for a piece of hardware, from the guides or measured on it.

    kind: `consumer`, `datacenter`, `any` or `measured`; low and high are inclusive. times: of a measured one, n_state
    and nanoseconds per token, layer and element of d_inner, forward and backward.
    """

    name: str
    label: str
    kind: str
    low: int
    high: int
    reason: str
    source: str
    times: tuple[tuple[int, float], ...] = ()

    def nanoseconds(self, n_heads: int, n_state: int) -> float | None:
        """Measured time of one layer's recurrence per token; None for an n_state that was not measured."""
        time = dict(self.times).get(n_state)
        return None if time is None else time * n_heads * n_state


@functools.cache
def hardware_table() -> dict[str, Hardware]:
    """The recommendations of `hardware.json`, by name; the name "default" is for no hardware at all."""
    data = json.loads(resources.files("e88.sizing").joinpath("hardware.json").read_text("utf-8"))
    table = {}
    for name, row in data.items():
        low, high = row["n_state"]
        table[name] = Hardware(name, row["label"], row["class"], low, high, row["reason"], row["source"])
    return table


def hardware_names() -> list[str]:
    """Names that `hardware` accepts."""
    return [name for name in hardware_table() if name != "default"]


def hardware(name: str | None) -> Hardware:
    """The recommendation for a GPU such as `h200` or `RTX 4090`; None gives the default. UserError if unknown."""
    if name is None:
        return hardware_table()["default"]
    key = re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())
    if key not in hardware_names():
        raise unknown_name("hardware", key or name, hardware_names())
    return hardware_table()[key]


def balanced_guide_verdict(ratio: float) -> str:
    """The balanced guide's word for H*n_state/dim. A ratio of exactly 2 is its own example of marginal."""
    if ratio < 0.5:
        return "below the guide's bands (they start at 0.5; its example h5n128, ratio 0.10: underutilized state)"
    if ratio < 2:
        return "balanced"
    return "marginal" if ratio <= 4 else "bottleneck"


def sizing_guide_verdict(ratio: float) -> str:
    """The sizing guide's word for dim/(H*n_state)."""
    if ratio > 2:
        return "severe bottleneck"
    if ratio > 1.2:
        return "mild bottleneck"
    if ratio >= 0.8:
        return "balanced"
    return "over-provisioned d_inner" if ratio >= 0.5 else "wasteful d_inner"


def verdicts(config: ModelConfig) -> list[dict[str, object]]:
    """Both guides' verdicts on an E88 shape: guide, quantity, value, verdict, rule. Empty for other mixers."""
    if not isinstance(config.mixer, E88Config):
        return []
    expansion, inverse = config.mixer.d_inner / config.dim, config.dim / config.mixer.d_inner
    return [
        {
            "guide": "balanced guide",
            "quantity": "H*n/dim",
            "value": expansion,
            "verdict": balanced_guide_verdict(expansion),
            "rule": BALANCED_RULE,
        },
        {
            "guide": "sizing guide",
            "quantity": "dim/(H*n)",
            "value": inverse,
            "verdict": sizing_guide_verdict(inverse),
            "rule": SIZING_RULE,
        },
    ]


def warnings(config: ModelConfig, on: Hardware | None = None) -> list[str]:
    """One line for each anti-pattern of the documents that an E88 shape shows, with the reason they give.

    on: without it, no warning about n_state on hardware. Other mixers have none.
    """
    mixer = config.mixer
    if not isinstance(mixer, E88Config):
        return []
    ratio = mixer.d_inner / config.dim
    return [*_shape_warnings(config, mixer, ratio), *_state_warnings(mixer, on)]


def _shape_warnings(config: ModelConfig, mixer: E88Config, ratio: float) -> list[str]:
    found = []
    if ratio > EXTREME_RATIO:
        found.append(
            f"extreme expansion: d_inner is {ratio:.1f} times dim, as in the balanced guide's h81n128 (27 times, "
            "10x slowdown); use fewer heads or a smaller n_state"
        )
    elif ratio > 4:
        found.append(
            f"heavy expansion: d_inner is {ratio:.1f} times dim, as in the balanced guide's h100n64 (10 times); the "
            "projections are the bottleneck"
        )
    if ratio < 0.5:
        found.append(
            f"underutilized state: d_inner is {ratio:.2f} of dim, as in the balanced guide's h5n128 (0.10); most "
            "parameters feed a small state"
        )
        found.append(
            f"few heads for a large dim: {mixer.n_heads} heads at dim {config.dim} (sizing guide: h20n32 at dim 8192 "
            "is a severe bottleneck)"
        )
    inverse = 1 / ratio
    if not 0.8 <= inverse <= 1.2:
        found.append(
            f"mismatch: dim/d_inner is {inverse:.2f}, outside 0.8-1.2; the sizing guide says that this bottlenecks the "
            "projections and wastes parameters"
        )
        if balanced_guide_verdict(ratio) == "balanced":
            found.append(
                f"the guides disagree: H*n/dim {ratio:.2f} is balanced in the balanced guide (0.5-2), "
                f"{sizing_guide_verdict(inverse)} in the sizing guide"
            )
    return found


def _state_warnings(mixer: E88Config, on: Hardware | None) -> list[str]:
    found = []
    if on is not None and on.kind == "consumer" and mixer.n_state > on.high:
        found.append(
            f"large n_state on a consumer GPU: {mixer.n_state} on {on.label}, where the sizing guide recommends "
            f"{on.high} (it saw backward 13-15x slower at 72-96, with kernels slower than today's)"
        )
    times = dict(on.times) if on is not None else {}
    if on is not None and mixer.n_state in times and not on.low <= mixer.n_state <= on.high:
        near = on.high if mixer.n_state > on.high else on.low
        word = "slow" if mixer.n_state > on.high else "small"
        found.append(
            f"{word} n_state for this hardware: at equal d_inner {mixer.n_state} takes "
            f"{times[mixer.n_state] / times[near]:.2f} times the time of {near} for {mixer.n_state / near:.2f} times "
            f"its state ({on.label})"
        )
    if mixer.n_state >= 64 or mixer.n_heads >= 100:
        found.append(
            "long runs untested: n_state 64-128 and 100 heads trained in the documents' runs, but only for a few "
            "hundred steps; whether they hold up longer is open"
        )
    return found


def notes(config: ModelConfig) -> list[str]:
    """What to know about a shape because a document is wrong about it. Not a fault of the shape."""
    mixer = config.mixer
    if isinstance(mixer, E88Config) and mixer.n_heads >= 36:
        return [LOGGING_ERROR]
    return []
