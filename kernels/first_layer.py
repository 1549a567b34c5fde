"""A network's first convolution with bias and activation in one kernel, and its weights' gradient in another.

The images have few channels, the output has many, so that its passes through memory are all that counts: written once
forward, and backward read once beside its own gradient. See `patches_in_registers`. The images' gradient, where one is
needed, is a product whose rows are put together: see `patches`. A generator's last layer is the transpose: it goes
forward as that gradient does, and its own gradients are by the kernels.
Bytes moved for each of B·HO·WO pixels, in a 16-bit type: 2·O forward, 4·O backward, and 2·C·stride² for the images; for
the images' gradient 4·O, and twice a patch's 2·C·K².
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import patches
from .patches_in_registers import (
    LEAK,
    LONGEST,
    MOST_PIECES,
    conv_triton,
    empty_out,
    empty_patches,
    gradient_triton,
    lines_and_length,
    partial_shape,
    patches_gradient_triton,
    summed,
)

WIDEST = 128  # outputs …
LARGEST = 96  # … and values of a patch, each piece filled up: smaller cards have shared memory for those
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda values: values,
    "relu": F.relu,
    "leaky_relu": partial(F.leaky_relu, negative_slope=LEAK.value),
    "elu": F.elu,
    "silu": F.silu,
}


def conv_reference(
    images: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, activation: str
) -> Tensor:
    """Convolution, bias and activation in plain PyTorch.

    images: [B, C, H, W]. weight: [O, C, K, K]. bias: [O]. Returns [B, O, HO, WO] of the images' type.
    """
    bias = None if bias is None else bias.to(images.dtype)
    return ACTIVATIONS[activation](F.conv2d(images, weight.to(images.dtype), bias, stride, padding))


def takes(weight: Tensor) -> bool:
    """Whether the kernels are for such weights."""
    outputs, channels, side, other = weight.shape
    if side != other or not 16 <= outputs <= WIDEST or outputs % 8:
        return False
    lines, length = lines_and_length(channels, side)
    pieces = side // lines
    return pieces * length <= LARGEST and length <= LONGEST and pieces <= MOST_PIECES


def runs_on(images: Tensor) -> bool:
    """Whether the kernels run where `images` are: on GPUs from sm_80 on."""
    return images.is_cuda and torch.cuda.get_device_capability(images.device) >= (8, 0)


@torch.library.custom_op("netdyno::first_layer", mutates_args=())
def _conv(images: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, activation: str) -> Tensor:
    return conv_triton(images, weight, bias, stride, padding, activation)


@_conv.register_fake
def _(images: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, activation: str) -> Tensor:
    return empty_out(images, len(weight), weight.shape[2], stride, padding)


@torch.library.custom_op("netdyno::first_layer_gradient", mutates_args=())
def _gradient(
    images: Tensor, gradient: Tensor, out: Tensor, side: int, stride: int, padding: int, activation: str
) -> Tensor:
    return gradient_triton(images, gradient, out, side, stride, padding, activation)


@_gradient.register_fake
def _(images: Tensor, gradient: Tensor, out: Tensor, side: int, stride: int, padding: int, activation: str) -> Tensor:
    return images.new_empty(partial_shape(out, images.shape[1], side), dtype=torch.float32)


@torch.library.custom_op("netdyno::first_layer_patches_gradient", mutates_args=())
def _patches_gradient(gradient: Tensor, out: Tensor, weight: Tensor, activation: str) -> Tensor:
    return patches_gradient_triton(gradient, out, weight, activation)


@_patches_gradient.register_fake
def _(gradient: Tensor, out: Tensor, weight: Tensor, activation: str) -> Tensor:
    return empty_patches(gradient, weight)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    images, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(images, weight, output)
    ctx.bias_type = None if bias is None else bias.dtype


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    images, weight, out = ctx.saved_tensors
    stride, padding, activation = ctx.options
    of_images = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        window = patches.Window(weight.shape[2], stride, padding)
        of_patches = _patches_gradient(gradient, out, patches.rows(weight, window).to(out.dtype), activation)
        of_images = patches.fold(of_patches, window, images.shape)
    if any(ctx.needs_input_grad[1:3]):
        partial = _gradient(images, gradient, out, weight.shape[2], stride, padding, activation)
        of_weight, of_bias = summed(partial, *weight.shape[1:3])
        of_weight = of_weight.to(weight.dtype)
        of_bias = None if ctx.bias_type is None else of_bias.to(ctx.bias_type)
    return of_images, of_weight, of_bias, None, None, None


_conv.register_autograd(_backward, setup_context=_keep)


def conv(images: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, activation: str) -> Tensor:
    """`conv_reference` (see there); differentiable, also compiled.

    By Triton kernels on GPUs from sm_80 on, where SiLU has nothing to learn; else by `patches`. activation: a name of
    `ACTIVATIONS`; ValueError for another, and for weights that the kernels do not take (`takes`).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, none of {', '.join(ACTIVATIONS)}")
    if not takes(weight) or images.shape[1] != weight.shape[1]:
        raise ValueError(f"weights {tuple(weight.shape)} on images of {images.shape[1]} channels")
    given = (images, weight) if bias is None else (images, weight, bias)
    learns = activation == "silu" and any(tensor.requires_grad for tensor in given)  # its value does not tell its slope
    if learns or not runs_on(images):
        return ACTIVATIONS[activation](patches.conv(images, weight, bias, stride, padding))
    return _conv(images, weight, bias, stride, padding, activation)


class _ConvTranspose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixels: Tensor, weight: Tensor, stride: int, padding: int, output_padding: int) -> Tensor:
        ctx.save_for_backward(pixels, weight)
        ctx.options = stride, padding, "none"
        return patches.conv_transpose(pixels, weight.to(pixels.dtype), None, stride, padding, output_padding)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pixels, weight = ctx.saved_tensors
        of_pixels = _conv(gradient, weight, None, *ctx.options)
        partial = _gradient(gradient, pixels, pixels, weight.shape[2], *ctx.options)
        of_weight, _ = summed(partial, *weight.shape[1:3])
        return of_pixels, of_weight.to(weight.dtype), None, None, None


def conv_transpose(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, output_padding: int
) -> Tensor:
    """`F.conv_transpose2d` in the pixels' type; differentiable, also compiled.

    By `patches`; its gradients by the kernels where those run.
    pixels: [B, O, HO, WO]. weight: [O, C, K, K], which the kernels take. bias: [C]. Returns [B, C, H, W].
    """
    if not runs_on(pixels):
        return patches.conv_transpose(pixels, weight.to(pixels.dtype), bias, stride, padding, output_padding)
    images = _ConvTranspose.apply(pixels, weight, stride, padding, output_padding)
    return images if bias is None else images + bias.to(images.dtype)[:, None, None]
