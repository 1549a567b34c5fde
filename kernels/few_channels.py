"""3×3 convolutions of a few channels, such as those of first layers and of the autoencoder, with bias and ReLU fused.

cuDNN pads 3, 4 and 8 channels to 32, or runs an implicit matrix product that is mostly empty. In bf16, which is for
GPUs whose tensor cores Triton has, `patches_in_registers` does the work. In fp32 and fp16 each output pixel is a sum
over taps and input channels in fp32 registers: no tensor cores, so that Turing runs it too. What the ReLU does to a
gradient, and there the bias's own, are left to torch.compile, which puts them into what it runs beside.

Shapes: B images, I input and O output channels, [H, W] the input's and [HO, WO] the output's size, where HO is
H + 2·padding - 2. A transposed convolution of stride 1 and padding q is a convolution of padding 2 - q with the
weights' axes turned and their taps mirrored: see `turned`.

Bytes moved for each image: (I·H·W + O·HO·WO)·itemsize forward, at least; operations: 18·I·O·HO·WO. The autoencoder's
four layers take 1.8 MFLOP an image forward, 5.0 with both gradients (the first layer's input needs none).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import patches_in_registers

LANES = 128  # threads of a program: four warps, one below the other, each of 32 columns
ROWS = 4  # output pixels of a thread of `conv_kernel`, which is written for four: each weight is read once for all
ROWS_OF_GRADIENT = 8  # … and of the weight gradient: each row of pixels is read once for three rows of taps
PROGRAMS = 396  # of a weight gradient, about: what an H100 holds at once, three on each multiprocessor
NARROW = 8  # channels: up to here all outputs of a pixel stay in a thread's registers


def turned(weight: Tensor) -> Tensor:
    """Weights [I, O, 3, 3] ↔ [O, I, 3, 3], taps mirrored: what turns a convolution into its transpose."""
    return weight.transpose(0, 1).flip(2, 3)


def conv_reference(images: Tensor, weight: Tensor, bias: Tensor | None, padding: int, relu: bool) -> Tensor:
    """Convolution, bias and ReLU in plain PyTorch.

    images: [B, I, H, W], floating point. weight: [O, I, 3, 3]. bias: [O]. padding: 0, 1 or 2, of zeros. Returns
    [B, O, HO, WO] of the images' type.
    """
    out = F.conv2d(images, weight.to(images.dtype), None if bias is None else bias.to(images.dtype), padding=padding)
    return out.relu() if relu else out


@triton.jit
def _pixels(column, y, stride_y, on_column, height):
    """The pixels of a column in row `y`, in fp32: [1, lanes], zero outside."""
    return tl.load(column + y * stride_y, mask=on_column & (y >= 0) & (y < height), other=0).to(tl.float32)[None, :]


@triton.jit
def conv_kernel(
    images,
    weight,
    bias,
    out,
    height,
    width,
    out_height,
    out_width,
    images_n,
    images_c,
    images_y,
    images_x,
    weight_o,
    weight_i,
    weight_tap,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WIDE: tl.constexpr,
    PADDING: tl.constexpr,
    MIRRORED: tl.constexpr,
    BIASED: tl.constexpr,
    RELU: tl.constexpr,
    LANES: tl.constexpr,
):
    """Programs: (image, tile of 32 columns). A thread: four output pixels, one below the other, of all channels.

    MIRRORED: the taps. out: [B, O, HO, WO], contiguous.
    """
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    across = tl.cdiv(out_width, 32)
    x = tl.program_id(1) % across * 32 + lane % 32
    y = (tl.program_id(1) // across * (LANES // 32) + lane // 32) * 4
    o = tl.arange(0, WIDE)
    t0 = tl.zeros([WIDE, LANES], tl.float32)
    t1 = t0
    t2 = t0
    t3 = t0
    top = y - PADDING
    for i in range(INPUTS):
        for kx in tl.static_range(3):
            ix = x + kx - PADDING
            on_column = (ix >= 0) & (ix < width)
            column = images + n * images_n + i * images_c + ix * images_x
            v0 = _pixels(column, top, images_y, on_column, height)
            v1 = _pixels(column, top + 1, images_y, on_column, height)
            v2 = _pixels(column, top + 2, images_y, on_column, height)
            v3 = _pixels(column, top + 3, images_y, on_column, height)
            v4 = _pixels(column, top + 4, images_y, on_column, height)
            v5 = _pixels(column, top + 5, images_y, on_column, height)
            for ky in tl.static_range(3):
                turn = 8 - 3 * ky - kx if MIRRORED else 3 * ky + kx
                at = weight + o * weight_o + i * weight_i + turn * weight_tap
                factor = tl.load(at, mask=o < OUTPUTS, other=0).to(tl.float32)[:, None]
                t0 += factor * (v0 if ky == 0 else v1 if ky == 1 else v2)
                t1 += factor * (v1 if ky == 0 else v2 if ky == 1 else v3)
                t2 += factor * (v2 if ky == 0 else v3 if ky == 1 else v4)
                t3 += factor * (v3 if ky == 0 else v4 if ky == 1 else v5)
    shift = tl.zeros([WIDE, 1], tl.float32)
    if BIASED:
        shift += tl.load(bias + o, mask=o < OUTPUTS, other=0).to(tl.float32)[:, None]
    at = out + (n * OUTPUTS + o[:, None]) * (out_height * out_width) + x[None, :]
    stored = (o < OUTPUTS)[:, None] & (x < out_width)[None, :]
    for row in tl.static_range(4):
        total = shift + (t0 if row == 0 else t1 if row == 1 else t2 if row == 2 else t3)
        if RELU:
            total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
        below = (y + row)[None, :]
        tl.store(at + below * out_width, total.to(out.dtype.element_ty), mask=stored & (below < out_height))


@triton.jit
def weight_gradient_kernel(
    images,
    gradient,
    partial,
    tasks,
    height,
    width,
    out_height,
    out_width,
    images_n,
    images_c,
    images_y,
    images_x,
    gradient_n,
    gradient_c,
    gradient_y,
    gradient_x,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Programs: (input channel, part of the tasks). The sums of a channel's nine taps stay in registers.

    A task is a tile of 32 columns of an image, of which a thread walks down `ROWS` pixels of one column, three rows of
    images in its registers. gradient: of the output. partial: fp32 [parts, I, 9, O]: the sums of each part. They are
    summed up later, in one order, so that the result is the same each time. TURNS: tasks of each program.
    """
    i, part = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, LANES)
    o = tl.arange(0, WIDE)
    across = tl.cdiv(out_width, 32)
    tiles = across * tl.cdiv(out_height, LANES // 32 * ROWS)
    t0 = tl.zeros([WIDE, LANES], tl.float32)
    t1 = t0
    t2 = t0
    t3 = t0
    t4 = t0
    t5 = t0
    t6 = t0
    t7 = t0
    t8 = t0
    for turn in range(TURNS):
        task = turn * tl.num_programs(1) + part
        n = tl.minimum(task // tiles, tasks // tiles - 1).to(tl.int64)
        tile = task % tiles
        x = tile % across * 32 + lane % 32
        y = (tile // across * (LANES // 32) + lane // 32) * ROWS
        left, middle, right = x - PADDING, x + 1 - PADDING, x + 2 - PADDING
        on_left = (left >= 0) & (left < width)
        on_middle = (middle >= 0) & (middle < width)
        on_right = (right >= 0) & (right < width)
        channel = images + n * images_n + i * images_c
        left_column = channel + left * images_x
        middle_column = channel + middle * images_x
        right_column = channel + right * images_x
        top = y - PADDING
        a0 = _pixels(left_column, top, images_y, on_left, height)
        a1 = _pixels(middle_column, top, images_y, on_middle, height)
        a2 = _pixels(right_column, top, images_y, on_right, height)
        b0 = _pixels(left_column, top + 1, images_y, on_left, height)
        b1 = _pixels(middle_column, top + 1, images_y, on_middle, height)
        b2 = _pixels(right_column, top + 1, images_y, on_right, height)
        at = gradient + n * gradient_n + o[:, None] * gradient_c + x[None, :] * gradient_x
        whole = (o < OUTPUTS)[:, None] & ((x < out_width) & (task < tasks))[None, :]
        for row in tl.static_range(ROWS):
            c0 = _pixels(left_column, top + row + 2, images_y, on_left, height)
            c1 = _pixels(middle_column, top + row + 2, images_y, on_middle, height)
            c2 = _pixels(right_column, top + row + 2, images_y, on_right, height)
            below = (y + row)[None, :]
            slope = tl.load(at + below * gradient_y, mask=whole & (below < out_height), other=0).to(tl.float32)
            t0 += slope * a0
            t1 += slope * a1
            t2 += slope * a2
            t3 += slope * b0
            t4 += slope * b1
            t5 += slope * b2
            t6 += slope * c0
            t7 += slope * c1
            t8 += slope * c2
            a0, a1, a2 = b0, b1, b2
            b0, b1, b2 = c0, c1, c2
    at = partial + ((part * INPUTS + i) * 9).to(tl.int64) * OUTPUTS + o
    tl.store(at, tl.sum(t0, 1), mask=o < OUTPUTS)
    tl.store(at + OUTPUTS, tl.sum(t1, 1), mask=o < OUTPUTS)
    tl.store(at + 2 * OUTPUTS, tl.sum(t2, 1), mask=o < OUTPUTS)
    tl.store(at + 3 * OUTPUTS, tl.sum(t3, 1), mask=o < OUTPUTS)
    tl.store(at + 4 * OUTPUTS, tl.sum(t4, 1), mask=o < OUTPUTS)
    tl.store(at + 5 * OUTPUTS, tl.sum(t5, 1), mask=o < OUTPUTS)
    tl.store(at + 6 * OUTPUTS, tl.sum(t6, 1), mask=o < OUTPUTS)
    tl.store(at + 7 * OUTPUTS, tl.sum(t7, 1), mask=o < OUTPUTS)
    tl.store(at + 8 * OUTPUTS, tl.sum(t8, 1), mask=o < OUTPUTS)


def conv_triton(
    images: Tensor, weight: Tensor, bias: Tensor | None, padding: int, relu: bool, *, transposed: bool = False
) -> Tensor:
    """`conv_reference` by the kernel, summed up in fp32; contiguous. transposed: by the `turned` weight."""
    b, i, h, w = images.shape
    o_stride, i_stride, _, tap_stride = weight.stride()
    if weight.stride(2) != 3 * tap_stride:
        weight = weight.contiguous()
        o_stride, i_stride, _, tap_stride = weight.stride()
    o = weight.shape[0]
    if transposed:
        o, o_stride, i_stride = weight.shape[1], i_stride, o_stride
    out = torch.empty(b, o, h + 2 * padding - 2, w + 2 * padding - 2, dtype=images.dtype, device=images.device)
    grid = (b, _tiles(out, ROWS))
    with torch.cuda.device_of(images):
        conv_kernel[grid](
            images,
            weight,
            out if bias is None else bias,
            out,
            h,
            w,
            *out.shape[2:],
            *images.stride(),
            o_stride,
            i_stride,
            tap_stride,
            INPUTS=i,
            OUTPUTS=o,
            WIDE=triton.next_power_of_2(o),
            PADDING=padding,
            MIRRORED=transposed,
            BIASED=bias is not None,
            RELU=relu,
            LANES=LANES,
        )
    return out


def _tiles(pixels: Tensor, rows: int) -> int:
    """Tiles of one image of `pixels`, where a thread takes so many rows."""
    return triton.cdiv(pixels.shape[3], 32) * triton.cdiv(pixels.shape[2], LANES // 32 * rows)


def turns_and_parts(images: Tensor, gradient: Tensor) -> tuple[int, int]:
    """How many tasks each program of a weight gradient does, and into how many parts they are cut."""
    tasks = len(images) * _tiles(gradient, ROWS_OF_GRADIENT)
    turns = max(1, triton.cdiv(tasks, max(1, PROGRAMS // images.shape[1])))
    return turns, triton.cdiv(tasks, turns)


def weight_gradient_triton(images: Tensor, gradient: Tensor, padding: int) -> Tensor:
    """The gradient of the weights in fp32, by part of the images, input channel and tap: [parts, I, 9, O].

    gradient: [B, O, HO, WO], of the output.
    """
    b, i, h, w = images.shape
    o, out_h, out_w = gradient.shape[1:]
    turns, parts = turns_and_parts(images, gradient)
    partial = torch.empty(parts, i, 9, o, dtype=torch.float32, device=images.device)
    with torch.cuda.device_of(images):
        weight_gradient_kernel[(i, parts)](
            images,
            gradient,
            partial,
            b * _tiles(gradient, ROWS_OF_GRADIENT),
            h,
            w,
            out_h,
            out_w,
            *images.stride(),
            *gradient.stride(),
            INPUTS=i,
            OUTPUTS=o,
            WIDE=triton.next_power_of_2(o),
            PADDING=padding,
            ROWS=ROWS_OF_GRADIENT,
            LANES=LANES,
            TURNS=turns,
        )
    return partial


def summed(partial: Tensor) -> Tensor:
    """[O, I, 3, 3] from what `weight_gradient_triton` gives."""
    return partial.sum(0).permute(2, 0, 1).unflatten(2, (3, 3))


def _by_tensor_cores(images: Tensor) -> bool:
    return images.dtype is torch.bfloat16


@torch.library.custom_op("netdyno::few_channel_conv", mutates_args=())
def _conv(images: Tensor, weight: Tensor, bias: Tensor, padding: int, relu: bool, transposed: bool) -> Tensor:
    if _by_tensor_cores(images):
        activation = "relu" if relu else "none"
        return patches_in_registers.conv_triton(images, weight, bias, 1, padding, activation, transposed=transposed)
    return conv_triton(images, weight, bias, padding, relu, transposed=transposed)


@_conv.register_fake
def _(images: Tensor, weight: Tensor, bias: Tensor, padding: int, relu: bool, transposed: bool) -> Tensor:
    return _room(images, len(bias), padding)


def _room(images: Tensor, channels: int, padding: int) -> Tensor:
    """For an output of so many channels."""
    if _by_tensor_cores(images):
        return patches_in_registers.empty_out(images, channels, 3, 1, padding)
    b, _, h, w = images.shape
    return images.new_empty(b, channels, h + 2 * padding - 2, w + 2 * padding - 2)


@torch.library.custom_op("netdyno::few_channel_conv_images", mutates_args=())
def _of_images(gradient: Tensor, weight: Tensor, padding: int, transposed: bool) -> Tensor:
    """The gradient of the images."""
    if _by_tensor_cores(gradient):
        return patches_in_registers.conv_triton(
            gradient, weight, None, 1, 2 - padding, "none", transposed=not transposed
        )
    return conv_triton(gradient, weight, None, 2 - padding, False, transposed=not transposed)


@_of_images.register_fake
def _(gradient: Tensor, weight: Tensor, padding: int, transposed: bool) -> Tensor:
    return _room(gradient, weight.shape[0] if transposed else weight.shape[1], 2 - padding)


@torch.library.custom_op("netdyno::few_channel_conv_weights", mutates_args=())
def _of_weights(images: Tensor, gradient: Tensor, padding: int) -> Tensor:
    """Parts of the gradient of the weights; by tensor cores of the bias too, as `patches_in_registers` has it."""
    if _by_tensor_cores(images):
        return patches_in_registers.gradient_triton(images, gradient, gradient, 3, 1, padding, "none")
    return weight_gradient_triton(images, gradient, padding)


@_of_weights.register_fake
def _(images: Tensor, gradient: Tensor, padding: int) -> Tensor:
    inputs, outputs = images.shape[1], gradient.shape[1]
    if _by_tensor_cores(images):
        shape: tuple[int, ...] = patches_in_registers.partial_shape(gradient, inputs, 3)
    else:
        shape = (turns_and_parts(images, gradient)[1], inputs, 9, outputs)
    return images.new_empty(shape, dtype=torch.float32)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    images, weight, _, *ctx.options = inputs
    ctx.save_for_backward(images, weight, output)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    images, weight, out = ctx.saved_tensors
    padding, relu, transposed = ctx.options
    if relu:
        gradient = torch.where(out <= 0, 0.0, gradient)  # what is no number passes
    if _by_tensor_cores(images):
        of_weight, of_bias = patches_in_registers.summed(_of_weights(images, gradient, padding), images.shape[1], 3)
        of_weight = turned(of_weight) if transposed else of_weight
    else:
        # A transposed convolution's weights see the images where a convolution's see the gradient.
        partial = _of_weights(gradient, images, 2 - padding) if transposed else _of_weights(images, gradient, padding)
        of_weight, of_bias = summed(partial), gradient.sum((0, 2, 3), dtype=torch.float32)
    of_images = _of_images(gradient, weight, padding, transposed) if ctx.needs_input_grad[0] else None
    return of_images, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None, None


_conv.register_autograd(_backward, setup_context=_keep)


def conv(images: Tensor, weight: Tensor, bias: Tensor, padding: int, relu: bool, *, transposed: bool = False) -> Tensor:
    """`conv_reference` (see there) with a bias, by the Triton kernels on CUDA; differentiable, also when compiled.

    Of bf16 images the weights are rounded to bf16 too, as under autocast, and the result is channels last.
    transposed: `weight`, [I, O, 3, 3], is a transposed convolution's, and of that is the padding too: 0, 1 or 2.
    ValueError for shapes that the kernels do not take: other than 3×3 taps, padding 0, 1 or 2 and up to 8 channels.
    """
    channels = weight.shape[0] if transposed else weight.shape[1]
    if images.shape[1] != channels:
        raise ValueError(f"images of {images.shape[1]} channels, but weights for {channels}")
    if weight.shape[2:] != (3, 3) or padding not in (0, 1, 2) or max(weight.shape[:2]) > NARROW:
        raise ValueError(
            f"weights {tuple(weight.shape)} at padding {padding}: 3×3 taps, 0 to 2, {NARROW} channels at most"
        )
    if transposed:
        padding = 2 - padding
    if not images.is_cuda:
        return conv_reference(images, turned(weight) if transposed else weight, bias, padding, relu)
    return _conv(images, weight, bias, padding, relu, transposed)
