"""Weights whose update ranks share out that reach each other's memory (ZeRO stage 1: Rajbhandari et al. 2020).

Within the backward pass each rank sends the others those parts of its gradients that are theirs to add up, each as soon
as it is there (`overlap`): on an H200 such copies leave the convolutions beside them alone. Each rank updates its part
of each weight, and its kernel writes what comes of it into the weights of all: together that takes no longer than one
rank's whole update. So there is one optimizer state of each weight, and not one on each GPU.

What is small is not worth sharing out: all those gradients go to all ranks, each of which adds them up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import parallel
from .parallel import flat, in_memory, shaped
from .reach import Room

ALIGNMENT = 256  # bytes, to which all that lies in a `Room` is rounded up

_made: "list[Sharded]" = []  # compiled code knows each by its number


@dataclass(frozen=True)
class Portion:
    """What this rank updates of a weight, flat, as the weight lies in memory: [n] of [N] values."""

    order: list[int]  # of the weight's dimensions in memory
    weights: list[Tensor]  # [n], its own weights, then those of the others: where all that comes of it is written
    gradients: list[Tensor]  # [n], each rank's, once they were sent
    sent: list[tuple[slice, Tensor]]  # of the gradient, [N], what is each rank's, and where that goes


class Sharded:
    """Shares `weights` out: those in bf16 by parts, the others not. Every rank does the same at the same time.

    The weights in bf16 move to memory that all ranks reach. portions: one for each of them.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self._number = len(_made)
        _made.append(self)
        self._large = [weight for weight in weights if weight.dtype is torch.bfloat16]
        self._small = [weight for weight in weights if weight.dtype is not torch.bfloat16]
        assert self._small
        known = {id(weight): place for place, weight in enumerate((*self._large, *self._small))}
        self._places = [known[id(weight)] for weight in weights]
        device = weights[0].device
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._reading: list[torch.UntypedStorage] = []  # what copies that are on their way read
        # one for each large weight, and one for all small ones: see `_Sending`
        self._gates = [torch.empty(0, device=device, requires_grad=True) for _ in range(len(self._large) + 1)]
        self._lay_out()

    def _lay_out(self) -> None:
        ranks, me = range(parallel.ranks()), parallel.rank()
        others = [(me + number) % len(ranks) for number in range(1, len(ranks))]  # not all of them one rank first
        sizes = [_rounded_up(weight.nbytes, len(ranks) * ALIGNMENT) for weight in self._large]
        small = _rounded_up(4 * sum(weight.numel() for weight in self._small), ALIGNMENT)
        self._room = Room(2 * sum(sizes) + len(ranks) * small)
        self.portions, start = [], 0
        for weight, size in zip(self._large, sizes, strict=True):
            order, kind, count = in_memory(weight), weight.dtype, weight.numel()
            length, came = size // len(ranks), start + size  # bytes; behind the weight each rank's gradients come
            step = length // kind.itemsize
            parts = [slice(min(rank * step, count), min((rank + 1) * step, count)) for rank in ranks]
            n = [part.stop - part.start for part in parts]
            weight.data = shaped(self._room.own(start, count, kind), weight.shape, order).copy_(weight.data)
            self.portions.append(
                Portion(
                    order,
                    [self._room.view(rank, start + me * length, n[me], kind) for rank in (me, *others)],
                    [self._room.view(me, came + rank * length, n[me], kind) for rank in ranks],
                    [(parts[to], self._room.view(to, came + me * length, n[to], kind)) for to in (*others, me)],
                )
            )
            start += 2 * size
        count = sum(weight.numel() for weight in self._small)
        self._came = [self._room.view(me, start + rank * small, count, torch.float32) for rank in ranks]
        self._sent = [self._room.view(to, start + me * small, count, torch.float32) for to in (*others, me)]

    def sending(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """`network`, which trains the weights, in their order, to be called in one loss: backward, gradients are sent.

        Backward, `grad` of weights in bf16 becomes this rank's own gradient, that of the others None.
        """
        trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        assert len(trained) == len(self._places)
        weights = _Sending.apply(self._number, self._places, *self._gates, *trained.values())
        return partial(torch.func.functional_call, network, dict(zip(trained, weights, strict=True)))

    def send(self, values: Tensor, place: int) -> None:
        """Sends the gradient of the weight at this place, or, behind all in bf16, [n] of all others together."""
        if place == len(self.portions):
            for there in self._sent:
                there.copy_(values)
            return
        portion = self.portions[place]
        gradient = flat(values, portion.order)
        self._reading.append(gradient.untyped_storage())  # not the tensor: autograd would leave us that and copy it
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for theirs, there in portion.sent:
                there.copy_(gradient[theirs])

    def take_gradients(self) -> None:
        """Waits until all gradients came and no rank computes with the weights; small gradients are those of all."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._room.meet()
        self._reading.clear()
        for weight in self._large:
            weight.grad = None
        total = torch.stack(self._came).sum(0)
        for weight, part in zip(self._small, total.split([weight.numel() for weight in self._small]), strict=True):
            weight.grad = shaped(part, weight.shape, in_memory(weight))
        for gate in self._gates:
            gate.grad = None

    def await_weights(self) -> None:
        """Waits until all ranks have written their parts of the weights."""
        self._room.meet()


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


class _Sending(torch.autograd.Function):
    """Weights as they are; backward their gradients are sent.

    What is sent leaves no trace in a graph of values. So there are gates, which are empty, and whose gradients, as
    empty, come of sending. A large gradient is given back, too, although nobody needs it then: what a compiled graph
    gives it does not overwrite, and copies may still read it.
    """

    @staticmethod
    def forward(ctx: Any, number: int, places: list[int], *gates_and_weights: Tensor) -> tuple[Tensor, ...]:
        gates, weights = gates_and_weights[: -len(places)], gates_and_weights[-len(places) :]
        ctx.number, ctx.places, ctx.large = number, places, len(gates) - 1
        ctx.orders = [in_memory(weight) for weight in weights]
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_place = [ctx.places.index(place) for place in range(len(gradients))]
        sent = [send(gradients[at], ctx.number, place) for place, at in enumerate(by_place[: ctx.large])]
        small = torch.cat([flat(gradients[at], ctx.orders[at]) for at in by_place[ctx.large :]])
        own = [gradient if place < ctx.large else None for place, gradient in zip(ctx.places, gradients, strict=True)]
        return None, None, *sent, send(small, ctx.number, ctx.large), *own


# flexible_layout: else the compiler may send a copy that lies as a trace has it, and overwrite that
@torch.library.custom_op("netdyno::send", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def send(values: Tensor, number: int, place: int) -> Tensor:
    """What the `Sharded` of that number sends; [0]."""
    _made[number].send(values, place)
    return values.new_empty(0, dtype=torch.float32)


@send.register_fake
def _(values: Tensor, number: int, place: int) -> Tensor:
    return values.new_empty(0, dtype=torch.float32)
