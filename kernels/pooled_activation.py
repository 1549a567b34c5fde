"""Bias, activation and 2×2 max pooling as one pass over what a convolution gives, and one pass back.

Taken one by one they read and write the largest tensor of a network three times and, backward, again. ReLU and ELU only
grow, so the largest activation of a window is the activation of its largest value: forward reads everything once and
writes a quarter, and for each window a byte that says which pixel was the largest; the gradients come from those
quarters alone, and only that of the input has full size again.

In PyTorch's own operations, of which torch.compile makes one kernel each way: nothing here is bound to a card.

Shapes: images [B, C, H, W], pooled [B, C, H/2, W/2], rounded down; an odd last row or column belongs to no window.
Bytes moved for each image element: 2 + ¼ · 3 forward and as many backward, in a 16-bit type.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu", "elu"]


def pooled_activation_reference(images: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    """The same, one operation after the other. bias: [C]; None: zero. activation: None is no more than pooling."""
    biased = images if bias is None else images + bias.to(images.dtype)[:, None, None]
    return F.max_pool2d(_activated(biased, activation), 2)


def pooled_activation(images: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    """`pooled_activation_reference` (see there) in one pass each way. The first of equal pixels gets the gradient."""
    if activation not in ("relu", "elu", None):
        raise ValueError(f"activation is {activation!r}, neither relu nor elu nor None")
    return _PooledActivation.apply(images, bias, activation)


class _PooledActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
        height, width = images.shape[2] // 2 * 2, images.shape[3] // 2 * 2
        pixels = [images[:, :, y:height:2, x:width:2] for y in (0, 1) for x in (0, 1)]
        place = _place_of_largest(pixels)
        largest = pixels[0]
        for number, pixel in enumerate(pixels[1:], 1):
            largest = torch.where(place == number, pixel, largest)
        total = largest if bias is None else largest + bias.to(images.dtype)[:, None, None]
        pooled = _activated(total, activation)
        ctx.save_for_backward(pooled, place, bias)
        ctx.activation, ctx.shape = activation, images.shape
        return pooled

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Written out, so that the gradient of the images is made channels last at once, odd sides too."""
        pooled, place, bias = ctx.saved_tensors
        passed = gradient
        if ctx.activation is not None:
            slope = 0.0 if ctx.activation == "relu" else pooled + 1
            passed = torch.where(pooled <= 0, gradient * slope, gradient)
        of_bias = None
        if bias is not None:
            of_bias = passed.sum((0, 2, 3), dtype=torch.promote_types(passed.dtype, torch.float32)).to(bias.dtype)
        b, c, height, width = ctx.shape
        # [B, H/2, 2, W/2, 2, C]: each window's gradient at its largest pixel
        number = torch.arange(4, dtype=torch.uint8, device=place.device).view(2, 1, 2, 1)
        wide_place, wide_passed = (some.permute(0, 2, 3, 1)[:, :, None, :, None, :] for some in (place, passed))
        spread = torch.where(wide_place == number, wide_passed, 0.0)
        whole = spread.reshape(b, height // 2 * 2, width // 2 * 2, c)
        return F.pad(whole, (0, 0, 0, width % 2, 0, height % 2)).permute(0, 3, 1, 2), of_bias, None


def _activated(images: Tensor, activation: Activation | None) -> Tensor:
    if activation is None:
        return images
    return F.relu(images) if activation == "relu" else F.elu(images)


def _place_of_largest(pixels: list[Tensor]) -> Tensor:
    """uint8: which of the tensors is the largest, element by element; the first one of equals.

    What is no number counts as larger, so that a run that diverges looks so.
    """
    largest = pixels[0]
    place = torch.zeros_like(largest, dtype=torch.uint8)
    for number, pixel in enumerate(pixels[1:], 1):
        larger = (pixel > largest) | pixel.isnan()
        largest = torch.where(larger, pixel, largest)
        place = torch.where(larger, number, place)
    return place
