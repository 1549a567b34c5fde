"""Puts the kernels into a network: what follows a convolution is done with it, as one operation."""

from collections.abc import Callable
from itertools import pairwise
from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import few_channels, patches
from ..kernels.pooled_activation import Activation, pooled_activation

Convolution = nn.Conv2d | nn.ConvTranspose2d
FEW = 4  # channels of a first layer, up to which its patches make a better matrix than its images
ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.ELU: "elu"}
FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"relu": F.relu, "elu": F.elu}


class ConvolutionAndMore(nn.Module):
    """A convolution, its activation and, where one follows, 2×2 max pooling; computes what they do but for rounding.

    It holds the convolution's own parameters under their names.
    """

    def __init__(self, conv: Convolution, activation: Activation, pooled: bool, first: bool) -> None:
        super().__init__()
        assert conv.bias is not None
        self.weight, self.bias = conv.weight, conv.bias
        self._activation, self._pooled = activation, pooled
        self._transposed = isinstance(conv, nn.ConvTranspose2d)
        self._padding = int(conv.padding[0])
        self._narrow = activation == "relu" and not pooled and _is_narrow(conv)
        self._by_patches = first and not self._narrow and conv.in_channels <= FEW

    def forward(self, images: Tensor) -> Tensor:
        if self._narrow:
            transposed = self._transposed
            return few_channels.conv(images, self.weight, self.bias, self._padding, relu=True, transposed=transposed)
        if self._by_patches:
            out, bias = patches.conv(images, self.weight, self.bias, self._padding), None
        elif self._pooled:
            out, bias = F.conv2d(images, self.weight, None, padding=self._padding), self.bias
        else:
            out, bias = F.conv2d(images, self.weight, self.bias, padding=self._padding), None
        return pooled_activation(out, bias, self._activation) if self._pooled else FUNCTIONS[self._activation](out)


def fuse(network: nn.Module) -> None:
    """Replaces, in every `nn.Sequential` of `network`, a convolution and what follows it where a kernel does both.

    Parameters stay what they are, under the names that they had; what was taken in is an `nn.Identity` from then on.
    """
    for layers in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for place, (conv, activation) in enumerate(pairwise(list(layers))):
            kind = ACTIVATIONS.get(type(activation))
            if kind is None or getattr(activation, "alpha", 1.0) != 1.0 or not _is_plain(conv):
                continue
            pooled = place + 2 < len(layers) and _is_halving(layers[place + 2])
            first = place == 0
            if pooled or _is_narrow(conv) or (first and conv.in_channels <= FEW):
                layers[place] = ConvolutionAndMore(conv, kind, pooled, first)
                for taken in range(place + 1, place + 2 + pooled):
                    layers[taken] = nn.Identity()


def _is_plain(conv: nn.Module) -> TypeGuard[Convolution]:
    """A convolution with a bias, stride 1 and one padding all around, none of its further options used."""
    if not isinstance(conv, Convolution) or conv.bias is None or isinstance(conv.padding, str):
        return False
    ones = {*conv.stride, *conv.dilation, conv.groups} == {1} and len(set(conv.padding)) == 1
    if isinstance(conv, nn.ConvTranspose2d):
        return ones and _is_narrow(conv) and set(conv.output_padding) == {0}
    return ones and conv.padding_mode == "zeros"


def _is_narrow(conv: Convolution) -> bool:
    """Whether `kernels.few_channels` takes it."""
    fits = max(conv.in_channels, conv.out_channels) <= few_channels.NARROW
    return fits and conv.kernel_size == (3, 3) and int(conv.padding[0]) <= 2


def _is_halving(module: nn.Module) -> bool:
    if not isinstance(module, nn.MaxPool2d) or module.ceil_mode or module.return_indices:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return sizes in ((2, 2, 0, 1), ((2, 2), (2, 2), 0, 1))
