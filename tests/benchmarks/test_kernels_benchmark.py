"""Speed of the kernels that take passes over memory out, forward and backward, beside what they replace."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from netdyno.kernels import first_layer, patches
from netdyno.kernels.batch_norm import batch_norm, batch_norm_reference
from netdyno.kernels.pooled_activation import pooled_activation, pooled_activation_reference
from netdyno.kernels.pooled_conv import pooled_conv, pooled_conv_reference

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]


def through(function: Callable[..., Tensor], device: str, inputs: list[Tensor]) -> Callable[[], object]:
    """A call forward and backward of `function`, compiled on a GPU, in 16 bits there."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    given = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
    run = torch.compile(lambda *some: function(*some).square().mean(), fullgraph=True, dynamic=False)
    run = run if device == "cuda" else lambda *some: function(*some).square().mean()
    return lambda: torch.autograd.grad(run(*given), given)


@pytest.mark.benchmark(group="bias, ReLU and pooling of 32 channels at 32×32, both ways")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [pooled_activation, pooled_activation_reference], ids=["kernel", "reference"])
def test_pooled_activation(rate: Callable[..., None], function: Callable[..., Tensor], device: str) -> None:
    torch._dynamo.reset()
    batch = 512 if device == "cuda" else 8
    images = torch.randn(batch, 32, 32, 32).contiguous(memory_format=torch.channels_last)
    run = through(lambda x, bias: function(x, bias, "relu"), device, [images, torch.randn(32)])
    rate(run, batch, on_gpu=device == "cuda")


@pytest.mark.benchmark(group="convolution, bias, ReLU and pooling of 32 channels at 32×32, both ways")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [pooled_conv, pooled_conv_reference], ids=["kernel", "reference"])
def test_pooled_conv(rate: Callable[..., None], function: Callable[..., Tensor], device: str) -> None:
    torch._dynamo.reset()
    batch = 512 if device == "cuda" else 8
    images = torch.randn(batch, 32, 32, 32).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, 32, 3, 3) / 17
    run = through(lambda x, w, b: function(x, w, b, 1), device, [images, weight, torch.randn(32)])
    rate(run, batch, on_gpu=device == "cuda")


@pytest.mark.benchmark(group="pooling, batch norm and SiLU of 64 channels at 31×31, both ways")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [batch_norm, batch_norm_reference], ids=["kernel", "reference"])
def test_batch_norm(rate: Callable[..., None], function: Callable[..., Tensor], device: str) -> None:
    torch._dynamo.reset()
    batch = 1536 if device == "cuda" else 8
    images = torch.randn(batch, 64, 31, 31).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.ones(64, device=device) for _ in range(2))
    run = through(lambda x: function(x, weight, bias, 1e-12, None, True)[0], device, [images])
    rate(run, batch, on_gpu=device == "cuda")


@pytest.mark.benchmark(group="first layer, 3 → 32 channels at 32×32, forward and weights")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", ["kernel", "patches", "reference"])
def test_first_layer(rate: Callable[..., None], how: str, device: str) -> None:
    torch._dynamo.reset()
    batch = 512 if device == "cuda" else 8
    images = torch.randn(batch, 3, 32, 32, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    images = images.contiguous(memory_format=torch.channels_last)

    def conv(weight: Tensor, bias: Tensor) -> Tensor:
        if how == "kernel":
            return first_layer.conv(images, weight, bias, 1, 1, "relu")
        convolve = partial(patches.conv, stride=1) if how == "patches" else F.conv2d
        return F.relu(convolve(images, weight, bias, padding=1))

    run = through(conv, device, [torch.randn(32, 3, 3, 3), torch.randn(32)])
    rate(run, batch, on_gpu=device == "cuda")


@pytest.mark.benchmark(group="first layer, 3 → 128 channels at 64×64, stride 2, forward and the images' gradient")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", ["kernel", "reference"])
def test_first_layer_for_its_images(rate: Callable[..., None], how: str, device: str) -> None:
    torch._dynamo.reset()
    batch = 128 if device == "cuda" else 4
    images = torch.randn(batch, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(128, 3, 5, 5, device=device), torch.zeros(128, device=device)
    conv = first_layer.conv if how == "kernel" else first_layer.conv_reference
    run = through(lambda x: conv(x, weight, bias, 2, 2, "leaky_relu"), device, [images])
    rate(run, batch, on_gpu=device == "cuda")
