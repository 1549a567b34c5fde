"""MNIST classifier: three 3×3 convolutions, two poolings, two linear layers."""

import torch
from torch import nn

from .init import he_uniform


class MnistCnn(nn.Module):
    """Images [B, 1, 28, 28] → logits [B, classes]; 159,254 parameters for 10 classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(1024, 100),
            nn.ReLU(),
            nn.Linear(100, classes),
        )
        he_uniform(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)
