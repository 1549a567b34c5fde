"""Convolution as a product over patches, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from netdyno.kernels import patches

# B, I, O, H, W, taps, padding: first layers, and what is odd
CASES = [(2, 3, 8, 9, 7, 3, 1), (3, 1, 32, 8, 8, 3, 0), (1, 4, 5, 6, 6, 5, 2), (2, 15, 2, 4, 4, 1, 0)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compiled", [False, True])
def test_equal_to_a_convolution(case: tuple[int, ...], compiled: bool) -> None:
    b, i, o, h, w, taps, padding = case
    images = torch.randn(b, i, h, w, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(o, i, taps, taps, dtype=torch.float64), torch.randn(o, dtype=torch.float64)
    torch._dynamo.reset()
    conv = torch.compile(patches.conv, fullgraph=True, dynamic=False) if compiled else patches.conv
    found = []
    for function in (conv, lambda *inputs: F.conv2d(*inputs[:3], padding=inputs[3])):
        inputs = [tensor.clone().requires_grad_() for tensor in (images, weight, bias)]
        out = function(*inputs, padding)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        found.append([out.detach(), *(tensor.grad for tensor in inputs)])
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)
    torch._dynamo.reset()


def test_autocast_makes_it_a_product_of_16_bits() -> None:
    images, weight, bias = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        out = patches.conv(images, weight, bias, 1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), F.conv2d(images, weight, bias, padding=1), atol=0.1, rtol=0.02)
