"""Memory of GPUs of one host that all ranks read and write, each from its own kernels: over NVLink."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .gpu import Gpu


class Room:
    """Memory of as many bytes on each rank's GPU, of which every rank sees all; made by all of them at once."""

    def __init__(self, size: int) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory  # here, since it takes a tenth of a second

        assert dist.group.WORLD is not None
        here = torch.device("cuda", torch.cuda.current_device())
        self._own = symmetric_memory.empty(size, dtype=torch.uint8, device=here)
        self._all: Any = symmetric_memory.rendezvous(self._own, dist.group.WORLD)

    def own(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """[count], from byte `start` of what is on this rank's GPU, which stays as long as it is used.

        To torch it has nothing to do with a `view` of the same bytes: what changes one is not to be given the other.
        """
        return self._own[start : start + count * dtype.itemsize].view(dtype)

    def view(self, rank: int, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """[count], from byte `start` of what is on the rank's GPU, as long as the room lasts.

        Views share no storage: what compiles their updates need not ask which of them overlap.
        """
        return self._all.get_buffer(rank, (count,), dtype, start // dtype.itemsize)

    def meet(self) -> None:
        """Every GPU waits here for all; each sees what the others wrote before. May be part of a CUDA graph."""
        self._all.barrier()


def all_reach_all() -> bool:
    """Whether there can be a `Room`: the same answer in every rank, all of which ask at once."""
    with Gpu.open() as own:
        uuids: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(uuids, own and own.uuid)
        others = uuids[: dist.get_rank()] + uuids[dist.get_rank() + 1 :]
        can = own is not None and all(uuid and own.reaches(uuid) for uuid in others)
    if _in_all(can):
        try:
            Room(16)
        except RuntimeError:  # no way to hand the memory over between these processes
            can = False
    return _in_all(can)


def _in_all(here: bool) -> bool:
    found = torch.tensor(here, dtype=torch.int32, device="cuda")
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return bool(found.item())
