"""3×3 convolutions of a few channels, such as those of first layers and of the autoencoder, with bias and ReLU fused.

cuDNN pads 3, 4 and 8 channels to 32, or runs an implicit matrix product that is mostly empty. Here each output pixel is
a sum over taps and input channels in fp32 registers: no tensor cores, so that Turing runs the same code. What the ReLU
does to a gradient, and the bias's own, are left to torch.compile, which puts them into what it runs beside.

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

BLOCK = 256  # output pixels a program: two for each thread of 4 warps, so that each weight is read for two products
BLOCK_OF_GRADIENT = 128  # one for each thread, with nine taps' sums for each output channel in registers
PROGRAMS = 2048  # of a weight gradient, about: some for each multiprocessor of the largest cards
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
    BLOCK: tl.constexpr,
):
    """Programs: (image, block of its output pixels). MIRRORED: the taps. out: [B, O, HO, WO], contiguous."""
    n = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    on_image = pixel < out_height * out_width
    y, x = pixel // out_width, pixel % out_width
    o = tl.arange(0, WIDE)
    total = tl.zeros([WIDE, BLOCK], tl.float32)
    for tap in tl.static_range(9):
        iy, ix = y + (tap // 3 - PADDING), x + (tap % 3 - PADDING)
        inside = on_image
        if PADDING:
            inside = inside & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
        turn = 8 - tap if MIRRORED else tap
        for i in tl.static_range(INPUTS):
            at = images + n * images_n + i * images_c + iy * images_y + ix * images_x
            value = tl.load(at, mask=inside, other=0).to(tl.float32)
            at = weight + o * weight_o + i * weight_i + turn * weight_tap
            factor = tl.load(at, mask=o < OUTPUTS, other=0).to(tl.float32)
            total += factor[:, None] * value[None, :]
    if BIASED:
        total += tl.load(bias + o, mask=o < OUTPUTS, other=0).to(tl.float32)[:, None]
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    at = out + (n * OUTPUTS + o[:, None]) * (out_height * out_width) + pixel[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(o < OUTPUTS)[:, None] & on_image[None, :])


@triton.jit
def _pixels(channel, y, x, on_image, height, width, stride_y, stride_x, PADDING: tl.constexpr):
    """The pixels (y, x) of one channel in fp32, zero outside."""
    inside = on_image
    if PADDING:
        inside = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return tl.load(channel + y * stride_y + x * stride_x, mask=inside, other=0).to(tl.float32)[None, :]


@triton.jit
def weight_gradient_kernel(
    images,
    gradient,
    partial,
    count,
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
    BLOCK: tl.constexpr,
    TASKS: tl.constexpr,
):
    """Programs: (input channel, part of the images). The sums of a channel's nine taps stay in registers.

    gradient: of the output. partial: fp32 [parts, I, 9, O]: the sums of each part. They are summed up later, in one
    order, so that the result is the same each time. TASKS: blocks of pixels for each program.
    """
    i, part = tl.program_id(0), tl.program_id(1)
    o = tl.arange(0, WIDE)
    t0 = tl.zeros([WIDE, BLOCK], tl.float32)
    t1 = t0
    t2 = t0
    t3 = t0
    t4 = t0
    t5 = t0
    t6 = t0
    t7 = t0
    t8 = t0
    pixels = out_height * out_width
    blocks = tl.cdiv(pixels, BLOCK)
    for turn in range(TASKS):
        task = turn * tl.num_programs(1) + part
        n = tl.minimum(task // blocks, count - 1).to(tl.int64)
        pixel = tl.where(task < count * blocks, task % blocks * BLOCK + tl.arange(0, BLOCK), pixels)
        on = pixel < pixels
        y, x = pixel // out_width, pixel % out_width
        at = gradient + n * gradient_n + o[:, None] * gradient_c + (y * gradient_y + x * gradient_x)[None, :]
        slope = tl.load(at, mask=(o < OUTPUTS)[:, None] & on[None, :], other=0).to(tl.float32)
        channel = images + n * images_n + i * images_c
        y -= PADDING
        x -= PADDING
        t0 += slope * _pixels(channel, y, x, on, height, width, images_y, images_x, PADDING)
        t1 += slope * _pixels(channel, y, x + 1, on, height, width, images_y, images_x, PADDING)
        t2 += slope * _pixels(channel, y, x + 2, on, height, width, images_y, images_x, PADDING)
        t3 += slope * _pixels(channel, y + 1, x, on, height, width, images_y, images_x, PADDING)
        t4 += slope * _pixels(channel, y + 1, x + 1, on, height, width, images_y, images_x, PADDING)
        t5 += slope * _pixels(channel, y + 1, x + 2, on, height, width, images_y, images_x, PADDING)
        t6 += slope * _pixels(channel, y + 2, x, on, height, width, images_y, images_x, PADDING)
        t7 += slope * _pixels(channel, y + 2, x + 1, on, height, width, images_y, images_x, PADDING)
        t8 += slope * _pixels(channel, y + 2, x + 2, on, height, width, images_y, images_x, PADDING)
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
    grid = (b, triton.cdiv(out.shape[2] * out.shape[3], BLOCK))
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
            BLOCK=BLOCK,
        )
    return out


def parts_of(images: Tensor, gradient: Tensor) -> int:
    """Into how many parts the images of a weight gradient are cut."""
    tasks = len(images) * triton.cdiv(gradient.shape[2] * gradient.shape[3], BLOCK_OF_GRADIENT)
    return max(1, min(PROGRAMS // images.shape[1], tasks))


def weight_gradient_triton(images: Tensor, gradient: Tensor, padding: int) -> Tensor:
    """The gradient of the weights in fp32, by part of the images, input channel and tap: [parts, I, 9, O].

    gradient: [B, O, HO, WO], of the output.
    """
    b, i, h, w = images.shape
    o, out_h, out_w = gradient.shape[1:]
    parts = parts_of(images, gradient)
    partial = torch.empty(parts, i, 9, o, dtype=torch.float32, device=images.device)
    with torch.cuda.device_of(images):
        weight_gradient_kernel[(i, parts)](
            images,
            gradient,
            partial,
            b,
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
            BLOCK=BLOCK_OF_GRADIENT,
            TASKS=triton.cdiv(b * triton.cdiv(out_h * out_w, BLOCK_OF_GRADIENT), parts),
        )
    return partial


def summed(partial: Tensor) -> Tensor:
    """[O, I, 3, 3] from what `weight_gradient_triton` gives."""
    return partial.sum(0).permute(2, 0, 1).unflatten(2, (3, 3))


@torch.library.custom_op("netdyno::few_channel_conv", mutates_args=())
def _conv(images: Tensor, weight: Tensor, bias: Tensor, padding: int, relu: bool, transposed: bool) -> Tensor:
    return conv_triton(images, weight, bias, padding, relu, transposed=transposed)


@_conv.register_fake
def _(images: Tensor, weight: Tensor, bias: Tensor, padding: int, relu: bool, transposed: bool) -> Tensor:
    b, _, h, w = images.shape
    return images.new_empty(b, len(bias), h + 2 * padding - 2, w + 2 * padding - 2)


@torch.library.custom_op("netdyno::few_channel_conv_images", mutates_args=())
def _of_images(gradient: Tensor, weight: Tensor, padding: int, transposed: bool) -> Tensor:
    """The gradient of the images."""
    return conv_triton(gradient, weight, None, 2 - padding, False, transposed=not transposed)


@_of_images.register_fake
def _(gradient: Tensor, weight: Tensor, padding: int, transposed: bool) -> Tensor:
    b, _, h, w = gradient.shape
    channels = weight.shape[0] if transposed else weight.shape[1]
    return gradient.new_empty(b, channels, h - 2 * padding + 2, w - 2 * padding + 2)


@torch.library.custom_op("netdyno::few_channel_conv_weights", mutates_args=())
def _of_weights(images: Tensor, gradient: Tensor, padding: int) -> Tensor:
    return weight_gradient_triton(images, gradient, padding)


@_of_weights.register_fake
def _(images: Tensor, gradient: Tensor, padding: int) -> Tensor:
    shape = (parts_of(images, gradient), images.shape[1], 9, gradient.shape[1])
    return images.new_empty(shape, dtype=torch.float32)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    images, weight, _, *ctx.options = inputs
    ctx.save_for_backward(images, weight, output)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    images, weight, out = ctx.saved_tensors
    padding, relu, transposed = ctx.options
    if relu:
        gradient = torch.where(out <= 0, 0.0, gradient)  # what is no number passes
    of_images = _of_images(gradient, weight, padding, transposed) if ctx.needs_input_grad[0] else None
    # A transposed convolution's weights see the images where a convolution's see the gradient.
    partial = _of_weights(gradient, images, 2 - padding) if transposed else _of_weights(images, gradient, padding)
    bias = gradient.sum((0, 2, 3), dtype=torch.float32)
    return of_images, summed(partial).to(weight.dtype), bias.to(weight.dtype), None, None, None


_conv.register_autograd(_backward, setup_context=_keep)


def conv(images: Tensor, weight: Tensor, bias: Tensor, padding: int, relu: bool, *, transposed: bool = False) -> Tensor:
    """`conv_reference` (see there) with a bias, by the Triton kernels on CUDA; differentiable, also when compiled.

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
