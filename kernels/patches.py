"""Convolutions to or from few channels as one matrix product over patches of the images.

cuDNN pads one or three channels to eight and more; first layers and a generator's last one then take up to a third of a
step that they should take a twentieth of (H200: mnist-cnn, dcgan). As a product they are cuBLAS's, bound by memory
alone, on every card: forward, the gradient of the weights and that of the images, which is the product's other side
folded back.

Shapes: images [B, C, H, W] with few channels C, pixels [B, O, HO, WO] with many; patches [B·HO·WO, K], where a row
holds the KH·KW·C values under one pixel, tap by tap, zeros behind them up to a whole 32 bytes in 16-bit types.
Bytes moved for each of B·HO·WO pixels, in a 16-bit type: 4·K and 2·O.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16  # elements of a row


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
    outputs, channels, side, _ = weight.shape
    window = Window(side, stride, padding)
    out_height, out_width = ((size + 2 * padding - side) // stride + 1 for size in images.shape[2:])
    patches = _Unfold.apply(images, window)
    pixels = patches @ _rows(weight.permute(0, 2, 3, 1), window.row(channels)).T
    pixels = pixels.view(len(images), out_height, out_width, outputs).permute(0, 3, 1, 2)
    return pixels if bias is None else pixels + bias.to(pixels.dtype)[:, None, None]


def conv_transpose(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, output_padding: int
) -> Tensor:
    """`F.conv_transpose2d`; channels last. pixels: [B, O, HO, WO]. weight: [O, C, KH, KW], square. bias: [C]."""
    side = weight.shape[2]
    height, width = ((size - 1) * stride - 2 * padding + side + output_padding for size in pixels.shape[2:])
    images = images_under(pixels, weight, stride, padding, height, width)
    return images if bias is None else images + bias.to(images.dtype)[:, None, None]


def images_under(pixels: Tensor, weight: Tensor, stride: int, padding: int, height: int, width: int) -> Tensor:
    """What `conv` of images of `height` and `width` gives back to them: `conv_transpose` to that size."""
    outputs, channels, side, _ = weight.shape
    window = Window(side, stride, padding)
    rows = pixels.permute(0, 2, 3, 1).reshape(-1, outputs)
    patches = rows @ _rows(weight.permute(0, 2, 3, 1), window.row(channels))
    return _Fold.apply(patches, window, (len(pixels), channels, height, width))


def _rows(weight: Tensor, length: int) -> Tensor:
    """[O, KH, KW, C] → [O, length]."""
    flat = weight.flatten(1)
    return F.pad(flat, (0, length - flat.shape[1]))


def _unfold(images: Tensor, window: Window) -> Tensor:
    """[B, C, H, W] → patches."""
    side, stride, padding = window
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    views = padded.unfold(1, side, stride).unfold(2, side, stride)  # [B, HO, WO, C, KH, KW]
    rows = views.permute(0, 1, 2, 4, 5, 3).reshape(-1, side * side * images.shape[1])
    return F.pad(rows, (0, window.row(images.shape[1]) - rows.shape[1]))


def _fold(patches: Tensor, window: Window, shape: tuple[int, int, int, int]) -> Tensor:
    """The transpose of `_unfold`: each pixel of [B, C, H, W] is the sum of where it came in patches.

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


class _Unfold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor, window: Window) -> Tensor:
        ctx.window, ctx.shape = window, images.shape
        return _unfold(images, window)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _fold(gradient, ctx.window, ctx.shape), None


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, patches: Tensor, window: Window, shape: tuple[int, int, int, int]) -> Tensor:
        ctx.window = window
        return _fold(patches, window, shape)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _unfold(gradient, ctx.window), None, None
