"""Batch norm in training with its activation, after 2×2 max pooling or nothing: two passes forward and two back.

Each pass reads and writes what it must and no more. Forward: the sums of each channel, in the same pass as the pooling;
then normalised and activated values. Backward: the sums that batch norm's gradient needs; then the gradient, spread
over the windows where there was pooling. What is computed again instead of stored are the normalised values.

Sums are of values and of their squares, in fp32: for activations, whose mean is not large against their spread.

What was written or read last is still in the cache: the first pass of each pair goes through the pixels from the end,
the second from the start.

A batch may be several of the same size, its groups, one behind the other: each is normalised by itself, and what else
is computed with it is computed at once.

Shapes: images [B, C, H, W], channels last, C a multiple of CHANNELS; pooled [B, C, H/2, W/2], rounded down: an odd last
row or column belongs to no window. Bytes moved in a 16-bit type, for each element of images, forward and back: 6 and 10
without pooling, with it 2 + ¼ · 7 and 2 + ¼ · 9.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 64  # of a program's block
# By pass, pixels of a program's block and its warps, as an H200 likes them.
BLOCKS = {
    "sums": (64, 2),
    "pooled_sums": (32, 8),
    "activated": (32, 4),
    "gradient_sums": (64, 4),
    "gradient": (16, 2),
}
PROGRAMS = 528  # of the sums, about: four on each multiprocessor of an H200


def batch_norm_reference(
    images: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float | None, pool: bool, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """In plain PyTorch: the activated values, of the images' type, and each channel's means and variances, [groups, C].

    Those two are of the type of `weight` and `bias`, fp32 or fp64 [C], and not differentiable. slope: of leaky ReLU
    below zero; None: SiLU. pool: pooled 2×2 before all of it.
    """
    parts = (F.max_pool2d(images, 2) if pool else images).chunk(groups)
    found = [torch.var_mean(part.detach().to(weight.dtype), (0, 2, 3), correction=0) for part in parts]
    variance, mean = (torch.stack(values) for values in zip(*found, strict=True))
    normed = torch.cat([F.batch_norm(part, None, None, weight, bias, training=True, eps=eps) for part in parts])
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
def _before(group, pixels, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OF_HEIGHT: tl.constexpr, OF_WIDTH: tl.constexpr):
    """Pixels of the groups before one, over [b, HEIGHT, WIDTH]; each has `pixels` over [b, OF_HEIGHT, OF_WIDTH]."""
    return group * (pixels // (OF_HEIGHT * OF_WIDTH)) * (HEIGHT * WIDTH)


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
    """Programs: parts of the pixels × blocks of channels × groups. partial: fp32 [parts, groups, 2, C], of values and
    squares.

    With POOL also pooled and place [pixels, C], the pixel of each window that is the largest; what is no number counts
    as larger. pixels: those of a group that are normalised. The parts are summed up later, in one order.
    """
    part = tl.program_id(0)
    group = tl.program_id(2).to(tl.int64)
    if POOL:
        images += _before(group, pixels, IN_HEIGHT, IN_WIDTH, IN_HEIGHT // 2, IN_WIDTH // 2) * C
        pooled, place = pooled + group * pixels * C, place + group * pixels * C
    else:
        images += group * pixels * C
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    squares = tl.zeros([ROWS, CHANNELS], tl.float32)
    for turn in range(TURNS):
        pixel = ((TURNS - 1 - turn) * tl.num_programs(0) + part) * ROWS + tl.arange(0, ROWS)
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
    at = partial + (part * tl.num_programs(2) + tl.program_id(2)) * 2 * C + c
    tl.store(at, tl.sum(total, 0))
    tl.store(at + C, tl.sum(squares, 0))


@triton.jit
def _place(C: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr):
    """Of a program of a second pass: the block of pixels, the group and the channels, which change first."""
    blocks: tl.constexpr = C // CHANNELS
    number = tl.program_id(0)
    c = number % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return number // (blocks * GROUPS), (number // blocks % GROUPS).to(tl.int64), c


@triton.jit
def activated_kernel(
    pooled,
    scale,
    shift,
    out,
    pixels,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Programs: blocks of pixels × groups × blocks of channels. out [pixels, C]: activation of pooled · scale + shift.

    scale, shift: fp32 [groups, C].
    """
    block, group, c = _place(C, CHANNELS, GROUPS)
    pooled, out = pooled + group * pixels * C, out + group * pixels * C
    scale, shift = scale + group * C, shift + group * C
    pixel = block * ROWS + tl.arange(0, ROWS)
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
    group = tl.program_id(2).to(tl.int64)
    gradient, pooled = gradient + group * pixels * C, pooled + group * pixels * C
    scale, shift = scale + group * C, shift + group * C
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    by, plus = tl.load(scale + c), tl.load(shift + c)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    products = tl.zeros([ROWS, CHANNELS], tl.float32)
    for turn in range(TURNS):
        pixel = ((TURNS - 1 - turn) * tl.num_programs(0) + part) * ROWS + tl.arange(0, ROWS)
        at = pixel.to(tl.int64)[:, None] * C + c[None, :]
        there = (pixel < pixels)[:, None]
        values = tl.load(pooled + at, mask=there, other=0.0).to(tl.float32)
        coming = tl.load(gradient + at, mask=there, other=0.0).to(tl.float32)
        back = _back(coming, values, by, plus, SLOPE)
        total += back
        products += back * values
    at = partial + (part * tl.num_programs(2) + tl.program_id(2)) * 2 * C + c
    tl.store(at, tl.sum(total, 0))
    tl.store(at + C, tl.sum(products, 0))


