"""Image classifier of the open division: a whitening first layer, three groups of convolutions, one linear layer.

After the networks of Keller Jordan's airbench (2024), from Page's "How to train your ResNet" (2018): what each change
gains is told there.
"""

from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn

PATCH = 2  # side of a whitened patch
WHITENING_EPSILON = 5e-4
RUNNING = 0.44  # the share of a batch in the running statistics of batch norm: runs are of a few hundred steps
LOGIT = 0.125  # the scale of the logits

# Of each group the channels, the kernels of its convolutions and, where it has three, the channels between the last
# two.
Groups = tuple[tuple[int, tuple[int, ...], int], ...]
PAIRS: Groups = ((64, (3, 3), 0), (256, (3, 3), 0), (256, (3, 3), 0))
RESIDUAL: Groups = ((64, (3, 1, 1), 64), (256, (3, 3, 1), 192), (768, (3, 3, 3), 512))


class WhitenedCnn(nn.Module):
    """Images [B, 3, H, W], H and W from 20 on, → logits [B, classes].

    The first layer projects patches onto the principal axes of the training set, scaled to unit variance, each also
    negated: `whiten` sets it, and it is not trained. Nothing else depends on the size of the images.
    """

    def __init__(self, classes: int, groups: Groups) -> None:
        super().__init__()
        axes = 3 * PATCH**2
        self.whitening = nn.Sequential(nn.Conv2d(3, 2 * axes, PATCH, bias=False).requires_grad_(False), nn.SiLU())
        channels = [2 * axes, *(width for width, _, _ in groups)]
        self.groups = nn.Sequential(*(Group(before, *group) for before, group in zip(channels, groups, strict=False)))
        self.head = nn.Linear(channels[-1], classes, bias=False)

    @torch.no_grad()
    def whiten(self, images: torch.Tensor) -> None:
        """Sets the first layer from images as the network sees them."""
        weight = self.get_parameter("whitening.0.weight")
        patches = F.unfold(images.float(), PATCH).transpose(1, 2).flatten(0, 1)
        values, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).cpu().double())
        axes = (vectors / (values + WHITENING_EPSILON).sqrt()).T.view(-1, *weight.shape[1:])
        weight.copy_(torch.cat([axes, -axes]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.groups(self.whitening(images)).flatten(2)
        return LOGIT * self.head(features.max(2)[0] + features.mean(2))


class Group(nn.Module):
    """[B, I, H, W] → [B, O, H/2, W/2]: a convolution, pooled, and one more, or two whose result is added."""

    def __init__(self, channels_in: int, channels: int, kernels: tuple[int, ...], between: int) -> None:
        super().__init__()
        widths = [channels_in, channels, *([between] if len(kernels) == 3 else []), channels]
        first, *further = map(Conv, widths, widths[1:], kernels)
        norm, *norms = map(Norm, widths[1:])
        self.first = nn.Sequential(first, nn.MaxPool2d(2), norm, nn.SiLU())
        layers = [(conv, norm, nn.SiLU()) for conv, norm in zip(further, norms, strict=True)]
        self.further = nn.Sequential(*chain.from_iterable(layers))
        self.residual = len(further) == 2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = self.first(images)
        further = self.further(first)
        return first + further if self.residual else further


class Conv(nn.Conv2d):
    """Without a bias; the first outputs begin as the inputs themselves."""

    def __init__(self, channels_in: int, channels: int, kernel: int) -> None:
        super().__init__(channels_in, channels, kernel, padding=kernel // 2, bias=False)
        with torch.no_grad():
            nn.init.dirac_(self.weight[:channels_in])


class Norm(nn.BatchNorm2d):
    """Batch norm without a learned scale."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=RUNNING)
        self.weight.requires_grad_(False)
