"""The frozen features of a ResNet with bottlenecks, batch norm folded into the convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.resnet import Bottleneck, ResNet

from ..kernels.conv_relu import conv_relu


class Folded(nn.Module):
    """ReLU(convolution, batch norm and what is added): the norm's scale and shift are in `weight` and `bias`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Module, norm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        self.register_buffer("weight", weight.detach().to(dtype, memory_format=torch.channels_last))
        self.register_buffer("bias", bias.detach().to(dtype))
        self.stride, self.padding = conv.stride[0], int(conv.padding[0])

    def forward(self, images: Tensor, added: Tensor | None = None) -> Tensor:
        return conv_relu(images, self.weight, self.bias, added, self.stride, self.padding)


class FoldedBottleneck(nn.Module):
    """[B, C, H, W] → [B, 4 · width, H / stride, W / stride]."""

    def __init__(self, block: Bottleneck, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = Folded(block.conv1, block.bn1, dtype)
        self.second = Folded(block.conv2, block.bn2, dtype)
        self.third = Folded(block.conv3, block.bn3, dtype)
        self.shortcut = None
        if block.downsample is not None:
            conv, norm = block.downsample
            self.shortcut = Folded(conv, norm, dtype)
        if self.shortcut is not None:
            self.third.bias += self.shortcut.bias

    def forward(self, images: Tensor) -> Tensor:
        added = images
        if self.shortcut is not None:
            added = F.conv2d(images, self.shortcut.weight, None, self.shortcut.stride)
        return self.third(self.second(self.first(images)), added)


class FoldedResNet(nn.Module):
    """What `resnet`, in eval mode, makes of images [B, 3, H, W] before its last layer, but for rounding: [B, channels].

    It computes in `dtype`, whatever the type of the images, and has no gradients.
    """

    def __init__(self, resnet: ResNet, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.stem = Folded(resnet.conv1, resnet.bn1, dtype)
        layers = (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)
        self.blocks = nn.Sequential(*(FoldedBottleneck(block, dtype) for layer in layers for block in layer))

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(self.stem(images.to(self.dtype)), 3, 2, 1)
        return self.blocks(features).mean((2, 3))
