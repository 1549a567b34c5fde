"""The augmentation kernel: the reference against numpy, the kernel against the reference, compilation without a GPU."""

import itertools

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from without_gpu import assert_equal_in_the_interpreter

from netdyno.kernels.augment import BLOCK, Moves, augment, augment_kernel, augment_reference, augment_triton

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SHAPES = [(5, 7, 9, 3), (3, 32, 32, 3), (4, 28, 28, 1), (2, 1, 1, 1), (3, 5, 5, 4), (2, 3, 400, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # relative: a rounding


def case(shape: tuple[int, int, int, int], device: str = "cpu") -> tuple[Tensor, Tensor, Moves]:
    """images, index and moves: repeated rows, every corner of the range of shifts, both ways round."""
    draw = torch.Generator().manual_seed(0)
    s, h, w, _ = shape
    pad = min(4, h - 1, w - 1)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    shift = torch.tensor([[y, x] for y in (-pad, 0, pad) for x in (-pad, 0, pad)] * 2, dtype=torch.int32)
    flip = torch.tensor([False, True] * 9)
    index = torch.randint(0, s, (18,), generator=draw)
    return images.to(device), index.to(device), Moves(shift.to(device), flip.to(device))


def constants(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (MEAN + MEAN)[:channels], (STD + STD)[:channels]


def compare_kernel_with_reference(device: str) -> None:
    for shape in SHAPES:
        images, index, moves = case(shape, device)
        mean, std = constants(shape[3])
        for dtype, moved in itertools.product(DTYPES, (moves, None)):
            expected = augment_reference(images, index, moved, mean, std, dtype)
            got = augment_triton(images, index, moved, mean, std, dtype)
            assert got.dtype == dtype
            assert got.shape == expected.shape
            assert got.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=TOLERANCE[dtype])
        # as loaders call it: uint8 flips, slices that are not aligned to 16 bytes
        sliced = (images, index[1:4], Moves(moves.shift[1:4], moves.flip.to(torch.uint8)[1:4]))
        torch.testing.assert_close(
            augment_triton(*sliced, mean, std, torch.float32),
            augment_reference(*sliced, mean, std, torch.float32),
            atol=1e-6,
            rtol=1e-6,
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_pad_crop_flip_normalise(shape: tuple[int, int, int, int]) -> None:
    images, index, (shift, flip) = case(shape)
    _, h, w, c = shape
    mean, std = constants(c)
    got = augment_reference(images, index, Moves(shift, flip), mean, std, torch.float32)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for row, (y, x), mirrored, image in zip(index, shift.tolist(), flip, got, strict=True):
        pad = max(abs(y), abs(x))
        padded = np.pad(images[row].numpy(), ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
        crop = padded[pad + y : pad + y + h, pad + x : pad + x + w]
        expected = (crop[:, ::-1] if mirrored else crop) / 255
        expected = (expected - np.array(mean)) / np.array(std)
        np.testing.assert_allclose(image.numpy(), expected.transpose(2, 0, 1), atol=1e-6)


def test_nothing_moved_is_normalisation_alone() -> None:
    images, index, moves = case((6, 8, 8, 3))
    expected = (images[index] / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    for still in (Moves(*map(torch.zeros_like, moves)), None):
        got = augment(images, index, still, MEAN, STD, torch.bfloat16)
        assert torch.equal(got, expected.permute(0, 3, 1, 2).bfloat16())


def test_kernel_equals_reference_in_the_interpreter() -> None:
    assert_equal_in_the_interpreter(__file__)


@pytest.mark.gpu
def test_kernel_equals_reference_on_the_gpu() -> None:
    compare_kernel_with_reference("cuda")


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    images = torch.zeros(2**31 // 3072 + 2, 32, 32, 3, dtype=torch.uint8, device="cuda")
    images[-1] = 255
    index = torch.tensor([len(images) - 1, 0], device="cuda")
    zeros = torch.zeros(2, 2, dtype=torch.int32, device="cuda")
    for still in (Moves(zeros, zeros[:, 0].bool()), None):
        got = augment(images, index, still, (0.0,) * 3, (1.0,) * 3, torch.float32)
        assert got.mean(dim=(1, 2, 3)).tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize(("capability", "out"), [(75, "fp16"), (75, "fp32"), (90, "fp16"), (90, "bf16"), (90, "fp32")])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("moved", [True, False])
def test_kernel_compiles_without_a_gpu(moved: bool, capability: int, out: str, channels: int) -> None:
    mean, std = constants(channels)
    constexprs = {"SCALE": std, "OFFSET": mean, "H": 28, "W": 28, "C": channels, "BLOCK": BLOCK}
    signature = {"images": "*u8", "index": "*i64", "shift": "*i32", "flip": "*u8", "out": f"*{out}"}
    if not moved:
        constexprs |= {"shift": None, "flip": None}
    aligned = {(position,): [["tt.divisibility", 16]] for position in (0, 4)}  # images and out, as on launch
    source = ASTSource(augment_kernel, signature | dict.fromkeys(constexprs, "constexpr"), constexprs, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.metadata.shared <= 64 * 1024  # what a block has on Turing
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    assert ("bf16" in ptx) == (out == "bf16")
    assert "st.global.v4.b32" in ptx  # 16 bytes a thread: coalesced
    assert ("ld.global.v2.b32" in ptx) != moved  # 8 values a thread in one


if __name__ == "__main__":
    compare_kernel_with_reference("cpu")
    print("equal")
