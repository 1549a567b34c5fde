"""A 3×3 convolution with bias, ReLU and 2×2 max pooling in one kernel, and one each for its two gradients.

On its own, what the convolution gives is a network's largest tensor: written, read for pooling, and backward its
gradient, three quarters of it zeros, written and read twice. Here it exists in registers alone. Rows of the products
are windows, not pixels: the two pixels of a window's line look at 3×4 pixels of the images, four of which lie side by
side in memory, so that the weights, spread over four taps for either pixel, make both in three products.

Shapes: images [B, C, H, W], weight [O, C, 3, 3], pooled [B, O, HO/2, WO/2], rounded down, channels last. Beside it goes
a byte for each value: which pixel of the window was the largest, or that ReLU lets none through.
Bytes moved, in a 16-bit type, for each of B·HO·WO pixels: 2·C + ¾·O forward, 2·C + ¾·O for the gradient of the images
and as many for that of the weights.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .pooled_activation import pooled_activation

CHANNELS = (16, 32)  # of images and of outputs: with more of them cuDNN is as fast
WINDOWS = 64  # of a program, or of a turn of one: as measured on an H200, as are the next three
GRADIENT_WINDOWS = 32  # … of the weights' gradient
GRADIENT_STAGES = 2  # in which its turns are under way
GRADIENT_PARTS = 264  # of it, about: two on each multiprocessor
NONE = tl.constexpr(4)  # the place of the largest pixel of a window that ReLU does not let through


def pooled_conv_reference(images: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """The same in plain PyTorch. bias: [O]; padding: 0 or 1. Returns [B, O, HO/2, WO/2] of the images' type."""
    return F.max_pool2d(F.relu(F.conv2d(images, weight.to(images.dtype), bias.to(images.dtype), padding=padding)), 2)


def takes(weight: Tensor, padding: int) -> bool:
    """Whether the kernels are for such weights."""
    outputs, channels, *sides = weight.shape
    return sides == [3, 3] and padding in (0, 1) and outputs in CHANNELS and channels in CHANNELS


