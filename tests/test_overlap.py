"""What ranks exchange in a compiled backward pass comes as early as can be."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from netdyno.bench import sharded
from netdyno.bench.overlap import SENDING, SUMS


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

    compiled = torch.compile(loss, fullgraph=True, options=SUMS)
    found, (*_, backward) = run_and_get_code(lambda: gradients(compiled))
    torch.testing.assert_close(found, gradients(loss))
    masks = re.findall(r"convolution_backward[.]default\(.*\[(True|False), (True|False), (?:True|False)\]\)", backward)
    asked = ["images" if of_images == "True" else "weights" for of_images, _ in masks]
    assert asked == ["weights", "images", "weights", "images", "weights"]
    assert all(of_images != of_weights for of_images, of_weights in masks)


class Room:
    """Memory that one rank alone sees."""

    def __init__(self, size: int) -> None:
        self._own = torch.zeros(size, dtype=torch.uint8)

    def own(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        return self._own[start : start + count * dtype.itemsize].view(dtype)

    def view(self, rank: int, start: int, count: int, dtype: torch.dtype) -> Tensor:
        assert rank == 0
        return self.own(start, count, dtype)

    def meet(self) -> None:
        pass


def test_gradients_are_sent_as_soon_as_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two convolutions in bf16, and in the end of what is small: a third and batch norm."""
    monkeypatch.setattr(sharded, "Room", Room)
    torch._dynamo.reset()
    torch.manual_seed(0)
    second, third = (nn.Conv2d(8, 8, 3, bias=False, dtype=torch.bfloat16) for _ in range(2))
    network = nn.Sequential(nn.Conv2d(3, 8, 3), second, nn.BatchNorm2d(8), third)
    network.to(memory_format=torch.channels_last)
    shared = sharded.Sharded(list(network.parameters()))
    images = torch.rand(2, 3, 12, 12).contiguous(memory_format=torch.channels_last)

    def sending(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.silu(shared.sending(network)(images)).float().square().sum()

    def alone(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.silu(network(images)).float().square().sum()

    def gradients(function: object) -> list[Tensor | None]:
        network.zero_grad()
        torch.compile(function, fullgraph=True, options=SENDING)(images).backward()  # type: ignore[call-overload]
        return [weight.grad for weight in network.parameters()]

    expected = gradients(alone)
    found, (*_, backward) = run_and_get_code(lambda: gradients(sending))
    assert [found[0], *found[3:5]] == [None] * 3  # of the small ones
    reading = [storage.data_ptr() for storage in shared._reading]
    assert sorted(reading) == sorted(gradient.data_ptr() for gradient in found if gradient is not None)  # no copies
    shared.take_gradients()
    came = iter(shared.portions)
    for weight, gradient in zip(network.parameters(), expected, strict=True):
        assert gradient is not None
        if weight.dtype is torch.bfloat16:
            torch.testing.assert_close(next(came).gradients[0], gradient.permute(0, 2, 3, 1).flatten())
        else:
            torch.testing.assert_close(weight.grad, gradient)
    sent = re.findall(r"= torch[.]ops[.]netdyno[.]send[.]default\((buf\d+), \d+, [01]\)", backward)
    given = re.findall(r"return \((.*)\)", backward)[-1].split(", ")
    assert len(sent) == 2
    assert {*sent} < {*given}  # what is given is not overwritten while copies read it
    masks = r"\[(True|False), (?:True|False), (?:True|False)\]"
    calls = re.findall(rf"= torch[.]ops[.]netdyno[.](send)[.]|convolution_backward[.]default\(.*{masks}", backward)
    order = [name or ("images" if of_images == "True" else "weights") for name, of_images in calls]
    assert order == ["weights", "send", "images", "weights", "send", "images", "weights", "send"]
