"""DCGAN for 64×64 images (Radford et al. 2016): generator and discriminator without pooling or fully connected layers.

The paper's form is 128 wide with 5×5 kernels; the common one is 64 wide with 4×4 kernels.
"""

import torch
from torch import nn

LATENT = 100  # length of the noise vector


def initialise(network: nn.Module) -> None:
    """Weights from N(0, 0.02), batch-norm scales from N(1, 0.02), as in the paper; biases 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class Generator(nn.Module):
    """Noise [B, 100] → images [B, 3, 64, 64] in [-1, 1]; 18,855,043 parameters in the paper's form (128 wide, 5×5).

    The first layer, a transposed convolution over a 1×1 input, is written as the matrix product that it is:
    torch.compile of torch 2.11 fails on the convolution in channels last.
    """

    def __init__(self, width: int = 128, kernel: int = 5) -> None:
        super().__init__()
        self.width = width
        self.project = nn.Linear(LATENT, 8 * width * 4 * 4, bias=False)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(8 * width),
            nn.ReLU(),
            *self._up(8 * width, 4 * width, kernel),
            *self._up(4 * width, 2 * width, kernel),
            *self._up(2 * width, width, kernel),
            nn.ConvTranspose2d(width, 3, kernel, 2, padding=(kernel - 1) // 2, output_padding=kernel % 2),
            nn.Tanh(),
        )
        initialise(self)

    @staticmethod
    def _up(channels_in: int, channels: int, kernel: int) -> list[nn.Module]:
        """[B, channels_in, H, W] → [B, channels, 2 H, 2 W]."""
        padding, extra = (kernel - 1) // 2, kernel % 2
        return [
            nn.ConvTranspose2d(channels_in, channels, kernel, 2, padding, output_padding=extra, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return self.layers(self.project(noise).view(-1, 8 * self.width, 4, 4))


class Discriminator(nn.Module):
    """Images [B, 3, 64, 64] in [-1, 1] → logits [B]; 17,232,897 parameters in the paper's form (128 wide, 5×5)."""

    def __init__(self, width: int = 128, kernel: int = 5) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, kernel, 2, padding=(kernel - 1) // 2),
            nn.LeakyReLU(0.2),
            *self._down(width, 2 * width, kernel),
            *self._down(2 * width, 4 * width, kernel),
            *self._down(4 * width, 8 * width, kernel),
            nn.Conv2d(8 * width, 1, 4),
            nn.Flatten(0),
        )
        initialise(self)

    @staticmethod
    def _down(channels_in: int, channels: int, kernel: int) -> list[nn.Module]:
        """[B, channels_in, H, W] → [B, channels, H/2, W/2]."""
        return [
            nn.Conv2d(channels_in, channels, kernel, 2, padding=(kernel - 1) // 2, bias=False),
            nn.BatchNorm2d(channels),
            nn.LeakyReLU(0.2),
        ]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


class Dcgan(nn.Module):
    """Both players: `generator` and `discriminator`."""

    def __init__(self, width: int = 128, kernel: int = 5) -> None:
        super().__init__()
        self.generator = Generator(width, kernel)
        self.discriminator = Discriminator(width, kernel)
