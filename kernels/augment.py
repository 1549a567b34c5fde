"""Stored images to network input in one pass: gather, reflect-padded crop, flip, normalise, cast, channels last.

Bytes moved for each image: H·W·C read and H·W·C·itemsize written, and nothing else of size. A CIFAR image in bf16 moves
3 KiB + 6 KiB, so the copy limit of a T4 (about 250 GB/s) allows 27 M images/s and that of an H200 (4.3 TB/s) 467 M.

Shapes: S stored images, B images of the batch, H height, W width, C channels (1 or 3). Elements of an image are
numbered in H, W, C order, the order in memory of a channels-last output too: neighbouring threads write neighbours, and
where nothing is moved they read neighbours, too, several at a time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements a program: 8 for each thread of 4 warps, so that a 16-bit store is 16 bytes a thread


class Moves(NamedTuple):
    """How each image of a batch is moved; None in its place: none is."""

    shift: Tensor  # int [B, 2], (dy, dx) of the crop against the image, absolute values below H and W
    flip: Tensor  # bool or uint8 [B], mirrors left-right after the crop


def augment_reference(
    images: Tensor,
    index: Tensor,
    moves: Moves | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Normalised crops of `images[index]`, in plain PyTorch.

    images: uint8 [S, H, W, C]. index: int64 [B], rows of images; rows may repeat. Beyond the border an image that is
    moved is reflected without repeating the edge pixel. mean, std: per channel, of values scaled to [0, 1]. Returns
    [B, C, H, W] of `dtype`, channels last in memory.
    """
    _, h, w, c = images.shape
    if moves is None:
        pixels = images.index_select(0, index)
    else:
        y = torch.arange(h, device=images.device)
        x = torch.arange(w, device=images.device)
        x_BW = torch.where(moves.flip.bool()[:, None], w - 1 - x, x) + moves.shift[:, 1:]
        y_BH = y + moves.shift[:, :1]
        row_BH = index[:, None] * h + _reflect(y_BH, h)
        pixel_BHW = row_BH[:, :, None] * w + _reflect(x_BW, w)[:, None, :]
        pixels = images.reshape(-1, c).index_select(0, pixel_BHW.flatten())
    # Line by line, because CPUs cannot vectorise over three channels: 2.3 ms → 0.5 ms for 512 images of 32×32×3.
    values = pixels.view(len(index), h, w * c).float().div_(255)
    values.sub_(torch.tensor(mean, device=images.device).repeat(w))
    values.div_(torch.tensor(std, device=images.device).repeat(w))
    return values.view(len(index), h, w, c).to(dtype).permute(0, 3, 1, 2)


def _reflect(position: Tensor, size: int) -> Tensor:
    return size - 1 - (size - 1 - position.abs()).abs()


# Batches are slices of longer tensors: specialising on their alignment would compile a second kernel in mid-run.
@triton.jit(do_not_specialize_on_alignment=["index", "shift", "flip"])
def augment_kernel(
    images,
    index,
    shift,
    flip,
    out,
    SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs: (image of the batch, block of its elements). SCALE, OFFSET: C floats each, value · SCALE + OFFSET.

    shift, flip: None where nothing is moved.
    """
    n = tl.program_id(0).to(tl.int64)  # 64 bits: S·H·W·C may exceed 2³¹
    row = tl.load(index + n).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < H * W * C
    c = element % C
    source = element
    if shift is not None:
        dy = tl.load(shift + 2 * n).to(tl.int32)
        dx = tl.load(shift + 2 * n + 1).to(tl.int32)
        mirrored = tl.load(flip + n) != 0
        x = element // C % W
        y = element // (C * W) + dy
        x = tl.where(mirrored, W - 1 - x, x) + dx
        y = H - 1 - tl.abs(H - 1 - tl.abs(y))
        x = W - 1 - tl.abs(W - 1 - tl.abs(x))
        source = (y * W + x) * C + c
    value = tl.load(images + row * (H * W * C) + source, mask=inside, other=0).to(tl.float32)

    scale = tl.full([BLOCK], SCALE[0], tl.float32)
    offset = tl.full([BLOCK], OFFSET[0], tl.float32)
    for channel in tl.static_range(1, C):
        scale = tl.where(c == channel, SCALE[channel], scale)
        offset = tl.where(c == channel, OFFSET[channel], offset)
    result = value * scale + offset
    tl.store(out + n * (H * W * C) + element, result.to(out.dtype.element_ty), mask=inside)


def augment_triton(
    images: Tensor,
    index: Tensor,
    moves: Moves | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """`augment_reference` as one kernel; equal to it within a rounding of float32, then of `dtype`.

    out: where the result goes, [B, C, H, W] of `dtype`, channels last; None: new memory.
    """
    _, h, w, c = images.shape
    if out is None:
        out = torch.empty(len(index), h, w, c, dtype=dtype, device=images.device).permute(0, 3, 1, 2)
    if out.shape != (len(index), c, h, w) or out.dtype != dtype or not out.permute(0, 2, 3, 1).is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, stride {out.stride()}: no place for the result")
    shift = flip = None
    if moves is not None:
        shift, flip = moves.shift.contiguous(), moves.flip.contiguous().view(torch.uint8)
    grid = (len(index), triton.cdiv(h * w * c, BLOCK))
    with torch.cuda.device_of(images):
        augment_kernel[grid](
            images.contiguous(),
            index.contiguous(),
            shift,
            flip,
            out,
            SCALE=tuple(1 / (255 * s) for s in std),
            OFFSET=tuple(-m / s for m, s in zip(mean, std, strict=True)),
            H=h,
            W=w,
            C=c,
            BLOCK=BLOCK,
        )
    return out


def augment(
    images: Tensor,
    index: Tensor,
    moves: Moves | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """`augment_reference` (see there), by the Triton kernel on CUDA; into `out`, if given (see `augment_triton`)."""
    if images.is_cuda:
        return augment_triton(images, index, moves, mean, std, dtype, out)
    result = augment_reference(images, index, moves, mean, std, dtype)
    return result if out is None else out.copy_(result)
