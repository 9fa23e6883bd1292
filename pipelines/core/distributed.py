"""Several processes that train one model: torchrun places them, this file is all they say to one another.

Every process runs the same stage on its share of the micro-batches. `sharding: none` is data parallelism (Li et
al., "PyTorch Distributed", 2020): each has the whole model and gradients are averaged before the update.
`sharding: full` splits the blocks' weights, gradients and optimizer state among them (Zhao et al., "PyTorch FSDP",
2023); embeddings and the last norm stay whole. Process 0 leads: it alone measures, writes and registers.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pipelines.core.errors import ParamsError
from pipelines.core.params.compute import ComputeParams

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # the others wait while process 0 measures
_PR_SET_PDEATHSIG = 1


class World(NamedTuple):
    """The processes of one stage. `rank` counts from 0; `local` is the number on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    sharding: str = "none"

    @property
    def leads(self) -> bool:
        """Whether this process measures, writes and registers."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[tuple[T, float]]:
        """This process's part of a step's micro-batches, each with its weight.

        Every process gets as many, since those that split a model must pass through it together: where the numbers do
        not work out, one is passed through once more with weight 0.
        """
        mine = [(item, 1.0) for item in items[self.rank :: self.size]]
        missing = -(-len(items) // self.size) - len(mine)
        return mine + [(items[-1], 0.0)] * missing

    def check_split(self, micro_batches: int, key: str) -> None:
        """All processes must have the same number of micro-batches in a step.

        Raises:
            ParamsError: they cannot; `key` is the dial that sets the number.
        """
        if micro_batches % self.size:
            raise ParamsError(
                f"{key}: a step has {micro_batches} micro-batches, which {self.size} processes (compute.processes x "
                f"compute.nodes) cannot share evenly; lower {key} so that there are a multiple of {self.size}"
            )


def must_launch(compute: ComputeParams) -> bool:
    """Whether several processes are asked for and no launcher has started this one."""
    return compute.processes * compute.nodes > 1 and "WORLD_SIZE" not in os.environ


def launch(stage: str, compute: ComputeParams) -> int:
    """Run `python -m pipelines STAGE` in `compute.processes` processes. Returns the exit code of the first that failed.

    Raises:
        ParamsError: several nodes; there, torchrun has to be started on each of them.
    """
    if compute.nodes > 1:
        raise ParamsError(
            f"compute.nodes: {compute.nodes}: start the stage on every node, in the repository's shared folder, with\n"
            f"  torchrun --nnodes {compute.nodes} --nproc-per-node {compute.processes} --rdzv-backend c10d "
            f"--rdzv-endpoint HOST:PORT -m pipelines {stage}"
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the stage has said what is wrong
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=compute.processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "pipelines", stage)
    except ChildFailedError as error:
        code = int(next(iter(error.failures.values())).exitcode)
        return code if code > 0 else 128 - code
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def join(compute: ComputeParams) -> World:
    """Meet the other processes that torchrun, or `accelerate launch`, has started; alone if none has.

    Raises:
        ParamsError: the launcher started another number of processes than `compute` says.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    wanted = compute.processes * compute.nodes
    if size != wanted:
        raise ParamsError(
            f"compute: processes x nodes is {compute.processes} x {compute.nodes} = {wanted}, but the launcher "
            f"started {size} processes; make the two agree"
        )
    if sys.platform == "linux":  # a launcher that is killed must not leave a second writer behind
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    import torch

    local = int(os.environ["LOCAL_RANK"])
    on_gpu = compute.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    return World(int(os.environ["RANK"]), size, local, compute.sharding)


def leave(world: World) -> None:
    """Part from the others, at the end of the stage."""
    if world.size > 1:
        import torch

        torch.distributed.destroy_process_group()


@contextmanager
def leader_first(world: World) -> Iterator[None]:
    """Process 0 does the block alone, then the others do it and find what it has made."""
    if world.size == 1:
        yield
        return
    import torch

    if not world.leads:
        torch.distributed.barrier()
    yield
    if world.leads:
        torch.distributed.barrier()


def from_leader(world: World, make: Callable[[], T]) -> T:
    """What `make()` returns in process 0, in every process."""
    if world.size == 1:
        return make()
    import torch

    if world.leads:
        held: list[Any] = [make()]
        torch.distributed.broadcast_object_list(held, src=0)
    else:  # whoever waits ends at once when asked to: it has nothing to save
        held = [None]
        known = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
        torch.distributed.broadcast_object_list(held, src=0)
        for number, handler in known.items():
            signal.signal(number, handler)
    made: T = held[0]
    return made


def any_of(world: World, *here: bool) -> list[bool]:
    """For each flag, whether it is set in any process: decisions that all must take alike."""
    if world.size == 1:
        return list(here)
    import torch

    flags = torch.tensor(here, dtype=torch.float32, device=_device())
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def mean_of(world: World, value: float) -> float:
    """The mean of a number over the processes."""
    if world.size == 1:
        return value
    import torch

    total = torch.tensor([value], dtype=torch.float64, device=_device())
    torch.distributed.all_reduce(total)
    return float(total) / world.size


def from_all(world: World, value: T) -> list[T]:
    """The value of every process, in their order, in every process."""
    if world.size == 1:
        return [value]
    import torch

    found: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(found, value)
    return found


def add_up(world: World, value: torch.Tensor) -> None:
    """Make a tensor on the CPU the sum of those of all processes, in place."""
    if world.size == 1:
        return
    import torch

    total = value.to(_device())
    torch.distributed.all_reduce(total)
    value.copy_(total)


def shard(model: Any, world: World) -> None:
    """Split the weights of the model's blocks among the processes, in place (FSDP2); nothing under `sharding: none`."""
    if world.size == 1 or world.sharding == "none":
        return
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    lists = (part for part in inner.modules() if isinstance(part, torch.nn.ModuleList))
    blocks = max(lists, key=len)  # the transformer's layers
    mesh = init_device_mesh(_device(), (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)


def average_gradients(parameters: Sequence[torch.Tensor], world: World) -> None:
    """Average the gradients of weights that every process holds whole; FSDP has averaged those that are split."""
    if world.size == 1:
        return
    import torch

    whole = [value.grad for value in parameters if value.grad is not None and not _is_split(value)]
    for kind in dict.fromkeys(gradient.dtype for gradient in whole):
        same = [gradient for gradient in whole if gradient.dtype == kind]
        flat = torch.cat([gradient.flatten() for gradient in same])
        torch.distributed.all_reduce(flat)
        flat /= world.size
        for gradient, part in zip(same, torch.split(flat, [gradient.numel() for gradient in same]), strict=True):
            gradient.copy_(part.view_as(gradient))


def by_kind(parameters: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Whole weights and split ones apart, without the empty side: torch's fused functions refuse a mixture."""
    sides = [[p for p in parameters if not _is_split(p)], [p for p in parameters if _is_split(p)]]
    return [side for side in sides if side]


def whole(value: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be split; every process must ask."""
    if not _is_split(value):
        return value
    full: torch.Tensor = value.full_tensor()  # type: ignore[attr-defined]
    return full


def like(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """`value`, whole, split as `model` is if it has its shape."""
    if not _is_split(model) or value.shape != model.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    placed: torch.Tensor = distribute_tensor(value.to(model.device), model.device_mesh, model.placements)  # type: ignore[attr-defined]
    return placed


def _is_split(value: torch.Tensor) -> bool:
    return hasattr(value, "full_tensor")


def _device() -> str:
    import torch

    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
