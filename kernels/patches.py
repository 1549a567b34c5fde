"""A convolution of few input channels as one matrix product over the images' patches.

cuDNN pads one or three channels to a multiple of eight and more, and of a first layer's weight gradient it makes up to
a sixth of a step (H200). Patches of 9 or 27 values and a one, for the bias, fill a row of 16 or 32; the product and
that of the gradient are then cuBLAS's, bound by memory alone, on every card. Autograd does the rest.

Shapes: images [B, C, H, W], weight [O, C, KH, KW], bias [O], result [B, O, HO, WO], channels last in memory.
Bytes moved for each output pixel, in a 16-bit type: 2·K written and read, K the row's length, and 2·O.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16  # elements: rows of 32 bytes


def conv(images: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """`F.conv2d(images, weight, bias, padding=padding)`."""
    outputs, channels, height, width = weight.shape
    rows = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1).unfold(1, height, 1).unfold(2, width, 1)
    b, out_height, out_width = rows.shape[:3]
    values = channels * height * width
    length = -(-(values + 1) // ALIGNMENT) * ALIGNMENT
    one = torch.arange(length, device=images.device) == values  # for the bias; behind it are zeros
    patches = F.pad(rows.reshape(-1, values), (0, length - values)) + one.to(images.dtype)
    factors = F.pad(torch.cat([weight.flatten(1), bias[:, None]], dim=1), (0, length - values - 1))
    return (patches @ factors.T).view(b, out_height, out_width, outputs).permute(0, 3, 1, 2)
