"""The kernels compile for GPUs that have their tensor cores, and take no more memory than those have.

What they compute is tested with what takes them, `test_few_channels.py` and `test_first_layer.py`.
"""

from typing import Any, NamedTuple

import pytest
import torch
import without_gpu

from netdyno.kernels import patches_in_registers
from netdyno.kernels.patches_in_registers import conv_kernel, gradient_kernel, patches_gradient_kernel

SHARED = {80: 163, 86: 99, 90: 227, 120: 99}  # KiB that a block may have, by compute capability
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class Layer(NamedTuple):
    """A convolution over 32×32 pixels, and what a program of it may take."""

    inputs: int
    outputs: int
    padding: int
    dtype: torch.dtype
    shared: int  # KiB: several programs are to be on a multiprocessor at a time
    side: int = 3
    stride: int = 1


LAYERS = [
    Layer(3, 8, 0, torch.bfloat16, 32),
    Layer(8, 3, 2, torch.bfloat16, 32),
    Layer(3, 32, 1, torch.bfloat16, 48),
    Layer(3, 64, 1, torch.bfloat16, 80),
    Layer(3, 128, 1, torch.bfloat16, 48),
    Layer(3, 128, 1, torch.float32, 99),
    Layer(8, 128, 1, torch.float32, 99),
    Layer(3, 128, 2, torch.float32, 99, 5, 2),
    Layer(3, 128, 2, torch.bfloat16, 48, 5, 2),
    Layer(3, 64, 1, torch.bfloat16, 99, 4, 2),
]


def compiled(kernel: Any, layer: Layer, capability: int) -> Any:
    """As it is launched."""
    images = torch.empty(2, layer.inputs, 32, 32, dtype=layer.dtype)
    out = patches_in_registers.empty_out(images, layer.outputs, layer.side, layer.stride, layer.padding)
    activation = "leaky_relu" if layer.stride == 2 else "relu" if layer.padding == 1 else "none"
    size = layer.side, layer.stride, layer.padding
    forward = kernel is conv_kernel
    rows = patches_in_registers.rows_forward(layer.inputs, layer.side) if forward else patches_in_registers.ROWS
    values = patches_in_registers._constants(images, out, *size, activation, rows)
    values["TURNS"] = 1 if forward and layer.outputs < patches_in_registers.KEPT else 8
    if forward:
        values |= {"MIRRORED": layer.padding == 2 and layer.stride == 1, "BIASED": True}
    pointers = dict.fromkeys(("images", "gradient", "out"), TYPES[layer.dtype])
    pointers |= dict.fromkeys(("weight", "bias", "partial"), "fp32")
    options = {"num_stages": patches_in_registers.stages(out)} if kernel is gradient_kernel else {}
    return without_gpu.compiled(kernel, values, pointers, capability, options)


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("kernel", [conv_kernel, gradient_kernel], ids=["conv", "gradient"])
def test_they_compile_without_a_gpu(kernel: Any, layer: Layer, capability: int) -> None:
    made = compiled(kernel, layer, capability)
    assert "mma" in made.asm["ptx"]  # tensor cores
    assert made.metadata.shared <= 1024 * min(layer.shared, SHARED[capability])


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [(128, 80), (64, 48)])
def test_the_images_gradient_compiles_without_a_gpu(size: tuple[int, int], dtype: torch.dtype, capability: int) -> None:
    values = patches_in_registers._patches_gradient_constants(torch.empty(size, dtype=dtype), "leaky_relu")
    pointers = dict.fromkeys(("gradient", "out", "weight", "patches"), TYPES[dtype])
    made = without_gpu.compiled(patches_gradient_kernel, values, pointers, capability, {})
    assert "mma" in made.asm["ptx"]
    assert made.metadata.shared <= 1024 * SHARED[capability]


def test_a_gradient_of_two_bytes_and_many_outputs_has_tiles_under_way() -> None:
    """The check itself: that it compiles what is launched."""
    made = compiled(gradient_kernel, LAYERS[2], 90)
    assert "cp.async" in made.asm["ptx"]
    assert "cp.async" not in compiled(gradient_kernel, LAYERS[0], 90).asm["ptx"]
