"""Batch norm in training with its activation, after 2×2 max pooling or nothing: two passes forward and two back.

Each pass reads and writes what it must and no more. Forward: the sums of each channel, in the same pass as the pooling;
then normalised and activated values. Backward: the sums that batch norm's gradient needs; then the gradient, spread
over the windows where there was pooling. What is computed again instead of stored are the normalised values.

Sums are of values and of their squares, in fp32: for activations, whose mean is not large against their spread.

Shapes: images [B, C, H, W], channels last, C a multiple of CHANNELS; pooled [B, C, H/2, W/2], rounded down: an odd last
row or column belongs to no window. Bytes moved in a 16-bit type, for each element of images, forward and back: 6 and 10
without pooling, with it 2 + ¼ · 7 and 2 + ¼ · 9.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 64  # of a program's block
# By pass, pixels of a program's block and its warps, as an H200 likes them.
BLOCKS = {"sums": (32, 8), "activated": (32, 4), "gradient_sums": (64, 4), "gradient": (32, 8)}
PROGRAMS = 528  # of the sums, about: four on each multiprocessor of an H200


def batch_norm_reference(
    images: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float | None, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """In plain PyTorch: the activated values, of the images' type, and each channel's mean and variance, [C].

    Those two are of the type of `weight` and `bias`, fp32 or fp64 [C], and not differentiable. slope: of leaky ReLU
    below zero; None: SiLU. pool: pooled 2×2 before all of it.
    """
    pooled = F.max_pool2d(images, 2) if pool else images
    variance, mean = torch.var_mean(pooled.detach().to(weight.dtype), (0, 2, 3), correction=0)
    normed = F.batch_norm(pooled, None, None, weight, bias, training=True, eps=eps)
    return F.silu(normed) if slope is None else F.leaky_relu(normed, slope), mean, variance


def takes(channels: int) -> bool:
    """Whether the kernels are for so many channels."""
    return channels % CHANNELS == 0


@triton.jit
def _corner(window, IN_HEIGHT: tl.constexpr, IN_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Of windows numbered over [B, HEIGHT, WIDTH]: row, column and the number of the first pixel in the images."""
    x = window % WIDTH
    y = window // WIDTH % HEIGHT
    n = window // (WIDTH * HEIGHT)
    return y, x, (n * IN_HEIGHT + 2 * y) * IN_WIDTH + 2 * x


