"""MNIST classifier of the open division: two convolutions and two linear layers, few and small.

After the network of tuomaso's train_mnist_fast (2020), whose sizes are enough for 99 % in one epoch.
"""

import torch
import torch.nn.functional as F
from torch import nn


class SmallCnn(nn.Module):
    """Images [B, 1, 28, 28] → logits [B, classes]; 215,194 parameters for 10 classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 5)
        self.conv2 = nn.Conv2d(24, 32, 3)
        self.linear1 = nn.Linear(800, 256)
        self.linear2 = nn.Linear(256, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = F.relu(F.max_pool2d(self.conv1(images), 2))
        features = F.relu(F.max_pool2d(self.conv2(features), 2))
        return self.linear2(F.relu(self.linear1(features.flatten(1))))
