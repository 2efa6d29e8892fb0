"""Hardware profiles: what `e88 profile` measured on a device, kept as JSON, and the n_state that follows from it.

A profile is one mapping: schema, date (UTC), device, dtype, batch_size, window, d_inner (as asked for), seconds (of
timing for each figure), environment, and rows. A row: n_state; heads and d_inner (heads * n_state, as near below the
one asked for as whole heads come); backend; error (largest relative error against float64); skipped (why there is no
time, or None); forward_ns and forward_backward_ns, per token of one layer; ns_per_element, the latter over the
elements of the state.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from e88 import runtime
from e88.errors import UserError
from e88.files import write_text
from e88.sizing.advice import Hardware, hardware

SCHEMA = 1
AUTO = "auto"
# What n_state gains by more state and loses by more time: doubling the state must cost less than 41 % more time.
MARGIN = 1.10
RULE = "least time per token over the square root of n_state, at equal d_inner, and its neighbours within 10 %"


def folder() -> Path:
    """Where profiles are kept for `--hardware auto`."""
    return runtime.cache_folder() / "profiles"


def default_path(profile: Mapping[str, Any]) -> Path:
    """A file for each device and dtype; measuring again replaces it."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{profile['device']} {profile['dtype']}".lower()).strip("-")
    return folder() / f"{name}.json"


def store(profile: Mapping[str, Any], path: Path) -> Path:
    """Write a profile, whole or not at all. UserError where that is impossible."""
    return write_text(path, json.dumps(profile, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A stored profile. UserError where the file cannot be read or is none."""
    remedy = "measure again with e88 profile"
    try:
        profile = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the profile {path} ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} is not a hardware profile (not JSON); {remedy}") from error
    try:
        if profile["schema"] != SCHEMA:
            raise UserError(f"{path} is a profile of schema {profile['schema']}, not {SCHEMA}; {remedy}")
        _times(profile)
        _label(profile), _source(profile, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a hardware profile ({error!r} is wrong); {remedy}") from error
    return dict(profile)


def newest() -> Path:
    """The stored profile measured last. UserError where there is none."""
    found = [(read(path)["date"], path) for path in folder().glob("*.json")]
    if not found:
        raise UserError(f"no hardware profile in {folder()}; run e88 profile first, or name the hardware")
    return max(found)[1]


def choose(name: str | None) -> Hardware:
    """The recommendation for `auto` (the profile measured last), the file of a profile, a GPU that the guides list, or
    None (the default). UserError for anything else."""
    if name == AUTO:
        return recommend(newest())
    if name is not None and (name.endswith(".json") or "/" in name):
        return recommend(Path(name))
    return hardware(name)


def recommend(path: Path) -> Hardware:
    """What the times of a stored profile say: the best n_state by `RULE`. UserError where it has none."""
    profile = read(path)
    times = _times(profile)
    if not times:
        raise UserError(f"{path} has no n_state that could be timed; measure again with e88 profile")
    states = sorted(times)
    price = {n: times[n] / math.sqrt(n) for n in states}
    best = min(states, key=lambda n: price[n])
    low = high = states.index(best)
    while low > 0 and price[states[low - 1]] <= MARGIN * price[best]:
        low -= 1
    while high + 1 < len(states) and price[states[high + 1]] <= MARGIN * price[best]:
        high += 1
    reason = (
        f"{RULE}; best {best}, {times[best] * profile['d_inner']:,.0f} ns per token and layer, forward and backward"
    )
    return Hardware(
        name=str(path), label=_label(profile), kind="measured", low=states[low], high=states[high], reason=reason,
        source=_source(profile, path), times=tuple((n, times[n]) for n in states),
    )  # fmt: skip


def _times(profile: Mapping[str, Any]) -> dict[int, float]:
    """Forward and backward, nanoseconds per token, layer and element of d_inner, by n_state."""
    measured = [row for row in profile["rows"] if row["skipped"] is None]
    return {int(row["n_state"]): float(row["forward_backward_ns"]) / row["d_inner"] for row in measured}


def _label(profile: Mapping[str, Any]) -> str:
    return f"measured on {profile['device']}, {profile['date'][:10]}"


def _source(profile: Mapping[str, Any], path: Path) -> str:
    shape = f"{profile['dtype']}, {profile['batch_size']} x {profile['window']} tokens, d_inner {profile['d_inner']:d}"
    return f"{shape}, commit {profile['environment']['commit']}; {path}"