@triton.jit
def sums_kernel(
    images,
    pooled,
    place,
    partial,
    pixels,
    C: tl.constexpr,
    IN_HEIGHT: tl.constexpr,
    IN_WIDTH: tl.constexpr,
    POOL: tl.constexpr,
    TURNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Programs: parts of the pixels × blocks of channels. partial: fp32 [parts, 2, C], values' and squares' sums.

    With POOL also pooled and place [pixels, C], the pixel of each window that is the largest; what is no number counts
    as larger. pixels: those that are normalised. The parts are summed up later, in one order.
    """
    part = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    squares = tl.zeros([ROWS, CHANNELS], tl.float32)
    for turn in range(TURNS):
        pixel = (turn * tl.num_programs(0) + part) * ROWS + tl.arange(0, ROWS)
        there = (pixel < pixels)[:, None]
        at = pixel.to(tl.int64)[:, None] * C + c[None, :]
        if POOL:
            _, _, corner = _corner(pixel, IN_HEIGHT, IN_WIDTH, IN_HEIGHT // 2, IN_WIDTH // 2)
            first = images + corner.to(tl.int64)[:, None] * C + c[None, :]
            values = tl.load(first, mask=there, other=0.0).to(tl.float32)
            largest = tl.zeros([ROWS, CHANNELS], tl.uint8)
            for number in tl.static_range(1, 4):
                next_one = first + (number // 2 * IN_WIDTH + number % 2) * C
                other = tl.load(next_one, mask=there, other=0.0).to(tl.float32)
                larger = (other > values) | (other != other)
                values = tl.where(larger, other, values)
                largest = tl.where(larger, number, largest).to(tl.uint8)
            tl.store(pooled + at, values.to(pooled.dtype.element_ty), mask=there)
            tl.store(place + at, largest, mask=there)
        else:
            values = tl.load(images + at, mask=there, other=0.0).to(tl.float32)
        total += values
        squares += values * values
    at = partial + part * 2 * C + c
    tl.store(at, tl.sum(total, 0))
    tl.store(at + C, tl.sum(squares, 0))


@triton.jit
def activated_kernel(
    pooled,
    scale,
    shift,
    out,
    pixels,
    C: tl.constexpr,
    SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Programs: blocks of pixels × blocks of channels. out [pixels, C]: activation of pooled · scale + shift."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = pixel.to(tl.int64)[:, None] * C + c[None, :]
    there = (pixel < pixels)[:, None]
    values = tl.load(pooled + at, mask=there, other=0.0).to(tl.float32)
    normed = values * tl.load(scale + c)[None, :] + tl.load(shift + c)[None, :]
    active = normed * tl.sigmoid(normed) if SLOPE is None else tl.where(normed > 0, normed, SLOPE * normed)
    tl.store(out + at, active.to(out.dtype.element_ty), mask=there)


@triton.jit
def _back(gradient, values, scale, shift, SLOPE: tl.constexpr):
    """The gradient of normalised values from that of activated ones."""
    normed = values * scale[None, :] + shift[None, :]
    if SLOPE is None:
        share = tl.sigmoid(normed)
        steepness = share + normed * share * (1 - share)
    else:
        steepness = tl.where(normed > 0, 1.0, SLOPE)
    return gradient * steepness


@triton.jit
def gradient_sums_kernel(
    gradient,
    pooled,
    scale,
    shift,
    partial,
    pixels,
    C: tl.constexpr,
    SLOPE: tl.constexpr,
    TURNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Programs and partial as in `sums_kernel`: sums of normalised values' gradients, and of those times values."""
    part = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    by, plus = tl.load(scale + c), tl.load(shift + c)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    products = tl.zeros([ROWS, CHANNELS], tl.float32)
    for turn in range(TURNS):
        pixel = (turn * tl.num_programs(0) + part) * ROWS + tl.arange(0, ROWS)
        at = pixel.to(tl.int64)[:, None] * C + c[None, :]
        there = (pixel < pixels)[:, None]
        values = tl.load(pooled + at, mask=there, other=0.0).to(tl.float32)
        coming = tl.load(gradient + at, mask=there, other=0.0).to(tl.float32)
        back = _back(coming, values, by, plus, SLOPE)
        total += back
        products += back * values
    at = partial + part * 2 * C + c
    tl.store(at, tl.sum(total, 0))
    tl.store(at + C, tl.sum(products, 0))


@triton.jit
def gradient_kernel(
    gradient,
    pooled,
    place,
    scale,
    shift,
    factors,
    out,
    windows,
    C: tl.constexpr,
    IN_HEIGHT: tl.constexpr,
    IN_WIDTH: tl.constexpr,
    POOL: tl.constexpr,
    SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Programs: blocks of windows × blocks of channels. out: the gradient of the images.

    factors: fp32 [3, C], by which it is made of normalised values' gradient, of the values and of one. With POOL the
    windows are numbered over [B, H/2, W/2], rounded up; those at the border that no pixel of `pooled` is of get zeros.
    """
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    window = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    by, plus = tl.load(scale + c), tl.load(shift + c)
    of_back, of_value, of_one = tl.load(factors + c), tl.load(factors + C + c), tl.load(factors + 2 * C + c)
    there = window < windows
    if POOL:
        HEIGHT: tl.constexpr = IN_HEIGHT // 2
        WIDTH: tl.constexpr = IN_WIDTH // 2
        y, x, corner = _corner(window, IN_HEIGHT, IN_WIDTH, (IN_HEIGHT + 1) // 2, (IN_WIDTH + 1) // 2)
        whole = (there & (y < HEIGHT) & (x < WIDTH))[:, None]
        pixel = (window // (((IN_HEIGHT + 1) // 2) * ((IN_WIDTH + 1) // 2)) * HEIGHT + y) * WIDTH + x
    else:
        whole = there[:, None]
        pixel = window
    at = pixel.to(tl.int64)[:, None] * C + c[None, :]
    values = tl.load(pooled + at, mask=whole, other=0.0).to(tl.float32)
    coming = tl.load(gradient + at, mask=whole, other=0.0).to(tl.float32)
    back = _back(coming, values, by, plus, SLOPE)
    result = back * of_back[None, :] + values * of_value[None, :] + of_one[None, :]
    result = result.to(out.dtype.element_ty)
    if POOL:
        largest = tl.where(whole, tl.load(place + at, mask=whole, other=0), 4)
        first = out + corner.to(tl.int64)[:, None] * C + c[None, :]
        for number in tl.static_range(4):
            inside = there & (2 * y + number // 2 < IN_HEIGHT) & (2 * x + number % 2 < IN_WIDTH)
            chosen = tl.where(largest == number, result, 0.0).to(out.dtype.element_ty)
            tl.store(first + (number // 2 * IN_WIDTH + number % 2) * C, chosen, mask=inside[:, None])
    else:
        tl.store(out + at, result, mask=whole)


Forward = tuple[Tensor, Tensor, Tensor]  # pooled images, which of each window's pixels was the largest, sums by part


def sums_triton(images: Tensor, pool: bool) -> Forward:
    """The first pass forward. Without `pool`, the pooled images and the places are empty."""
    empty = _empty_forward(images, pool)
    shape = (empty[0] if pool else images).shape
    turns, parts = _turns_and_parts("sums", _pixels(shape), shape[1])
    with torch.cuda.device_of(images):
        sums_kernel[(parts, shape[1] // CHANNELS)](
            images, *empty, _pixels(shape), **_size(images.shape), POOL=pool, TURNS=turns, **_block("sums")
        )
    return empty


def activated_triton(pooled: Tensor, scale: Tensor, shift: Tensor, slope: float | None) -> Tensor:
    """The second pass forward. scale, shift: fp32 [C]."""
    out, pixels, channels = torch.empty_like(pooled), _pixels(pooled.shape), pooled.shape[1]
    with torch.cuda.device_of(pooled):
        activated_kernel[_programs("activated", pixels, channels)](
            pooled, scale, shift, out, pixels, C=channels, SLOPE=slope, **_block("activated")
        )
    return out


def gradient_sums_triton(gradient: Tensor, pooled: Tensor, scale: Tensor, shift: Tensor, slope: float | None) -> Tensor:
    """The first pass back: fp32 [parts, 2, C], the sums of normalised values' gradients and of those times `pooled`."""
    pixels, channels = _pixels(pooled.shape), pooled.shape[1]
    turns, parts = _turns_and_parts("gradient_sums", pixels, channels)
    partial = pooled.new_empty(parts, 2, channels, dtype=torch.float32)
    with torch.cuda.device_of(pooled):
        gradient_sums_kernel[(parts, channels // CHANNELS)](
            gradient,
            pooled,
            scale,
            shift,
            partial,
            pixels,
            C=channels,
            SLOPE=slope,
            TURNS=turns,
            **_block("gradient_sums"),
        )
    return partial


def gradient_triton(
    gradient: Tensor,
    pooled: Tensor,
    place: Tensor | None,
    height: int,
    width: int,
    scale: Tensor,
    shift: Tensor,
    factors: Tensor,
    slope: float | None,
) -> Tensor:
    """The second pass back: the gradient of the images, of `height` and `width`. place: None without pooling."""
    out = _empty_images(pooled, height, width)
    halves = 1 if place is None else 2
    windows = len(pooled) * -(-height // halves) * -(-width // halves)
    with torch.cuda.device_of(pooled):
        gradient_kernel[_programs("gradient", windows, pooled.shape[1])](
            gradient,
            pooled,
            place,
            scale,
            shift,
            factors,
            out,
            windows,
            **_size(out.shape),
            POOL=place is not None,
            SLOPE=slope,
            **_block("gradient"),
        )
    return out


def _size(shape: torch.Size) -> dict[str, int]:
    return {"C": shape[1], "IN_HEIGHT": shape[2], "IN_WIDTH": shape[3]}


def _block(kernel: str) -> dict[str, int]:
    rows, warps = BLOCKS[kernel]
    return {"ROWS": rows, "CHANNELS": CHANNELS, "num_warps": warps}


def _pixels(shape: torch.Size) -> int:
    return shape[0] * shape[2] * shape[3]


def _programs(kernel: str, pixels: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(pixels, BLOCKS[kernel][0]), channels // CHANNELS


def _turns_and_parts(kernel: str, pixels: int, channels: int) -> tuple[int, int]:
    """How many blocks of pixels each program sums up, and into how many parts the pixels are cut."""
    blocks, of_channels = _programs(kernel, pixels, channels)
    turns = triton.cdiv(blocks * of_channels, PROGRAMS)
    return turns, triton.cdiv(blocks, turns)


def _empty_images(like: Tensor, height: int, width: int) -> Tensor:
    return like.new_empty(len(like), height, width, like.shape[1]).permute(0, 3, 1, 2)


def _empty_forward(images: Tensor, pool: bool) -> Forward:
    b, c, height, width = images.shape
    pooled = _empty_images(images, height // 2, width // 2) if pool else images.new_empty(0)
    pixels = b * (height // 2) * (width // 2) if pool else b * height * width
    _, parts = _turns_and_parts("sums", pixels, c)
    place = torch.empty_like(pooled, dtype=torch.uint8)
    return pooled, place, images.new_empty(parts, 2, c, dtype=torch.float32)


@torch.library.custom_op("netdyno::batch_norm_sums", mutates_args=())
def _sums(images: Tensor, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    return sums_triton(images, pool)


@_sums.register_fake
def _(images: Tensor, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_forward(images, pool)


@torch.library.custom_op("netdyno::batch_norm_activated", mutates_args=())
def _activated(pooled: Tensor, scale: Tensor, shift: Tensor, slope: float | None) -> Tensor:
    return activated_triton(pooled, scale, shift, slope)


@_activated.register_fake
def _(pooled: Tensor, scale: Tensor, shift: Tensor, slope: float | None) -> Tensor:
    return torch.empty_like(pooled)


@torch.library.custom_op("netdyno::batch_norm_gradient_sums", mutates_args=())
def _gradient_sums(gradient: Tensor, pooled: Tensor, scale: Tensor, shift: Tensor, slope: float | None) -> Tensor:
    return gradient_sums_triton(gradient, pooled, scale, shift, slope)


@_gradient_sums.register_fake
def _(gradient: Tensor, pooled: Tensor, scale: Tensor, shift: Tensor, slope: float | None) -> Tensor:
    _, parts = _turns_and_parts("gradient_sums", _pixels(pooled.shape), pooled.shape[1])
    return pooled.new_empty(parts, 2, pooled.shape[1], dtype=torch.float32)


@torch.library.custom_op("netdyno::batch_norm_gradient", mutates_args=())
def _gradient(
    gradient: Tensor,
    pooled: Tensor,
    place: Tensor | None,
    height: int,
    width: int,
    scale: Tensor,
    shift: Tensor,
    factors: Tensor,
    slope: float | None,
) -> Tensor:
    return gradient_triton(gradient, pooled, place, height, width, scale, shift, factors, slope)


@_gradient.register_fake
def _(
    gradient: Tensor,
    pooled: Tensor,
    place: Tensor | None,
    height: int,
    width: int,
    scale: Tensor,
    shift: Tensor,
    factors: Tensor,
    slope: float | None,
) -> Tensor:
    return _empty_images(pooled, height, width)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, images: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float | None, pool: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        pooled, place, partial = _sums(images, pool)
        if not pool:
            pooled = images
        mean, mean_square = partial.sum(0) / _pixels(pooled.shape)
        variance = (mean_square - mean**2).clamp_min(0)
        scale = torch.rsqrt(variance + eps) * weight
        shift = bias - mean * scale
        ctx.save_for_backward(pooled, place if pool else None, mean, variance, scale, shift)
        ctx.eps, ctx.slope, ctx.size = eps, slope, images.shape[2:]
        return _activated(pooled, scale, shift, slope), mean, variance

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        pooled, place, mean, variance, scale, shift = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_bias, of_values = _gradient_sums(gradient, pooled, scale, shift, ctx.slope).sum(0)
        steep = torch.rsqrt(variance + ctx.eps)
        of_weight = steep * (of_values - mean * of_bias)  # the sum over normalised values' gradients times those
        pixels = _pixels(pooled.shape)
        of_value = -scale * steep * of_weight / pixels
        factors = torch.stack([scale, of_value, -scale * of_bias / pixels - mean * of_value])
        of_images = _gradient(gradient, pooled, place, *ctx.size, scale, shift, factors, ctx.slope)
        return of_images, of_weight, of_bias, None, None, None


def by_kernels(
    images: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float | None, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm` wherever Triton runs."""
    active, mean, variance = _BatchNorm.apply(images, weight, bias, eps, slope, pool)
    return active, mean.detach(), variance.detach()


def batch_norm(
    images: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float | None, pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm_reference` (see there), differentiable by images, weight and bias, also compiled.

    By Triton kernels on a GPU; else the reference. ValueError for channels that the kernels do not take (`takes`).
    """
    if not takes(images.shape[1]):
        raise ValueError(f"{images.shape[1]} channels are no multiple of {CHANNELS}")
    if not images.is_cuda:
        return batch_norm_reference(images, weight, bias, eps, slope, pool)
    return by_kernels(images.contiguous(memory_format=torch.channels_last), weight, bias, eps, slope, pool)
