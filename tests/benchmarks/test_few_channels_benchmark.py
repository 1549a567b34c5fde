"""Speed of the few-channel convolutions on the autoencoder's layers, forward and backward, beside cuDNN's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from netdyno.kernels.few_channels import conv, conv_reference

LAYERS = [(3, 8, 32, 0), (8, 4, 30, 0), (4, 8, 28, 2), (8, 3, 30, 2)]  # I, O, side of the input, padding


def loss_of(function: Callable[..., Tensor], images: Tensor, parameters: list[Tensor]) -> Tensor:
    """Through all four layers."""
    out = images
    for (_, _, _, padding), weight, bias in zip(LAYERS, parameters[::2], parameters[1::2], strict=True):
        out = function(out, weight, bias, padding, True)
    return out.float().square().mean()


@pytest.mark.parametrize(
    ("name", "function", "device"),
    [
        ("reference", conv_reference, "cpu"),
        pytest.param("cuDNN", conv_reference, "cuda", marks=pytest.mark.gpu),
        pytest.param("kernel", conv, "cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.benchmark(group="autoencoder, forward and backward")
def test_few_channels(rate: Callable[..., None], name: str, function: Callable[..., Tensor], device: str) -> None:
    on_gpu = device == "cuda"
    batch = 4_096 if on_gpu else 16
    images = torch.rand(batch, 3, 32, 32, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    images = images.contiguous(memory_format=torch.channels_last)
    shapes = [shape for i, o, _, _ in LAYERS for shape in ((o, i, 3, 3), (o,))]
    parameters = [(0.2 * torch.randn(shape, device=device)).requires_grad_() for shape in shapes]
    loss = torch.compile(loss_of, fullgraph=True) if on_gpu else loss_of
    rate(lambda: torch.autograd.grad(loss(function, images, parameters), parameters), batch, on_gpu=on_gpu)
