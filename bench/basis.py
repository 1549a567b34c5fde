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
    """The orthogonal matrix [9 · channels, 9 · channels] whose columns are the axes, for filters over `channels`."""
    colours = COSINES if channels == 3 else torch.eye(channels)
    return torch.kron(colours, torch.kron(COSINES, COSINES)).T.contiguous()


class Coordinates:
    """Parameters for an optimizer, `trained`: 3×3 filters [M, channels, 3, 3] by their frequencies, others themselves.

    After each backward pass `take_gradients`, after each update `write_back`.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        filters = [weight for weight in parameters if weight.shape[2:] == (3, 3)]
        others = [weight for weight in parameters if weight.shape[2:] != (3, 3)]
        axes = [frequencies(weight.shape[1]).to(weight.device) for weight in filters]
        values = [nn.Parameter(weight.new_empty(len(weight), len(q))) for weight, q in zip(filters, axes, strict=True)]
        self._filters = list(zip(filters, values, axes, strict=True))
        self.trained = [*values, *others]
        self.read()

    @torch.no_grad()
    def read(self) -> None:
        """The coordinates of what the filters are now."""
        for weight, value, axes in self._filters:
            value.copy_(weight.flatten(1) @ axes)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Hands the filters' gradients to their coordinates."""
        for weight, value, axes in self._filters:
            assert weight.grad is not None
            value.grad = weight.grad.flatten(1) @ axes
            weight.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Sets the filters to what their coordinates are now."""
        for weight, value, axes in self._filters:
            weight.copy_((value @ axes.T).view(weight.shape))
