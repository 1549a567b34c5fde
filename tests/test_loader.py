"""The rules of loader.Loader, held against DALI's loaders and the baseline's."""

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from netdyno.bench.data import baseline, dali
from netdyno.bench.data.loader import Batch, Loader, Share
from netdyno.bench.errors import UserError
from netdyno.bench.workloads import Preprocess

N = 42  # images of one grey level each, GREY · their number, so that a pixel tells which image it is
GREY = 6
ARRAY = Preprocess(mean=(0.5,), std=(0.25,), crop_padding=2, flip=True)
JPEG = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.25, 0.3, 0.35), image_size=16, shear_deg=10, zoom=0.2, flip=True)

Build = Callable[..., Loader]


@pytest.fixture(params=["dali-array", "dali-jpeg", "baseline-array", "baseline-jpeg"])
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Build:
    """A function that builds a loader over the grey images: build(train=…, seed=…, batch_size=…)."""
    loader, kind = request.param.split("-")
    module = {"dali": dali, "baseline": baseline}[loader]
    common = {"labels": np.arange(N), "device": torch.device("cpu"), "dtype": torch.float32, "seed": 0, "batch_size": 8}
    if loader == "baseline":
        common["workers"] = 0
    if kind == "array":
        images = np.broadcast_to((GREY * np.arange(N, dtype=np.uint8))[:, None, None, None], (N, 12, 12, 1))
        return partial(module.array_loader, images, preprocess=ARRAY, **common)
    files = [tmp_path / f"{i:02}.jpg" for i in range(N)]
    for i, file in enumerate(files):
        Image.new("RGB", (24, 20), (GREY * i,) * 3).save(file, quality=95)
    return partial(module.jpeg_loader, files, preprocess=JPEG, **common)


