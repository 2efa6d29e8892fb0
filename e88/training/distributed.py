"""One run in several processes, started by torchrun: DDP or FSDP2.

A `Group` of one process is the ordinary case, and each of its methods then does nothing. In a group of several every
process holds the same configuration and takes the same decisions: what only one can know (the clock, a signal, a file)
is shared before anybody acts on it. The first process alone writes and prints.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from e88.errors import UserError
from e88.layers.common import keep_decay_exemptions
from e88.models.lm import LanguageModel
from e88.runtime import choose_device
from e88.training.config import MODES, TrainingConfig

T = TypeVar("T")
# Parts of the model that FSDP gathers one after the other.
UNITS = 8
# Of the models that this process has sharded.
_meshes: list[Any] = []


class RanksLost(Exception):
    """Another process of the run has died; the run goes on from its last checkpoint."""


@dataclass(frozen=True)
class Group:
    """rank: this process among `world`. mode: `ddp`, `fsdp`, or "" for one process. backend: moves the tensors."""

    device: torch.device
    rank: int = 0
    world: int = 1
    mode: str = ""
    backend: str = ""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def describe(self) -> dict[str, Any] | None:
        """What a record says of it; None for one process."""
        return {"world": self.world, "mode": self.mode, "backend": self.backend} if self.world > 1 else None

    def check(self, config: TrainingConfig) -> None:
        """Raise UserError for what several processes cannot do."""
        if self.world > 1 and config.carry > 1:
            raise UserError(f"carry {config.carry} works in one process, not in {self.world}; use one GPU, or carry 1")
        parts = self.world * config.accumulate
        if config.batch_size % parts:
            raise UserError(
                f"batch_size {config.batch_size} cannot be cut into {self.world} processes x accumulate "
                f"{config.accumulate}; use a multiple of {parts}"
            )
        if self.mode == "fsdp" and config.optimizer == "muon":
            raise UserError("muon needs whole matrices, which fsdp cuts up; use --parallel ddp, or another optimizer")

    def rows(self, count: int) -> slice:
        """This process's part of `count` rows: row i belongs to process i * world // count."""
        return slice(-(-self.rank * count // self.world), -(-(self.rank + 1) * count // self.world))

    def wrap(self, model: LanguageModel) -> tuple[Callable[[Tensor], Tensor], nn.Module | None]:
        """(what maps windows to nll in training, its DDP module if any). FSDP shards the model itself, in place.

        Under FSDP the shards and what is gathered of them are float32, and autocast computes in bf16, as in one
        process: FSDP's own mixed precision would round norms, decay parameters and the residual stream.
        """
        if self.mode == "ddp":
            # Said of the convolutions' filters, whose one-wide axis has two equally good strides.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            devices = [self.device] if self.device.type == "cuda" else None
            wrapped = nn.parallel.DistributedDataParallel(
                _Loss(model), device_ids=devices, gradient_as_bucket_view=True
            )
            return wrapped, wrapped
        if self.mode == "fsdp":
            self._shard(model)
        return model.nll, None

    def _shard(self, model: LanguageModel) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # It warns of views among a module's outputs, on which in-place changes would go wrong. Nothing makes any.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(self.device.type, (self.world,))
        _meshes.append(mesh)
        with keep_decay_exemptions(model):
            # Gathering costs the host about a millisecond a time, more than a small block takes the device.
            size = -(-len(model.blocks) // UNITS)
            for first in range(0, len(model.blocks), size):
                fully_shard(list(model.blocks[first : first + size]), mesh=mesh)
            # By default these weights would stay whole after a pass without backward, and be old in the next one.
            fully_shard(model, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(model, "nll")

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of which each process may have a shard, put together. Every process must ask."""
        full = getattr(tensor, "full_tensor", None)
        return tensor if full is None else full()

    def place(self, tensor: Tensor, like: Tensor | None) -> Tensor:
        """The inverse of `whole`: this process's shard of a tensor that belongs to the parameter `like`."""
        mesh = getattr(like, "device_mesh", None)
        if like is None or mesh is None or tensor.shape != like.shape:
            return tensor
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(self.device), mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]

    def spread(
        self, tensors: Mapping[str, Tensor], place: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor
    ) -> dict[str, Tensor]:
        """The first process's CPU tensors in every process, each placed at once, so that few are whole at a time."""
        if self.world == 1:
            return {name: place(name, tensor) for name, tensor in tensors.items()}
        kinds = self.shared(lambda: [(name, t.dtype, t.shape) for name, t in tensors.items()])
        found = {}
        for name, dtype, shape in kinds:
            tensor = tensors[name].contiguous() if self.is_first else torch.empty(shape, dtype=dtype)
            dist.broadcast(tensor, 0)
            found[name] = place(name, tensor)
        return found

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes, bit for bit the same in each."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def norm(self, own: Tensor) -> Tensor:
        """The norm of all gradients, from that of what this process holds: under FSDP a part of them."""
        if self.mode != "fsdp":
            return own
        squares = own.square()
        dist.all_reduce(squares)
        return squares.sqrt()

    def sum(self, values: list[float]) -> list[float]:
        """Sums over processes of numbers on the host."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def shared(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, or the UserError that it raises there, in every process."""
        if self.world == 1:
            return make()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = make()
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, 0)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def agreed(self, make: Callable[[], T]) -> T:
        """What `make` returns in this process; a UserError of any process is raised in all."""
        value, error = None, None
        try:
            value = make()
        except UserError as raised:
            if self.world == 1:
                raise
            error = str(raised)
        for text in self.gather(error):
            if text is not None:
                raise UserError(text)
        return value  # type: ignore[return-value]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn the errors with which a dead process shows itself to the others into RanksLost."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
                raise
            raise RanksLost(
                f"another process of the run is gone, as rank {self.rank} noticed; the last checkpoint is whole: "
                "the same command and --resume goes on from it"
            ) from error

    def is_first_to_say(self, key: str) -> bool:
        """Whether no other process has asked this for `key`; works when others are gone, the first one included."""
        if self.world == 1:
            return True
        try:
            return dist.distributed_c10d._get_default_store().add(f"e88/{key}", 1) == 1
        except RuntimeError:
            return True


class _Loss(nn.Module):
    """DDP sees only what goes through a module's forward."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, windows: Tensor) -> Tensor:
        return self.model.nll(windows)


def last_part_only(ddp: nn.Module | None, is_last: bool) -> AbstractContextManager[Any]:
    """Under DDP gradients are summed over processes once, after the last part of a batch."""
    return nullcontext() if ddp is None or is_last else ddp.no_sync()  # type: ignore[operator]


@contextmanager
def joined(device: str = "auto", mode: str | None = None) -> Iterator[Group]:
    """The group of processes that torchrun started, or a group of this one; left at the end.

    device: as `e88.runtime.choose_device` takes it; of several GPUs each process takes that of its local rank. mode:
    `ddp` (also where None) or `fsdp`. Raises UserError for what is not there.
    """
    if mode is not None and mode not in MODES:
        raise UserError(f"--parallel '{mode}' is not one of {', '.join(MODES)}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if mode is not None and "WORLD_SIZE" not in os.environ:
        raise UserError(f"--parallel {mode} needs several processes; use torchrun --nproc-per-node N -m e88 train ...")
    where = choose_device(device)
    if world == 1:
        yield Group(where)
        return
    if where.type == "cuda":
        where = _own_gpu()
    # The defaults of its functions are the group that there is when it is first imported, which they would keep.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    try:
        backend = "nccl" if where.type == "cuda" else "gloo"
        yield Group(where, dist.get_rank(), dist.get_world_size(), mode or "ddp", backend)
    finally:
        _let_go(sys.exc_info()[1])
        dist.destroy_process_group()


def _let_go(error: BaseException | None) -> None:
    """Drop what holds the group besides torch: sharded models, in an error's frames too, and their meshes, which
    torch's caches keep.

    gloo's threads live as long as the group, and one of them that lets go of a tensor while the interpreter ends
    aborts the process.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()
    for mesh in _meshes:
        vars(mesh).get("_pg_registry", {}).clear()
    _meshes.clear()


def _own_gpu() -> torch.device:
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise UserError(f"process {local} of this machine has no GPU: there are {count}; lower --nproc-per-node")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
