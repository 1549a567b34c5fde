"""CIFAR-10 classifier: three blocks of two 3×3 convolutions and a pooling, two linear layers."""

import torch
from torch import nn

from .init import he_uniform


def block(channels_in: int, channels: int) -> list[nn.Module]:
    """[B, channels_in, H, W] → [B, channels, H/2, W/2]."""
    return [
        nn.Conv2d(channels_in, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]


class Cifar10Cnn(nn.Module):
    """Images [B, 3, 32, 32] → logits [B, classes]; 550,570 parameters for 10 classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *block(3, 32),
            *block(32, 64),
            *block(64, 128),
            nn.Flatten(),
            nn.Linear(2048, 128),
            nn.ReLU(),
            nn.Linear(128, classes),
        )
        he_uniform(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)