def numbers(batch: Batch) -> list[int]:
    """Which images the batch holds, read from the pixel in the middle."""
    size = batch.images.shape[-1]
    grey = (batch.images[:, 0, size // 2, size // 2] * 0.25 + 0.5) * 255
    return (grey / GREY).round().int().tolist()


def epochs(loader: Loader, count: int) -> list[list[Batch]]:
    result = [list(loader.epoch()) for _ in range(count)]
    loader.close()
    return result


def order(batches: list[Batch]) -> list[int]:
    return [number for batch in batches for number in numbers(batch)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) and x.valid == y.valid
        for x, y in zip(a, b, strict=True)
    )


def test_training_brings_each_image_at_most_once(build: Build) -> None:
    loader = build(train=True)
    assert (loader.batches_per_epoch, loader.images_per_epoch) == (5, 40)
    left_out = set()
    for batches in epochs(loader, 3):
        assert len(batches) == 5
        for batch in batches:
            assert batch.images.shape[0] == batch.labels.shape[0] == batch.valid == 8
            assert batch.images.shape == batches[0].images.shape
            assert batch.images.dtype == torch.float32
            assert batch.labels.dtype == torch.int64
            assert numbers(batch) == batch.labels.tolist()
        seen = order(batches)
        assert len(set(seen)) == len(seen) == 40
        left_out |= set(range(N)) - set(seen)
    assert len(left_out) > 2  # not the same two at every epoch


def test_evaluation_brings_each_image_once_and_pads_the_last_batch(build: Build) -> None:
    loader = build(train=False)
    assert (loader.batches_per_epoch, loader.images_per_epoch) == (6, N)
    first, second = epochs(loader, 2)
    assert [batch.valid for batch in first] == [8, 8, 8, 8, 8, 2]
    assert {tuple(batch.images.shape) for batch in first} == {tuple(first[0].images.shape)}
    assert order(first)[:N] == list(range(N))
    assert torch.cat([batch.labels for batch in first])[:N].tolist() == list(range(N))
    assert numbers(first[-1])[2:] == first[-1].labels[2:].tolist() == [N - 1] * 6
    assert same(first, second)


def test_evaluation_is_not_padded_where_batches_fit(build: Build) -> None:
    (batches,) = epochs(build(train=False, batch_size=21), 1)
    assert [batch.valid for batch in batches] == [21, 21]


def test_order_depends_on_seed_and_epoch_and_on_nothing_else(build: Build) -> None:
    first = epochs(build(train=True, seed=1), 2)
    again = epochs(build(train=True, seed=1), 2)
    other = epochs(build(train=True, seed=2), 2)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    orders = {tuple(order(batches)) for batches in [*first, *other]}
    assert len(orders) == 4
    assert tuple(range(40)) not in orders


def test_an_epoch_left_half_way_is_over(build: Build) -> None:
    _, second = epochs(build(train=True), 2)
    loader = build(train=True)
    left = loader.epoch()
    next(left)
    assert same(second, list(loader.epoch()))
    loader.close()


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format(build: Build, channels_last: bool) -> None:
    ((batch, *_),) = epochs(build(train=True, channels_last=channels_last), 1)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.images.is_contiguous(memory_format=wanted)


def test_precision(build: Build) -> None:
    ((wide, *_),) = epochs(build(train=False), 1)
    ((half, *_),) = epochs(build(train=False, dtype=torch.bfloat16), 1)
    assert half.images.dtype == torch.bfloat16
    torch.testing.assert_close(half.images, wide.images.bfloat16())


def test_sets_without_labels_get_zeros(build: Build) -> None:
    ((batch, *_),) = epochs(build(train=True, labels=None), 1)
    assert torch.equal(batch.labels, torch.zeros(8, dtype=torch.int64))


def place(batches: int, batch_size: int = 8, channels: int = 1) -> Batch:
    """Memory for images of 12×12 with one channel, or of 16×16 with three."""
    side, rows = {1: 12, 3: 16}[channels], batches * batch_size
    images = torch.full((rows, side, side, channels), torch.nan).permute(0, 3, 1, 2)
    return Batch(images, torch.zeros(rows, dtype=torch.int64), rows, batches)


@pytest.mark.parametrize("train", [True, False])
def test_batches_come_into_given_memory(build: Build, train: bool) -> None:
    if build.func.__module__ == baseline.__name__:  # type: ignore[attr-defined]
        pytest.skip("the baseline gives each batch memory of its own")
    into = place(1, channels=1 if build.func is dali.array_loader else 3)  # type: ignore[attr-defined]
    (apart,) = epochs(build(train=train), 1)
    loader = build(train=train, into=into)
    for got, expected in zip(loader.epoch(), apart, strict=True):
        assert (got.images.data_ptr(), got.labels.data_ptr()) == (into.images.data_ptr(), into.labels.data_ptr())
        assert same([got], [expected])
    loader.close()


@pytest.mark.parametrize(
    ("at_once", "super_batch"), [(2, 16), (2, 17), (2, 1_000), (3, 24), (3, 1), (5, 40), (5, 100), (3, 0)]
)
def test_several_batches_come_at_once(at_once: int, super_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows as one by one, in the same order; the fewer at the end of an epoch in the first rows.

    A super-batch of 0 images stands for a set that stays on the device.
    """
    images = np.random.default_rng(0).integers(0, 256, (N, 12, 12, 1), np.uint8)
    loader = partial(
        dali.array_loader,
        images,
        np.arange(N),
        preprocess=ARRAY,
        batch_size=8,
        train=True,
        seed=3,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    apart = epochs(loader(), 2)
    monkeypatch.setattr(dali, "RESIDENT_BYTES", images.nbytes - (super_batch > 0))
    monkeypatch.setattr(dali, "SUPER_BATCH_IMAGES", super_batch or 1_000)
    into = place(at_once)
    together = loader(into=into)
    assert (together.batches_per_epoch, together.batches_at_once) == (5, at_once)
    for epoch in apart:
        done = 0
        for got in together.epoch():
            assert (got.batches, got.valid) == (min(at_once, 5 - done), 8 * got.batches)
            assert got.images.data_ptr() == into.images.data_ptr()
            expected = epoch[done : done + got.batches]
            assert torch.equal(got.images, torch.cat([batch.images for batch in expected]))
            assert torch.equal(got.labels, torch.cat([batch.labels for batch in expected]))
            done += got.batches
        assert done == 5
    together.close()


def test_a_replay_takes_many_batches_but_neither_a_super_batch_nor_a_quarter_of_an_epoch() -> None:
    small = np.broadcast_to(np.uint8(0), (60_000, 28, 28, 1))
    assert dali.batches_at_once(small, 32) == 32  # 1,875 batches in 59 parts
    assert dali.batches_at_once(small, 1_024) == 12  # 58 in 5: a quarter of them would be 14
    assert dali.batches_at_once(small, 2_048) == 6  # 29 in 5, of which two super-batches have 8 each
    assert dali.batches_at_once(small, 1_024, Share(0, 2)) == 6  # of two ranks' 29 in 5
    assert dali.batches_at_once(small, 1_024, Share(0, 8, 8)) == 12  # of as many epochs at once as of one rank
    assert dali.batches_at_once(small, 20_000) == 1
    faces = np.broadcast_to(np.uint8(0), (200_000, 64, 64, 3))
    assert dali.batches_at_once(faces, 512) == 10  # 390 in 39; 5,461 images of 12 KiB are 64 MiB


def threads(at_most: int = 0) -> int:
    """Threads of this process; waits for the kernel to clear away those that have just ended."""
    deadline = time.monotonic() + 5
    while (count := len(os.listdir("/proc/self/task"))) > at_most > 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    return count


def test_closing_ends_threads_and_processes(build: Build) -> None:
    next(build(train=True).epoch())  # what a first use leaves for ever, torch's thread pool say, is there now
    before = threads()
    loader = build(train=True)
    next(loader.epoch())
    loader.close()
    loader.close()
    assert threads(at_most=before) <= before
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.epoch())


def test_a_forgotten_loader_leaves_nothing_behind(build: Build) -> None:
    next(build(train=True).epoch())
    before = threads()
    for _ in range(3):
        next(build(train=True).epoch())
    assert threads(at_most=before) <= before


def test_a_set_smaller_than_a_batch_cannot_train(build: Build) -> None:
    with pytest.raises(UserError, match="42 images do not fill one batch of 43"):
        build(train=True, batch_size=43)
    ((batch,),) = epochs(build(train=False, batch_size=43), 1)
    assert batch.valid == N


def test_recipes_that_do_not_fit_are_refused(build: Build) -> None:
    preprocess = build.keywords["preprocess"]  # type: ignore[attr-defined]
    other = {"shear_deg": 5.0} if preprocess is ARRAY else {"crop_padding": 2}
    for wrong in (replace(preprocess, **other), replace(preprocess, mean=(0.5, 0.5), std=(1.0, 1.0))):
        with pytest.raises(ValueError, match="Preprocess"):
            build(train=True, preprocess=wrong)
    with pytest.raises(ValueError, match="labels of shape"):
        build(train=True, labels=np.arange(3))


@pytest.mark.parametrize("module", [dali, baseline])
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_pixels_of_a_real_set_are_the_stored_ones_normalised(data_root: Path, module, name: str) -> None:
    images = np.load(data_root / name / "test.images.npy", mmap_mode="r")[:300]
    labels = np.load(data_root / name / "test.labels.npy")[:300]
    channels = images.shape[3]
    mean, std = (0.49, 0.48, 0.45)[:channels], (0.25, 0.24, 0.26)[:channels]
    workers = {"workers": 0} if module is baseline else {}
    loader = module.array_loader(
        images,
        labels,
        preprocess=Preprocess(mean=mean, std=std, crop_padding=4, flip=True),
        batch_size=128,
        train=False,
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        **workers,
    )
    (batches,) = epochs(loader, 1)
    got = np.concatenate([batch.images[: batch.valid].numpy() for batch in batches])
    expected = (images / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(got, expected.transpose(0, 3, 1, 2), atol=1e-6)
    assert np.concatenate([batch.labels[: batch.valid] for batch in batches]).tolist() == labels.tolist()


def test_both_loaders_show_the_same_flowers(data_root: Path) -> None:
    files = sorted((data_root / "flowers" / "test").glob("*/*.jpg"))[::8]
    arguments = {
        "preprocess": Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3, image_size=112, shear_deg=10, zoom=0.2, flip=True),
        "batch_size": len(files),
        "train": False,
        "seed": 0,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    ((by_dali,),) = epochs(dali.jpeg_loader(files, None, **arguments), 1)
    ((by_pillow,),) = epochs(baseline.jpeg_loader(files, None, workers=0, **arguments), 1)
    difference = (by_dali.images - by_pillow.images).abs().mean().item()
    assert difference < 0.5 / 255
    shuffled = (by_dali.images.roll(1, 0) - by_pillow.images).abs().mean().item()
    assert shuffled > 10 / 255  # that bound tells images apart
