"""A network's first convolution with bias and activation in one kernel, and its weights' gradient in another.

The images have few channels and need no gradient, the output has many, so that its passes through memory are all that
counts: written once forward, and backward read once beside its own gradient. As a product over patches (see `patches`)
the patches are written and read too, bias and activation pass over the output once more, and over its gradient twice.
Here patches are put together in registers for the tensor cores, which Triton has from sm_80 on.

Shapes: images [B, C, H, W], outputs [B, O, HO, WO], channels last. A patch is a row of LENGTH values: those under one
pixel, tap by tap, then a one, whose gradient is the bias's, then zeros up to a power of two.
Bytes moved for each of B·HO·WO pixels, in a 16-bit type: 2·O forward, 4·O backward, and 2·C·stride² for the images.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import patches

PIXELS = 128  # of a program's block: one for each thread
PROGRAMS = 396  # of the weights' gradient, about: what an H100 holds at once, three on each multiprocessor
WIDEST = 128  # outputs
LONGEST = 64  # values of a patch
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "elu": F.elu, "silu": F.silu}


def conv_reference(images: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, activation: str) -> Tensor:
    """Convolution, bias and activation in plain PyTorch.

    images: [B, C, H, W]. weight: [O, C, K, K]. bias: [O]. Returns [B, O, HO, WO] of the images' type.
    """
    return ACTIVATIONS[activation](F.conv2d(images, weight.to(images.dtype), bias.to(images.dtype), stride, padding))


def takes(weight: Tensor) -> bool:
    """Whether the kernels are for such weights."""
    outputs, channels, side, other = weight.shape
    return side == other and _length(channels, side) <= LONGEST and 16 <= outputs <= WIDEST and outputs % 8 == 0


def _length(channels: int, side: int) -> int:
    return max(16, triton.next_power_of_2(side**2 * channels + 1))


@triton.jit
def _patches(
    images,
    pixel,
    pixels,
    images_n,
    images_c,
    images_y,
    images_x,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """The patches under `pixel`: [pixels, LENGTH]; zeros for pixels that are not there."""
    x = pixel % OUT_WIDTH
    y = pixel // OUT_WIDTH % OUT_HEIGHT
    n = (pixel // (OUT_WIDTH * OUT_HEIGHT)).to(tl.int64)
    k = tl.arange(0, LENGTH)
    tap = k // CHANNELS
    row = y[:, None] * STRIDE + (tap // SIDE)[None, :] - PADDING
    column = x[:, None] * STRIDE + (tap % SIDE)[None, :] - PADDING
    there = (pixel < pixels)[:, None] & (tap < SIDE * SIDE)[None, :]
    inside = there & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    corner = images + n * images_n
    at = corner[:, None] + row * images_y + column * images_x + (k % CHANNELS)[None, :] * images_c
    values = tl.load(at, mask=inside, other=0.0)
    one = (pixel < pixels)[:, None] & (k == SIDE * SIDE * CHANNELS)[None, :]
    return tl.where(one, 1.0, values).to(values.dtype)


@triton.jit
def conv_kernel(
    images,
    weight,
    bias,
    out,
    pixels,
    images_n,
    images_c,
    images_y,
    images_x,
    weight_o,
    weight_c,
    weight_y,
    weight_x,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs: blocks of pixels. out: [pixels, O]."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = _patches(
        images,
        pixel,
        pixels,
        images_n,
        images_c,
        images_y,
        images_x,
        HEIGHT,
        WIDTH,
        OUT_HEIGHT,
        OUT_WIDTH,
        CHANNELS,
        SIDE,
        STRIDE,
        PADDING,
        LENGTH,
    )
    o = tl.arange(0, WIDE)
    k = tl.arange(0, LENGTH)
    tap = k // CHANNELS
    at = weight + (k % CHANNELS * weight_c + tap // SIDE * weight_y + tap % SIDE * weight_x)[:, None]
    factors = tl.load(at + o[None, :] * weight_o, mask=(tap < SIDE * SIDE)[:, None] & (o < OUTPUTS)[None, :], other=0.0)
    total = (
        tl.dot(rows, factors.to(rows.dtype)) + tl.load(bias + o, mask=o < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    )
    if ACTIVATION == "relu":
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "elu":
        total = tl.where(total > 0, total, tl.exp(total) - 1)
    else:
        total = total * tl.sigmoid(total)
    place = pixel.to(tl.int64)[:, None] * OUTPUTS + o[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(pixel < pixels)[:, None] & (o < OUTPUTS)[None, :])


@triton.jit
def gradient_kernel(
    images,
    gradient,
    out,
    partial,
    pixels,
    images_n,
    images_c,
    images_y,
    images_x,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Programs: parts of the pixels, TURNS blocks each. gradient, out: [pixels, O]. partial: fp32 [parts, LENGTH, O].

    The parts are summed up later, in one order, so that the result is the same each time.
    """
    tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "elu", "only their slopes are told by their values")
    part = tl.program_id(0)
    o = tl.arange(0, WIDE)
    k = tl.arange(0, LENGTH)
    total = tl.zeros([LENGTH, WIDE], tl.float32)
    for turn in range(TURNS):
        pixel = (turn * tl.num_programs(0) + part) * BLOCK + tl.arange(0, BLOCK)
        rows = _patches(
            images,
            pixel,
            pixels,
            images_n,
            images_c,
            images_y,
            images_x,
            HEIGHT,
            WIDTH,
            OUT_HEIGHT,
            OUT_WIDTH,
            CHANNELS,
            SIDE,
            STRIDE,
            PADDING,
            LENGTH,
        )
        place = pixel.to(tl.int64)[:, None] * OUTPUTS + o[None, :]
        there = (pixel < pixels)[:, None] & (o < OUTPUTS)[None, :]
        slope = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32)
        height = tl.load(out + place, mask=there, other=0.0).to(tl.float32)
        # of ReLU: what is no number passes; of ELU: its slope below zero is its value and one
        slope = tl.where(height <= 0, 0.0 if ACTIVATION == "relu" else slope * (height + 1), slope)
        total = tl.dot(tl.trans(rows), slope.to(rows.dtype), total)
    at = partial + (part * LENGTH + k).to(tl.int64)[:, None] * OUTPUTS + o[None, :]
    tl.store(at, total, mask=(o < OUTPUTS)[None, :])


