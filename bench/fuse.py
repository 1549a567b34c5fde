"""Puts the kernels into a network, in place of its own layers where a kernel does their work."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import batch_norm, few_channels, first_layer, patches, pooled_conv
from ..kernels.pooled_activation import Activation, pooled_activation
from ..models.resnet50_transfer import ResNet50Transfer

Convolution = nn.Conv2d | nn.ConvTranspose2d
Function = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of images, weight and bias

FEW = 4  # channels on one side of a convolution, up to which patches make a better matrix than images
ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.ELU: "elu"}


class Replacement(nn.Module):
    """A convolution, with what was taken in, as one function; has the convolution's parameters by their names."""

    def __init__(self, conv: Convolution, function: Function) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._function = function

    def forward(self, images: Tensor) -> Tensor:
        return self._function(images, self.weight, self.bias)


class FusedNorm(nn.BatchNorm2d):
    """Batch norm with its activation and pooling, in one; has its parameters and buffers by their names.

    A batch is normalised in `groups` equal parts, each by itself, as if they came one after the other: running
    statistics move once for each. `num_batches_tracked` stays as it is.
    """

    groups = 1

    def __init__(self, norm: nn.BatchNorm2d, slope: float | None, pool: bool) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self._slope, self._pool = slope, pool

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            normed = super().forward(F.max_pool2d(images, 2) if self._pool else images)
            return F.silu(normed) if self._slope is None else F.leaky_relu(normed, self._slope)
        active, mean, variance = batch_norm.batch_norm(
            images, self.weight, self.bias, self.eps, self._slope, self._pool, self.groups
        )
        count = active.numel() // active.shape[1] // self.groups
        with torch.no_grad():
            for running, new in ((self.running_mean, mean), (self.running_var, variance * (count / (count - 1)))):
                assert running is not None
                assert self.momentum is not None
                for of_group in new:
                    running.lerp_(of_group, self.momentum)
        return active


def fuse(network: nn.Module, dtype: torch.dtype) -> None:
    """Replaces, in every `nn.Sequential` of `network`, convolutions and batch norms where a kernel does the same.

    Parameters stay what they are, under the names that they had; what was taken in is an `nn.Identity` from then on.
    Frozen features of a ResNet become folded ones, and first layers by their kernel, both computed in `dtype`.
    """
    if isinstance(network, ResNet50Transfer):
        from ..models.folded_resnet import FoldedResNet  # here, since it takes torchvision's models

        network.features = FoldedResNet(network.features, dtype)
    for layers in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        _fuse_norms(layers)
        modules = list(layers)
        for place, conv in enumerate(modules):
            if not _is_plain(conv) or (found := _replacement(conv, modules[place + 1 : place + 3], dtype)) is None:
                continue
            function, taken = found
            layers[place] = Replacement(conv, function)
            for behind in range(place + 1, place + 1 + taken):
                layers[behind] = nn.Identity()


def in_groups(network: nn.Module, groups: int) -> nn.Module | None:
    """A fused `network`, with the same parameters and buffers, for that many equal batches, one behind the other.

    It does to them at once what `network` would do one by one, in the mode (training, evaluation) that this was in.
    None where a batch norm is none of the kernels'.
    """
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    copy = deepcopy(network, shared)
    for module in copy.modules():
        if isinstance(module, FusedNorm):
            module.groups = groups
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            return None
    return copy


def _fuse_norms(layers: nn.Sequential) -> None:
    modules = list(layers)
    for place, norm in enumerate(modules[:-1]):
        activation = modules[place + 1]
        if not _is_plain_norm(norm) or not isinstance(activation, nn.SiLU | nn.ReLU | nn.LeakyReLU):
            continue
        slope = None if isinstance(activation, nn.SiLU) else getattr(activation, "negative_slope", 0.0)
        pool = place > 0 and _is_halving(modules[place - 1])
        layers[place] = FusedNorm(norm, slope, pool)
        for taken in ([place - 1] if pool else []) + [place + 1]:
            layers[taken] = nn.Identity()


