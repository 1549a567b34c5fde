"""Convolutions of few channels on tensor cores, which Triton has from sm_80 on: patches put together in registers.

As a product over patches (see `patches`) the patches are written and read, bias and activation pass over the output
once more, and over its gradient twice. Here memory is passed once: images read and outputs written forward, and
backward both read beside the outputs' gradient. The images' gradient alone goes by patches that are written: a product
over the outputs' gradient, with the activation's slope taken in. The references are those of `few_channels` and
`first_layer`, which take it.

Shapes: images [B, C, H, W], outputs [B, O, HO, WO], channels last. A patch, the values under one pixel, is put together
line by line of its taps: a line's values lie side by side. A piece is one line, where its pixels can be loaded as a
whole or all lines are too many, or all lines; behind its values come, in the first piece, a one, whose gradient is the
bias's, and zeros up to LENGTH, a power of two. A program's block is a tile of `COLUMNS` pixels in `ROWS` rows, or
`ROWS_OF_MOST`, of one image.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS, ROWS = 32, 4  # of a tile: a pixel for each of 128 threads …
ROWS_OF_MOST = 2  # … but forward of the most pieces, all of which a thread holds: two threads a pixel
NARROWEST = 16  # side of a product
LONGEST = 64  # values of a piece …
MOST_PIECES = 5  # … and pieces of a patch, at most
LEAK = tl.constexpr(0.2)  # slope of "leaky_relu" below zero
PROGRAMS = 396  # of the weights' gradient, about: what an H100 holds at once, three on each multiprocessor …
PROGRAMS_OF_MOST = 264  # … and of the most pieces, whose sums take more registers, two
KEEPERS = 264  # programs forward, at most, where each keeps the weights: two on each multiprocessor
KEPT = 33  # outputs from which on each does: 64 and 128 gain by it (H200); of 32 and fewer a program is for one tile
STAGES = 3  # … in which tiles are under way, where that gains anything (H200) and shared memory has room for them
BLOCK = 64  # pixels of a program's block of `patches_gradient_kernel`
STAGED = range(17, 65)  # outputs, in a 16-bit type


@triton.jit
def _patches(
    image,
    y,
    x,
    there,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FIRST: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """The piece from line FIRST on of the patches under the pixels (y, x): [pixels, LENGTH]; zeros if not `there`."""
    k = tl.arange(0, LENGTH)
    tap = k // CHANNELS
    down, across = FIRST + tap // SIDE, tap % SIDE
    top, left = y * STRIDE - PADDING, x * STRIDE - PADDING
    at = ((top * WIDTH + left) * CHANNELS)[:, None] + ((down * WIDTH + across) * CHANNELS + k % CHANNELS)[None, :]
    inside = there[:, None] & (tap < LINES * SIDE)[None, :]
    if PADDING > 0:
        row, column = top[:, None] + down[None, :], left[:, None] + across[None, :]
        inside &= (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    values = tl.load(image + at, mask=inside, other=0.0)
    if FIRST == 0:
        values = tl.where(there[:, None] & (k == LINES * SIDE * CHANNELS)[None, :], 1.0, values).to(values.dtype)
    return values


@triton.jit
def _pixels(tile, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Row and column of each pixel of an image's `tile`, and whether the image has it."""
    lane = tl.arange(0, COLUMNS * ROWS)
    tiles_across: tl.constexpr = (OUT_WIDTH + COLUMNS - 1) // COLUMNS
    y = tile // tiles_across * ROWS + lane // COLUMNS
    x = tile % tiles_across * COLUMNS + lane % COLUMNS
    return y, x, (y < OUT_HEIGHT) & (x < OUT_WIDTH)


