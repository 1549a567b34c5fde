"""What every loader gives: `Batch` and `Loader`, and the rules that DALI's and the baseline's share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from ..workloads import Preprocess


class Batch(NamedTuple):
    """One batch on the device, or several that lie one behind the other, for as many steps at a time."""

    images: Tensor  # [batches · B, C, H, W], normalised
    labels: Tensor  # int64 [batches · B]; zeros where the set has none
    valid: int  # rows that count; the rest, at the end of an evaluation, repeats an image
    batches: int = 1

    def first(self, batches: int) -> Batch:
        """The first so many batches, in the same memory."""
        rows = batches * (len(self.images) // self.batches)
        return Batch(self.images[:rows], self.labels[:rows], min(self.valid, rows), batches)


class Loader(Protocol):
    """Epochs of batches of one constant shape.

    Training: order and augmentation differ by (seed, epoch) and are reproducible, each image comes at most once an
    epoch, in one of the ranks, and the last partial batch is dropped: where several epochs come as one, `Share.epochs`,
    only behind the last of them. Evaluation: stored order, nothing random, each image exactly once, the last
    batch padded. `epoch()` begins the next epoch also when the one before was left half-way.
    """

    batches_per_epoch: int
    images_per_epoch: int  # training: without the dropped remainder
    batches_at_once: int  # in each `Batch` but the last of an epoch, which may have fewer

    def epoch(self) -> Iterator[Batch]: ...

    def close(self) -> None: ...


class Share(NamedTuple):
    """Which rows of a training epoch a loader brings: every `ranks`-th, from `rank` on.

    So the ranks' k-th batches are, together, the k-th batch of one loader of their sizes' sum.
    """

    rank: int = 0
    ranks: int = 1
    epochs: int = 1  # trained as one, each behind the one before

    def of(self, rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(rows[self.rank :: self.ranks])  # DALI takes no others


WHOLE = Share()


def count_epoch(images: int, batch_size: int, *, train: bool, share: Share = WHOLE) -> tuple[int, int]:
    """(batches, images) of one rank's epoch; UserError where that is nothing.

    A training set of `images` is shared by all ranks; an evaluation's is the rank's own.
    """
    whole = share.ranks * batch_size
    batches = share.epochs * images // whole if train else -(-images // batch_size)
    if batches == 0:
        fewest = -(-whole // share.epochs)
        raise UserError(f"{images} images do not fill one batch of {fewest}: choose a smaller batch size")
    return batches, batches * batch_size if train else images


def labels_or_zeros(labels: np.ndarray | None, images: int) -> np.ndarray:
    """int64 [images]."""
    if labels is None:
        return np.zeros(images, np.int64)
    if labels.shape != (images,):
        raise ValueError(f"{images} images, but labels of shape {labels.shape}")
    return np.asarray(labels, np.int64)


def check_array_set(images: np.ndarray, preprocess: Preprocess) -> None:
    """ValueError for a recipe that arrays cannot follow."""
    _, h, w, c = images.shape
    if preprocess.shear_deg or preprocess.zoom or preprocess.image_size not in (None, h) or h != w:
        raise ValueError(f"arrays are neither sheared, zoomed nor resized: {preprocess} on {h}×{w} images")
    if preprocess.crop_padding >= h or c != len(preprocess.mean):
        raise ValueError(f"{preprocess} does not fit images of {h}×{w}×{c}")


def check_jpeg_set(preprocess: Preprocess) -> int:
    """The side of the square that JPEGs are resized to; ValueError for a recipe that they cannot follow."""
    if preprocess.image_size is None or preprocess.crop_padding or len(preprocess.mean) != 3:
        raise ValueError(f"JPEGs need image_size, three channels and no crop: {preprocess}")
    return preprocess.image_size
