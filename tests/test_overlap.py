"""A compiled backward pass gives a convolution's weights their gradient before its images theirs."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from netdyno.bench.overlap import OVERLAP


def test_the_gradients_of_weights_come_first() -> None:
    """Three convolutions, one transposed, one with a bias; the first has no images that learn."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, bias=False),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.ConvTranspose2d(6, 5, 3, stride=2, bias=False),
    ]
    network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 12, 12).contiguous(memory_format=torch.channels_last)

    def loss(images: Tensor) -> Tensor:
        return F.silu(network(images)).square().sum()

    def gradients(function: object) -> list[Tensor]:
        network.zero_grad()
        function(images).backward()  # type: ignore[operator]
        return [weight.grad.clone() for weight in network.parameters() if weight.grad is not None]

    compiled = torch.compile(loss, fullgraph=True, options=OVERLAP)
    found, (*_, backward) = run_and_get_code(lambda: gradients(compiled))
    torch.testing.assert_close(found, gradients(loss))
    masks = re.findall(r"convolution_backward[.]default\(.*\[(True|False), (True|False), (?:True|False)\]\)", backward)
    asked = ["images" if of_images == "True" else "weights" for of_images, _ in masks]
    assert asked == ["weights", "images", "weights", "images", "weights"]
    assert all(of_images != of_weights for of_images, of_weights in masks)