@triton.jit
def gradient_kernel(
    gradient,
    pooled,
    place,
    scale,
    shift,
    of_value,
    of_one,
    out,
    windows,
    C: tl.constexpr,
    IN_HEIGHT: tl.constexpr,
    IN_WIDTH: tl.constexpr,
    POOL: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Programs: blocks of windows × groups × blocks of channels. out: the gradient of the images.

    scale, of_value, of_one: fp32 [groups, C], by which it is made of normalised values' gradient, of the values and of
    one. With POOL a group's windows are numbered over [b, H/2, W/2], rounded up; those at the border that no pixel of
    `pooled` is of get zeros.
    """
    block, group, c = _place(C, CHANNELS, GROUPS)
    scale, shift = scale + group * C, shift + group * C
    of_value, of_one = of_value + group * C, of_one + group * C
    window = block * ROWS + tl.arange(0, ROWS)
    by, plus = tl.load(scale + c), tl.load(shift + c)
    for_value, for_one = tl.load(of_value + c), tl.load(of_one + c)
    there = window < windows
    if POOL:
        HEIGHT: tl.constexpr = IN_HEIGHT // 2
        WIDTH: tl.constexpr = IN_WIDTH // 2
        y, x, corner = _corner(window, IN_HEIGHT, IN_WIDTH, (IN_HEIGHT + 1) // 2, (IN_WIDTH + 1) // 2)
        whole = (there & (y < HEIGHT) & (x < WIDTH))[:, None]
        pixel = (window // (((IN_HEIGHT + 1) // 2) * ((IN_WIDTH + 1) // 2)) * HEIGHT + y) * WIDTH + x
        before = _before(group, windows, HEIGHT, WIDTH, (IN_HEIGHT + 1) // 2, (IN_WIDTH + 1) // 2) * C
        out += _before(group, windows, IN_HEIGHT, IN_WIDTH, (IN_HEIGHT + 1) // 2, (IN_WIDTH + 1) // 2) * C
        place += before
    else:
        whole = there[:, None]
        pixel = window
        before = group * windows * C
        out += before
    gradient, pooled = gradient + before, pooled + before
    at = pixel.to(tl.int64)[:, None] * C + c[None, :]
    values = tl.load(pooled + at, mask=whole, other=0.0).to(tl.float32)
    coming = tl.load(gradient + at, mask=whole, other=0.0).to(tl.float32)
    back = _back(coming, values, by, plus, SLOPE)
    result = back * by[None, :] + values * for_value[None, :] + for_one[None, :]
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


def sums_triton(images: Tensor, pool: bool, groups: int) -> Forward:
    """The first pass forward. Without `pool`, the pooled images and the places are empty."""
    empty = _empty_forward(images, pool, groups)
    shape = (empty[0] if pool else images).shape
    pixels = _pixels(shape, groups)
    kernel = "pooled_sums" if pool else "sums"
    turns, parts = _turns_and_parts(kernel, pixels, shape[1], groups)
    with torch.cuda.device_of(images):
        sums_kernel[(parts, shape[1] // CHANNELS, groups)](
            images, *empty, pixels, **_size(images.shape), POOL=pool, TURNS=turns, **_block(kernel)
        )
    return empty


def activated_triton(pooled: Tensor, scale: Tensor, shift: Tensor, slope: float | None) -> Tensor:
    """The second pass forward. scale, shift: fp32 [groups, C]."""
    groups, channels = scale.shape
    out, pixels = torch.empty_like(pooled), _pixels(pooled.shape, groups)
    with torch.cuda.device_of(pooled):
        activated_kernel[(groups * math.prod(_programs("activated", pixels, channels)),)](
            pooled, scale, shift, out, pixels, C=channels, GROUPS=groups, SLOPE=slope, **_block("activated")
        )
    return out


def gradient_sums_triton(gradient: Tensor, pooled: Tensor, scale: Tensor, shift: Tensor, slope: float | None) -> Tensor:
    """The first pass back: fp32 [parts, groups, 2, C], of normalised values' gradients and of those times `pooled`."""
    groups, channels = scale.shape
    pixels = _pixels(pooled.shape, groups)
    turns, _ = _turns_and_parts("gradient_sums", pixels, channels, groups)
    partial = _empty_partial("gradient_sums", pooled, groups)
    with torch.cuda.device_of(pooled):
        gradient_sums_kernel[(len(partial), channels // CHANNELS, groups)](
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
    of_value: Tensor,
    of_one: Tensor,
    slope: float | None,
) -> Tensor:
    """The second pass back: the gradient of the images, of `height` and `width`. place: None without pooling."""
    out = _empty_images(pooled, height, width)
    groups, channels = scale.shape
    halves = 1 if place is None else 2
    windows = len(pooled) // groups * -(-height // halves) * -(-width // halves)
    with torch.cuda.device_of(pooled):
        gradient_kernel[(groups * math.prod(_programs("gradient", windows, channels)),)](
            gradient,
            pooled,
            place,
            scale,
            shift,
            of_value,
            of_one,
            out,
            windows,
            **_size(out.shape),
            GROUPS=groups,
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


def _pixels(shape: torch.Size, groups: int) -> int:
    """Of a group."""
    return shape[0] // groups * shape[2] * shape[3]


def _programs(kernel: str, pixels: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(pixels, BLOCKS[kernel][0]), channels // CHANNELS


def _turns_and_parts(kernel: str, pixels: int, channels: int, groups: int) -> tuple[int, int]:
    """How many blocks of pixels each program sums up, and into how many parts a group's pixels are cut."""
    blocks, of_channels = _programs(kernel, pixels, channels)
    turns = triton.cdiv(blocks * of_channels * groups, PROGRAMS)
    return turns, triton.cdiv(blocks, turns)


def _empty_partial(kernel: str, values: Tensor, groups: int) -> Tensor:
    channels = values.shape[1]
    _, parts = _turns_and_parts(kernel, _pixels(values.shape, groups), channels, groups)
    return values.new_empty(parts, groups, 2, channels, dtype=torch.float32)


def _empty_images(like: Tensor, height: int, width: int) -> Tensor:
    return like.new_empty(len(like), height, width, like.shape[1]).permute(0, 3, 1, 2)


def _empty_forward(images: Tensor, pool: bool, groups: int) -> Forward:
    height, width = images.shape[2:]
    pooled = _empty_images(images, height // 2, width // 2) if pool else images.new_empty(0)
    place = torch.empty_like(pooled, dtype=torch.uint8)
    return pooled, place, _empty_partial(*("pooled_sums", pooled) if pool else ("sums", images), groups)


@torch.library.custom_op("netdyno::batch_norm_sums", mutates_args=())
def _sums(images: Tensor, pool: bool, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    return sums_triton(images, pool, groups)


@_sums.register_fake
def _(images: Tensor, pool: bool, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_forward(images, pool, groups)


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
    return _empty_partial("gradient_sums", pooled, len(scale))


@torch.library.custom_op("netdyno::batch_norm_gradient", mutates_args=())
def _gradient(
    gradient: Tensor,
    pooled: Tensor,
    place: Tensor | None,
    height: int,
    width: int,
    scale: Tensor,
    shift: Tensor,
    of_value: Tensor,
    of_one: Tensor,
    slope: float | None,
) -> Tensor:
    return gradient_triton(gradient, pooled, place, height, width, scale, shift, of_value, of_one, slope)


@_gradient.register_fake
def _(
    gradient: Tensor,
    pooled: Tensor,
    place: Tensor | None,
    height: int,
    width: int,
    scale: Tensor,
    shift: Tensor,
    of_value: Tensor,
    of_one: Tensor,
    slope: float | None,
) -> Tensor:
    return _empty_images(pooled, height, width)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, images: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float | None, pool: bool, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        pooled, place, partial = _sums(images, pool, groups)
        if not pool:
            pooled = images
        # Each sum by itself, not both at once: the compiler makes one kernel of them and of what comes of them.
        mean, mean_square = (partial[:, :, number].sum(0) / _pixels(pooled.shape, groups) for number in range(2))
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
        partial = _gradient_sums(gradient, pooled, scale, shift, ctx.slope)
        of_bias, of_values = partial[:, :, 0].sum(0), partial[:, :, 1].sum(0)
        steep = torch.rsqrt(variance + ctx.eps)
        of_weight = steep * (of_values - mean * of_bias)  # the sum over normalised values' gradients times those
        pixels = _pixels(pooled.shape, len(scale))
        of_value = -scale * steep * of_weight / pixels
        of_one = -scale * of_bias / pixels - mean * of_value
        of_images = _gradient(gradient, pooled, place, *ctx.size, scale, shift, of_value, of_one, ctx.slope)
        return of_images, of_weight.sum(0), of_bias.sum(0), None, None, None, None


def by_kernels(
    images: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float | None, pool: bool, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm` wherever Triton runs."""
    active, mean, variance = _BatchNorm.apply(images, weight, bias, eps, slope, pool, groups)
    return active, mean.detach(), variance.detach()


def batch_norm(
    images: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float | None, pool: bool, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm_reference` (see there), differentiable by images, weight and bias, also compiled.

    By Triton kernels on a GPU; else the reference. ValueError for channels that the kernels do not take (`takes`), and
    for images that are not as many in each group.
    """
    if not takes(images.shape[1]):
        raise ValueError(f"{images.shape[1]} channels are no multiple of {CHANNELS}")
    if len(images) % groups:
        raise ValueError(f"{len(images)} images cannot be cut into {groups} groups")
    if not images.is_cuda:
        return batch_norm_reference(images, weight, bias, eps, slope, pool, groups)
    return by_kernels(images.contiguous(memory_format=torch.channels_last), weight, bias, eps, slope, pool, groups)
