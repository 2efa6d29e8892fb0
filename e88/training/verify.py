"""No run on a GPU before its layer has been checked against float64 there: kernels and libraries can be wrong."""

from __future__ import annotations

from typing import Any

import torch

from e88.errors import UserError
from e88.layers.accuracy import check
from e88.layers.mixer import backends_for
from e88.models.config import ModelConfig
from e88.training.config import TrainingConfig

# On a CPU the layers are what the tests test.
DEVICES = ("cuda",)


def verify(model: ModelConfig, config: TrainingConfig, device: torch.device, rows: int) -> dict[str, Any] | None:
    """rows: windows at once. What the record says of the check (tensor, error, tolerance; of a hybrid the mixer that is
    further off), or None where none is made.

    Raises UserError where the layer's output or a gradient is wrong, or no mixer knows the backend.
    """
    if device.type not in DEVICES:
        return None
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    windows = 2 if config.carry > 1 else 1
    tune = (rows, windows * config.window)
    chosen = backends_for((mixer.kind for mixer in model.mixers), config.backend)
    parts = [
        (part.mixer.kind, check(part, device, dtype, chosen[part.mixer.kind], tune=tune, windows=windows))
        for part in model.parts()
    ]
    if device.type == "cuda":
        # The check's memory is not the run's.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for kind, found in parts:
        if not found.ok:
            raise UserError(
                f"the {kind} layer is wrong on this machine: {found.tensor} is off by {found.error:.2g} of its norm, "
                f"{found.tolerance:g} allowed ({', '.join(found.backends)}); choose another --backend, see e88 doctor"
            )
    worst = max((found for _, found in parts), key=lambda found: found.error)
    return {"tensor": worst.tensor, "error": worst.error, "tolerance": worst.tolerance}
