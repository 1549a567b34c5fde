"""Convolution, bias, a tensor to add and ReLU as one cuDNN kernel, for frozen layers: no gradients.

On their own, bias, sum and ReLU read and write the output once more, which in ResNet-50's features is as much time as
two thirds of the convolutions (H200, batch 64: 22 MB an image in 16 bits).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_relu_reference(
    images: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, stride: int, padding: int
) -> Tensor:
    """ReLU(convolution + bias + added) in plain PyTorch.

    images: [B, C, H, W]. weight: [O, C, KH, KW]. bias: [O]. added: [B, O, HO, WO]; None: nothing. All of one type.
    """
    out = F.conv2d(images, weight, bias, stride, padding)
    return F.relu(out if added is None else out + added)


@torch.library.custom_op("netdyno::conv_relu", mutates_args=())
def conv_relu(images: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, stride: int, padding: int) -> Tensor:
    """`conv_relu_reference` (see there), on CUDA by one kernel."""
    if not images.is_cuda:
        return conv_relu_reference(images, weight, bias, added, stride, padding)
    geometry = ([stride] * 2, [padding] * 2, [1, 1], 1)
    if added is None:
        return torch.cudnn_convolution_relu(images, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(images, weight, added, 1.0, bias, *geometry)


@conv_relu.register_fake
def _(images: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, stride: int, padding: int) -> Tensor:
    height, width = ((size + 2 * padding - weight.shape[2]) // stride + 1 for size in images.shape[2:])
    out = images.new_empty(len(images), len(weight), height, width)
    return out.contiguous(memory_format=torch.channels_last)
