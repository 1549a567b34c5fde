"""Weights whose update ranks share out that reach each other's memory (ZeRO stage 1: Rajbhandari et al. 2020).

Behind a backward pass each rank lays out what the others need of its gradients. Each rank updates its part of each
weight: its kernel reads all ranks' gradients of that where they lie, adds them up, and writes what comes of it into the
weights of all. So there is one optimizer state of each weight, and not one on each GPU, and what a rank reads and
writes is about as much as in a whole update of its own, of which a part goes over the links.

What is small is not worth sharing out: each rank reads all those gradients, and adds them up itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import parallel
from .parallel import flat_gradient, in_memory, shaped
from .reach import Room

ALIGNMENT = 256  # bytes, to which all that lies in a `Room` is rounded up


@dataclass(frozen=True)
class Portion:
    """What this rank updates of a weight, flat, as the weight lies in memory: [n] of [N] values."""

    part: slice  # of the N values
    weights: list[Tensor]  # [n], its own weights, then those of the others: where all that comes of it is written
    gradients: list[Tensor]  # [n], what the ranks before this one laid out, and those behind it
    offered: list[tuple[slice, Tensor]]  # of its own gradient, [N], what each other rank updates, and where to lay that


class Sharded:
    """Shares `weights` out: those in bf16 by parts, the others not. Every rank does the same at the same time.

    The weights in bf16 move to memory that all ranks reach. portions: one for each of them.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self._large = [weight for weight in weights if weight.dtype is torch.bfloat16]
        self._small = [weight for weight in weights if weight.dtype is not torch.bfloat16]
        ranks, me = range(parallel.ranks()), parallel.rank()
        others = [(me + number) % len(ranks) for number in range(1, len(ranks))]  # not all of them one rank first
        sizes = [_rounded_up(weight.nbytes, len(ranks) * ALIGNMENT) for weight in self._large]
        count = sum(weight.numel() for weight in self._small)
        self._room = Room(2 * sum(sizes) + 4 * count)
        self.portions, start = [], 0
        for weight, size in zip(self._large, sizes, strict=True):
            kind, whole = weight.dtype, weight.numel()
            length, laid = size // len(ranks), start + size  # bytes of a part; where its gradient is, by parts
            step = length // kind.itemsize
            parts = [slice(min(rank * step, whole), min((rank + 1) * step, whole)) for rank in ranks]
            n = [part.stop - part.start for part in parts]
            place = self._room.own(start, whole, kind)
            weight.data = shaped(place, weight.shape, in_memory(weight)).copy_(weight.data)
            self.portions.append(
                Portion(
                    parts[me],
                    [self._room.view(rank, start + me * length, n[me], kind) for rank in (me, *others)],
                    [self._room.view(rank, laid + me * length, n[me], kind) for rank in ranks if rank != me],
                    [(parts[to], self._room.view(me, laid + to * length, n[to], kind)) for to in others],
                )
            )
            start += 2 * size
        self._small_gradients = [self._room.view(rank, start, count, torch.float32) for rank in ranks]

    def take_gradients(self) -> list[list[Tensor]]:
        """Of each weight in bf16 its portion's gradients, [n], of each rank; small gradients become those of all.

        They are there until `finish`.
        """
        me = parallel.rank()
        own = [flat_gradient(weight) for weight in self._large]
        places = [place for portion in self.portions for _, place in portion.offered]
        offered = [of[part] for of, portion in zip(own, self.portions, strict=True) for part, _ in portion.offered]
        torch._foreach_copy_(places, offered)
        torch.cat([flat_gradient(weight) for weight in self._small], out=self._small_gradients[me])
        self._room.meet()
        total = torch.stack(self._small_gradients).sum(0)
        for weight, sums in zip(self._small, total.split([weight.numel() for weight in self._small]), strict=True):
            weight.grad = shaped(sums, weight.shape, in_memory(weight))
        return [
            [*portion.gradients[:me], of[portion.part], *portion.gradients[me:]]
            for of, portion in zip(own, self.portions, strict=True)
        ]

    def finish(self) -> None:
        """Waits until all ranks have read the gradients and written their parts of the weights."""
        self._room.meet()


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
