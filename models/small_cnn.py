"""MNIST classifier of the open division: two convolutions and two linear layers, few and small.

After the network of tuomaso's train_mnist_fast (2020), whose sizes are enough for 99 % in one epoch.
"""

import torch
from torch import nn


class SmallCnn(nn.Module):
    """Images [B, 1, 28, 28] → logits [B, classes]; 215,194 parameters for 10 classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 24, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(24, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(800, 256), nn.ReLU(), nn.Linear(256, classes)),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)
