"""Convolutions of few channels: the kernels against PyTorch in float64, their gradients, compilation without a GPU."""

from collections.abc import Iterable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from without_gpu import assert_equal_in_the_interpreter

from netdyno.kernels import few_channels, patches_in_registers
from netdyno.kernels.few_channels import (
    conv,
    conv_kernel,
    conv_reference,
    conv_triton,
    summed,
    weight_gradient_kernel,
    weight_gradient_triton,
)

# B, I, O, H, W: the autoencoder's layers and first layers, and what is odd
SHAPES = [(3, 3, 8, 12, 13), (2, 8, 4, 14, 14), (2, 1, 5, 35, 40), (1, 3, 1, 3, 3), (1, 8, 8, 6, 6)]
LARGE = [(40, 3, 8, 32, 32), (40, 8, 4, 30, 30), (300, 4, 8, 28, 28), (40, 8, 3, 30, 30), (300, 8, 4, 28, 28)]
# Of the largest value: rounding of the result, and of sums in fp32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def case(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """images, weight and bias; weight and bias in float32, as networks keep them."""
    b, i, o, h, w = shape
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(b, i, h, w, generator=draw).to(dtype)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return (
        images.to(device),
        torch.randn(o, i, 3, 3, generator=draw).to(device),
        torch.randn(o, generator=draw).to(device),
    )


Numbered = tuple[int, tuple[int, ...], torch.dtype, int]


def cases_of(shapes: list[tuple[int, ...]]) -> list[Numbered]:
    """Number, shape, type and padding: each shape in every type and at every padding, but not all of both.

    Each combination is to be compiled, which takes seconds.
    """
    pairs = product(enumerate(shapes), enumerate(TOLERANCE))
    return [(3 * i + j, shape, dtype, (i + j) % 3) for (i, shape), (j, dtype) in pairs]


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(1.0, expected.double().abs().max().item()), error


def compare_kernels_with_float64(device: str, cases: Iterable[Numbered]) -> None:
    """Layouts and the ReLU alternate by a case's number."""
    for n, shape, dtype, padding in cases:
        channels_last, relu = n % 2 == 0, n % 5 < 3
        images, weight, bias = case(shape, dtype, channels_last, device)
        exact = [tensor.double().requires_grad_() for tensor in (images, weight, bias)]
        out = conv_reference(*exact, padding, relu)
        found = conv_triton(images, weight, bias, padding, relu)
        assert found.dtype == dtype
        close(found, out, TOLERANCE[dtype])

        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        if n % 2:
            gradient = gradient.contiguous(memory_format=torch.channels_last)
        F.conv2d(*exact, padding=padding).backward(gradient.double())
        close(summed(weight_gradient_triton(images, gradient, padding)), exact[1].grad, 1e-5)
        if n % 3 == 0:
            weight = weight.contiguous(memory_format=torch.channels_last)
        behind = conv_triton(gradient, weight, None, 2 - padding, False, transposed=True)
        close(behind, exact[0].grad, TOLERANCE[dtype])


def compare_tensor_cores_with_float64(device: str, cases: Iterable[Numbered]) -> None:
    """Which are in another kernel; on a CPU the interpreter plays them."""
    for n, shape, dtype, padding in cases:
        relu = n % 5 < 3
        images, weight, bias = case(shape, dtype, n % 2 == 0, device)
        # what tensor cores multiply is of the images' type: the reference starts from the same numbers
        exact = [images.double(), weight.to(dtype).double(), bias.double()]
        for tensor in exact:
            tensor.requires_grad_()
        out = patches_in_registers.conv_triton(images, weight, bias, 1, padding, "relu" if relu else "none")
        assert out.dtype == dtype
        close(out, conv_reference(*exact, padding, relu), TOLERANCE[dtype])

        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        F.conv2d(*exact, padding=padding).backward(gradient.double())
        partial = patches_in_registers.gradient_triton(images, gradient, gradient, 3, 1, padding, "none")
        of_weight, of_bias = patches_in_registers.summed(partial, images.shape[1], 3)
        close(of_weight, exact[1].grad, 1e-5)
        close(of_bias, exact[2].grad, 1e-5)
        if n % 3 == 0:
            weight = weight.contiguous(memory_format=torch.channels_last)
        behind = patches_in_registers.conv_triton(gradient, weight, None, 1, 2 - padding, "none", transposed=True)
        close(behind, exact[0].grad, TOLERANCE[dtype])


