"""Figures of merit against formulas written out here, known cases and known inequalities."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from netdyno.bench.metrics import laplacian_pyramid, psnr, sliced_wasserstein, ssim


def smooth(count: int, seed: int, side: int = 32, channels: int = 3) -> torch.Tensor:
    """Images of soft blobs in [0, 1], all from one distribution: [count, channels, side, side]."""
    noise = torch.rand(count, channels, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1)


def noise_like(images: torch.Tensor, seed: int = 99) -> torch.Tensor:
    return torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))


# PSNR and SSIM


def test_psnr_by_hand() -> None:
    truth = torch.full((3, 3, 4, 4), 0.5)
    images = truth.clone()
    images[0] += 0.1  # mean squared error 0.01
    images[1, :, :2] += 0.01  # half of the pixels: 0.00005
    images[2, 0] -= 0.3  # one channel of three: 0.03
    expected = [20.0, 10 * math.log10(1 / 0.00005), 10 * math.log10(1 / 0.03)]
    assert psnr(images, truth).tolist() == pytest.approx(expected, abs=1e-3)


def test_psnr_cuts_to_the_range_of_a_picture() -> None:
    truth = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    images = truth + torch.tensor([-5.0, 0.3]).view(2, 1, 1, 1)
    assert psnr(images, truth).tolist() == pytest.approx([100.0, 100.0])  # no error: the upper end
    assert psnr(images.flip(0), truth).tolist() == pytest.approx([0.0, 0.0])


def test_psnr_of_low_precision_is_computed_in_float32() -> None:
    truth = torch.full((1, 3, 32, 32), 0.5)
    assert psnr((truth + 0.125).bfloat16(), truth.bfloat16()).item() == pytest.approx(-20 * math.log10(0.125), abs=1e-3)


def ssim_by_hand(one: np.ndarray, two: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, of two channels [H, W] in [0, 1], over the windows inside the image."""
    at = np.arange(11) - 5
    row = np.exp(-(at**2) / (2 * 1.5**2))
    window = np.outer(row, row) / row.sum() ** 2
    a, b = (np.lib.stride_tricks.sliding_window_view(x, (11, 11)) for x in (one, two))

    def weighted(values: np.ndarray) -> np.ndarray:
        return (window * values).sum(axis=(2, 3))

    mean_a, mean_b = weighted(a), weighted(b)
    from_a, from_b = a - mean_a[..., None, None], b - mean_b[..., None, None]
    structure = (2 * weighted(from_a * from_b) + 0.03**2) / (weighted(from_a**2) + weighted(from_b**2) + 0.03**2)
    return float((structure * (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)).mean())


def test_ssim_by_hand() -> None:
    truth = smooth(3, seed=0, side=16)
    images = (truth + 0.2 * (noise_like(truth) - 0.5) * torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1, 1)).clamp(0, 1)
    expected = [
        np.mean([ssim_by_hand(a, b) for a, b in zip(one, two, strict=True)])
        for one, two in zip(images.double().numpy(), truth.double().numpy(), strict=True)
    ]
    assert expected == sorted(expected, reverse=True)
    assert ssim(images, truth).tolist() == pytest.approx(expected, abs=1e-3)


def test_ssim_of_equal_images_is_one() -> None:
    images = smooth(3, seed=0)
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 3, abs=1e-5)


def test_ssim_cuts_to_the_range_of_a_picture() -> None:
    truth = smooth(2, seed=0)
    beyond = truth.where(truth < 1, truth + 1)
    beyond[:, :, 0, 0] = 3.0
    assert torch.allclose(ssim(beyond, truth), ssim(beyond.clamp(0, 1), truth))


# Laplacian pyramid


def spread(images: np.ndarray) -> np.ndarray:
    """Twice the size by zeros between the pixels and the 5×5 binomial filter, of gain 4, at reflected borders."""
    *first, height, width = images.shape
    wide = np.zeros((*first, 2 * height, 2 * width))
    wide[..., ::2, ::2] = images
    padded = np.pad(wide, [(0, 0)] * len(first) + [(2, 2), (2, 2)], mode="reflect")
    row = np.array([1, 4, 6, 4, 1]) / 8
    rows = sum(weight * padded[..., k : k + 2 * height, :] for k, weight in enumerate(row))
    return sum(weight * rows[..., k : k + 2 * width] for k, weight in enumerate(row))


@pytest.mark.parametrize(("side", "sides"), [(64, [64, 32, 16]), (32, [32, 16]), (16, [16])])
def test_pyramid_holds_the_whole_image(side: int, sides: list[int]) -> None:
    images = noise_like(torch.empty(2, 3, side, side))
    levels = laplacian_pyramid(images)
    assert [level.shape for level in levels] == [(2, 3, size, size) for size in sides]
    rebuilt = levels[-1].double().numpy()
    for level in levels[-2::-1]:
        rebuilt = spread(rebuilt) + level.double().numpy()
    assert np.allclose(rebuilt, images.numpy(), atol=1e-5)


