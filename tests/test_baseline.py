"""The baseline beyond the common rules of test_loader.py: workers, random state, augmentation, broken files."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from netdyno.bench.data import baseline
from netdyno.bench.data.loader import Loader
from netdyno.bench.errors import UserError
from netdyno.bench.workloads import Preprocess

MOVED = Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop_padding=2, flip=True)
WARPED = Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), image_size=16, shear_deg=10, zoom=0.2, flip=True)


def arrays(images: np.ndarray, workers: int) -> Loader:
    return baseline.array_loader(
        images,
        np.arange(len(images)),
        preprocess=MOVED,
        batch_size=4,
        train=True,
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        workers=workers,
    )


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)


def test_worker_processes_reproduce_their_epochs_and_end(noise: np.ndarray) -> None:
    runs = []
    for _ in range(2):
        loader = arrays(noise, workers=2)
        runs.append([batch for _ in range(2) for batch in loader.epoch()])
        assert len(multiprocessing.active_children()) == 2  # kept from epoch to epoch
        loader.close()
        assert not multiprocessing.active_children()
    first, again = runs
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert not torch.equal(torch.cat([b.labels for b in first[:12]]), torch.cat([b.labels for b in first[12:]]))


def test_the_random_state_of_training_is_left_alone(noise: np.ndarray) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    loader = arrays(noise, workers=0)
    drawn = []
    for batch in loader.epoch():
        drawn.append(torch.rand(1))  # as dropout does between batches
        del batch
    assert torch.equal(torch.cat(drawn[:3]), expected)


def test_crops_and_flips_are_those_of_the_padded_image(noise: np.ndarray) -> None:
    padded = np.pad(noise, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    moves = set()
    for batch in arrays(noise, workers=0).epoch():
        for image, label in zip(batch.images.permute(0, 2, 3, 1).mul(255).round().byte(), batch.labels, strict=True):
            matches = [
                (y, x, flip)
                for y in range(5)
                for x in range(5)
                for flip in (1, -1)
                if np.array_equal(image.numpy(), padded[label, y : y + 8, x : x + 8][:, ::flip])
            ]
            assert len(matches) == 1
            moves.add(matches[0])
    assert len(moves) > 20


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_jpeg_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    files = [tmp_path / f"{i}.jpg" for i in range(6)]
    for file in files:
        Image.effect_noise((40, 40), 50).convert("RGB").save(file)
    files[4].write_bytes(files[4].read_bytes()[:900])
    loader = baseline.jpeg_loader(
        files,
        None,
        preprocess=WARPED,
        batch_size=2,
        train=True,
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        workers=workers,
    )
    with pytest.raises(UserError, match=r"4\.jpg cannot be decoded") as caught:
        list(loader.epoch())
    assert "\n" not in str(caught.value)
    loader.close()