@triton.jit
def _split(window, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Image, row and column of windows, HEIGHT · WIDTH of which are an image's."""
    return (window // (HEIGHT * WIDTH)).to(tl.int64), window // WIDTH % HEIGHT, window % WIDTH


@triton.jit
def _line(images, n, y, x, there, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Four pixels side by side, from (y, x) of each image n on: [windows, 4 · CHANNELS]; zeros outside of the image."""
    k = tl.arange(0, 4 * CHANNELS)
    at = ((n * HEIGHT + y) * WIDTH + x) * CHANNELS
    column = x[:, None] + (k // CHANNELS)[None, :]
    inside = (there & (y >= 0) & (y < HEIGHT))[:, None] & (column >= 0) & (column < WIDTH)
    return tl.load(images + at[:, None] + k[None, :], mask=inside, other=0.0)


@triton.jit
def _matrix(factors, number: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One of the matrices that lie one behind the other in `factors`."""
    at = number * (ROWS * COLUMNS) + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(factors + at)


@triton.jit
def conv_kernel(
    images,
    factors,
    bias,
    pooled,
    place,
    windows,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    POOLED_HEIGHT: tl.constexpr,
    POOLED_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PADDING: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """Programs: WINDOWS of all windows. factors: [3, 4·C, O·2]. pooled, place: [B, HO/2, WO/2, O]."""
    window = tl.program_id(0) * WINDOWS + tl.arange(0, WINDOWS)
    there = window < windows
    n, wy, wx = _split(window, POOLED_HEIGHT, POOLED_WIDTH)
    above = tl.zeros([WINDOWS, OUTPUTS * 2], tl.float32)
    below = above
    for line in tl.static_range(4):
        y, x = 2 * wy + line - PADDING, 2 * wx - PADDING
        values = _line(images, n, y, x, there, HEIGHT, WIDTH, CHANNELS)
        if line < 3:
            above = tl.dot(values, _matrix(factors, line, 4 * CHANNELS, OUTPUTS * 2), above)
        if line > 0:
            below = tl.dot(values, _matrix(factors, line - 1, 4 * CHANNELS, OUTPUTS * 2), below)
    a, b = tl.split(tl.reshape(above, [WINDOWS, OUTPUTS, 2]))
    c, d = tl.split(tl.reshape(below, [WINDOWS, OUTPUTS, 2]))
    # the first of equals, and what is no number counts as larger, so that a run that diverges looks so
    larger = (b > a) | (b != b)
    largest, which = tl.where(larger, b, a), tl.where(larger, 1, 0)
    larger = (c > largest) | (c != c)
    largest, which = tl.where(larger, c, largest), tl.where(larger, 2, which)
    larger = (d > largest) | (d != d)
    largest, which = tl.where(larger, d, largest), tl.where(larger, 3, which)
    o = tl.arange(0, OUTPUTS)
    largest += tl.load(bias + o).to(tl.float32)[None, :]
    which = tl.where(largest <= 0, NONE, which)
    at = window.to(tl.int64)[:, None] * OUTPUTS + o[None, :]
    active = tl.maximum(largest, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(pooled + at, active.to(pooled.dtype.element_ty), mask=there[:, None])
    tl.store(place + at, which.to(tl.uint8), mask=there[:, None])


@triton.jit
def images_gradient_kernel(
    gradient,
    place,
    factors,
    out,
    windows,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    POOLED_HEIGHT: tl.constexpr,
    POOLED_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PADDING: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """Programs: WINDOWS of all windows of the images' pixels. factors: [3, 4·O, 2·C]. out: [B, H, W, C].

    A pixel of what the convolution gives has the gradient of its own window where it was the largest there.
    """
    window = tl.program_id(0) * WINDOWS + tl.arange(0, WINDOWS)
    there = window < windows
    n, wy, wx = _split(window, (HEIGHT + 1) // 2, (WIDTH + 1) // 2)
    above = tl.zeros([WINDOWS, 2 * CHANNELS], tl.float32)
    below = above
    k = tl.arange(0, 4 * OUTPUTS)
    pixel = k // OUTPUTS + PADDING
    vx = wx[:, None] + (pixel // 2 - 1)[None, :]
    for line in tl.static_range(4):
        vy = wy + ((PADDING + line) // 2 - 1)
        at = ((n * POOLED_HEIGHT + vy) * POOLED_WIDTH)[:, None] + vx
        inside = (there & (vy >= 0) & (vy < POOLED_HEIGHT))[:, None] & (vx >= 0) & (vx < POOLED_WIDTH)
        at = at * OUTPUTS + (k % OUTPUTS)[None, :]
        which = tl.load(place + at, mask=inside, other=NONE)
        whole = tl.load(gradient + at, mask=inside, other=0.0)
        here = (PADDING + line) % 2 * 2 + pixel % 2
        passed = tl.where(which == here[None, :], whole, 0.0).to(whole.dtype)
        if line < 3:
            above = tl.dot(passed, _matrix(factors, 2 - line, 4 * OUTPUTS, 2 * CHANNELS), above)
        if line > 0:
            below = tl.dot(passed, _matrix(factors, 3 - line, 4 * OUTPUTS, 2 * CHANNELS), below)
    k = tl.arange(0, 2 * CHANNELS)
    right = 2 * wx[:, None] + (k // CHANNELS)[None, :] < WIDTH
    at = ((n * HEIGHT + 2 * wy) * WIDTH + 2 * wx)[:, None] * CHANNELS + k[None, :]
    tl.store(out + at, above.to(out.dtype.element_ty), mask=there[:, None] & right)
    inside = (there & (2 * wy + 1 < HEIGHT))[:, None] & right
    tl.store(out + at + WIDTH * CHANNELS, below.to(out.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient_kernel(
    images,
    gradient,
    place,
    partial,
    windows,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    POOLED_HEIGHT: tl.constexpr,
    POOLED_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PADDING: tl.constexpr,
    WINDOWS: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Programs: parts of all windows, WINDOWS in each of TURNS. partial: fp32 [parts, 3, 4·C, 2·O], of the factors.

    The parts are summed up later in one order, so that the result is the same each time.
    """
    part = tl.program_id(0)
    t0 = tl.zeros([4 * CHANNELS, 2 * OUTPUTS], tl.float32)
    t1 = t0
    t2 = t0
    k = tl.arange(0, 2 * OUTPUTS)
    for turn in range(TURNS):
        window = (turn * tl.num_programs(0) + part) * WINDOWS + tl.arange(0, WINDOWS)
        there = window < windows
        n, wy, wx = _split(window, POOLED_HEIGHT, POOLED_WIDTH)
        at = window.to(tl.int64)[:, None] * OUTPUTS + (k % OUTPUTS)[None, :]
        which = tl.load(place + at, mask=there[:, None], other=NONE)
        whole = tl.load(gradient + at, mask=there[:, None], other=0.0)
        above = tl.where(which == (k // OUTPUTS)[None, :], whole, 0.0).to(whole.dtype)
        below = tl.where(which == (k // OUTPUTS + 2)[None, :], whole, 0.0).to(whole.dtype)
        for line in tl.static_range(4):
            y, x = 2 * wy + line - PADDING, 2 * wx - PADDING
            values = tl.trans(_line(images, n, y, x, there, HEIGHT, WIDTH, CHANNELS))
            if line == 0:
                t0 = tl.dot(values, above, t0)
            elif line == 1:
                t1 = tl.dot(values, above, t1)
                t0 = tl.dot(values, below, t0)
            elif line == 2:
                t2 = tl.dot(values, above, t2)
                t1 = tl.dot(values, below, t1)
            else:
                t2 = tl.dot(values, below, t2)
    size: tl.constexpr = 8 * CHANNELS * OUTPUTS
    at = partial + (part * 3).to(tl.int64) * size + tl.arange(0, 4 * CHANNELS)[:, None] * (2 * OUTPUTS) + k[None, :]
    tl.store(at, t0)
    tl.store(at + size, t1)
    tl.store(at + 2 * size, t2)


@torch.library.custom_op("netdyno::pooled_conv", mutates_args=())
def _conv(images: Tensor, factors: Tensor, bias: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """(pooled, place) by the kernel, summed up in fp32; factors: [3, 4·C, O·2]."""
    pooled, place = _empty_out(images, len(bias), padding)
    windows = pooled.numel() // len(bias)
    with torch.cuda.device_of(images):
        conv_kernel[(triton.cdiv(windows, WINDOWS),)](
            images, factors, bias, pooled, place, windows, **_constants(images, pooled, padding)
        )
    return pooled, place


@_conv.register_fake
def _(images: Tensor, factors: Tensor, bias: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    return _empty_out(images, len(bias), padding)


@torch.library.custom_op("netdyno::pooled_conv_images_gradient", mutates_args=())
def _images_gradient(gradient: Tensor, place: Tensor, factors: Tensor, images: Tensor, padding: int) -> Tensor:
    """That of `images` from that of what `_conv` gave; factors: [3, 4·O, 2·C]."""
    out = torch.empty_like(images)
    windows = len(images) * triton.cdiv(images.shape[2], 2) * triton.cdiv(images.shape[3], 2)
    with torch.cuda.device_of(images):
        images_gradient_kernel[(triton.cdiv(windows, WINDOWS),)](
            gradient, place, factors, out, windows, **_constants(images, gradient, padding)
        )
    return out


@_images_gradient.register_fake
def _(gradient: Tensor, place: Tensor, factors: Tensor, images: Tensor, padding: int) -> Tensor:
    return torch.empty_like(images)


@torch.library.custom_op("netdyno::pooled_conv_weight_gradient", mutates_args=())
def _weight_gradient(images: Tensor, gradient: Tensor, place: Tensor, padding: int) -> Tensor:
    """That of the factors in fp32, by part of the windows: [parts, 3, 4·C, 2·O]."""
    partial = _empty_partial(images, gradient)
    windows = gradient.numel() // gradient.shape[1]
    with torch.cuda.device_of(images):
        weight_gradient_kernel[(len(partial),)](
            images,
            gradient,
            place,
            partial,
            windows,
            **_constants(images, gradient, padding, GRADIENT_WINDOWS),
            TURNS=triton.cdiv(windows, GRADIENT_WINDOWS * len(partial)),
            num_stages=GRADIENT_STAGES,
        )
    return partial


@_weight_gradient.register_fake
def _(images: Tensor, gradient: Tensor, place: Tensor, padding: int) -> Tensor:
    return _empty_partial(images, gradient)


def _empty_out(images: Tensor, outputs: int, padding: int) -> tuple[Tensor, Tensor]:
    height, width = ((size + 2 * padding - 2) // 2 for size in images.shape[2:])
    pooled = images.new_empty(len(images), height, width, outputs)
    return pooled.permute(0, 3, 1, 2), torch.empty_like(pooled, dtype=torch.uint8).permute(0, 3, 1, 2)


def _empty_partial(images: Tensor, gradient: Tensor) -> Tensor:
    turns = triton.cdiv(gradient.numel() // gradient.shape[1], GRADIENT_WINDOWS)
    parts = triton.cdiv(turns, triton.cdiv(turns, GRADIENT_PARTS))
    return images.new_empty(parts, 3, 4 * images.shape[1], 2 * gradient.shape[1], dtype=torch.float32)


def _constants(images: Tensor, pooled: Tensor, padding: int, windows: int = WINDOWS) -> dict[str, int]:
    return {
        "HEIGHT": images.shape[2],
        "WIDTH": images.shape[3],
        "POOLED_HEIGHT": pooled.shape[2],
        "POOLED_WIDTH": pooled.shape[3],
        "CHANNELS": images.shape[1],
        "OUTPUTS": pooled.shape[1],
        "PADDING": padding,
        "WINDOWS": windows,
    }


def _for_either(taps: Tensor) -> Tensor:
    """[3, 3, …] → [2, 3, 4, …]: a line's three taps among four, for the left and for the right pixel of a window."""
    rest = (0, 0) * (taps.dim() - 2)
    return torch.stack([F.pad(taps, (*rest, 0, 1)), F.pad(taps, (*rest, 1, 0))])


class _PooledConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        factors = _for_either(weight.to(images.dtype).permute(2, 3, 1, 0)).permute(1, 2, 3, 4, 0)
        pooled, place = _conv(images, factors.reshape(3, 4 * images.shape[1], -1), bias, padding)
        ctx.save_for_backward(images, weight, bias, place)
        ctx.padding = padding
        return pooled

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, bias, place = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        outputs, channels = weight.shape[:2]
        of_images = None
        if ctx.needs_input_grad[0]:
            taps = weight.to(gradient.dtype).permute(2, 3, 0, 1).flip(1)
            factors = _for_either(taps).permute(1, 2, 3, 0, 4).reshape(3, 4 * outputs, -1)
            of_images = _images_gradient(gradient, place, factors, images, ctx.padding)
        partial = _weight_gradient(images, gradient, place, ctx.padding)
        either = partial.sum(0).view(3, 4, channels, 2, outputs)
        of_weight = (either[:, :3, :, 0] + either[:, 1:, :, 1]).permute(3, 2, 0, 1)
        of_bias = torch.where(place == NONE.value, 0.0, gradient).sum((0, 2, 3), dtype=torch.float32)
        return of_images, of_weight.to(weight.dtype), of_bias.to(bias.dtype), None


def pooled_conv(images: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """`pooled_conv_reference` (see there); differentiable, also compiled. The first of equal pixels gets the gradient.

    By Triton kernels for 16-bit images on GPUs from sm_80 on, else by PyTorch and `pooled_activation`. ValueError for
    weights that the kernels do not take (`takes`).
    """
    if not takes(weight, padding) or images.shape[1] != weight.shape[1]:
        raise ValueError(f"weights {tuple(weight.shape)}, padding {padding}, on images of {images.shape[1]} channels")
    if not images.is_cuda or images.itemsize != 2 or torch.cuda.get_device_capability(images.device) < (8, 0):
        return pooled_activation(F.conv2d(images, weight, None, padding=padding), bias, "relu")
    return _PooledConv.apply(images, weight, bias, padding)
