"""The frozen features of a ResNet with bottlenecks, batch norm folded into the convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.resnet import Bottleneck, ResNet

from ..kernels.conv_relu import conv_relu

WHOLE = 8  # channels that tensor cores take at once


def fold(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that does `norm`'s work too. ValueError for one that goes not straight."""
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    if {*conv.dilation, conv.groups} != {1}:
        raise ValueError(f"{conv} has groups or dilation, which are not folded")
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return weight.detach(), bias.detach()


class FoldedConvolution(nn.Module):
    """ReLU(convolution, batch norm and what is added): the norm's scale and shift are in `weight` and `bias`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Module, norm: nn.Module, dtype: torch.dtype, more_bias: Tensor | None = None) -> None:
        super().__init__()
        assert isinstance(conv, nn.Conv2d)
        weight, bias = fold(conv, norm)
        bias = bias if more_bias is None else bias + more_bias
        self.register_buffer("weight", weight.to(dtype, memory_format=torch.channels_last))
        self.register_buffer("bias", bias.to(dtype))
        self.stride, self.padding = conv.stride[0], int(conv.padding[0])

    def forward(self, images: Tensor, added: Tensor | None = None) -> Tensor:
        return conv_relu(images, self.weight, self.bias, added, self.stride, self.padding)


class FoldedStem(FoldedConvolution):
    """A `FoldedConvolution` of images with few channels: over their blocks of `stride` × `stride` pixels.

    Three channels leave most of a tensor core empty. A block has stride² times as many, filled up with zeros to a
    multiple of `WHOLE`, and over blocks the convolution has stride 1.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(conv, norm, dtype)
        outputs, channels, self.side, _ = self.weight.shape
        stride = self.stride
        blocks = -(-self.side // stride)
        missing = blocks * stride - self.side
        whole = F.pad(self.weight, (0, missing, 0, missing)).view(outputs, channels, blocks, stride, blocks, stride)
        blocked = whole.permute(0, 1, 3, 5, 2, 4).reshape(outputs, channels * stride**2, blocks, blocks)
        self.filling = -blocked.shape[1] % WHOLE
        self.weight = _filled(blocked, self.filling).contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor, added: Tensor | None = None) -> Tensor:
        # zeros up to the end of the block where the last filter ends: those of its weights that are added are zeros too
        behind = [self._to_blocks(size) - size - self.padding for size in images.shape[:1:-1]]
        padded = F.pad(images, (self.padding, behind[0], self.padding, behind[1]))
        blocks = _filled(F.pixel_unshuffle(padded, self.stride), self.filling)
        return conv_relu(blocks.contiguous(memory_format=torch.channels_last), self.weight, self.bias, added, 1, 0)

    def _to_blocks(self, size: int) -> int:
        """Pixels of whole blocks that the filters of `size` pixels reach over, with the padding before them."""
        outputs = (size + 2 * self.padding - self.side) // self.stride + 1
        return self.stride * (outputs - 1 + self.weight.shape[2])


def _filled(images: Tensor, channels: int) -> Tensor:
    """With so many channels of zeros more."""
    return F.pad(images, (0, 0, 0, 0, 0, channels))


class FoldedBottleneck(nn.Module):
    """[B, C, H, W] → [B, 4 · width, H / stride, W / stride]."""

    shortcut: Tensor | None

    def __init__(self, block: Bottleneck, dtype: torch.dtype) -> None:
        super().__init__()
        shortcut = of_shortcut = None
        self.stride = 1
        if block.downsample is not None:  # a 1×1 convolution; its bias goes with the third one's
            conv, norm = block.downsample
            shortcut, of_shortcut = fold(conv, norm)
            shortcut, self.stride = shortcut.to(dtype, memory_format=torch.channels_last), conv.stride[0]
        self.register_buffer("shortcut", shortcut)
        self.first = FoldedConvolution(block.conv1, block.bn1, dtype)
        self.second = FoldedConvolution(block.conv2, block.bn2, dtype)
        self.third = FoldedConvolution(block.conv3, block.bn3, dtype, of_shortcut)

    def forward(self, images: Tensor) -> Tensor:
        added = images if self.shortcut is None else F.conv2d(images, self.shortcut, None, self.stride)
        return self.third(self.second(self.first(images)), added)


class FoldedResNet(nn.Module):
    """What `resnet`, in eval mode, makes of images [B, 3, H, W] before its last layer, but for rounding: [B, channels].

    It computes in `dtype`, whatever the type of the images, and has no gradients.
    """

    def __init__(self, resnet: ResNet, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.stem = FoldedStem(resnet.conv1, resnet.bn1, dtype)
        layers = (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)
        self.blocks = nn.Sequential(*(FoldedBottleneck(block, dtype) for layer in layers for block in layer))

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(self.stem(images.to(self.dtype)), 3, 2, 1)
        return self.blocks(features).mean((2, 3))
