"""A network's first convolution with bias and activation in one kernel, and its weights' gradient in another.

The images have few channels and need no gradient, the output has many, so that its passes through memory are all that
counts: written once forward, and backward read once beside its own gradient. See `patches_in_registers`.
Bytes moved for each of B·HO·WO pixels, in a 16-bit type: 2·O forward, 4·O backward, and 2·C·stride² for the images.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import patches
from .patches_in_registers import conv_triton, empty_out, gradient_triton, lines_and_length, partial_shape, summed

WIDEST = 128  # outputs
LONGEST = 64  # values of a piece of a patch
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "elu": F.elu, "silu": F.silu}


def conv_reference(images: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, activation: str) -> Tensor:
    """Convolution, bias and activation in plain PyTorch.

    images: [B, C, H, W]. weight: [O, C, K, K]. bias: [O]. Returns [B, O, HO, WO] of the images' type.
    """
    return ACTIVATIONS[activation](F.conv2d(images, weight.to(images.dtype), bias.to(images.dtype), stride, padding))


def takes(weight: Tensor) -> bool:
    """Whether the kernels are for such weights."""
    outputs, channels, side, other = weight.shape
    return (
        side == other
        and lines_and_length(channels, side)[1] <= LONGEST
        and 16 <= outputs <= WIDEST
        and outputs % 8 == 0
    )


@torch.library.custom_op("netdyno::first_layer", mutates_args=())
def _conv(images: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, activation: str) -> Tensor:
    return conv_triton(images, weight, bias, stride, padding, activation)


@_conv.register_fake
def _(images: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, activation: str) -> Tensor:
    return empty_out(images, len(weight), weight.shape[2], stride, padding)


@torch.library.custom_op("netdyno::first_layer_gradient", mutates_args=())
def _gradient(
    images: Tensor, gradient: Tensor, out: Tensor, side: int, stride: int, padding: int, activation: str
) -> Tensor:
    return gradient_triton(images, gradient, out, side, stride, padding, activation)


@_gradient.register_fake
def _(images: Tensor, gradient: Tensor, out: Tensor, side: int, stride: int, padding: int, activation: str) -> Tensor:
    return images.new_empty(partial_shape(out, images.shape[1], side), dtype=torch.float32)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    images, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(images, output)
    ctx.shape, ctx.types = weight.shape, (weight.dtype, bias.dtype)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    images, out = ctx.saved_tensors
    partial = _gradient(images, gradient, out, ctx.shape[2], *ctx.options)
    of_weight, of_bias = summed(partial, *ctx.shape[1:3])
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