def conv_triton(images: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, activation: str) -> Tensor:
    """`conv_reference` by the kernel, summed up in fp32; channels last."""
    out = _empty_out(images, weight, stride, padding)
    pixels = len(images) * out.shape[2] * out.shape[3]
    with torch.cuda.device_of(images):
        conv_kernel[(triton.cdiv(pixels, PIXELS),)](
            images,
            weight,
            bias,
            out,
            pixels,
            *images.stride(),
            *weight.stride(),
            **_constants(images, out, weight.shape[2], stride, padding, activation),
        )
    return out


def gradient_triton(
    images: Tensor, gradient: Tensor, out: Tensor, side: int, stride: int, padding: int, activation: str
) -> Tensor:
    """The gradient of weights and bias in fp32, by part of the pixels: [parts, LENGTH, O]. activation: ReLU or ELU.

    gradient: of `out`, which is what `conv_triton` gave; both channels last.
    """
    pixels = len(out) * out.shape[2] * out.shape[3]
    turns, parts = turns_and_parts(pixels)
    constants = _constants(images, out, side, stride, padding, activation)
    length = _length(images.shape[1], side)
    partial = torch.empty(parts, length, out.shape[1], dtype=torch.float32, device=images.device)
    with torch.cuda.device_of(images):
        gradient_kernel[(parts,)](images, gradient, out, partial, pixels, *images.stride(), **constants, TURNS=turns)
    return partial