def _replacement(conv: Convolution, behind: list[nn.Module], dtype: torch.dtype) -> tuple[Function, int] | None:
    """What does the work of `conv`, and how many of the modules behind it are then done too."""
    activation = ACTIVATIONS.get(type(behind[0])) if behind and getattr(behind[0], "alpha", 1.0) == 1.0 else None
    padding, stride = int(conv.padding[0]), conv.stride[0]
    transposed = isinstance(conv, nn.ConvTranspose2d)
    if activation == "relu" and _is_narrow(conv):
        return partial(few_channels.conv, padding=padding, relu=True, transposed=transposed), 1

    square = len(set(conv.kernel_size)) == 1
    dot = dtype is not torch.float16  # which is for cards whose tensor cores Triton does not have
    if transposed:
        if not square or conv.out_channels > FEW:
            return None
        convolve = first_layer.conv_transpose if dot and first_layer.takes(conv.weight) else patches.conv_transpose
        return partial(convolve, stride=stride, padding=padding, output_padding=conv.output_padding[0]), 0
    by_patches = square and conv.in_channels <= FEW
    plain = partial(patches.conv if by_patches else F.conv2d, stride=stride, padding=padding)
    pooling = len(behind) > 1 and _is_halving(behind[1])
    biased = activation == "relu" and stride == 1 and conv.bias is not None
    if biased and pooling and dot and pooled_conv.takes(conv.weight, padding):
        return partial(_pooled_conv, dtype=dtype, padding=padding), 2
    if activation is not None and conv.bias is not None and pooling:
        return partial(_pooled, convolve=plain, activation=activation), 2
    if behind and _is_halving(behind[0]):
        return partial(_pooled, convolve=plain, activation=None), 1
    name = activation or _activation_of_first(conv, behind)
    if name is not None and by_patches and dot and first_layer.takes(conv.weight):
        return partial(_first, dtype=dtype, stride=stride, padding=padding, activation=name), 1
    if by_patches:
        return plain, 0
    return (partial(_conv_to_one, stride=stride), 0) if conv.out_channels == 1 and padding == 0 and square else None


def _activation_of_first(conv: Convolution, behind: list[nn.Module]) -> str | None:
    """The activation behind `conv` that `first_layer` alone computes with it."""
    if behind and isinstance(behind[0], nn.SiLU) and not conv.weight.requires_grad:
        return "silu"
    if behind and isinstance(behind[0], nn.LeakyReLU) and behind[0].negative_slope == first_layer.LEAK.value:
        return "leaky_relu"
    return None


def _conv_to_one(images: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """A convolution to one channel. Where the kernel is as large as the images, they are weighed and summed up.

    That passes over them once; cuDNN takes several passes and transposes (H200: 20 µs and 40 back for 4 MB).
    """
    if images.shape[2:] != weight.shape[2:]:
        return F.conv2d(images, weight, bias, stride)
    wide = torch.promote_types(images.dtype, torch.float32)
    total = (images.to(wide) * weight.to(images.dtype).to(wide)).sum((1, 2, 3))
    if bias is not None:
        total = total + bias
    return total.to(images.dtype)[:, None, None, None]


def _first(images: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, **options: Any) -> Tensor:
    return first_layer.conv(images.to(dtype), weight, bias, **options)  # autocast does not know the kernel


def _pooled_conv(images: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, padding: int) -> Tensor:
    assert bias is not None
    return pooled_conv.pooled_conv(images.to(dtype), weight, bias, padding)


def _pooled(
    images: Tensor, weight: Tensor, bias: Tensor | None, convolve: Callable[..., Tensor], activation: Activation | None
) -> Tensor:
    return pooled_activation(convolve(images, weight, None), bias, activation)


def _is_plain(conv: nn.Module) -> TypeGuard[Convolution]:
    """A convolution that goes the same way along both sides and uses none of the further options."""
    if not isinstance(conv, Convolution) or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return False
    same = all(len(set(pair)) == 1 for pair in (conv.stride, conv.padding, conv.output_padding))
    return same and {*conv.dilation, conv.groups} == {1}


def _is_plain_norm(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """A batch norm that `kernels.batch_norm` computes the same: with all that it can have, and no more."""
    if not isinstance(norm, nn.BatchNorm2d) or type(norm).forward is not nn.BatchNorm2d.forward:
        return False
    whole = norm.affine and norm.track_running_stats and norm.momentum is not None
    return whole and batch_norm.takes(norm.num_features)


def _is_narrow(conv: Convolution) -> bool:
    """Whether `kernels.few_channels` takes it."""
    narrow = max(conv.in_channels, conv.out_channels) <= few_channels.NARROW
    plain = {*conv.stride} == {1} and {*conv.output_padding} == {0} and conv.bias is not None
    return narrow and plain and conv.kernel_size == (3, 3) and int(conv.padding[0]) <= 2


def _is_halving(module: nn.Module) -> bool:
    if not isinstance(module, nn.MaxPool2d) or module.ceil_mode or module.return_indices:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return sizes in ((2, 2, 0, 1), ((2, 2), (2, 2), 0, 1))
