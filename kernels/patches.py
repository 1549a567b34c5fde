"""Convolutions to or from few channels as one matrix product over patches of the images.

cuDNN pads one or three channels to eight and more; first layers and a generator's last one then take up to a third of a
step that they should take a twentieth of (H200: mnist-cnn, dcgan). As a product they are cuBLAS's, bound by memory
alone, on every card: forward, the gradient of the weights and that of the images, which is the product's other side
folded back, on a GPU by a kernel that reads each element of it once.

Shapes: images [B, C, H, W] with few channels C, pixels [B, O, HO, WO] with many; patches [B·HO·WO, K], where a row
holds the KH·KW·C values under one pixel, tap by tap, zeros behind them up to a whole 32 bytes in 16-bit types.
Bytes moved for each of B·HO·WO pixels, in a 16-bit type: 4·K and 2·O.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16  # elements of a row
BLOCK = 256  # values of an image that a program puts together


class Window(NamedTuple):
    """What a convolution's kernel sees: square, the same way along both sides."""

    side: int
    stride: int
    padding: int

    def row(self, channels: int) -> int:
        """Elements of a patch, whole rows."""
        return -(-(self.side**2 * channels) // ALIGNMENT) * ALIGNMENT


def conv(images: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """`F.conv2d`; channels last. weight: [O, C, KH, KW], square. bias: [O]."""
    outputs, _, side, _ = weight.shape
    window = Window(side, stride, padding)
    out_height, out_width = ((size + 2 * padding - side) // stride + 1 for size in images.shape[2:])
    patches = _Unfold.apply(images, window)
    pixels = patches @ rows(weight, window).T
    pixels = pixels.view(len(images), out_height, out_width, outputs).permute(0, 3, 1, 2)
    return pixels if bias is None else pixels + bias.to(pixels.dtype)[:, None, None]


def conv_transpose(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, output_padding: int
) -> Tensor:
    """`F.conv_transpose2d`; channels last. pixels: [B, O, HO, WO]. weight: [O, C, KH, KW], square. bias: [C]."""
    outputs, channels, side, _ = weight.shape
    height, width = ((size - 1) * stride - 2 * padding + side + output_padding for size in pixels.shape[2:])
    window = Window(side, stride, padding)
    patches = pixels.permute(0, 2, 3, 1).reshape(-1, outputs) @ rows(weight, window)
    images = _Fold.apply(patches, window, (len(pixels), channels, height, width))
    return images if bias is None else images + bias.to(images.dtype)[:, None, None]


def rows(weight: Tensor, window: Window) -> Tensor:
    """[O, C, KH, KW] → what each output's patches are multiplied by, [O, K]."""
    flat = weight.permute(0, 2, 3, 1).flatten(1)
    return F.pad(flat, (0, window.row(weight.shape[1]) - flat.shape[1]))


def _unfold(images: Tensor, window: Window) -> Tensor:
    """[B, C, H, W] → patches."""
    side, stride, padding = window
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    views = padded.unfold(1, side, stride).unfold(2, side, stride)  # [B, HO, WO, C, KH, KW]
    rows = views.permute(0, 1, 2, 4, 5, 3).reshape(-1, side * side * images.shape[1])
    return F.pad(rows, (0, window.row(images.shape[1]) - rows.shape[1]))


def fold_reference(patches: Tensor, window: Window, shape: Sequence[int]) -> Tensor:
    """In plain PyTorch: each pixel of [B, C, H, W] is the sum of where it came in patches [B·HO·WO, K].

    Pixels a stride apart see the same taps of patches, shifted, so the image is put together from stride² parts.
    """
    side, stride, padding = window
    b, c, height, width = shape
    out_height, out_width = ((size + 2 * padding - side) // stride + 1 for size in (height, width))
    taps = patches[:, : side * side * c].view(b, out_height, out_width, side, side, c)
    wide = torch.promote_types(patches.dtype, torch.float32)
    rows, columns = (-(-(size + padding) // stride) for size in (height, width))

    def part(y: int, x: int) -> Tensor:
        """Pixels (y + i·stride, x + j·stride) of the padded image: [B, rows, columns, C]."""
        total = torch.zeros(b, rows, columns, c, dtype=wide, device=patches.device)
        for ky in range(y, side, stride):
            for kx in range(x, side, stride):
                down, right = ky // stride, kx // stride
                if down >= rows or right >= columns:  # beyond the padding of a small image
                    continue
                seen = taps[:, : rows - down, : columns - right, ky, kx]
                below, beside = rows - down - seen.shape[1], columns - right - seen.shape[2]
                total = total + F.pad(seen.to(wide), (0, 0, right, beside, down, below))
        return total

    lines = [torch.stack([part(y, x) for x in range(stride)], dim=3) for y in range(stride)]
    padded = torch.stack(lines, dim=2).view(b, rows * stride, columns * stride, c)
    return padded[:, padding : padding + height, padding : padding + width].to(patches.dtype).permute(0, 3, 1, 2)


@triton.jit
def fold_kernel(
    patches,
    images,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs: images × blocks of an image's values. images: [B, H, W, C]."""
    n = tl.program_id(0).to(tl.int64)
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = value < HEIGHT * WIDTH * CHANNELS
    y = value // (WIDTH * CHANNELS) + PADDING
    x = value // CHANNELS % WIDTH + PADDING
    patches += n * (OUT_HEIGHT * OUT_WIDTH * ROW)
    WIDE: tl.constexpr = tl.float64 if patches.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK], WIDE)
    for down in tl.static_range(0, SIDE, STRIDE):
        row, ky = y // STRIDE - down // STRIDE, y % STRIDE + down
        inside = there & (ky < SIDE) & (row >= 0) & (row < OUT_HEIGHT)
        for right in tl.static_range(0, SIDE, STRIDE):
            column, kx = x // STRIDE - right // STRIDE, x % STRIDE + right
            seen = inside & (kx < SIDE) & (column >= 0) & (column < OUT_WIDTH)
            at = (row * OUT_WIDTH + column) * ROW + (ky * SIDE + kx) * CHANNELS + value % CHANNELS
            total += tl.load(patches + at, mask=seen, other=0.0).to(WIDE)
    tl.store(images + n * (HEIGHT * WIDTH * CHANNELS) + value, total.to(images.dtype.element_ty), mask=there)


def fold_triton(patches: Tensor, side: int, stride: int, padding: int, shape: Sequence[int]) -> Tensor:
    """What `fold_reference` gives, wherever Triton runs. shape: of the images, [B, C, H, W]."""
    images, (b, channels, height, width) = _images_like(patches, shape), shape
    out_height, out_width = ((size + 2 * padding - side) // stride + 1 for size in (height, width))
    with torch.cuda.device_of(patches):
        fold_kernel[(b, triton.cdiv(height * width * channels, BLOCK))](
            patches.contiguous(),
            images,
            HEIGHT=height,
            WIDTH=width,
            CHANNELS=channels,
            OUT_HEIGHT=out_height,
            OUT_WIDTH=out_width,
            SIDE=side,
            STRIDE=stride,
            PADDING=padding,
            ROW=patches.shape[1],
            BLOCK=BLOCK,
        )
    return images


def _images_like(patches: Tensor, shape: Sequence[int]) -> Tensor:
    b, channels, height, width = shape
    return patches.new_empty(b, height, width, channels).permute(0, 3, 1, 2)


@torch.library.custom_op("netdyno::fold", mutates_args=())
def _fold_op(patches: Tensor, side: int, stride: int, padding: int, shape: list[int]) -> Tensor:
    return fold_triton(patches, side, stride, padding, shape)


@_fold_op.register_fake
def _(patches: Tensor, side: int, stride: int, padding: int, shape: list[int]) -> Tensor:
    return _images_like(patches, shape)


def fold(patches: Tensor, window: Window, shape: Sequence[int]) -> Tensor:
    """`fold_reference` (see there), by the kernel on a GPU."""
    return _fold_op(patches, *window, list(shape)) if patches.is_cuda else fold_reference(patches, window, shape)


class _Unfold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor, window: Window) -> Tensor:
        ctx.window, ctx.shape = window, images.shape
        return _unfold(images, window)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return fold(gradient, ctx.window, ctx.shape), None


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, patches: Tensor, window: Window, shape: tuple[int, int, int, int]) -> Tensor:
        ctx.window = window
        return fold(patches, window, shape)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _unfold(gradient, ctx.window), None, None
