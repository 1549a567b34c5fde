"""Weights whose update ranks share out that reach each other's memory (ZeRO stage 1: Rajbhandari et al. 2020).

Behind a backward pass each rank lays out what the others need of its gradients. Each rank updates its part of each
weight: its kernel reads all ranks' gradients of that where they lie, adds them up, and writes what comes of it into the
weights of all. So there is one optimizer state of each weight, and not one on each GPU, and what a rank reads and
writes is about as much as in a whole update of its own, of which a part goes over the links.

What is small is not worth sharing out: each rank reads all those gradients, and updates all those weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import parallel
from .parallel import in_memory, shaped
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
    """Shares `weights` in bf16 out, and `count` values of others not. Every rank does the same at the same time.

    The weights move to memory that all ranks reach. portions: one for each of them. compile: what lays gradients out.
    """

    def __init__(self, weights: Sequence[nn.Parameter], count: int, compile: bool) -> None:
        ranks, me = range(parallel.ranks()), parallel.rank()
        others = [(me + number) % len(ranks) for number in range(1, len(ranks))]  # not all of them one rank first
        sizes = [_rounded_up(weight.nbytes, len(ranks) * ALIGNMENT) for weight in weights]
        self._room = Room(2 * sum(sizes) + 4 * count)
        self.portions, start = [], 0
        for weight, size in zip(weights, sizes, strict=True):
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
        self._small = [self._room.view(rank, start, count, torch.float32) for rank in ranks]
        self._lay_out = torch.compile(lay_out, fullgraph=True, dynamic=False) if compile else lay_out

    def exchange(self, large: list[Tensor], small: list[Tensor]) -> list[list[Tensor]]:
        """Of this rank's gradients makes those of all: of its part of each weight, [n], and of what is small, [count].

        large: [N] of each weight; small: the pieces of one row. They last until `finish`.
        """
        me = parallel.rank()
        places = [place for portion in self.portions for _, place in portion.offered]
        offered = [of[part] for of, portion in zip(large, self.portions, strict=True) for part, _ in portion.offered]
        self._lay_out(places, offered)
        torch.cat(small, out=self._small[me])
        self._room.meet()
        return [
            *(
                [*portion.gradients[:me], of[portion.part], *portion.gradients[me:]]
                for of, portion in zip(large, self.portions, strict=True)
            ),
            self._small,
        ]

    def finish(self) -> None:
        """Waits until all ranks have read the gradients and written their parts of the weights."""
        self._room.meet()


def lay_out(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for place, of in zip(places, values, strict=True):
        place.copy_(of)


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
