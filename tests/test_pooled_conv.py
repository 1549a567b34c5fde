"""Convolution, bias, ReLU and pooling in one: the kernels against PyTorch in float64, their gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from without_gpu import assert_equal_in_the_interpreter, compiled

from netdyno.kernels import pooled_conv as module
from netdyno.kernels.pooled_conv import (
    NONE,
    _PooledConv,
    conv_kernel,
    images_gradient_kernel,
    pooled_conv,
    pooled_conv_reference,
    weight_gradient_kernel,
)

# B, C, O, H, W, padding: the layer of cifar10-cnn, cut to size, and what is odd
CASES = [
    (2, 32, 32, 8, 8, 1),
    (3, 16, 32, 7, 9, 1),
    (2, 16, 16, 7, 6, 0),
    (1, 32, 16, 5, 4, 0),
]
LARGE = [(64, 32, 32, 32, 32, 1), (37, 32, 16, 31, 30, 0), (512, 16, 32, 9, 9, 1)]
# Of the largest value, or of the mean of the values' sizes.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def inputs_of(case: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images, channels last, of `dtype`; weight and bias in float32, as networks keep them."""
    b, c, o, h, w, _ = case
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(b, c, h, w, generator=draw).to(device, dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(o, c, 3, 3, generator=draw).to(device) / (9 * c) ** 0.5
    return images, weight, torch.randn(o, generator=draw).to(device)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(1.0, expected.double().abs().max().item()), error


def through_kernels(
    images: Tensor, weight: Tensor, bias: Tensor, padding: int
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """What the kernels give, which pixels they found to be the largest, and what has a gradient."""
    leaves = tuple(tensor.clone().requires_grad_() for tensor in (images, weight, bias))
    out = _PooledConv.apply(*leaves, padding)
    place = out.grad_fn.saved_tensors[3]
    return out, place, leaves


def spread(gradient: Tensor, place: Tensor, height: int, width: int) -> Tensor:
    """[B, O, height, width]: each window's gradient at its largest pixel."""
    whole = gradient.new_zeros(*gradient.shape[:2], height, width)
    for number in range(4):
        y, x = divmod(number, 2)
        windows = whole[:, :, y : height // 2 * 2 : 2, x : width // 2 * 2 : 2]
        windows += torch.where(place == number, gradient, 0.0)
    return whole


def compare_with_float64(case: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    images, weight, bias = inputs_of(case, dtype, device)
    padding = case[5]
    out, place, leaves = through_kernels(images, weight, bias, padding)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    # What tensor cores multiply is of the images' type: the reference starts from the same numbers.
    exact = images.double(), weight.to(dtype).double()
    expected = pooled_conv_reference(*exact, bias.double(), padding)
    close(out, expected, TOLERANCE[dtype])
    assert torch.equal(place == NONE.value, out == 0)
    wide = F.conv2d(*exact, padding=padding)
    ones = torch.ones_like(expected)
    found = F.avg_pool2d(wide * spread(ones, place, *wide.shape[2:]), 2) * 4 + bias.double()[:, None, None]
    close(torch.where(place == NONE.value, 0.0, found), expected, 1e-5)  # the largest of each window, or its equal

    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    out.backward(gradient)
    slope = spread(gradient.double(), place, *wide.shape[2:])
    of_images = torch.nn.grad.conv2d_input(images.shape, exact[1], slope, padding=padding)
    of_weight = torch.nn.grad.conv2d_weight(exact[0], weight.shape, slope, padding=padding)
    for leaf, wanted in zip(leaves, (of_images, of_weight, slope.sum((0, 2, 3))), strict=True):
        assert leaf.grad is not None
        close(leaf.grad, wanted, TOLERANCE[dtype])


def sum_exactly(case: tuple[int, ...], device: str) -> None:
    b, c, o, h, w, padding = case
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(-2, 3, (b, c, h, w), generator=draw).to(device, torch.float16)
    images = images.contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-2, 3, (o, c, 3, 3), generator=draw).to(device, torch.float32)
    bias = torch.full((o,), 400.0, device=device)  # every output is above zero
    out, _, leaves = through_kernels(images, weight, bias, padding)
    exact = [tensor.double().requires_grad_() for tensor in (images, weight, bias)]
    expected = pooled_conv_reference(*exact, padding)
    assert torch.equal(out.double(), expected)
    gradient = torch.randint(-1, 2, expected.shape, generator=draw).to(device, torch.float16)
    out.backward(gradient)
    expected.backward(gradient.double())  # PyTorch gives it to the first of equals, too
    for got, wanted in zip(leaves, exact, strict=True):
        assert got.grad is not None
        assert wanted.grad is not None
        assert torch.equal(got.grad.double(), wanted.grad)


def hide_no_nan(device: str) -> None:
    images, weight, bias = inputs_of(CASES[0], torch.float16, device)
    weight[0, 0, 1, 1] = torch.nan
    out, *_ = through_kernels(images, weight, bias, 1)
    assert out[:, 0].isnan().all()
    assert out[:, 1:].isfinite().all()


def test_kernels_equal_float64_in_the_interpreter() -> None:
    assert_equal_in_the_interpreter(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_kernels_equal_float64_on_the_gpu(case: tuple[int, ...], dtype: torch.dtype) -> None:
    compare_with_float64(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_whole_numbers_are_summed_up_exactly_on_the_gpu(case: tuple[int, ...]) -> None:
    """No pixel is lost or counted twice: sums of small whole numbers have no rounding, however they are ordered."""
    sum_exactly(case, "cuda")


@pytest.mark.gpu
def test_what_is_no_number_is_not_hidden() -> None:
    hide_no_nan("cuda")


@pytest.mark.gpu
def test_gradients_through_torch_compile() -> None:
    images, weight, bias = inputs_of(LARGE[0], torch.bfloat16, "cuda")
    found = []
    for function in (pooled_conv, torch.compile(pooled_conv, fullgraph=True)):
        leaves = [tensor.clone().requires_grad_() for tensor in (images, weight, bias)]
        out = function(*leaves, 1)
        out.float().square().mean().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*reversed(found), strict=True):
        close(got, expected, 1e-2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_cpu_it_equals_the_reference(case: tuple[int, ...]) -> None:
    found = []
    for function in (pooled_conv, pooled_conv_reference):
        leaves = [tensor.double().requires_grad_() for tensor in inputs_of(case, torch.float32, "cpu")]
        out = function(*leaves, case[5])
        out.square().sum().backward()
        found.append([out, *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_what_the_kernels_do_not_take() -> None:
    images = torch.ones(1, 32, 8, 8)
    for weight in (torch.ones(32, 32, 5, 5), torch.ones(64, 32, 3, 3), torch.ones(32, 16, 3, 3)):
        with pytest.raises(ValueError, match="on images of 32 channels"):
            pooled_conv(images, weight, torch.ones(len(weight)), 1)
    with pytest.raises(ValueError, match="padding 2"):
        pooled_conv(images, torch.ones(32, 32, 3, 3), torch.ones(32), 2)


SHARED = {80: 163, 86: 99, 90: 227, 120: 99}  # KiB that a block may have, by compute capability


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("kernel", [conv_kernel, images_gradient_kernel, weight_gradient_kernel])
def test_they_compile_without_a_gpu(kernel: Any, capability: int) -> None:
    """As they are launched for the widest layer that they take."""
    images = torch.empty(2, 32, 32, 32, dtype=torch.bfloat16)
    pooled, _ = module._empty_out(images, 32, 1)
    of_weight = kernel is weight_gradient_kernel
    windows = (module.GRADIENT_WINDOWS,) if of_weight else ()
    values = module._constants(images, pooled, 1, *windows) | ({"TURNS": 8} if of_weight else {})
    pointers = dict.fromkeys(("images", "factors", "gradient", "out", "pooled"), "bf16")
    pointers |= {"place": "u8", "bias": "fp32", "partial": "fp32"}
    options = {"num_stages": module.GRADIENT_STAGES} if of_weight else {}
    made = compiled(kernel, values, pointers, capability, options)
    assert "mma" in made.asm["ptx"]  # tensor cores
    assert made.metadata.shared <= 1024 * SHARED[capability]


if __name__ == "__main__":
    module.GRADIENT_PARTS = 1  # several turns for a program
    for one in CASES:
        for kind in (torch.float32, torch.float16):
            compare_with_float64(one, kind, "cpu")
        sum_exactly(one, "cpu")
    hide_no_nan("cpu")
    print("equal")
