"""Figures of merit: PSNR and SSIM of reconstructions, sliced Wasserstein distance of generated images."""

import torch
import torch.nn.functional as F

SSIM_BORDER = 5  # pixels from the centre of a window to its edge
PATCH = 7  # side of a descriptor, in pixels
PATCHES_PER_IMAGE = 128
DIRECTIONS = 512
DIRECTIONS_AT_ONCE = 128  # bounds the memory of one projection
SMALLEST_LEVEL = 16  # side of the coarsest pyramid level, in pixels


def psnr(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image, in dB: [B, C, H, W] in [0, 1], twice → [B].

    10 log₁₀(1 / mean squared error), the peak being 1; `images` are cut to [0, 1] first, as a saved picture would be.
    """
    error = (images.float().clamp(0, 1) - truth.float()).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp_min(1e-10))


def ssim(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image: [B, C, H, W] in [0, 1], at least 11 pixels wide, twice → [B].

    Wang et al. 2004: the mean over all Gaussian windows of 11×11 (σ 1.5) that lie inside the image, channel by channel;
    `images` are cut to [0, 1] first.
    """
    # here: of the six workloads one needs it, and its import takes 1.8 s on two cores
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, everywhere = structural_similarity_index_measure(
        images.float().clamp(0, 1),
        truth.float(),
        sigma=1.5,
        kernel_size=11,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    # torchmetrics also has windows that reach over the border, onto reflected pixels; the definition has not
    return everywhere[:, :, SSIM_BORDER:-SSIM_BORDER, SSIM_BORDER:-SSIM_BORDER].mean(dim=(1, 2, 3))


def _blur(images: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """Binomial 5×5 blur with reflected borders: [B, C, H, W] → [B, C, H, W]."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=images.device) / 16
    weight = (gain * torch.outer(row, row)).expand(images.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), weight, groups=images.shape[1])


def laplacian_pyramid(images: torch.Tensor) -> list[torch.Tensor]:
    """Band-pass levels of [B, C, H, W], finest first, down to 16 pixels; the coarsest keeps its low frequencies."""
    levels = []
    while images.shape[-1] > SMALLEST_LEVEL:
        smaller = _blur(images)[:, :, ::2, ::2]
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = smaller
        levels.append(images - _blur(spread, gain=4.0))
        images = smaller
    return [*levels, images]


def _descriptors(level: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random 7×7 patches, 128 an image, each channel of mean 0 and deviation 1: [B, C, H, W] → [128 B, 49 C]."""
    images, channels, height, width = level.shape
    count = images * PATCHES_PER_IMAGE
    offsets = torch.arange(PATCH, device=level.device)
    y = torch.randint(height - PATCH + 1, (count,), generator=generator).to(level.device)
    x = torch.randint(width - PATCH + 1, (count,), generator=generator).to(level.device)
    image = torch.arange(images, device=level.device).repeat_interleave(PATCHES_PER_IMAGE)
    rows = (y[:, None] + offsets)[:, :, None]
    columns = (x[:, None] + offsets)[:, None, :]
    patches = level[image[:, None, None], :, rows, columns]  # [128 B, 7, 7, C]
    patches = (patches - patches.mean(dim=(0, 1, 2))) / patches.std(dim=(0, 1, 2))
    return patches.reshape(count, PATCH * PATCH * channels)


def sliced_wasserstein(images: torch.Tensor, others: torch.Tensor, seed: int = 0) -> float:
    """Sliced Wasserstein distance × 10³ between two equally large sets [N, C, H, W] (Karras et al. 2018, § 5).

    7×7 patches of each level of a Laplacian pyramid, their channels normalised, projected on 512 random directions;
    the mean absolute difference of the sorted projections, averaged over the levels. Patch places and directions come
    from `seed`, so that two calls with one seed differ by their images alone. A lower value is better; two samples of
    one distribution do not reach 0.
    """
    if images.shape != others.shape:
        raise ValueError(f"the sets differ in shape: {tuple(images.shape)} and {tuple(others.shape)}")
    distances = []
    for number, (level, other) in enumerate(
        zip(laplacian_pyramid(images.float()), laplacian_pyramid(others.float()), strict=True)
    ):
        generator = torch.Generator().manual_seed(seed * 1_000 + number)
        one, two = _descriptors(level, generator), _descriptors(other, generator)
        for _ in range(DIRECTIONS // DIRECTIONS_AT_ONCE):
            directions = torch.randn(one.shape[1], DIRECTIONS_AT_ONCE, generator=generator).to(one.device)
            directions = directions / directions.norm(dim=0)
            difference = (one @ directions).sort(dim=0).values - (two @ directions).sort(dim=0).values
            distances.append(difference.abs().mean())
    return 1_000 * torch.stack(distances).mean().item()
