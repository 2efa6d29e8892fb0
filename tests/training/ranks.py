"""What two processes do for test_distributed.py: `torchrun --nproc-per-node 2 ranks.py TEXT OUT CACHE`.

OUT/one holds runs of one process. Whatever a test looks at is left in OUT: run folders, errors.RANK.json, and in
threads.RANK.json what is left of the group after its end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from e88.data.corpus import open_corpus
from e88.errors import UserError
from e88.layers import e88 as layer
from e88.layers.linear import _JointLinear
from e88.models.config import E88Config, ModelConfig
from e88.models.lm import LanguageModel
from e88.training import loop
from e88.training.config import Budget, TrainingConfig
from e88.training.distributed import Group, joined

# Three heads make rows that two processes cannot share evenly. The norm clips, and decay shows on what is free of it.
MODEL = ModelConfig(dim=16, depth=2, mixer=E88Config(n_heads=3, n_state=8, gate=True, conv=4, head_norm=True))
BASE = TrainingConfig(
    budget=Budget(steps=6), batch_size=8, window=16, lr=1e-2, clip=0.3, weight_decay=0.5, heldout_bytes=1900,
    warmup=0.0, sampling="draws",
)  # fmt: skip
STOP, BAD = 3, 2
# Name -> (mode, what differs from BASE).
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "ddp-parts": ("ddp", {"accumulate": 2}),
    "fsdp-parts": ("fsdp", {"accumulate": 4}),
    "ddp-muon": ("ddp", {"optimizer": "muon"}),
    "fsdp-free": ("fsdp", {"optimizer": "schedulefree"}),
    "fsdp-joint": ("fsdp", {}),
    "fsdp-half": ("fsdp", {"precision": "bf16"}),
    "ddp-half": ("ddp", {"precision": "bf16"}),
}


def config(name: str) -> TrainingConfig:
    return dataclasses.replace(BASE, **RUNS[name][1])


def joint_linear(x: torch.Tensor, projections: Any) -> Any:
    """The GPU's way through the projections, which reads their weights without calling them."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return _JointLinear.apply(x.to(dtype), *(projection.weight for projection in projections))


class Before:
    """Do something in one process before its training step of some number."""

    def __init__(self, rank: int, step: int, act: Any) -> None:
        self.rank, self.at, self.act, self.plain = rank, step, act, loop._train_step

    def __enter__(self) -> None:
        def step(run: Any, sampler: Any) -> Any:
            if run.step == self.at and dist.get_rank() == self.rank:
                self.act(run)
            return self.plain(run, sampler)

        loop._train_step = step

    def __exit__(self, *_: object) -> None:
        loop._train_step = self.plain


def poison(run: Any) -> None:
    weight = run.model.blocks[1].mixer.o_proj.weight.data
    getattr(weight, "to_local", lambda: weight)()[0, 0] = float("nan")


def exempt(model: LanguageModel) -> set[str]:
    return {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}


def main(text: str, out: Path, cache: str) -> None:
    torch.set_num_threads(1)
    with joined("cpu", "fsdp") as group:
        do_all(group.rank, text, out, cache)
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    (out / f"threads.{group.rank}.json").write_text(json.dumps([name for name in names if "gloo" in name]))


def do_all(rank: int, text: str, out: Path, cache: str) -> None:
    corpus = open_corpus(text, cache=Path(cache))
    groups = {mode: Group(torch.device("cpu"), rank, 2, mode, "gloo") for mode in ("ddp", "fsdp")}
    model = LanguageModel(MODEL)
    before = exempt(model)
    groups["fsdp"].wrap(model)
    assert before and exempt(model) == before
    for name, (mode, _) in RUNS.items():
        plain = layer.joint_linear
        if name == "fsdp-joint":
            layer.joint_linear = joint_linear
        record = loop.train(MODEL, config(name), corpus, out / name, group=groups[mode])
        layer.joint_linear = plain
        # Every process has the record that one of them wrote.
        assert record == json.loads((out / name / "record.json").read_text())
    for mode, group in groups.items():
        loop.train(MODEL, BASE, corpus, out / "one" / f"to-{mode}", group=group, resume=True)
        try:
            with Before(1, STOP - 1, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
                loop.train(MODEL, BASE, corpus, out / f"from-{mode}", group=group)
            raise AssertionError("the signal stopped nothing")
        except loop.Interrupted:
            pass
        with Before(1, BAD, poison):
            loop.train(MODEL, BASE, corpus, out / f"bad-{mode}", group=group)
    errors = []
    for mode, changes, folder in (
        ("ddp", {}, "ddp"), ("fsdp", {"optimizer": "muon"}, "new"), ("ddp", {"batch_size": 9}, "new"),
        ("ddp", {"accumulate": 8}, "new"), ("fsdp", {"backend": "numbe"}, "new"),
    ):  # fmt: skip
        try:
            loop.train(MODEL, dataclasses.replace(BASE, **changes), corpus, out / folder, group=groups[mode])
        except UserError as error:
            errors.append(str(error))
    (out / f"errors.{rank}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
