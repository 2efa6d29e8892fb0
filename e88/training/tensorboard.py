"""A reporter that writes TensorBoard events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e88.errors import UserError
from e88.training.layers import DECAY_EDGES


class Scalars:
    """Loss, learning rate, gradient norm and tok/s of every step; the layers' statistics where a step was sampled."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise UserError("--tensorboard needs the tensorboard package; pip install 'e88[track]'") from error
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def step(self, entry: dict[str, Any], used: float, seconds_left: float) -> None:
        for key in ("loss", "lr", "grad_norm"):
            self.writer.add_scalar(f"train/{key}", entry[key], entry["step"])
        self.writer.add_scalar("train/tokens_per_second", entry["step_tokens"] / entry["step_seconds"], entry["step"])
        for key, values in entry.get("layers", {}).items():
            for index, value in enumerate(values if isinstance(values, list) else [values]):
                if value is None:
                    continue
                if key == "decay":
                    self._histogram(f"decay/{index:02d}", value, entry["step"])
                else:
                    self.writer.add_scalar(f"{key}/{index:02d}", value, entry["step"])

    def _histogram(self, name: str, shares: list[float], step: int) -> None:
        """Shares of decays between 0, DECAY_EDGES and 1, whose moments are taken from the middles of the bins."""
        limits = [*DECAY_EDGES, 1.0]
        middles = [(low + high) / 2 for low, high in zip([0.0, *limits], limits, strict=False)]
        self.writer.add_histogram_raw(
            name, min=0.0, max=1.0, num=1, bucket_limits=limits, bucket_counts=shares, global_step=step,
            sum=sum(m * s for m, s in zip(middles, shares, strict=True)),
            sum_squares=sum(m * m * s for m, s in zip(middles, shares, strict=True)),
        )  # fmt: skip
