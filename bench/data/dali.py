"""NVIDIA DALI pipelines, on a GPU or, with the same results but for rounding, on the CPU.

Array sets (MNIST, CIFAR, faces): DALI handles a *super-batch* as one sample, because at 32×32 its cost a sample is what
counts: 65–236 k images/s image by image, 160–360 µs an iteration by super-batch (H200). A set of up to `RESIDENT_BYTES`
is brought to the device once and stays there; a super-batch is then an epoch's row numbers, and its shifts and flips
where images are moved. Of a larger set a super-batch is some 16k images: a thread gathers the rows of the next one
while DALI copies one and the network trains on another. `kernels.augment` makes each batch in one pass. JPEG sets: DALI
decodes, resizes and warps image by image, one batch an iteration.

Everything random is drawn on the host from a generator keyed by (seed, epoch) and travels with the images, so that an
epoch is the same on every device. Iterations follow each other without end. The next one is taken from DALI while the
device is busy with the first batches of this one, and an epoch's first batches are made behind the last ones of the
epoch before. An epoch ends when all that DALI has begun has arrived: else it would decode for the next epoch while
the network is evaluated, which nobody times, and for the next evaluation while it trains, which is timed.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...kernels.augment import Moves, augment
from .. import parallel
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
from .prepared import check_decodes, read_jpeg

if TYPE_CHECKING:
    from ..workloads import Preprocess

T = TypeVar("T")

RESIDENT_BYTES = 1 << 30  # of one set: a sixteenth of a T4's memory
SUPER_BATCH_IMAGES = 16_384
SUPER_BATCH_BYTES = 64 << 20  # up to four are on the device at a time: DALI's queue, the next and the one in use
STEPS_AT_ONCE = 32  # of a captured step, at most …
PARTS_OF_EPOCH = 4  # … and so few that an epoch has as many blocks, since a block of time is a replay or more
JPEG_QUEUE = 4  # batches that DALI works on or has done
DECODE_CHUNK = 256


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
    into: Batch | None = None,
    share: Share = WHOLE,
) -> Loader:
    """Batches of uint8 `images` [N, H, W, C], which may be memory-mapped, with int64 `labels` [N].

    `into`, channels last, is the memory that all batches come in, as many at a time as it holds, and the next epoch's
    first ones at an epoch's end; without it each batch has memory of its own. `share`: what of a training set is this
    rank's, in batches of `batch_size`.
    """
    check_array_set(images, preprocess)
    batches, images_per_epoch = count_epoch(len(images), batch_size, train=train, share=share)
    at_once = 1 if into is None else into.batches
    resident = is_resident(images)
    batches_per_run = batches
    if not resident:
        parts = -(-batches // at_once)
        batches_per_run = at_once * _spread(parts, _super_batch(images) // (at_once * batch_size))

    known = labels_or_zeros(labels, len(images))
    size = batches_per_run * batch_size
    moves = preprocess if train else _unmoved(preprocess)
    orders = _orders(
        len(images),
        count=images_per_epoch,
        size=size,
        preprocess=moves,
        seed=seed,
        shuffle=train,
        share=share,
    )
    # Numbers travel in no time: with a queue of two, the first epoch would wait for those of the second one too.
    depth = 1 if resident else 2
    rehearsal: tuple[np.ndarray, ...] = (np.zeros((1, size), np.int64),)
    dali, fn, types = import_dali()
    dtypes, ndims = [types.INT64], [1]
    if _are_moved(moves):
        rehearsal += np.zeros((1, size, 2), np.int32), np.zeros((1, size), np.uint8)
        dtypes, ndims = [*dtypes, types.INT32, types.UINT8], [*ndims, 2, 1]
    if not resident:
        whole = np.ascontiguousarray(images)  # of a strided view np.take would make this copy at every call
        rehearsal = next(_gathered(iter([rehearsal]), whole, known))
        orders = _gathered(orders, whole, known)
        dtypes, ndims = [types.UINT8, *dtypes], [4, *ndims]
    source = _rehearsed(rehearsal, depth, orders if resident else _ahead(orders))
    pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=_device_id(device), prefetch_queue_depth=depth)
    with pipeline:
        outputs = fn.external_source(source, num_outputs=len(dtypes), dtype=dtypes, ndim=ndims)
        pipeline.set_outputs(*(_to_device(output, device) for output in outputs))
    return _DaliLoader(
        pipeline,
        source,
        stored=_Stored(_bring(images, device), torch.tensor(known, device=device)) if resident else None,
        images_per_epoch=images_per_epoch,
        batches_per_epoch=batches,
        batches_per_run=batches_per_run,
        batch_size=batch_size,
        preprocess=preprocess,
        device=device,
        dtype=dtype,
        channels_last=channels_last,
        into=into,
        makes_ahead=train,
    )


def is_resident(images: np.ndarray) -> bool:
    """Whether a set stays on the device."""
    return images.nbytes <= RESIDENT_BYTES


def batches_at_once(images: np.ndarray, batch_size: int, share: Share = WHOLE) -> int:
    """How many training batches of `images` [N, H, W, C] a rank's captured step best takes at a time."""
    batches, _ = count_epoch(len(images), batch_size, train=True, share=share)
    return _spread(batches, min(STEPS_AT_ONCE, batches // PARTS_OF_EPOCH, _super_batch(images) // batch_size))


def _super_batch(images: np.ndarray) -> int:
    """Images of a super-batch, at most."""
    return min(SUPER_BATCH_IMAGES, SUPER_BATCH_BYTES // images[0].nbytes)


def _spread(count: int, most: int) -> int:
    """The size of the parts that `count` is cut into evenly, at most `most`: the last one is hardly smaller."""
    parts = -(-count // max(1, most))
    return -(-count // parts)


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
    into: Batch | None = None,
    share: Share = WHOLE,
) -> Loader:
    """Batches of JPEG `files` with int64 `labels` [N], resized to `preprocess.image_size`.

    `into`, of one batch, channels last, is the memory that all batches come in; `share` is as for arrays. The encoded
    files are read into memory once. UserError names a file that cannot be read or decoded.
    """
    side = check_jpeg_set(preprocess)
    batches, images_per_epoch = count_epoch(len(files), batch_size, train=train, share=share)
    moves = preprocess if train else _unmoved(preprocess)
    warped = bool(moves.shear_deg or moves.zoom or moves.flip)
    dali, fn, types = import_dali()
    # as DALI's own tensors, which spares it a conversion of each at every use: 0.6 instead of 1.5 ms for 128
    encoded_files = [dali.tensors.TensorCPU(np.frombuffer(read_jpeg(file), np.uint8)) for file in files]
    rehearsal = (
        [encoded_files[i % len(files)] for i in range(batch_size)],
        np.zeros(batch_size, np.int64),
        np.tile(np.eye(2, 3, dtype=np.float32), (batch_size, 1, 1)),
    )
    batches_of_files = _jpeg_batches(
        encoded_files,
        labels_or_zeros(labels, len(files)),
        count=images_per_epoch,
        batch_size=batch_size,
        preprocess=moves,
        seed=seed,
        shuffle=train,
        share=share,
    )
    source = _rehearsed(rehearsal, JPEG_QUEUE, batches_of_files)
    pipeline = _per_image_pipeline(dali, batch_size, device, JPEG_QUEUE)
    with pipeline:
        outputs = 3 if warped else 2
        encoded, label, *matrix = fn.external_source(
            source,
            num_outputs=outputs,
            dtype=[types.UINT8, types.INT64, types.FLOAT][:outputs],
            ndim=[1, 0, 2][:outputs],
        )
        image = _decoder(fn, types, encoded, device)
        image = fn.resize(image, size=[side, side], interp_type=types.INTERP_LINEAR, antialias=True)
        if warped:
            # No fill value: the border pixel is repeated, so that no black wedge tells the network of the warp.
            image = fn.warp_affine(image, matrix=matrix[0], interp_type=types.INTERP_LINEAR)
        pipeline.set_outputs(image, _to_device(label, device))
    return _DaliLoader(
        pipeline,
        source,
        images_per_epoch=images_per_epoch,
        batches_per_epoch=batches,
        batches_per_run=1,
        batch_size=batch_size,
        preprocess=preprocess,
        device=device,
        dtype=dtype,
        channels_last=channels_last,
        into=into,
        makes_ahead=train,
        files=files,
    )


def decode(files: Sequence[Path], device: torch.device) -> np.ndarray:
    """uint8 [N, H, W, 3] of JPEGs of one size; UserError names a file that is of another or cannot be decoded."""
    encoded = [np.frombuffer(read_jpeg(file), np.uint8) for file in files]
    starts = range(0, len(encoded), DECODE_CHUNK)
    dali, fn, types = import_dali()
    pipeline = _per_image_pipeline(dali, DECODE_CHUNK, device, 2)
    with pipeline:
        chunks = fn.external_source(
            (encoded[start : start + DECODE_CHUNK] for start in starts), dtype=types.UINT8, ndim=1
        )
        pipeline.set_outputs(_decoder(fn, types, chunks, device))

    images: np.ndarray | None = None
    for start in starts:
        with _blaming(files):
            (output,) = pipeline.run()
        for i, decoded in enumerate(output.as_cpu(), start):
            image = np.asarray(decoded)
            if images is None:
                images = np.empty((len(files), *image.shape), np.uint8)
            if image.shape != images.shape[1:]:
                raise UserError(f"{files[i]}: {image.shape[:2]} pixels, but {files[0]} has {images.shape[1:3]}")
            images[i] = image
    if images is None:
        raise UserError("no JPEG files to decode")
    return images


class _Stored(NamedTuple):
    """A set on the device."""

    images: Tensor  # uint8 [N, H, W, C]
    labels: Tensor  # int64 [N]


class _DaliLoader:
    """A `Loader` over a pipeline that brings S = batches_per_run · batch_size rows an iteration, for ever.

    Outputs of the pipeline for JPEG `files`: images uint8 [S, H, W, C] and labels int64 [S]. For arrays a super-batch,
    which is one sample and so has a leading 1: images as above, unless they are `stored`, then int64 [1, S], row
    numbers of stored images or else labels, and, where images are moved, shift int32 [1, S, 2] and flip uint8 [1, S].
    """

    def __init__(
        self,
        pipeline: Any,
        source: Generator[Any, None, None],
        *,
        images_per_epoch: int,
        batches_per_epoch: int,
        batches_per_run: int,
        batch_size: int,
        preprocess: Preprocess,
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool,
        into: Batch | None,
        makes_ahead: bool,
        stored: _Stored | None = None,
        files: Sequence[Path] | None = None,
    ) -> None:
        self.images_per_epoch = images_per_epoch
        self.batches_per_epoch = batches_per_epoch
        self.batches_at_once = 1 if into is None else into.batches
        self._pipeline = pipeline
        # DALI leaves the source in a cycle of references; its thread and its images shall not wait for the collector.
        self._end_source = weakref.finalize(self, source.close)
        self._batches_per_run = batches_per_run
        self._runs_per_epoch = -(-batches_per_epoch // batches_per_run)
        self._batch_size = batch_size
        self._preprocess = preprocess
        self._device = device
        self._dtype = dtype
        self._channels_last = channels_last
        self._into = into
        self._stored = stored
        self._files = files
        self._next_epoch = 0
        self._next_run = 0
        self._due = 0  # so many iterations may be begun until the end of the epoch
        self._arrived: deque[list[Tensor]] = deque()  # those taken from DALI and not yet wanted
        self._latest: list[Tensor] = []  # the outputs of the run before the next one
        self._makes_ahead = makes_ahead
        self._made: tuple[int, Batch] | None = None  # an epoch and its first batches, made before it began
        self._index = torch.arange(batches_per_run * batch_size, device=device)
        # DALI makes its threads and its memory in a first run, which is as many iterations as its queue is deep. Those
        # are none of an epoch's.
        pipeline.build()
        pipeline.schedule_run()
        self._depth = pipeline.prefetch_queue_depth
        self._begun = self._depth  # iterations that DALI works on, or has done
        while self._begun:
            self._take()

    def epoch(self) -> Iterator[Batch]:
        epoch = self._next_epoch
        self._next_epoch += 1
        return self._batches(epoch)

    def close(self) -> None:
        self._pipeline = None  # the last reference: DALI's threads end
        # what they take on the device goes too, whoever still has the loader
        self._stored, self._latest, self._made = None, [], None
        self._arrived.clear()
        self._end_source()

    def _batches(self, epoch: int) -> Iterator[Batch]:
        first_run = epoch * self._runs_per_epoch
        # One fewer in the end than the queue holds: then an epoch's last iteration is begun early enough to be there.
        self._due = max(self._due, first_run + self._runs_per_epoch + max(1, self._depth - 1))
        made, self._made = self._made, None
        for run in range(self._runs_per_epoch):
            outputs = self._outputs(first_run + run)
            batches = min(self._batches_per_run, self.batches_per_epoch - run * self._batches_per_run)
            for k in range(0, batches, self.batches_at_once):
                if run == k == 0 and made is not None and made[0] == epoch:
                    yield made[1]
                else:
                    yield self._make(outputs, run, k)
                if self._pipeline is None:
                    raise RuntimeError("this loader is closed")
                if k == 0 and self._next_run == first_run + run + 1:  # the device is busy with what was handed over
                    self._advance()
        if self._makes_ahead and epoch + 1 == self._next_epoch:
            self._made = epoch + 1, self._make(self._outputs(first_run + self._runs_per_epoch), 0, 0)
        while self._begun:
            self._arrived.append(self._take())

    def _make(self, outputs: list[Tensor], run: int, k: int) -> Batch:
        """As many batches as come at once of a super-batch, the run `run` of its epoch, from its batch `k` on."""
        images, labels, index, moves = self._super_batch(outputs)
        first_batch = run * self._batches_per_run + k
        at_once = min(self.batches_at_once, self._batches_per_run - k, self.batches_per_epoch - first_batch)
        rows = slice(k * self._batch_size, (k + at_once) * self._batch_size)
        place = None if self._into is None else self._into.first(at_once)
        batch = augment(
            images,
            index[rows],
            Moves(*(move[rows] for move in moves)) if moves else None,
            self._preprocess.mean,
            self._preprocess.std,
            self._dtype,
            None if place is None else place.images,
        )
        return Batch(
            images=batch if self._channels_last else batch.contiguous(),
            labels=torch.index_select(labels, 0, index[rows], out=None if place is None else place.labels),
            valid=min(len(batch), self.images_per_epoch - first_batch * self._batch_size),
            batches=at_once,
        )

    def _super_batch(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Images and labels, the index in them of each row of the super-batch, and shift and flip if it is moved."""
        if self._stored is not None:
            index, *moves = outputs
            return self._stored.images, self._stored.labels, index, moves
        images, labels, *moves = outputs
        return images, labels, self._index, moves

    def _outputs(self, wanted: int) -> list[Tensor]:
        """The outputs of iteration `wanted`."""
        while self._next_run <= wanted:  # more than once where an epoch was left half-way
            self._advance()
        if self._pipeline is None:
            raise RuntimeError("this loader is closed")
        if self._next_run > wanted + 1:
            raise RuntimeError("an epoch cannot go on after a later one has begun")
        return self._latest

    def _advance(self) -> None:
        """Goes on to the next iteration, and has DALI begin some behind it."""
        if self._pipeline is None:
            raise RuntimeError("this loader is closed")
        queued = self._begun + len(self._arrived)
        for _ in range(min(self._depth - queued, self._due - self._next_run - queued)):
            self._pipeline.schedule_run()
            self._begun += 1
        self._latest = self._arrived.popleft() if self._arrived else self._take()
        self._next_run += 1

    def _take(self) -> list[Tensor]:
        """The oldest iteration that was begun, as tensors of our own."""
        stream = _stream(self._device)
        with _blaming(self._files or ()):
            outputs = self._pipeline.share_outputs(stream)
        tensors = [self._copy(output.as_tensor(), stream) for output in outputs]
        self._pipeline.release_outputs()
        self._begun -= 1
        return tensors

    def _copy(self, output: Any, stream: torch.cuda.Stream | None) -> Tensor:
        from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type

        tensor = torch.empty(output.shape(), dtype=to_torch_type[output.dtype], device=self._device)
        feed_ndarray(output, tensor, cuda_stream=stream)
        return tensor.flatten(0, 1) if self._files is None else tensor


def _orders(
    images: int, *, count: int, size: int, preprocess: Preprocess, seed: int, shuffle: bool, share: Share
) -> Iterator[tuple[np.ndarray, ...]]:
    """Epoch after epoch, the numbers of `size` rows, shift and flip, each with the leading 1 of a DALI batch of one.

    Without shift and flip where `preprocess` does not move images. `count` rows (`_epochs`), then padding to whole
    super-batches. All is drawn as for one rank, and then shared.
    """
    first = np.zeros(images, np.uint8)
    if preprocess.flip == "by turns":  # three numbers: two with a zero at the end are the stream of the first epoch
        first = np.random.default_rng((seed, 0, 1)).integers(0, 1, images, np.uint8, endpoint=True)

    def draw_epoch(epoch: int, drawn: int) -> list[np.ndarray]:
        draw = np.random.default_rng((seed, epoch))
        rows = (draw.permutation(images) if shuffle else np.arange(images))[:drawn]
        if not _are_moved(preprocess):
            return [rows]
        pad = preprocess.crop_padding
        shift = draw.integers(-pad, pad, (drawn, 2), np.int32, endpoint=True)
        flip = draw.integers(0, int(bool(preprocess.flip)), drawn, np.uint8, endpoint=True)
        return [rows, shift, first[rows] ^ (epoch % 2) if preprocess.flip == "by turns" else flip]

    for order in _epochs(draw_epoch, images, count, share):
        for part in zip(*(_parts(values, size) for values in order), strict=True):
            yield tuple(values[None] for values in part)


def _epochs(
    draw_epoch: Callable[[int, int], list[np.ndarray]], images: int, count: int, share: Share
) -> Iterator[list[np.ndarray]]:
    """This rank's share of the epochs of a set, as many at a time as are trained as one: `count` rows of them.

    draw_epoch: makes the first so many rows of an epoch, by its number, and what is drawn for each.
    """
    drawn = count * share.ranks
    for first in itertools.count(step=share.epochs):
        parts = [draw_epoch(epoch, min(drawn, images)) for epoch in range(first, first + share.epochs)]
        yield [share.of(np.concatenate(values)[:drawn]) for values in zip(*parts, strict=True)]


def _gathered(
    orders: Iterator[tuple[np.ndarray, ...]], images: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[np.ndarray, ...]]:
    """The images and labels of each order, and its moves."""
    for rows, *moves in orders:
        yield images.take(rows, axis=0), labels[rows], *moves


def _bring(images: np.ndarray, device: torch.device) -> Tensor:
    """A copy of `images` on the device, brought by DALI in super-batches."""
    dali, fn, types = import_dali()
    from nvidia.dali.plugin.pytorch import feed_ndarray

    brought = torch.empty(images.shape, dtype=torch.uint8, device=device)
    parts = brought.split(_super_batch(images))
    starts = itertools.accumulate((len(part) for part in parts), initial=0)
    pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=_device_id(device), prefetch_queue_depth=2)
    with pipeline:
        source = (
            np.ascontiguousarray(images[at : at + len(part)])[None] for at, part in zip(starts, parts, strict=False)
        )
        pipeline.set_outputs(_to_device(fn.external_source(source, dtype=types.UINT8, ndim=4), device))
    for part in parts:
        (output,) = pipeline.run(_stream(device))
        feed_ndarray(output.as_tensor(), part[None], cuda_stream=_stream(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # before the pipeline goes, and its memory with it
    return brought


def _jpeg_batches(
    encoded: list[Any],
    labels: np.ndarray,
    *,
    count: int,
    batch_size: int,
    preprocess: Preprocess,
    seed: int,
    shuffle: bool,
    share: Share,
) -> Generator[tuple[list[Any], np.ndarray, np.ndarray], None, None]:
    """Epoch after epoch, (encoded files, labels, affine maps) of one batch; padding after `count` images."""

    def draw_epoch(epoch: int, drawn: int) -> list[np.ndarray]:
        draw = np.random.default_rng((seed, epoch))
        rows = draw.permutation(len(encoded)) if shuffle else np.arange(len(encoded))
        return [rows[:drawn], _affine_maps(drawn, preprocess, draw)]

    for rows, maps in _epochs(draw_epoch, len(encoded), count, share):
        for part, moves in zip(_parts(rows, batch_size), _parts(maps, batch_size), strict=True):
            yield [encoded[row] for row in part], labels[part], moves


def _parts(values: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """`values` in parts of `size`; the last one is filled up with the last value."""
    for start in range(0, len(values), size):
        part = values[start : start + size]
        filled = np.repeat(part[-1:], size - len(part), axis=0)
        yield np.concatenate([part, filled]) if len(filled) else part


def _are_moved(preprocess: Preprocess) -> bool:
    """Whether array images are."""
    return bool(preprocess.crop_padding or preprocess.flip)


def _unmoved(preprocess: Preprocess) -> Preprocess:
    return replace(preprocess, crop_padding=0, flip=False, shear_deg=0.0, zoom=0.0)


def _affine_maps(count: int, preprocess: Preprocess, draw: np.random.Generator) -> np.ndarray:
    """float32 [count, 2, 3], from a point (x, y) of the output to one of the input: mirror · shear · zoom⁻¹ about the
    centre of an image of image_size²; (0, 0) is the outer corner of the first pixel, as in DALI."""
    assert preprocess.image_size is not None
    zoom = draw.uniform(1 - preprocess.zoom, 1 + preprocess.zoom, count)
    shear = np.tan(np.radians(draw.uniform(-preprocess.shear_deg, preprocess.shear_deg, count)))
    mirror = np.where(draw.random(count) < 0.5, -1, 1) if preprocess.flip else np.ones(count)
    linear = np.zeros((count, 2, 2))
    linear[:, 0, 0] = mirror / zoom
    linear[:, 0, 1] = mirror * shear / zoom
    linear[:, 1, 1] = 1 / zoom
    centre = np.full((2, 1), preprocess.image_size / 2)
    return np.concatenate([linear, centre - linear @ centre], axis=2).astype(np.float32)


def _ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """`items`, which never end, each computed in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, items)
        while True:
            item = pending.result()
            pending = thread.submit(next, items)
            yield item


def _rehearsed(rehearsal: T, depth: int, items: Iterator[T]) -> Generator[T, None, None]:
    """`rehearsal` for each iteration of DALI's first run, then `items`, which end with this once they have begun."""
    yield from itertools.repeat(rehearsal, depth)
    yield from items


def import_dali() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        import nvidia.dali as dali
        from nvidia.dali import fn, types
    except ImportError as error:
        raise UserError(
            "NVIDIA DALI is not installed: pip install nvidia-dali-cuda120 (or nvidia-dali-cuda130)"
        ) from error
    return dali, fn, types


def _device_id(device: torch.device) -> int | None:
    """DALI's number of a CUDA device; None: no GPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _to_device(node: Any, device: torch.device) -> Any:
    return node.gpu() if device.type == "cuda" else node


def _per_image_pipeline(dali: ModuleType, batch_size: int, device: torch.device, depth: int) -> Any:
    return dali.Pipeline(
        batch_size=batch_size,
        num_threads=parallel.cores(),
        device_id=_device_id(device),
        prefetch_queue_depth=depth,
    )


def _decoder(fn: ModuleType, types: ModuleType, encoded: Any, device: torch.device) -> Any:
    """RGB, uint8 HWC. EXIF orientation is left alone, as Pillow and so the baseline do."""
    options: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if device.type != "cuda":
        return fn.decoders.image(encoded, device="cpu", **options)
    # None to a hardware decoder: all to it was a quarter slower on an H100, alone and beside training; half no faster.
    return fn.decoders.image(encoded, device="mixed", hw_decoder_load=0.0, **options)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that DALI binds outputs to: the host need not wait, nor is an output reused before it is copied."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


@contextmanager
def _blaming(files: Sequence[Path]) -> Iterator[None]:
    """UserError where DALI fails because one of `files` is no sound JPEG."""
    try:
        yield
    except RuntimeError:
        for file in files:  # DALI does not say which one it was
            check_decodes(file)
        raise
