"""E88: a recurrent language model whose memory is a nonlinear matrix.

Importing this package loads nothing heavy; the public names below are resolved on first use.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# GNU OpenMP, which torch brings, lets idle threads spin for so long that one busy core slows every parallel region
# many times over, and that numba's threads wait for them. Read when torch is loaded; a user's own value is kept.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_LAZY = {
    "fused_tanh_delta_rule": "e88.ops",
    "fused_tanh_delta_rule_step": "e88.ops",
    "tanh_delta_rule": "e88.ops",
    "tanh_delta_rule_step": "e88.ops",
    "E88Layer": "e88.layers.e88",
    "LanguageModel": "e88.models.lm",
    "ModelConfig": "e88.models.config",
    "UserError": "e88.errors",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'e88' has no attribute '{name}'")