def test_kernels_equal_float64_in_the_interpreter() -> None:
    assert_equal_in_the_interpreter(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_kernels_equal_float64_on_the_gpu(shape: tuple[int, ...]) -> None:
    cases = [case for case in cases_of(SHAPES + LARGE) if case[1] == shape]
    compare_kernels_with_float64("cuda", cases)
    compare_tensor_cores_with_float64("cuda", [case for case in cases if case[2] is torch.bfloat16])


@pytest.mark.gpu
def test_what_is_no_number_is_not_hidden_by_relu() -> None:
    """A run that diverges must look so, and the gradient scaler must see an overflow."""
    images, weight, bias = case(SHAPES[0], torch.float32, True, "cuda")
    weight[0, 0, 1, 1] = torch.nan
    out = conv(images, weight, bias, 1, True)
    assert out[:, 0].isnan().all()
    assert out[:, 1:].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_through_torch_compile(dtype: torch.dtype) -> None:
    """A chain of two, as networks use it: the first with images that need no gradient, the second transposed.

    The reference rounds where tensor cores do, since a ReLU's gradient is another where a rounded output changes sign.
    """
    images, weight, bias = case(SHAPES[0], dtype, True, "cuda")
    draw = torch.Generator().manual_seed(2)
    second, other = (torch.randn(shape, generator=draw).cuda() for shape in [(8, 4, 3, 3), (4,)])

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).float()

    def chain(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return conv(conv(images, w1, b1, 0, True), w2, b2, 1, False, transposed=True).square().mean()

    def reference(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        behind_first = rounded(F.conv2d(images.float(), rounded(w1), b1).relu())
        return rounded(F.conv_transpose2d(behind_first, rounded(w2), b2, padding=1)).square().mean()

    found = []
    for run in (reference, torch.compile(chain, fullgraph=True)):
        parameters = [tensor.clone().requires_grad_() for tensor in (weight, bias, second, other)]
        loss = run(*parameters)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in parameters)])
    for got, expected in zip(*reversed(found), strict=True):
        close(got, expected, 1e-3 if dtype is torch.float32 else 2e-2)  # cuDNN's may be TF32


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_transposed_convolution_is_one_of_turned_weights(padding: int) -> None:
    images, weight, bias = torch.randn(2, 4, 6, 6), torch.randn(4, 8, 3, 3), torch.randn(8)
    expected = F.conv_transpose2d(images, weight, bias, padding=padding)
    found = conv(images, weight, bias, padding, False, transposed=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_shapes_that_the_kernels_do_not_take() -> None:
    for weight, padding in [(torch.ones(2, 2, 5, 5), 0), (torch.ones(2, 2, 3, 3), 3), (torch.ones(9, 2, 3, 3), 0)]:
        with pytest.raises(ValueError, match="channels at most"):
            conv(torch.ones(1, 2, 8, 8), weight, torch.ones(len(weight)), padding, False)
    with pytest.raises(ValueError, match="images of 3 channels, but weights for 5"):
        conv(torch.ones(1, 3, 8, 8), torch.ones(2, 5, 3, 3), torch.ones(2), 0, False)


@pytest.mark.parametrize(("capability", "dtype"), [(75, "fp16"), (75, "fp32"), (90, "fp32")])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("kernel", [conv_kernel, weight_gradient_kernel], ids=["conv", "weights"])
def test_kernels_compile_without_a_gpu(capability: int, dtype: str, kernel, mirrored: bool) -> None:
    values = {"INPUTS": 8, "OUTPUTS": 4, "WIDE": 4, "PADDING": 2}
    if kernel is conv_kernel:
        values |= {"BIASED": True, "RELU": True, "MIRRORED": mirrored, "LANES": few_channels.LANES}
    else:
        values |= {"TURNS": 8, "ROWS": few_channels.ROWS_OF_GRADIENT, "LANES": few_channels.LANES}
    pointers = {"images": dtype, "gradient": dtype, "out": dtype}
    pointers |= {"weight": "fp32", "bias": "fp32", "partial": "fp32"}
    signature = {
        name: "constexpr" if name in values else f"*{pointers[name]}" if name in pointers else "i32"
        for name in kernel.arg_names
    }
    compiled = triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", capability, 32))
    assert compiled.metadata.shared <= 64 * 1024  # what a block has on Turing
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert "bf16" not in compiled.asm["ptx"]


def compare_gradients() -> None:
    """Through autograd, both directions, by the custom operators, which a CPU takes in the interpreter alone."""
    for n, (transposed, padding) in enumerate(product((False, True), (0, 1, 2))):
        relu, (i, o) = n % 2 == 0, ((3, 8), (4, 1))[n // 2 % 2]
        draw = torch.Generator().manual_seed(0)
        images = torch.randn(2, i, 7, 6, generator=draw)
        weight = torch.randn((i, o, 3, 3) if transposed else (o, i, 3, 3), generator=draw)
        found = []
        for ours in (True, False):
            inputs = [tensor.clone().requires_grad_() for tensor in (images, weight, torch.linspace(-1, 1, o))]
            if ours:
                out = few_channels._conv(*inputs, 2 - padding if transposed else padding, relu, transposed)
            else:
                out = (F.conv_transpose2d if transposed else F.conv2d)(*inputs, padding=padding)
                out = out.relu() if relu else out
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
            found.append([out.detach(), *(tensor.grad for tensor in inputs)])
        for got, expected in zip(*found, strict=True):
            close(got, expected, 1e-5)


if __name__ == "__main__":
    compare_gradients()
    few_channels.PROGRAMS = patches_in_registers.PROGRAMS = 2  # several tasks for a program, and more room than tasks
    patches_in_registers.KEEPERS, patches_in_registers.KEPT = 2, 1
    compare_kernels_with_float64("cpu", cases_of(SHAPES))
    compare_tensor_cores_with_float64("cpu", [case for case in cases_of(SHAPES) if case[2] is not torch.bfloat16])
    few_channels._by_tensor_cores = lambda images: True
    compare_gradients()
    print("equal")
