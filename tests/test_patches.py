"""Convolutions as products over patches, against PyTorch's own."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from without_gpu import assert_equal_in_the_interpreter
from without_gpu import compiled as compiled_for

from netdyno.kernels import patches
from netdyno.kernels.patches import Window, fold_kernel, fold_reference, fold_triton

# B, C, O, H, W, taps, stride, padding: first layers, a generator's last, and what is odd
CASES = [
    (2, 3, 8, 9, 7, 3, 1, 1),
    (3, 1, 32, 8, 8, 3, 1, 0),
    (2, 3, 6, 16, 16, 5, 2, 2),
    (2, 3, 6, 16, 16, 4, 2, 1),
    (1, 4, 5, 7, 10, 4, 3, 0),
    (2, 15, 2, 4, 4, 1, 1, 0),
    (2, 3, 2, 1, 1, 5, 1, 2),
]


def compare(ours: Callable[..., Tensor], torchs: Callable[..., Tensor], inputs: list[Tensor], device: str) -> None:
    """Results, layouts and all gradients."""
    found = []
    for function in (ours, torchs):
        fresh = [tensor.to(device).requires_grad_() for tensor in (tensor.clone() for tensor in inputs)]
        out = function(*fresh)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view(out.shape)).sum().backward()
        found.append([out.detach(), *(tensor.grad for tensor in fresh)])
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def both_ways(case: tuple[int, ...], prepare: Callable[[Callable], Callable], device: str) -> None:
    b, c, o, h, w, taps, stride, padding = case
    images = torch.randn(b, c, h, w, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(o, c, taps, taps, dtype=torch.float64)
    many, few = torch.randn(o, dtype=torch.float64), torch.randn(c, dtype=torch.float64)
    ours = prepare(lambda *inputs: patches.conv(*inputs, stride, padding))
    compare(ours, lambda *inputs: F.conv2d(*inputs, stride, padding), [images, weight, many], device)

    pixels = F.conv2d(images, weight, many, stride, padding)
    for extra in range(stride):
        ours = prepare(lambda *inputs, extra=extra: patches.conv_transpose(*inputs, stride, padding, extra))
        torchs = lambda *inputs, extra=extra: F.conv_transpose2d(*inputs, stride, padding, extra)  # noqa: E731
        compare(ours, torchs, [pixels, weight, few], device)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_convolutions(case: tuple[int, ...]) -> None:
    both_ways(case, lambda function: function, "cpu")


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("case", [CASES[0], CASES[2]])
def test_equal_when_compiled(case: tuple[int, ...]) -> None:
    both_ways(case, compiled, "cpu")


@pytest.mark.gpu
def test_equal_on_a_gpu() -> None:
    both_ways(CASES[2], compiled, "cuda")


def fold_exactly(case: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """The same values summed up in the same order: nothing may differ."""
    b, c, _, h, w, side, stride, padding = case
    window = Window(side, stride, padding)
    rows = b * ((h + 2 * padding - side) // stride + 1) * ((w + 2 * padding - side) // stride + 1)
    folded = torch.randn(rows, window.row(c), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    images = fold_triton(folded, *window, [b, c, h, w])
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, fold_reference(folded, window, (b, c, h, w)))


def test_the_kernel_folds_as_the_reference_does_in_the_interpreter() -> None:
    assert_equal_in_the_interpreter(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [*CASES, (128, 3, 1, 64, 64, 5, 2, 2)], ids=str)
def test_the_kernel_folds_as_the_reference_does(case: tuple[int, ...], dtype: torch.dtype) -> None:
    fold_exactly(case, dtype, "cuda")


@pytest.mark.parametrize(("capability", "dtype"), [(75, "fp16"), (75, "fp32"), (90, "bf16")])
def test_the_kernel_compiles_without_a_gpu(capability: int, dtype: str) -> None:
    values = {"HEIGHT": 64, "WIDTH": 64, "CHANNELS": 3, "OUT_HEIGHT": 32, "OUT_WIDTH": 32}
    values |= {"SIDE": 5, "STRIDE": 2, "PADDING": 2, "ROW": 80, "BLOCK": patches.BLOCK}
    made = compiled_for(fold_kernel, values, dict.fromkeys(("patches", "images"), dtype), capability, {})
    assert made.metadata.shared == 0
    assert ("bf16" in made.asm["ttir"]) == (dtype == "bf16")


def test_without_a_bias() -> None:
    images, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    out = patches.conv(images, weight, None, 1, 1)
    torch.testing.assert_close(out, F.conv2d(images, weight, padding=1), atol=1e-5, rtol=1e-5)
    back = patches.conv_transpose(out, weight, None, 1, 1, 0)
    torch.testing.assert_close(back, F.conv_transpose2d(out, weight, padding=1), atol=1e-4, rtol=1e-5)


def test_autocast_makes_it_a_product_of_16_bits() -> None:
    images, weight, bias = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        out = patches.conv(images, weight, bias, 1, 1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), F.conv2d(images, weight, bias, padding=1), atol=0.1, rtol=0.02)


if __name__ == "__main__":
    for one in CASES:
        for kind in (torch.float16, torch.float32, torch.float64):
            fold_exactly(one, kind, "cpu")
    print("equal")