def test_pyramid_levels_are_bands() -> None:
    flat = laplacian_pyramid(torch.full((1, 1, 64, 64), 0.7))
    assert torch.allclose(flat[-1], torch.full((1, 1, 16, 16), 0.7))
    assert all(torch.allclose(level, torch.zeros(()), atol=1e-6) for level in flat[:-1])

    chessboard = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float()[None, None]
    fine = laplacian_pyramid(chessboard)  # the finest pattern there is: all of it in the first level
    assert torch.allclose(fine[0], chessboard - 0.5, atol=1e-5)
    assert torch.allclose(fine[1], torch.zeros(()), atol=1e-5)
    assert torch.allclose(fine[2], torch.full((), 0.5), atol=1e-5)


# Sliced Wasserstein distance


def test_swd_has_its_size_by_theory() -> None:
    """White noise against flat images of random brightness: the Wasserstein distance of two normal distributions.

    A unit direction in 49 dimensions sees white noise as N(0, 1), and flat patches, whose 49 values are one N(0, 1),
    as N(0, s²), s the sum of its components. Between the two lies |1 - |s|| · √(2/π), s itself being nearly N(0, 1).
    """
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(100, 1, 16, 16, generator=generator)
    flat = torch.randn(100, 1, 1, 1, generator=generator).expand(100, 1, 16, 16)
    within_one = 0.6827 - 2 * (0.39894 - 0.24197)  # E[max(0, 1 - |s|)]
    expected = math.sqrt(2 / math.pi) * (math.sqrt(2 / math.pi) - 1 + 2 * within_one)
    assert sliced_wasserstein(white, flat) == pytest.approx(1_000 * expected, rel=0.1)


def test_swd_ranks_itself_before_real_before_noise() -> None:
    """A set is not at 0 from itself, since both sides draw patches of their own."""
    real, others = smooth(16, seed=0), smooth(16, seed=1)
    itself, between, noise = (sliced_wasserstein(images, real) for images in (real, others, noise_like(real)))
    assert 0 < 1.5 * itself < between < noise / 1.5


@pytest.mark.parametrize("damage", ["noise", "blur"])
def test_swd_grows_with_damage(damage: str) -> None:
    real = 0.1 * noise_like(torch.empty(16, 3, 32, 32), 5) + 0.9 * smooth(16, seed=0)
    others = 0.1 * noise_like(torch.empty(16, 3, 32, 32), 6) + 0.9 * smooth(16, seed=1)

    def damaged(amount: float) -> torch.Tensor:
        worse = noise_like(others, 7) if damage == "noise" else F.avg_pool2d(others, 5, 1, 2)
        return (1 - amount) * others + amount * worse

    distances = [sliced_wasserstein(damaged(amount), real) for amount in (0.0, 0.25, 0.5, 1.0)]
    assert distances == sorted(distances)
    assert distances[-1] > 1.4 * distances[0]


def test_swd_is_nearly_symmetric_and_blind_to_order() -> None:
    real, noise = smooth(16, seed=0), noise_like(torch.empty(16, 3, 32, 32))
    distance = sliced_wasserstein(noise, real)
    assert sliced_wasserstein(real, noise) == pytest.approx(distance, rel=0.05)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(noise[order], real) == pytest.approx(distance, rel=0.02)
    assert sliced_wasserstein(noise, real[order]) == pytest.approx(distance, rel=0.05)


def test_swd_normalises_each_channel() -> None:
    real, noise = smooth(16, seed=0), noise_like(torch.empty(16, 3, 32, 32))
    moved = noise * torch.tensor([0.5, 2.0, 10.0]).view(3, 1, 1) + torch.tensor([0.0, 1.0, -3.0]).view(3, 1, 1)
    assert sliced_wasserstein(moved, real) == pytest.approx(sliced_wasserstein(noise, real), rel=1e-3)


def test_swd_depends_on_its_seed_alone() -> None:
    real, others = smooth(16, seed=0), smooth(16, seed=1)
    torch.manual_seed(1)
    first = sliced_wasserstein(real, others)
    torch.manual_seed(2)
    assert sliced_wasserstein(real, others) == first
    assert sliced_wasserstein(real, others, seed=1) != first


def test_swd_sees_every_level() -> None:
    """A difference in the finest band and one in the coarsest each count."""
    real, others = smooth(16, seed=0), smooth(16, seed=1)
    base = sliced_wasserstein(others, real)
    chessboard = (torch.arange(32)[:, None] + torch.arange(32)).remainder(2).float() - 0.5
    stripes = torch.sin(torch.arange(32) / 32 * 4 * math.pi).expand(32, 32)
    assert sliced_wasserstein(others + 0.2 * chessboard, real) > 1.3 * base
    assert sliced_wasserstein(others + stripes, real) > 1.3 * base


def test_swd_of_unlike_shapes_is_an_error() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        sliced_wasserstein(torch.rand(4, 3, 32, 32), torch.rand(5, 3, 32, 32))


def test_swd_of_real_faces(data_root: Path) -> None:
    files = sorted((data_root / "anime_faces" / "train").glob("*.jpg"))[:128]
    faces = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 127.5 - 1 for file in files])
    half, other = faces[::2], faces[1::2]
    between = sliced_wasserstein(half, other)
    assert 1.3 * between < sliced_wasserstein(F.avg_pool2d(half, 3, 1, 1), other)
    assert 4 * between < sliced_wasserstein(2 * noise_like(half) - 1, other)
