"""First layers: the kernels against PyTorch in float64, their gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from without_gpu import assert_equal_in_the_interpreter

from netdyno.kernels import first_layer, patches_in_registers
from netdyno.kernels.first_layer import conv, conv_reference, conv_transpose, conv_triton, gradient_triton, summed

# B, C, O, H, W, side, stride, padding: those of networks, and what is odd
CASES = [
    (2, 3, 32, 12, 9, 3, 1, 1),
    (3, 1, 16, 8, 8, 3, 1, 0),
    (1, 1, 32, 11, 10, 5, 2, 2),
    (2, 3, 16, 7, 7, 4, 2, 1),
    (1, 4, 64, 3, 3, 3, 1, 2),
    (2, 3, 24, 9, 8, 2, 1, 0),  # the whitening layer's
    (2, 3, 16, 11, 10, 5, 2, 2),  # in five pieces
    (2, 3, 16, 8, 10, 4, 2, 1),
]
STRIDED = [case for case in CASES if case[6] == 2]  # as those whose images learn, and whose transposes are last layers
LARGE = [
    (64, 3, 24, 32, 32, 2, 1, 0),
    (64, 3, 32, 32, 32, 3, 1, 1),
    (32, 3, 128, 32, 32, 3, 1, 1),
    (64, 1, 32, 28, 28, 3, 1, 0),
    (128, 3, 128, 64, 64, 5, 2, 2),  # dcgan's
    (128, 3, 64, 64, 64, 4, 2, 1),
]
# Of the largest value. tf32: what tensor cores make of fp32, where they have it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
TF32 = 2e-3


def inputs_of(case: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images, channels last, of `dtype`; weight and bias in float32, as networks keep them."""
    b, c, o, h, w, side, *_ = case
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(b, c, h, w, generator=draw).to(device, dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(o, c, side, side, generator=draw).to(device) / (side**2 * c) ** 0.5
    return images, weight, torch.randn(o, generator=draw).to(device)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(1.0, expected.double().abs().max().item()), error


def compare_with_float64(case: tuple[int, ...], dtype: torch.dtype, activation: str, device: str) -> None:
    images, weight, bias = inputs_of(case, dtype, device)
    *_, stride, padding = case
    tolerance = TF32 if dtype is torch.float32 and device == "cuda" else TOLERANCE[dtype]
    # What tensor cores multiply is of the images' type: the reference starts from the same numbers.
    exact = [images.double(), weight.to(dtype).double(), bias.double()]
    expected = conv_reference(*exact, stride, padding, activation)
    out = conv_triton(images, weight, bias, stride, padding, activation)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    close(out, expected, tolerance)
    if activation == "silu":
        return  # whose weights do not learn

    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    # Slopes by the kernel's own outputs: one near zero may be on the other side than the reference's.
    below = {"none": 1.0, "relu": 0.0, "leaky_relu": 0.2, "elu": out.double() + 1}[activation]
    slope = gradient.double() * torch.where(out <= 0, below, torch.ones_like(expected))
    of_weight = torch.nn.grad.conv2d_weight(exact[0], weight.shape, slope, stride, padding)
    partial = gradient_triton(images, gradient, out, case[5], stride, padding, activation)
    for got, wanted in zip(summed(partial, *weight.shape[1:3]), (of_weight, slope.sum((0, 2, 3))), strict=True):
        close(got, wanted, tolerance)


def sum_exactly(case: tuple[int, ...], device: str) -> None:
    b, c, o, h, w, side, stride, padding = case
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(-2, 3, (b, c, h, w), generator=draw).to(device, torch.float16)
    images = images.contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-2, 3, (o, c, side, side), generator=draw).to(device, torch.float32)
    bias = torch.full((o,), 200.0, device=device)  # every output is above zero
    exact = [tensor.double().requires_grad_() for tensor in (images, weight, bias)]
    expected = conv_reference(*exact, stride, padding, "relu")
    out = conv_triton(images, weight, bias, stride, padding, "relu")
    assert torch.equal(out.double(), expected)
    gradient = torch.randint(-1, 2, expected.shape, generator=draw).to(device, torch.float16)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    expected.backward(gradient.double())
    partial = gradient_triton(images, gradient, out, side, stride, padding, "relu")
    for got, leaf in zip(summed(partial, *weight.shape[1:3]), exact[1:], strict=True):
        assert torch.equal(got.double(), leaf.grad)


