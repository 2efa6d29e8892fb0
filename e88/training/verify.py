"""No run on a GPU before its layer has been checked against float64 there: kernels and libraries can be wrong."""

from __future__ import annotations

from typing import Any

import torch

from e88.errors import UserError
from e88.layers.accuracy import check
from e88.models.config import ModelConfig
from e88.training.config import TrainingConfig

# On a CPU the layers are what the tests test.
DEVICES = ("cuda",)


def verify(model: ModelConfig, config: TrainingConfig, device: torch.device, rows: int) -> dict[str, Any] | None:
    """rows: windows at once. What the record says of the check (tensor, error, tolerance), or None where none is made.

    Raises UserError where the layer's output or a gradient is wrong.
    """
    if device.type not in DEVICES:
        return None
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    windows = 2 if config.carry > 1 else 1
    found = check(model, device, dtype, config.backend, tune=(rows, windows * config.window), windows=windows)
    if device.type == "cuda":
        # The check's memory is not the run's.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if not found.ok:
        raise UserError(
            f"the {model.mixer.kind} layer is wrong on this machine: {found.tensor} is off by {found.error:.2g} of its "
            f"norm, {found.tolerance:g} allowed ({', '.join(found.backends)}); choose another --backend, see e88 doctor"
        )
    return {"tensor": found.tensor, "error": found.error, "tolerance": found.tolerance}
