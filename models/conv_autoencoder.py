"""Convolutional autoencoder: two valid 3×3 convolutions down to 4 channels, two transposed ones back."""

import torch
from torch import nn

from .init import glorot_uniform


class ConvAutoencoder(nn.Module):
    """Images [B, 3, 32, 32] in [0, 1] → reconstructions [B, 3, 32, 32], at least 0; 1,031 parameters.

    Every layer ends in a ReLU, the last one too. A last layer whose outputs all start below zero would never
    learn, so its bias starts at ½, the middle of the range that it has to produce.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 8, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 3, 3),
            nn.ReLU(),
        )
        glorot_uniform(self)
        with torch.no_grad():
            dict(self.named_parameters())["layers.6.bias"].fill_(0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)