def test_kernels_equal_float64_in_the_interpreter() -> None:
    assert_equal_in_the_interpreter(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", list(first_layer.ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_kernels_equal_float64_on_the_gpu(case: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
    compare_with_float64(case, dtype, activation, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_whole_numbers_are_summed_up_exactly_on_the_gpu(case: tuple[int, ...]) -> None:
    """No pixel is lost or counted twice: sums of small whole numbers have no rounding, however they are ordered."""
    sum_exactly(case, "cuda")


@pytest.mark.gpu
def test_what_is_no_number_is_not_hidden() -> None:
    images, weight, bias = inputs_of(CASES[0], torch.bfloat16, "cuda")
    weight[0, 0, 1, 1] = torch.nan
    for activation in ("relu", "elu"):
        out = conv(images, weight, bias, 1, 1, activation)
        assert out[:, 0].isnan().all()
        assert out[:, 1:].isfinite().all()


@pytest.mark.gpu
def test_gradients_through_torch_compile() -> None:
    images, weight, bias = inputs_of(LARGE[0], torch.bfloat16, "cuda")
    found = []
    for function in (conv_reference, torch.compile(conv, fullgraph=True)):
        parameters = [tensor.clone().requires_grad_() for tensor in (weight, bias)]
        out = function(images, *parameters, 1, 1, "relu")
        out.float().square().mean().backward()
        found.append([out.detach(), *(parameter.grad for parameter in parameters)])
    for got, expected in zip(*reversed(found), strict=True):
        close(got, expected, 2e-2)


def compare_images_gradients(
    case: tuple[int, ...], dtype: torch.dtype, activation: str, device: str, compiled: bool = False
) -> None:
    """Asked for without those of the weights, as a generator asks for it."""
    *_, stride, padding = case
    images, weight, bias = inputs_of(case, dtype, device)
    exact = weight.to(dtype).double()
    torch._dynamo.reset()  # it stops at eight forms of one function
    function = torch.compile(conv, fullgraph=True) if compiled else conv
    images.requires_grad_()
    out = function(images, weight, bias, stride, padding, activation)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(gradient)
    below = {"none": 1.0, "relu": 0.0, "leaky_relu": 0.2, "elu": out.double() + 1}[activation]
    slope = gradient.double() * torch.where(out <= 0, below, torch.ones_like(gradient, dtype=torch.double))
    assert images.grad is not None
    tolerance = TF32 if dtype is torch.float32 and device == "cuda" else TOLERANCE[dtype]
    close(images.grad, torch.nn.grad.conv2d_input(images.shape, exact, slope, stride, padding), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "elu"])
@pytest.mark.parametrize("case", [*STRIDED, LARGE[-2]], ids=str)
def test_gradients_of_the_images_too(
    case: tuple[int, ...], activation: str, compiled: bool, dtype: torch.dtype
) -> None:
    compare_images_gradients(case, dtype, activation, "cuda", compiled)


def transposed(case: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """What goes into the transpose of a case: pixels, weight and bias, and the output padding that its size takes."""
    b, c, o, h, w, side, stride, padding = case
    _, weight, _ = inputs_of(case, dtype, device)
    size = [(length + 2 * padding - side) // stride + 1 for length in (h, w)]
    draw = torch.Generator().manual_seed(2)
    pixels = torch.randn(b, o, *size, generator=draw).to(device, dtype).contiguous(memory_format=torch.channels_last)
    return pixels, weight, torch.randn(c, generator=draw).to(device), (h + 2 * padding - side) % stride


def compare_transposes(case: tuple[int, ...], dtype: torch.dtype, device: str, compiled: bool = False) -> None:
    *_, stride, padding = case
    pixels, weight, bias, extra = transposed(case, dtype, device)
    torch._dynamo.reset()  # it stops at eight forms of one function
    function = torch.compile(conv_transpose, fullgraph=True) if compiled else conv_transpose
    found = []
    for way, kind in ((function, dtype), (F.conv_transpose2d, torch.double)):
        rounded = weight.to(dtype).to(torch.float32 if way is function else kind)
        leaves = [given.detach().clone().requires_grad_() for given in (pixels.to(kind), rounded, bias.to(kind))]
        out = way(*leaves, stride, padding, extra)
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        out.backward(gradient.to(out.dtype).contiguous(memory_format=torch.channels_last))
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    tolerance = TF32 if dtype is torch.float32 and device == "cuda" else TOLERANCE[dtype]
    for got, expected in zip(*found, strict=True):
        close(got, expected, tolerance)


@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_the_transpose_on_a_cpu(case: tuple[int, ...]) -> None:
    compare_transposes(case, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*STRIDED, LARGE[-2]], ids=str)
def test_the_transpose_on_the_gpu(case: tuple[int, ...], dtype: torch.dtype, compiled: bool) -> None:
    compare_transposes(case, dtype, "cuda", compiled)


@pytest.mark.parametrize("activation", ["leaky_relu", "elu", "silu"])
@pytest.mark.parametrize("by_images", [False, True])
def test_on_a_cpu_it_equals_the_reference(by_images: bool, activation: str) -> None:
    found = []
    for function in (conv, conv_reference):
        images, weight, bias = (tensor.double() for tensor in inputs_of(CASES[0], torch.float32, "cpu"))
        leaves = [weight, bias, *([images] if by_images else [])]
        for leaf in leaves:
            leaf.requires_grad_()
        out = function(images, weight, bias, 1, 1, activation)
        out.square().sum().backward()
        found.append([out, *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_what_the_kernels_do_not_take() -> None:
    images = torch.ones(1, 3, 8, 8)
    assert first_layer.takes(torch.ones(128, 8, 3, 3))
    assert not first_layer.takes(torch.ones(128, 4, 5, 5))  # whose patches are too long
    for weight in (
        torch.ones(32, 3, 6, 6),
        torch.ones(20, 3, 3, 3),
        torch.ones(256, 3, 3, 3),
        torch.ones(32, 2, 3, 3),
    ):
        with pytest.raises(ValueError, match="on images of 3 channels"):
            conv(images, weight, torch.ones(len(weight)), 1, 1, "relu")
    with pytest.raises(ValueError, match="none of none, relu, leaky_relu, elu, silu"):
        conv(images, torch.ones(32, 3, 3, 3), torch.ones(32), 1, 1, "tanh")


if __name__ == "__main__":
    first_layer.runs_on = lambda images: True
    patches_in_registers.PROGRAMS = patches_in_registers.PROGRAMS_OF_MOST = 2  # several blocks for a program
    patches_in_registers.KEEPERS, patches_in_registers.KEPT = 2, 1
    for n, one in enumerate(CASES):
        for kind in (torch.float32, torch.float16):
            compare_with_float64(one, kind, ("relu", "elu", "silu", "leaky_relu")[n % 4], "cpu")
            if one in STRIDED:
                compare_with_float64(one, kind, "leaky_relu", "cpu")
                compare_transposes(one, kind, "cpu")
                for activation in ("none", "relu", "leaky_relu", "elu"):
                    compare_images_gradients(one, kind, activation, "cpu")
        sum_exactly(one, "cpu")
    print("equal")
