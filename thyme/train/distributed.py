"""The processes that train together: who they are, and what they tell each other.

`torchrun --nproc-per-node N -m thyme ...` starts N ranks, each with a device of its own. They run the same program on
the same global batch, of which each computes its share (thyme/train/balance.py); the trainer's state is sharded over
them (thyme/train/sharding.py). One process is a world of one: the same interface, no process group, nobody to wait for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from thyme.train.config import DistributedConfig

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from thyme.train.watchdog import Watchdog

T = TypeVar("T")


class World:
    """One process alone. The ranks of several are `Ranks`, which answer the same questions."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device | str = "cpu", watchdog: Watchdog | None = None) -> None:
        self.device = torch.device(device)
        """Where this rank computes."""
        self._watchdog = watchdog

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run's files and talks to the user."""
        return self.rank == 0

    def gather(self, item: T) -> list[T]:
        """The `item` of every rank, by rank, on every rank; anything that can be pickled."""
        return [item]

    def from_main(self, item: T) -> T:
        """The first rank's `item`, on every rank: a decision that all must take alike."""
        return item

    def on_main(self, function: Callable[[], T]) -> T:
        """What `function` returns on the first rank, which alone calls it; what it raises is raised on every rank."""
        return function()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Entry by entry, the sum over ranks, in the order of ranks."""
        return [float(sum(column)) for column in zip(*self.gather(list(values)), strict=True)]

    def phase(self, name: str) -> AbstractContextManager[object]:
        """While the block runs, the watchdog holds it to the deadline of this phase (`DistributedConfig`)."""
        return nullcontext() if self._watchdog is None else self._watchdog.phase(name)


class Ranks(World):
    """One rank of several.

    Args:
        device: of this rank.
        mesh: "shard", or "replicate" and "shard": over which ranks the trainer's state is cut, how often it is kept.
        objects: a gloo group for what is no tensor, with a timeout of its own: a collective of NCCL that waits for a
            slow rollout would end the run.
    """

    def __init__(
        self, device: torch.device, mesh: DeviceMesh, objects: ProcessGroup, watchdog: Watchdog | None = None
    ) -> None:
        super().__init__(device, watchdog)
        self.mesh = mesh
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.objects = objects

    def gather(self, item: T) -> list[T]:
        items: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(items, item, group=self.objects)
        return items

    def from_main(self, item: T) -> T:
        items = [item]
        torch.distributed.broadcast_object_list(items, src=0, group=self.objects)
        return items[0]

    def on_main(self, function: Callable[[], T]) -> T:
        done: tuple[Any, str] = (None, "")
        error: Exception | None = None
        if self.is_main:
            try:
                done = (function(), "")
            except Exception as raised:
                error, done = raised, (None, str(raised) or type(raised).__name__)
        result, failure = self.from_main(done)
        if failure:
            raise error or RuntimeError(failure)
        return result


@contextmanager
def open_world(config: DistributedConfig | None = None) -> Iterator[World]:
    """The world that torchrun's environment describes; a world of one without it.

    Its end is reached by all ranks together: none goes while another still writes.

    Raises:
        ValueError: fewer devices than ranks of this machine, or ranks that `config.shard_ranks` does not divide.
    """
    config = config or DistributedConfig()
    from thyme.train.watchdog import Watchdog

    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local)
    deadlines = config.deadlines()
    if size == 1:
        with Watchdog(deadlines) as watchdog:
            yield World(device, watchdog)
        return
    _check(config, size)
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    timeout = timedelta(seconds=config.timeout_s)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        timeout=timeout,
        device_id=None if device.type == "cpu" else device,
    )
    try:
        shard = config.shard_ranks or size
        shape, names = ((size,), ("shard",)) if shard == size else ((size // shard, shard), ("replicate", "shard"))
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        objects = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.object_timeout_s))
        ranks = Ranks(device, mesh, objects)
        peers = ranks.gather((os.uname().nodename, os.getpid()))
        with Watchdog(deadlines, rank=ranks.rank, peers=peers) as watchdog:
            ranks._watchdog = watchdog
            yield ranks
            watchdog.close()
            dist.barrier(objects)
    finally:
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK {local_rank}: this machine has {torch.cuda.device_count()} CUDA devices, and each rank needs "
            "one: start torchrun with a smaller --nproc-per-node"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _check(config: DistributedConfig, size: int) -> None:
    if config.shard_ranks and size % config.shard_ranks:
        raise ValueError(
            f"distributed.shard_ranks: {config.shard_ranks} does not divide the {size} ranks that torchrun started: "
            "give the number of ranks of a node, or 0 for all"
        )