@triton.jit
def _task(
    turn,
    tasks,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """What a program does in a turn: the image's number, and the pixels of its tile, as `_pixels` gives them."""
    task = turn * tl.num_programs(0) + tl.program_id(0)
    y, x, there = _pixels(task % TILES, OUT_HEIGHT, OUT_WIDTH, COLUMNS, ROWS)
    return (tl.minimum(task, tasks - 1) // TILES).to(tl.int64), y, x, there & (task < tasks)


@triton.jit
def _factors(
    weight,
    weight_o,
    weight_c,
    weight_y,
    weight_x,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SIDE: tl.constexpr,
    MIRRORED: tl.constexpr,
    FIRST: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What the piece of a patch from line FIRST on is multiplied by: [LENGTH, WIDE]."""
    k = tl.arange(0, LENGTH)
    o = tl.arange(0, WIDE)
    tap = FIRST * SIDE + k // CHANNELS
    tap = SIDE * SIDE - 1 - tap if MIRRORED else tap
    at = weight + (k % CHANNELS * weight_c + tap // SIDE * weight_y + tap % SIDE * weight_x)[:, None]
    used = (k < LINES * SIDE * CHANNELS)[:, None] & (o < OUTPUTS)[None, :]
    return tl.load(at + o[None, :] * weight_o, mask=used, other=0.0)


@triton.jit
def _all_patches(
    image,
    y,
    x,
    there,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """All pieces of `_patches`."""
    pieces: tl.tuple = ()
    for first in tl.static_range(0, SIDE, LINES):
        pieces += (_patches(image, y, x, there, HEIGHT, WIDTH, CHANNELS, SIDE, STRIDE, PADDING, first, LINES, LENGTH),)
    return pieces


@triton.jit
def conv_kernel(
    images,
    weight,
    bias,
    out,
    tasks,
    weight_o,
    weight_c,
    weight_y,
    weight_x,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    TURNS: tl.constexpr,
    MIRRORED: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Programs: parts of the tasks, which are tiles of images, TILES of each; TURNS a program.

    In several turns the weights stay on chip, and a tile's patches are on their way while the tile before is computed.
    MIRRORED: the taps. out: [B, HO, WO, O].
    """
    o = tl.arange(0, WIDE)
    factors: tl.tuple = ()
    for first in tl.static_range(0, SIDE, LINES):
        of_piece = _factors(
            weight,
            weight_o,
            weight_c,
            weight_y,
            weight_x,
            CHANNELS,
            OUTPUTS,
            SIDE,
            MIRRORED,
            first,
            LINES,
            LENGTH,
            WIDE,
        )
        factors += (of_piece.to(images.dtype.element_ty),)
    if BIASED:
        shift = tl.load(bias + o, mask=o < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    n, y, x, there = _task(0, tasks, OUT_HEIGHT, OUT_WIDTH, COLUMNS, ROWS, TILES)
    image = images + n * (HEIGHT * WIDTH * CHANNELS)
    values = _all_patches(image, y, x, there, HEIGHT, WIDTH, CHANNELS, SIDE, STRIDE, PADDING, LINES, LENGTH)
    for turn in range(TURNS):
        if TURNS > 1:
            next_n, next_y, next_x, next_there = _task(turn + 1, tasks, OUT_HEIGHT, OUT_WIDTH, COLUMNS, ROWS, TILES)
            image = images + next_n * (HEIGHT * WIDTH * CHANNELS)
            next_values = _all_patches(
                image, next_y, next_x, next_there, HEIGHT, WIDTH, CHANNELS, SIDE, STRIDE, PADDING, LINES, LENGTH
            )
        total = tl.zeros([COLUMNS * ROWS, WIDE], tl.float32)
        for piece in tl.static_range(SIDE // LINES):
            total = tl.dot(values[piece], factors[piece], total)
        if BIASED:
            total += shift
        if ACTIVATION == "relu":
            total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
        elif ACTIVATION == "leaky_relu":
            total = tl.where(total > 0, total, LEAK * total)
        elif ACTIVATION == "elu":
            total = tl.where(total > 0, total, tl.exp(total) - 1)
        elif ACTIVATION == "silu":
            total = total * tl.sigmoid(total)
        at = out + n * (OUT_HEIGHT * OUT_WIDTH * OUTPUTS) + ((y * OUT_WIDTH + x) * OUTPUTS)[:, None] + o[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=there[:, None] & (o < OUTPUTS)[None, :])
        if TURNS > 1:
            n, y, x, there, values = next_n, next_y, next_x, next_there, next_values


@triton.jit
def _before_activation(gradient, out, there, ACTIVATION: tl.constexpr):
    """The gradient of what was activated, from that of `out`, what came of it; pointers to both."""
    tl.static_assert(ACTIVATION != "silu", "whose slope is not told by its value")
    slope = tl.load(gradient, mask=there, other=0.0)
    if ACTIVATION != "none":
        height = tl.load(out, mask=there, other=0.0).to(tl.float32)
        # of ReLU: what is no number passes; of ELU: its slope below zero is its value and one
        if ACTIVATION == "relu":
            below = 0.0
        elif ACTIVATION == "leaky_relu":
            below = slope.to(tl.float32) * LEAK
        else:
            below = slope.to(tl.float32) * (height + 1)
        slope = tl.where(height <= 0, below, slope.to(tl.float32)).to(slope.dtype)
    return slope


@triton.jit
def gradient_kernel(
    images,
    gradient,
    out,
    partial,
    tasks,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Programs: parts of the tasks, which are tiles of images, TILES of each; TURNS a program.

    gradient, out: [B, HO, WO, O]. partial: fp32 [parts, pieces, LENGTH, O]. The parts are summed up later, in one
    order, so that the result is the same each time.
    """
    PIECES: tl.constexpr = SIDE // LINES
    part = tl.program_id(0)
    o = tl.arange(0, WIDE)
    totals: tl.tuple = ()  # of each piece
    for _ in tl.static_range(PIECES):
        totals += (tl.zeros([LENGTH, WIDE], tl.float32),)
    for turn in range(TURNS):
        n, y, x, there = _task(turn, tasks, OUT_HEIGHT, OUT_WIDTH, COLUMNS, ROWS, TILES)
        at = n * (OUT_HEIGHT * OUT_WIDTH * OUTPUTS)
        place = ((y * OUT_WIDTH + x) * OUTPUTS)[:, None] + o[None, :]
        stored = there[:, None] & (o < OUTPUTS)[None, :]
        slope = _before_activation(gradient + at + place, out + at + place, stored, ACTIVATION)
        image = images + n * (HEIGHT * WIDTH * CHANNELS)
        larger: tl.tuple = ()
        for piece in tl.static_range(PIECES):
            first = piece * LINES
            values = _patches(image, y, x, there, HEIGHT, WIDTH, CHANNELS, SIDE, STRIDE, PADDING, first, LINES, LENGTH)
            larger += (tl.dot(tl.trans(values), slope.to(values.dtype), totals[piece]),)
        totals = larger
    k = tl.arange(0, LENGTH)[:, None]
    for piece in tl.static_range(PIECES):
        at = partial + ((part * PIECES + piece) * LENGTH).to(tl.int64) * OUTPUTS + o[None, :]
        tl.store(at + k * OUTPUTS, totals[piece], mask=(o < OUTPUTS)[None, :])


@triton.jit
def patches_gradient_kernel(
    gradient,
    out,
    weight,
    patches,
    pixels,
    OUTPUTS: tl.constexpr,
    ROW: tl.constexpr,
    WIDE: tl.constexpr,
    LENGTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs: blocks of pixels. gradient, out: [pixels, O]. weight: [O, ROW]. patches: [pixels, ROW]."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o = tl.arange(0, WIDE)
    k = tl.arange(0, LENGTH)
    there, used, kept = (pixel < pixels)[:, None], o < OUTPUTS, (k < ROW)[None, :]
    row = pixel.to(tl.int64)[:, None]
    at = row * OUTPUTS + o[None, :]
    slope = _before_activation(gradient + at, out + at, there & used[None, :], ACTIVATION)
    factors = tl.load(weight + o[:, None] * ROW + k[None, :], mask=used[:, None] & kept, other=0.0)
    values = tl.dot(slope, factors)
    tl.store(patches + row * ROW + k[None, :], values.to(patches.dtype.element_ty), mask=there & kept)


def lines_and_length(channels: int, side: int) -> tuple[int, int]:
    """Of a piece. Lines come one by one where all are too many, or a pixel's channels are loaded at once."""
    one_by_one = side**2 * channels >= LONGEST or (channels == 4 and side == 3)
    lines = 1 if one_by_one else side
    return lines, max(NARROWEST, triton.next_power_of_2(lines * side * channels + 1))


def conv_triton(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    activation: str,
    *,
    transposed: bool = False,
) -> Tensor:
    """Activation(convolution + bias) by the kernel, summed up in fp32.

    images: [B, C, H, W]. weight: [O, C, K, K], or transposed [C, O, K, K], whose taps are then mirrored. bias: [O].
    activation: "relu", "leaky_relu", "elu", "silu" or "none". Returns [B, O, HO, WO] of the images' type,
    channels last.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    if transposed:
        weight = weight.transpose(0, 1)
    out = empty_out(images, len(weight), weight.shape[2], stride, padding)
    rows = rows_forward(images.shape[1], weight.shape[2])
    tasks = _tasks(out, rows)
    turns, parts = _turns_and_parts(tasks, KEEPERS if len(weight) >= KEPT else tasks)
    with torch.cuda.device_of(images):
        conv_kernel[(parts,)](
            images,
            weight,
            weight if bias is None else bias,
            out,
            tasks,
            *weight.stride(),
            **_constants(images, out, weight.shape[2], stride, padding, activation, rows),
            TURNS=turns,
            MIRRORED=transposed,
            BIASED=bias is not None,
        )
    return out


def gradient_triton(
    images: Tensor,
    gradient: Tensor,
    out: Tensor,
    side: int,
    stride: int,
    padding: int,
    activation: str,
) -> Tensor:
    """The gradient of weights and bias in fp32, by part of the pixels: [parts, pieces, LENGTH, O].

    gradient: [B, O, HO, WO], of `out`, which is what `conv_triton` gave. activation: not "silu".
    """
    images, gradient, out = (given.contiguous(memory_format=torch.channels_last) for given in (images, gradient, out))
    shape = partial_shape(out, images.shape[1], side)
    tasks = _tasks(out, ROWS)
    turns, _ = _turns_and_parts(tasks, _programs_of_gradient(shape[1]))
    partial = torch.empty(shape, dtype=torch.float32, device=images.device)
    with torch.cuda.device_of(images):
        gradient_kernel[(len(partial),)](
            images,
            gradient,
            out,
            partial,
            tasks,
            **_constants(images, out, side, stride, padding, activation, ROWS),
            TURNS=turns,
            num_stages=stages(out),
        )
    return partial


def patches_gradient_triton(gradient: Tensor, out: Tensor, weight: Tensor, activation: str) -> Tensor:
    """What the images' gradient is put together from, patches [B·HO·WO, ROW] of the gradient's type.

    gradient: [B, O, HO, WO], of `out`, which is what `conv_triton` gave. weight: [O, ROW], laid out as patches are, of
    the gradient's type. activation: not "silu".
    """
    gradient, out = (given.contiguous(memory_format=torch.channels_last) for given in (gradient, out))
    patches = empty_patches(gradient, weight)
    with torch.cuda.device_of(gradient):
        patches_gradient_kernel[(triton.cdiv(len(patches), BLOCK),)](
            gradient,
            out,
            weight.contiguous(),
            patches,
            len(patches),
            **_patches_gradient_constants(weight, activation),
        )
    return patches


def empty_patches(gradient: Tensor, weight: Tensor) -> Tensor:
    """Room for what `patches_gradient_triton` gives."""
    b, _, height, width = gradient.shape
    return gradient.new_empty(b * height * width, weight.shape[1])


def _patches_gradient_constants(weight: Tensor, activation: str) -> dict[str, int | str]:
    outputs, row = weight.shape
    wide, length = (max(NARROWEST, triton.next_power_of_2(size)) for size in (outputs, row))
    return {
        "OUTPUTS": outputs,
        "ROW": row,
        "WIDE": wide,
        "LENGTH": length,
        "ACTIVATION": activation,
        "BLOCK": BLOCK,
    }


def rows_forward(channels: int, side: int) -> int:
    """Of a tile, where `conv_triton` goes through them."""
    lines, _ = lines_and_length(channels, side)
    return ROWS_OF_MOST if side // lines == MOST_PIECES else ROWS


def stages(out: Tensor) -> int:
    """In which a program of its weights' gradient has tiles under way."""
    return STAGES if out.shape[1] in STAGED and out.itemsize == 2 else 1


def _tiles(out: Tensor, rows: int) -> int:
    """Of an image's outputs."""
    return triton.cdiv(out.shape[3], COLUMNS) * triton.cdiv(out.shape[2], rows)


def _tasks(out: Tensor, rows: int) -> int:
    """Tiles of all images' outputs."""
    return len(out) * _tiles(out, rows)


def _turns_and_parts(tasks: int, programs: int) -> tuple[int, int]:
    """How many tasks each program does, and into how many parts they are cut: `programs` at most."""
    turns = triton.cdiv(tasks, programs)
    return turns, triton.cdiv(tasks, turns)


def _programs_of_gradient(pieces: int) -> int:
    return PROGRAMS_OF_MOST if pieces == MOST_PIECES else PROGRAMS


def partial_shape(out: Tensor, channels: int, side: int) -> tuple[int, int, int, int]:
    """Of what `gradient_triton` gives."""
    lines, length = lines_and_length(channels, side)
    pieces = side // lines
    _, parts = _turns_and_parts(_tasks(out, ROWS), _programs_of_gradient(pieces))
    return parts, pieces, length, out.shape[1]


def summed(partial: Tensor, channels: int, side: int) -> tuple[Tensor, Tensor]:
    """The gradients of weights, [O, C, K, K], and of the bias, [O], from what `gradient_triton` gives."""
    total = partial.sum(0)
    values = side // len(total) * side * channels  # of a piece
    return total[:, :values].reshape(side, side, channels, -1).permute(3, 2, 0, 1), total[0, values]


def empty_out(images: Tensor, outputs: int, side: int, stride: int, padding: int) -> Tensor:
    """Room for [B, outputs, HO, WO], channels last."""
    height, width = ((size + 2 * padding - side) // stride + 1 for size in images.shape[2:])
    return images.new_empty(len(images), height, width, outputs).permute(0, 3, 1, 2)


def _constants(
    images: Tensor, out: Tensor, side: int, stride: int, padding: int, activation: str, rows: int
) -> dict[str, int | str]:
    channels, height, width = images.shape[1:]
    lines, length = lines_and_length(channels, side)
    return {
        "HEIGHT": height,
        "WIDTH": width,
        "OUT_HEIGHT": out.shape[2],
        "OUT_WIDTH": out.shape[3],
        "CHANNELS": channels,
        "OUTPUTS": out.shape[1],
        "SIDE": side,
        "STRIDE": stride,
        "PADDING": padding,
        "LINES": lines,
        "LENGTH": length,
        "WIDE": max(NARROWEST, triton.next_power_of_2(out.shape[1])),
        "ACTIVATION": activation,
        "COLUMNS": COLUMNS,
        "ROWS": rows,
        "TILES": _tiles(out, rows),
    }
