"""Another basis for 3×3 filters: their spatial frequencies instead of their taps, for optimizers that scale each
coordinate on its own, such as Adam.

Neighbouring pixels are alike, so the gradients of neighbouring taps are too, and a scale for each tap can't tell the
strong mean of an image from its faint details. Along the axes of the discrete cosine transform (over the taps) and of
opponent colours (over three channels: grey, red against blue, green against both) they come apart, as along the axes
that SOAP finds for itself (Vyas et al. 2024), but known beforehand and free.
"""

import torch
from torch import Tensor, nn

# rows: the orthonormal cosine transform of three values
COSINES = torch.tensor([[2**0.5, 2**0.5, 2**0.5], [3**0.5, 0.0, -(3**0.5)], [1.0, -2.0, 1.0]]) / 6**0.5


def frequencies(channels: int) -> Tensor:
    """The orthogonal matrix [9 · channels, 9 · channels] whose columns are the axes, for one channel or three."""
    colours = COSINES if channels == 3 else torch.eye(channels)
    return torch.kron(colours, torch.kron(COSINES, COSINES)).T.contiguous()


class Coordinates:
    """Parameters for an optimizer, `trained`: all 3×3 filters by their frequencies, in one tensor, others themselves.

    After each backward pass `take_gradients`, after each update `write_back`. A filter's coordinates lie where its taps
    do, one filter behind the other, channels last. Each is a sum over the taps of its block, the 9 of one channel or
    the 27 of three, and so back, so that all filters take a handful of kernels together.
    """

    def __init__(self, parameters: list[nn.Parameter], compile: bool) -> None:
        self._sums = torch.compile(_sums, fullgraph=True, dynamic=False) if compile else _sums
        self._filters = [weight for weight in parameters if weight.shape[2:] == (3, 3)]
        count = sum(weight.numel() for weight in self._filters)
        widest = max(9 * _channels(weight) for weight in self._filters)
        # For each coordinate the places of its block; what is left of a row is its own, at a factor of zero.
        block = torch.arange(count)[:, None].repeat(1, widest)
        there = torch.zeros(count, widest)
        back = torch.zeros(count, widest)
        start = 0
        for weight in self._filters:
            places = (start + torch.arange(weight.numel())).view(_last(weight).shape).permute(0, 3, 1, 2)
            axes = frequencies(_channels(weight))
            blocks = places.reshape(-1, len(axes))
            block[blocks, : len(axes)] = blocks[:, None, :]
            there[blocks, : len(axes)] = axes.T
            back[blocks, : len(axes)] = axes
            start += weight.numel()
        device = parameters[0].device
        self._block, self._there, self._back = (table.to(device) for table in (block, there, back))
        self._values = nn.Parameter(torch.empty(count, device=device))
        self.trained = [self._values, *(weight for weight in parameters if weight.shape[2:] != (3, 3))]
        self.read()

    @torch.no_grad()
    def read(self) -> None:
        """The coordinates of what the filters are now."""
        self._values.copy_(_sums(_flat(self._filters), self._block, self._there))

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Hands the filters' gradients to their coordinates."""
        gradients = [weight.grad for weight in self._filters if weight.grad is not None]
        assert len(gradients) == len(self._filters)
        self._values.grad = self._sums(_flat(gradients), self._block, self._there)
        for weight in self._filters:
            weight.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Sets the filters to what their coordinates are now."""
        taps = self._sums(self._values.detach(), self._block, self._back)
        filters = [_last(weight) for weight in self._filters]
        parts = taps.split([weight.numel() for weight in filters])
        torch._foreach_copy_(filters, [new.view(old.shape) for old, new in zip(filters, parts, strict=True)])


def _sums(values: Tensor, block: Tensor, factors: Tensor) -> Tensor:
    """For each coordinate the sum of its block's `values`, at its own factors."""
    return (values[block] * factors).sum(1)


def _channels(weight: Tensor) -> int:
    """Channels whose taps are transformed together."""
    return 3 if weight.shape[1] == 3 else 1


def _last(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1)


def _flat(weights: list[Tensor] | list[nn.Parameter]) -> Tensor:
    return torch.cat([_last(weight).flatten() for weight in weights])