def turns_and_parts(pixels: int) -> tuple[int, int]:
    """How many blocks each program of a gradient takes, and into how many parts the pixels are cut."""
    blocks = triton.cdiv(pixels, PIXELS)
    turns = triton.cdiv(blocks, PROGRAMS)
    return turns, triton.cdiv(blocks, turns)


def summed(partial: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The gradients of weights, of `shape` [O, C, K, K], and of the bias from what `gradient_triton` gives."""
    outputs, channels, side, _ = shape
    total = partial.sum(0)
    values = side**2 * channels
    return total[:values].view(side, side, channels, outputs).permute(3, 2, 0, 1), total[values]


def _empty_out(images: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    side = weight.shape[2]
    height, width = ((size + 2 * padding - side) // stride + 1 for size in images.shape[2:])
    return images.new_empty(len(images), height, width, len(weight)).permute(0, 3, 1, 2)


def _constants(
    images: Tensor, out: Tensor, side: int, stride: int, padding: int, activation: str
) -> dict[str, int | str]:
    channels, height, width = images.shape[1:]
    return {
        "HEIGHT": height,
        "WIDTH": width,
        "OUT_HEIGHT": out.shape[2],
        "OUT_WIDTH": out.shape[3],
        "CHANNELS": channels,
        "OUTPUTS": out.shape[1],
        "SIDE": side,
        "STRIDE": stride,
        "PADDING": padding,
        "LENGTH": _length(channels, side),
        "WIDE": triton.next_power_of_2(out.shape[1]),
        "ACTIVATION": activation,
        "BLOCK": PIXELS,
    }


@torch.library.custom_op("netdyno::first_layer", mutates_args=())
def _conv(images: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, activation: str) -> Tensor:
    return conv_triton(images, weight, bias, stride, padding, activation)


@_conv.register_fake
def _(images: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, activation: str) -> Tensor:
    return _empty_out(images, weight, stride, padding)


@torch.library.custom_op("netdyno::first_layer_gradient", mutates_args=())
def _gradient(
    images: Tensor, gradient: Tensor, out: Tensor, side: int, stride: int, padding: int, activation: str
) -> Tensor:
    return gradient_triton(images, gradient, out, side, stride, padding, activation)


@_gradient.register_fake
def _(images: Tensor, gradient: Tensor, out: Tensor, side: int, stride: int, padding: int, activation: str) -> Tensor:
    _, parts = turns_and_parts(len(out) * out.shape[2] * out.shape[3])
    return images.new_empty(parts, _length(images.shape[1], side), out.shape[1], dtype=torch.float32)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    images, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(images, output)
    ctx.shape, ctx.types = weight.shape, (weight.dtype, bias.dtype)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    images, out = ctx.saved_tensors
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    partial = _gradient(images, gradient, out, ctx.shape[2], *ctx.options)
    of_weight, of_bias = summed(partial, ctx.shape)
    return None, of_weight.to(ctx.types[0]), of_bias.to(ctx.types[1]), None, None, None


_conv.register_autograd(_backward, setup_context=_keep)


def conv(images: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, activation: str) -> Tensor:
    """`conv_reference` (see there); differentiable by weight and bias, also compiled.

    By Triton kernels on GPUs from sm_80 on, where the images need no gradient, and of SiLU the weights neither; else by
    `patches`. activation: a name of `ACTIVATIONS`; ValueError for another, and for weights that the kernels do not take
    (`takes`).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, none of {', '.join(ACTIVATIONS)}")
    if not takes(weight) or images.shape[1] != weight.shape[1]:
        raise ValueError(f"weights {tuple(weight.shape)} on images of {images.shape[1]} channels")
    needed = (images, weight, bias) if activation == "silu" else (images,)  # SiLU's slope is not told by its value
    learns = any(tensor.requires_grad for tensor in needed)
    if learns or not images.is_cuda or torch.cuda.get_device_capability(images.device) < (8, 0):
        return ACTIVATIONS[activation](patches.conv(images, weight, bias, stride, padding))
    return _conv(images, weight, bias, stride, padding, activation)
