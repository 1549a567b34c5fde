"""Batch norm with activation and pooling: the kernels against PyTorch in float64, compiled, and without a GPU."""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from without_gpu import assert_equal_in_the_interpreter

from netdyno.kernels import batch_norm as module
from netdyno.kernels.batch_norm import (
    activated_kernel,
    batch_norm,
    batch_norm_reference,
    by_kernels,
    gradient_kernel,
    gradient_sums_kernel,
    sums_kernel,
)

CASES = [(2, 64, 5, 7), (3, 128, 6, 4), (5, 64, 2, 3), (2, 64, 1, 9)]  # B, C, H, W
LARGE = [(128, 64, 31, 31), (64, 256, 13, 13), (100, 192, 7, 7), (128, 1024, 4, 4)]
SLOPES = [None, 0.0, 0.2]  # SiLU, ReLU, leaky ReLU
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest value
EPS = 1e-5

Function = Callable[[Tensor, Tensor, Tensor, float, float | None, bool, int], tuple[Tensor, Tensor, Tensor]]


def ways() -> Iterator[tuple[float | None, bool]]:
    """Slopes, with and without pooling."""
    return product(SLOPES, (False, True))


def inputs_of(case: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images of `dtype`, channels last, each channel about a mean of its own; weight and bias in float32."""
    draw = torch.Generator().manual_seed(0)
    channels = torch.randn(case[1], generator=draw)
    images = torch.randn(case, generator=draw) * 2 + channels[:, None, None]
    images = images.to(device, dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(case[1], generator=draw) + 0.5, torch.randn(case[1], generator=draw)
    return images, weight.to(device), bias.to(device)


def everything_of(
    function: Function,
    inputs: tuple[Tensor, ...],
    slope: float | None,
    pool: bool,
    groups: int = 1,
    gradient: Tensor | None = None,
) -> list[Tensor]:
    """Values, mean, variance and the gradients of all inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out, mean, variance = function(*leaves, EPS, slope, pool, groups)
    if gradient is None:
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(gradient.to(out.dtype))
    return [out.detach(), mean.detach(), variance.detach(), *(leaf.grad for leaf in leaves)]


def compare_with_float64(
    function: Function,
    case: tuple[int, ...],
    dtype: torch.dtype,
    slope: float | None,
    pool: bool,
    device: str,
    groups: int = 1,
) -> None:
    inputs = inputs_of(case, dtype, device)
    got = everything_of(function, inputs, slope, pool, groups)
    exact = tuple(tensor.double() for tensor in inputs)
    expected = everything_of(batch_norm_reference, exact, slope, pool, groups)
    assert got[0].dtype == dtype
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for one, wanted in zip(got, expected, strict=True):
        assert one.shape == wanted.shape
        error = (one.double() - wanted).abs().max().item()
        assert error <= TOLERANCE[dtype] * max(1.0, wanted.abs().max().item()), error


def test_kernels_equal_float64_in_the_interpreter() -> None:
    # Dynamo makes instances of autograd functions, and PyTorch warns of that.
    assert_equal_in_the_interpreter(__file__, "<class 'torch.autograd")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_kernels_equal_float64_on_the_gpu(case: tuple[int, ...], dtype: torch.dtype) -> None:
    for slope, pool in ways():
        if case in LARGE and dtype is torch.float32 and slope is not None:
            continue  # of millions some are within rounding of zero, where the slope jumps
        if not pool or min(case[2:]) > 1:
            for groups in (1, 2) if case[0] % 2 == 0 else (1,):
                compare_with_float64(batch_norm, case, dtype, slope, pool, "cuda", groups)


@pytest.mark.gpu
def test_compiled_it_is_the_same() -> None:
    for slope, pool in ways():
        compiled = torch.compile(batch_norm, fullgraph=True, dynamic=False)
        compare_with_float64(compiled, CASES[0], torch.bfloat16, slope, pool, "cuda", 2)


@pytest.mark.gpu
@pytest.mark.parametrize("pool", [False, True])
def test_what_is_no_number_is_not_hidden(pool: bool) -> None:
    images, weight, bias = inputs_of(CASES[0], torch.bfloat16, "cuda")
    images[0, 3, 1, 0] = torch.nan
    out, mean, _ = batch_norm(images, weight, bias, EPS, None, pool)
    assert out[:, 3].isnan().all()
    assert mean[0, 3].isnan()
    assert mean[0, :3].isfinite().all()


def test_channels_that_the_kernels_do_not_take() -> None:
    with pytest.raises(ValueError, match="96 channels"):
        batch_norm(torch.ones(2, 96, 4, 4), torch.ones(96), torch.ones(96), EPS, None, False)


def test_groups_are_as_if_one_came_after_the_other() -> None:
    images, weight, bias = inputs_of((6, 64, 5, 4), torch.float32, "cpu")
    found = batch_norm(images, weight, bias, EPS, 0.2, True, 3)
    for number, part in enumerate(images.chunk(3)):
        out, mean, variance = batch_norm(part, weight, bias, EPS, 0.2, True)
        torch.testing.assert_close(found[0].chunk(3)[number], out)
        torch.testing.assert_close(torch.stack([found[1][number], found[2][number]]), torch.cat([mean, variance]))
    with pytest.raises(ValueError, match="6 images cannot be cut into 4 groups"):
        batch_norm(images, weight, bias, EPS, 0.2, True, 4)


@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize("slope", [None, 0.2])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(
    "kernel", [sums_kernel, activated_kernel, gradient_sums_kernel, gradient_kernel], ids=lambda kernel: kernel.__name__
)
def test_kernels_compile_without_a_gpu(kernel, pool: bool, slope: float | None, capability: int) -> None:
    constants = {"C": 256, "IN_HEIGHT": 15, "IN_WIDTH": 15, "POOL": pool, "SLOPE": slope, "TURNS": 8, "GROUPS": 2}
    constants |= {"ROWS": 32, "CHANNELS": module.CHANNELS}
    values = {name: value for name, value in constants.items() if name in kernel.arg_names}
    pointers = dict.fromkeys(("images", "pooled", "gradient", "out"), "fp16") | {"place": "u8"}
    pointers |= dict.fromkeys(("scale", "shift", "partial", "of_value", "of_one"), "fp32")
    signature = {
        name: "constexpr" if name in values else f"*{pointers[name]}" if name in pointers else "i32"
        for name in kernel.arg_names
    }
    triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", capability, 32))


if __name__ == "__main__":
    module.PROGRAMS = 2  # several blocks for a program
    for number, (slope, pool) in enumerate(ways()):
        for case in CASES:
            if not pool or min(case[2:]) > 1:
                kind = (torch.float32, torch.float16, torch.bfloat16)[number % 3]
                compare_with_float64(by_kernels, case, kind, slope, pool, "cpu")
                if case[0] % 2 == 0:
                    compare_with_float64(by_kernels, (2 * case[0], *case[1:]), kind, slope, pool, "cpu", 2)
        compiled = torch.compile(by_kernels, fullgraph=True, dynamic=False, backend="aot_eager")
        compare_with_float64(compiled, CASES[0], torch.float32, slope, pool, "cpu")
    print("equal")
