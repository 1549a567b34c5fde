"""Weights whose update ranks share out that reach each other's memory (ZeRO stage 1: Rajbhandari et al. 2020).

Behind a backward pass each rank writes what the others need of its gradients into their memory. Each rank updates its
part of each weight: its kernel adds up all ranks' gradients of that and writes what comes of it into the weights of
all. So there is one optimizer state of each weight, and not one on each GPU, and an update takes half the memory
traffic with two ranks, for as many bytes over the links as a sum of the gradients would take.

What is small is not worth sharing out: all those gradients go to all ranks, each of which updates all those weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import parallel
from .parallel import as_it_lies, in_memory, shaped
from .reach import Room

ALIGNMENT = 256  # bytes, to which what lies in shared memory is rounded up: kernels load 16 at a time


@dataclass(frozen=True)
class Portion:
    """What this rank updates of a weight, flat, as it lies in memory: [n] of [N] values."""

    part: slice  # of the N values
    weights: list[Tensor]  # [n], its own, then those of other ranks: where all that comes of it is written
    gradients: list[Tensor]  # [n], where those of the ranks before this one come, and of those behind it
    given: list[tuple[Tensor, slice]]  # where what each other rank needs of its own gradient goes, and which part it is


class Sharded:
    """Shares out those of the `weights` that are in bf16, each by parts; the others each rank updates as a whole.

    Every rank does the same at the same time. What is shared out moves to memory that all reach. portions: one of each
    weight. compile: what gives gradients away.
    """

    def __init__(self, weights: Sequence[nn.Parameter], compile: bool) -> None:
        ranks, me = range(parallel.ranks()), parallel.rank()
        others = [(me + number) % len(ranks) for number in range(1, len(ranks))]  # not all of them one rank first
        parted = [weight.dtype is torch.bfloat16 for weight in weights]
        lengths = [_length(weight, len(ranks) if cut else 1) for weight, cut in zip(weights, parted, strict=True)]
        slots = sum(length * (2 if cut else 1) for length, cut in zip(lengths, parted, strict=True))
        self._room = Room(len(ranks) * slots)
        self._give = side_by_side(give) if compile else give
        self.portions, start = [], 0
        for weight, cut, length in zip(weights, parted, lengths, strict=True):
            kind, whole = weight.dtype, weight.numel()
            step = length // kind.itemsize
            limits = [(rank * step, (rank + 1) * step) if cut else (0, whole) for rank in ranks]
            parts = [slice(min(first, whole), min(end, whole)) for first, end in limits]
            n = [part.stop - part.start for part in parts]
            if cut:
                place = self._room.own(start, whole, kind)
                weight.data = shaped(place, weight.shape, in_memory(weight)).copy_(weight.data)
                places = [self._room.view(rank, start + me * length, n[me], kind) for rank in (me, *others)]
                start += len(ranks) * length
            else:
                places = [as_it_lies(weight)]
            came = [start + rank * length for rank in ranks]  # where gradients come, by the ranks that they come from
            gradients = [self._room.view(me, came[rank], n[me], kind) for rank in ranks if rank != me]
            given = [(self._room.view(to, came[me], n[to], kind), parts[to]) for to in others]
            self.portions.append(Portion(parts[me], places, gradients, given))
            start += len(ranks) * length

    def exchange(self, gradients: Sequence[Tensor]) -> list[list[Tensor]]:
        """Of this rank's gradients, [N], makes each rank's of its portions, [n], which last until `finish`."""
        pairs = zip(gradients, self.portions, strict=True)
        self._give([(place, gradient[part]) for gradient, portion in pairs for place, part in portion.given])
        self._room.meet()
        me = parallel.rank()
        return [
            [*portion.gradients[:me], gradient[portion.part], *portion.gradients[me:]]
            for gradient, portion in zip(gradients, self.portions, strict=True)
        ]

    def finish(self) -> None:
        """Waits until all ranks have written their parts of the weights and need the gradients no more."""
        self._room.meet()


def give(given: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copies into the first of each pair, [n], what the second holds."""
    for place, values in given:
        place.copy_(values)


def side_by_side(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled: on a GPU a kernel does up to eight things at once that do not depend on one another.

    The compiler is not to time numbers of values a thread: that gained cifar100-cnn's update 1 % at best (H100).
    """
    choices: dict[str, Any] = {"combo_kernels": True, "triton.autotune_pointwise": False}
    return torch.compile(function, fullgraph=True, dynamic=False, options=choices)


def _length(weight: Tensor, parts: int) -> int:
    """Bytes of each of so many parts of a weight."""
    return -(-weight.nbytes // (parts * ALIGNMENT)) * ALIGNMENT
