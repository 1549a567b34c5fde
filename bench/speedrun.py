"""The open division: seeds one after the other in one process, each trained anew to the end, by one captured step.

A seed's time goes from before its first step, whitening and the loader's first fill included, to the end of its one
evaluation, further views included. Compilation, capture and a first seed that does not count come before.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import child
from .capture import Captured
from .data.loader import Batch
from .data.prepared import ImageSet
from .measure import BlockClock
from .step import make_step, execute
from .tuning import Tuning
from .workloads import Workload

WHITENED = 960  # images whose patches are whitened
CHUNK = 2500  # test images at a time


class Seed(NamedTuple):
    """What one seed reached."""

    metric: float
    seconds: float
    steps: int
    loss: float
    wall_s: float


class Speedrun:
    """A network with everything that trains and judges it, for seed after seed."""

    def __init__(
        self, workload: Workload, train_set: ImageSet, eval_set: ImageSet, tuning: Tuning, device: torch.device
    ) -> None:
        self._workload, self._tuning, self._device = workload, tuning, device
        self._train_set = train_set
        recipe = workload.recipe
        self._network = workload.network(train_set.classes).to(device)
        if tuning.channels_last:
            self._network.to(memory_format=torch.channels_last)
        self._place, eval_place = child.places(workload, train_set, eval_set, tuning, device)
        self._eval_loader = child.make_loader(workload, eval_set, tuning, device, train=False, seed=0, into=eval_place)
        with closing(self._loader(0)) as loader:
            self._at_once = loader.batches_at_once
            per_epoch = loader.batches_per_epoch
        side = train_set.images.shape[1]
        sides = recipe.sides or ((side, float(recipe.epochs)),)
        self._plan = [
            side for side, epochs in sides for _ in range(round(epochs * per_epoch / self._at_once))
        ]  # of each super-step
        self._small = {side: None for side, _ in sides if side != train_set.images.shape[1]}
        self._step, self._players = make_step(workload, self._network, tuning, device, len(self._plan) * self._at_once)
        self._judge = self._make_judge()
        mean, std = (
            torch.tensor(values, device=device).view(-1, 1, 1)
            for values in (workload.preprocess.mean, workload.preprocess.std)
        )
        first = torch.tensor(np.ascontiguousarray(train_set.images[:WHITENED]), device=device).permute(0, 3, 1, 2)
        self._first = (first / 255 - mean) / std

    def _loader(self, seed: int):
        return child.make_loader(
            self._workload, self._train_set, self._tuning, self._device, train=True, seed=seed, into=self._place
        )

    def _make_judge(self):
        logits_of = execute(self._network, self._tuning, self._device)
        unsure = self._workload.unsure

        def in_chunks(images: Tensor) -> Tensor:
            return torch.cat(
                [
                    logits_of(chunk.contiguous(memory_format=torch.channels_last)).clone()
                    for chunk in images.split(CHUNK)
                ]
            )

        def judge(images: Tensor, labels: Tensor) -> Tensor:
            logits = in_chunks(images)
            if unsure:
                count = round(unsure * len(images))
                sure, _ = logits.float().softmax(1).max(1)
                rows = sure.topk(count, largest=False, sorted=False).indices
                again = views(images[rows])
                logits = logits.index_copy(
                    0, rows, in_chunks(again).view(-1, count, logits.shape[1]).mean(0).to(logits.dtype)
                )
            return (logits.argmax(1) == labels).sum()

        return Captured(judge, "eval") if self._tuning.capture else judge

    def reset(self, seed: int) -> None:
        torch.manual_seed(seed)
        fresh = self._workload.network(self._train_set.classes)
        self._network.load_state_dict(fresh.state_dict())
        for player in self._players:
            player.restart()
        self._network.train()

    def run(self, seed: int) -> Seed:
        self.reset(seed)
        with closing(self._loader(seed)) as loader:
            clock = BlockClock(self._device, len(self._plan) * self._at_once, self._at_once)
            clock.start()
            if hasattr(self._network, "whiten"):
                self._network.whiten(self._first)
            batches = endless(loader)
            for side in self._plan:
                batch = next(batches)
                loss = self._step(self._sized(batch.images, side), batch.labels)
                clock.step(batch.batches)
            right = self._evaluate()
            clock.step()  # the evaluation counts as one more
            clock.stop()
        return Seed(
            100.0 * right, clock.total_s, len(self._plan) * self._at_once, loss.item() / self._at_once, clock.wall_s
        )

    def _sized(self, images: Tensor, side: int) -> Tensor:
        if side == images.shape[2]:
            return images
        small = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)
        if self._small[side] is None:
            self._small[side] = small.contiguous(memory_format=torch.channels_last)
        return self._small[side].copy_(small)

    @torch.no_grad()
    def _evaluate(self) -> float:
        self._network.eval()
        right = images = 0
        for batch in self._eval_loader.epoch():
            right += self._judge(batch.images, batch.labels)
            images += batch.valid
        return right.item() / images


def endless(loader) -> Iterator[Batch]:
    while True:
        yield from loader.epoch()


def views(images: Tensor) -> Tensor:
    """Six views of images [N, C, H, W], one behind the other: shifted by a pixel up left, down right, not; mirrored."""
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    moved = torch.cat([images, padded[:, :, :height, :width], padded[:, :, 2:, 2:]])
    return torch.cat([moved, moved.flip(3)])
