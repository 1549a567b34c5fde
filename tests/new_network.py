"""All that a new network takes: one module, which would be a file in `models/`, and one spec in `bench/workloads.py`.

Two classes of 8×8 images that differ in brightness; small enough to be compiled and trained in a test.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from netdyno.bench.tuning import eager, tuned
from netdyno.bench.workloads import ACCURACY, Preprocess, Recipe, Workload

CPU = torch.device("cpu")
EAGER = eager(None)
COMPILED = replace(tuned(None), precision="bf16")


class TinyCnn(nn.Module):
    """Images [B, 3, 8, 8] → logits [B, classes]."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 4 * 4, classes)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def tiny_cnn() -> Workload:
    recipe = Recipe(batch_size=8, epochs=3, optimizer="sgd", learning_rate=0.05, momentum=0.9)
    return Workload(
        name="tiny-cnn",
        dataset="bright and dark",
        objective="classify",
        network=TinyCnn,
        preprocess=Preprocess(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_padding=1, flip=True),
        metric=ACCURACY,
        recipe=recipe,
        source=recipe,
        quick=replace(recipe, epochs=1),
        eval_batch_size=8,
    )


def bright_and_dark(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, 8, 8, 3] and int64 [count]: class 1 is 40 grey levels brighter than class 0, under noise."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, count)
    noise = draw.normal(0, 30, (count, 8, 8, 3))
    return np.clip(108 + 40 * labels[:, None, None, None] + noise, 0, 255).astype(np.uint8), labels


def batch_of(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as normalised tensors: float32 [count, 3, 8, 8] and int64 [count]."""
    images, labels = bright_and_dark(count, seed)
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(labels)
