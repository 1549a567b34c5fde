"""Weights whose update ranks share out that reach each other's memory (ZeRO stage 1: Rajbhandari et al. 2020).

Behind a backward pass each rank writes what the others need of its gradients into their memory. Each rank updates its
part of each weight: its kernel adds up all ranks' gradients of that and writes what comes of it into the weights of
all. So there is one optimizer state of each weight, and not one on each GPU, and an update takes half the memory
traffic with two ranks, for as many bytes over the links as a sum of the gradients would take.

What is small is not worth sharing out: all those gradients go to all ranks, each of which updates all those weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from . import parallel
from .parallel import in_memory, shaped
from .reach import Room

ALIGNMENT = 256  # bytes, to which parts of a weight and weights in a row are rounded up: kernels load 16 at a time


@dataclass(frozen=True)
class Portion:
    """What this rank updates of a row of weights, flat, as they lie in memory: [n] of [N] values."""

    part: slice  # of the N values
    weights: list[Tensor]  # [n], its own, then those of other ranks: where all that comes of it is written
    gradients: list[Tensor]  # [n], where those of the ranks before this one come, and of those behind it
    given: list[tuple[slice, Tensor]]  # of its own gradient, [N], what each other rank needs, and where that goes


class Sharded:
    """Shares out `weights` in bf16, each by parts; a `row` of others, in fp32, each rank updates as a whole.

    Every rank does the same at the same time. The weights move to memory that all reach. portions: one of each weight,
    then that of the row.
    """

    def __init__(self, weights: Sequence[nn.Parameter], row: Tensor) -> None:
        ranks, me = range(parallel.ranks()), parallel.rank()
        others = [(me + number) % len(ranks) for number in range(1, len(ranks))]  # not all of them one rank first
        sizes = [_rounded_up(weight.nbytes, len(ranks) * ALIGNMENT) for weight in weights]
        self._room = Room(2 * sum(sizes) + len(ranks) * row.nbytes)
        self.portions, start = [], 0
        for weight, size in zip(weights, sizes, strict=True):
            kind, whole = weight.dtype, weight.numel()
            length, came = size // len(ranks), start + size  # bytes of a part; where its gradients come, by ranks
            step = length // kind.itemsize
            parts = [slice(min(rank * step, whole), min((rank + 1) * step, whole)) for rank in ranks]
            n = [part.stop - part.start for part in parts]
            place = self._room.own(start, whole, kind)
            weight.data = shaped(place, weight.shape, in_memory(weight)).copy_(weight.data)
            self.portions.append(
                Portion(
                    parts[me],
                    [self._room.view(rank, start + me * length, n[me], kind) for rank in (me, *others)],
                    [self._room.view(me, came + rank * length, n[me], kind) for rank in ranks if rank != me],
                    [(parts[to], self._room.view(to, came + me * length, n[to], kind)) for to in others],
                )
            )
            start += 2 * size
        of_rank = [start + rank * row.nbytes for rank in ranks]
        gradients = [self._room.view(me, of_rank[rank], len(row), row.dtype) for rank in ranks if rank != me]
        given = [(slice(len(row)), self._room.view(to, of_rank[me], len(row), row.dtype)) for to in others]
        self.portions.append(Portion(slice(len(row)), [row], gradients, given))

    def exchange(self, gradients: Sequence[Tensor]) -> list[list[Tensor]]:
        """Of this rank's gradients, [N], makes each rank's of its portions, [n], which last until `finish`."""
        for gradient, portion in zip(gradients, self.portions, strict=True):
            for part, place in portion.given:
                place.copy_(gradient[part])
        self._room.meet()
        me = parallel.rank()
        return [
            [*portion.gradients[:me], gradient[portion.part], *portion.gradients[me:]]
            for gradient, portion in zip(gradients, self.portions, strict=True)
        ]

    def finish(self) -> None:
        """Waits until all ranks have written their parts of the weights and need the gradients no more."""
        self._room.meet()


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
