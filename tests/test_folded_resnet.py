"""ResNet-50's features with batch norm folded, against torchvision's own in eval mode."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from netdyno.bench.fuse import fuse
from netdyno.kernels.conv_relu import conv_relu, conv_relu_reference
from netdyno.models.folded_resnet import FoldedConvolution, FoldedResNet, FoldedStem
from netdyno.models.resnet50_transfer import ResNet50Transfer


def used_resnet() -> nn.Module:
    """With statistics and scales as training leaves them, unlike those of a new one."""
    torch.manual_seed(0)
    resnet = resnet50()
    for norm in resnet.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for value in (norm.running_var, norm.weight):
                nn.init.uniform_(value, 0.4, 0.8)
            for value in (norm.running_mean, norm.bias):
                nn.init.uniform_(value, -0.2, 0.2)
    resnet.fc = nn.Identity()
    return resnet.requires_grad_(False).eval()


def test_folded_features_are_those_of_the_network() -> None:
    resnet = used_resnet().double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(FoldedResNet(resnet, torch.float64)(images), resnet(images))


@pytest.mark.parametrize(("side", "stride", "padding"), [(7, 2, 3), (3, 2, 0), (4, 3, 1), (5, 1, 2), (2, 4, 0)])
@pytest.mark.parametrize("size", [(23, 32), (24, 21)])
def test_a_stem_over_blocks_is_the_convolution(side: int, stride: int, padding: int, size: tuple[int, int]) -> None:
    conv = nn.Conv2d(3, 8, side, stride, padding, dtype=torch.float64)
    norm = nn.BatchNorm2d(8).double().eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    stem = FoldedStem(conv, norm, torch.float64)
    assert stem.weight.shape[1] % 8 == 0
    torch.testing.assert_close(stem(images), FoldedConvolution(conv, norm, torch.float64)(images))


def test_the_transfer_network_keeps_its_head_and_takes_any_type_of_images() -> None:
    network = ResNet50Transfer(5, None).eval()
    network.features = used_resnet()
    images = torch.randn(2, 3, 64, 64)
    expected = network.features(images)
    head = dict(network.head.named_parameters())
    fuse(network, torch.bfloat16)
    assert all(value is head[name] for name, value in network.head.named_parameters())
    assert [name for name, value in network.named_parameters() if value.requires_grad] == [f"head.{n}" for n in head]
    network.train()
    for given in (images, images.bfloat16()):
        found = network.features(given)
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 0.03 * expected.norm()
        assert (0.9 * expected - expected).norm() > 0.03 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("adds", [False, True])
def test_one_kernel_computes_the_same_on_a_gpu(dtype: torch.dtype, adds: bool) -> None:
    for channels, outputs, side, stride, padding in (
        (64, 256, 1, 1, 0),
        (64, 64, 3, 1, 1),
        (64, 64, 3, 2, 1),
        (16, 64, 4, 1, 0),  # the stem's
    ):
        images = torch.randn(4, channels, 32, 32, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
        weight = 0.1 * torch.randn(outputs, channels, side, side, device="cuda", dtype=dtype)
        weight = weight.to(memory_format=torch.channels_last)
        bias = torch.randn(outputs, device="cuda", dtype=dtype)
        exact = conv_relu_reference(images.double(), weight.double(), bias.double(), None, stride, padding)
        added = torch.randn_like(exact).to(dtype) if adds else None
        if added is not None:
            inputs = (images.double(), weight.double(), bias.double(), added.double())
            exact = conv_relu_reference(*inputs, stride, padding)
        stale = torch.full((64 << 20,), torch.nan, device="cuda", dtype=dtype)  # what reused memory may hold
        del stale
        torch._dynamo.reset()  # it stops at eight forms of one function
        found = torch.compile(conv_relu, fullgraph=True)(images, weight, bias, added, stride, padding)
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.double(), exact, atol=0.05, rtol=0.02)
