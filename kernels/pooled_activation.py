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


def pooled_activation_reference(images: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """The same, one operation after the other. bias: [C]; None: zero."""
    biased = images if bias is None else images + bias.to(images.dtype)[:, None, None]
    return F.max_pool2d(F.relu(biased) if activation == "relu" else F.elu(biased), 2)


def pooled_activation(images: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """`pooled_activation_reference` (see there) in one pass each way. The first of equal pixels gets the gradient."""
    if activation not in ("relu", "elu"):
        raise ValueError(f"activation is {activation!r}, neither relu nor elu")
    height, width = images.shape[2] // 2 * 2, images.shape[3] // 2 * 2
    pixels = [images[:, :, y:height:2, x:width:2] for y in (0, 1) for x in (0, 1)]
    place = _place_of_largest([pixel.detach() for pixel in pixels])
    largest = pixels[0]
    for number, pixel in enumerate(pixels[1:], 1):
        largest = torch.where(place == number, pixel, largest)
    total = largest if bias is None else largest + bias.to(images.dtype)[:, None, None]
    return F.relu(total) if activation == "relu" else F.elu(total)


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
