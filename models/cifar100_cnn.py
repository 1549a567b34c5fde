"""CIFAR-100 classifier: three blocks of a same and a valid 3×3 convolution, ELU, pooling and dropout."""

import torch
from torch import nn

from .init import glorot_uniform


def block(channels_in: int, channels: int) -> list[nn.Module]:
    """[B, channels_in, H, W] → [B, channels, (H - 2) // 2, (W - 2) // 2]."""
    return [
        nn.Conv2d(channels_in, channels, 3, padding=1),
        nn.ELU(),
        nn.Conv2d(channels, channels, 3),
        nn.ELU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
    ]


class Cifar100Cnn(nn.Module):
    """Images [B, 3, 32, 32] → logits [B, classes]; 6,777,060 parameters for 100 classes."""

    def __init__(self, classes: int = 100) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *block(3, 128),
            *block(128, 256),
            *block(256, 512),
            nn.Flatten(),
            nn.Linear(2048, 1024),
            nn.ELU(),
            nn.Dropout(0.5),
            nn.Linear(1024, classes),
        )
        glorot_uniform(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)
