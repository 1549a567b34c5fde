"""The loader people write first: `torch.utils.data.DataLoader` over torchvision transforms, image by image.

It is what the DALI pipelines are measured against, so it is neither sped up nor slowed down. In two points it cannot
follow them: torchvision's RandomAffine fills the border with black, and augmentation is drawn by the worker processes,
so that it depends on their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler
from torchvision import transforms

from ..errors import UserError
from .loader import (
    WHOLE,
    Batch,
    Loader,
    Share,
    check_array_set,
    check_jpeg_set,
    count_epoch,
    labels_or_zeros,
)
from .prepared import decoding

if TYPE_CHECKING:
    from ..workloads import Preprocess


def array_loader(
    images: np.ndarray,
    labels: np.ndarray | None,
    *,
    preprocess: Preprocess,
    batch_size: int,
    train: bool,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool = True,
    workers: int,
    share: Share = WHOLE,
) -> Loader:
    """Batches of uint8 `images` [N, H, W, C] with int64 `labels` [N]; `workers` processes, 0: none.

    `share`: what of a training set is this rank's, in batches of `batch_size`.
    """
    check_array_set(images, preprocess)
    steps: list[object] = []
    if train and preprocess.crop_padding:
        steps.append(transforms.RandomCrop(images.shape[1:3], padding=preprocess.crop_padding, padding_mode="reflect"))
    dataset = _Images(images, labels_or_zeros(labels, len(images)), _transform(steps, preprocess, train))
    return _BaselineLoader(dataset, batch_size, train, seed, device, dtype, channels_last, workers, share)


def jpeg_loader(
    files: Sequence[Path],
    labels: np.ndarray | None,
    *,
    preprocess: Preprocess,
    batch_size: int,
    train: bool,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool = True,
    workers: int,
    share: Share = WHOLE,
) -> Loader:
    """Batches of JPEG `files` with int64 `labels` [N], resized; UserError, in mid-epoch, names one that is broken."""
    side = check_jpeg_set(preprocess)
    steps: list[object] = [transforms.Resize((side, side))]
    if train and (preprocess.shear_deg or preprocess.zoom):
        steps.append(
            transforms.RandomAffine(
                degrees=0,
                scale=(1 - preprocess.zoom, 1 + preprocess.zoom),
                shear=preprocess.shear_deg,
                interpolation=transforms.InterpolationMode.BILINEAR,
            )
        )
    dataset = _Images(files, labels_or_zeros(labels, len(files)), _transform(steps, preprocess, train))
    return _BaselineLoader(dataset, batch_size, train, seed, device, dtype, channels_last, workers, share)


def _transform(steps: list[object], preprocess: Preprocess, train: bool) -> transforms.Compose:
    if train and preprocess.flip:
        steps = [*steps, transforms.RandomHorizontalFlip()]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(preprocess.mean, preprocess.std)])


class _Images(Dataset[tuple[Tensor, int]]):
    """Single images, from an array or from files."""

    def __init__(self, images: np.ndarray | Sequence[Path], labels: np.ndarray, transform: transforms.Compose) -> None:
        self._images = images
        self._labels = labels
        self._transform = transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        source = self._images[i]
        if isinstance(source, np.ndarray):
            image = Image.fromarray(source[:, :, 0] if source.shape[2] == 1 else source)
        else:
            with decoding(source), Image.open(source, formats=["JPEG"]) as stored:
                image = stored.convert("RGB")
        return self._transform(image), int(self._labels[i])


class _Part(Sampler[int]):
    """The first `count` rows of one rank's share of those that a sampler brings."""

    def __init__(self, rows: Sampler[int], share: Share, count: int) -> None:
        self._rows, self._share, self._count = rows, share, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return islice(self._rows, self._share.rank, self._count * self._share.ranks, self._share.ranks)


class _BaselineLoader:
    """A `Loader` over a `DataLoader`."""

    batches_at_once = 1

    def __init__(
        self,
        dataset: _Images,
        batch_size: int,
        train: bool,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool,
        workers: int,
        share: Share,
    ) -> None:
        self.batches_per_epoch, self.images_per_epoch = count_epoch(len(dataset), batch_size, train=train, share=share)
        self._batch_size = batch_size
        self._seed = seed
        self._device = device
        self._dtype = dtype
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._next_epoch = 0
        self._rank = share.rank
        self._order = torch.Generator()  # the same in every rank
        self._moves = torch.Generator()  # what augmentation is drawn from: another one in each
        rows: Sampler[int] = SequentialSampler(dataset)
        if train:
            rows = RandomSampler(dataset, num_samples=share.epochs * len(dataset), generator=self._order)
        self._loader: DataLoader | None = DataLoader(
            dataset,
            batch_size,
            sampler=_Part(rows, share, self.images_per_epoch),
            generator=self._moves,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )

    def epoch(self) -> Iterator[Batch]:
        epoch = self._next_epoch
        self._next_epoch += 1
        return self._batches(epoch)

    def close(self) -> None:
        self._loader = None  # the last reference: the worker processes end with it

    def _batches(self, epoch: int) -> Iterator[Batch]:
        if self._loader is None:
            raise RuntimeError("this loader is closed")
        self._order.manual_seed(_mixed(self._seed, epoch))
        self._moves.manual_seed(_mixed(self._seed, epoch, 1 + self._rank))
        for images, labels in _in_own_random_state(self._loader, self._moves):
            valid = len(images)
            if valid < self._batch_size:
                padding = self._batch_size - valid
                images = torch.cat([images, images[-1:].expand(padding, -1, -1, -1)])
                labels = torch.cat([labels, labels[-1:].expand(padding)])
            yield Batch(
                images=images.to(self._device, non_blocking=True).to(self._dtype, memory_format=self._memory_format),
                labels=labels.to(self._device, non_blocking=True),
                valid=valid,
            )


def _mixed(*numbers: int) -> int:
    """A seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _in_own_random_state(loader: DataLoader, moves: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches; without workers its transforms draw from torch's global generator, which training also
    uses: they get it in a state that depends on the epoch alone and leave it as it was."""
    batches = iter(loader)
    own = torch.Generator().manual_seed(moves.initial_seed()).get_state()
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(own)
            try:
                batch = next(batches, None)
            except UserError as error:  # out of a worker it carries the worker's traceback, and ends with the one line
                raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
            own = torch.get_rng_state()
        if batch is None:
            return
        yield batch
