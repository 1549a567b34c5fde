"""3×3 filters by their frequencies: an orthogonal change of basis, there and back."""

import copy
from dataclasses import replace

import pytest
import torch
from new_network import CPU, EAGER, TinyCnn, batch_of, tiny_cnn
from torch import nn

from netdyno.bench.basis import Coordinates, frequencies
from netdyno.bench.step import make_step
from netdyno.bench.tuning import Tuning
from netdyno.bench.workloads import Recipe


@pytest.mark.parametrize("channels", [1, 3])
def test_the_axes_are_orthonormal(channels: int) -> None:
    axes = frequencies(channels)
    assert axes.shape == (9 * channels, 9 * channels)
    torch.testing.assert_close(axes.T @ axes, torch.eye(9 * channels), atol=1e-6, rtol=0)


def test_the_first_axis_is_the_mean_and_the_second_a_slope() -> None:
    flat, slope = frequencies(1).T[:2].view(2, 3, 3)
    torch.testing.assert_close(flat, torch.full((3, 3), 1 / 3))
    torch.testing.assert_close(slope, torch.tensor([1.0, 0.0, -1.0]).expand(3, 3) / 6**0.5)
    grey = frequencies(3).T[0].view(3, 3, 3)
    torch.testing.assert_close(grey, torch.full((3, 3, 3), 27**-0.5))


def test_filters_come_back_and_others_stay_themselves() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 5, 3), nn.Conv2d(5, 2, 1)).to(
        memory_format=torch.channels_last  # type: ignore[call-overload]
    )
    before = copy.deepcopy(network.state_dict())
    coordinates = Coordinates(list(network.parameters()), compile=True)
    filters = network[0].weight.numel() + network[1].weight.numel()
    assert coordinates.trained[0].shape == (filters,)
    assert coordinates.trained[1:] == [network[0].bias, network[1].bias, *network[2].parameters()]
    coordinates.write_back()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name])
    with torch.no_grad():
        network[0].weight.fill_(1.0)
    coordinates.read()
    values = coordinates.trained[0].detach()
    of_three_channels = values[: network[0].weight.numel()].view(4, 3, 3, 3).permute(0, 3, 1, 2).flatten(1)
    expected = torch.zeros(4, 27)
    expected[:, 0] = 27**0.5
    torch.testing.assert_close(of_three_channels, expected, atol=1e-5, rtol=0)


def test_coordinates_are_products_with_the_axes() -> None:
    """Of gradients as of weights; filters over other than three channels, channel by channel."""
    weight, other = nn.Parameter(torch.randn(2, 3, 3, 3)), nn.Parameter(torch.randn(4, 5, 3, 3))
    coordinates = Coordinates([weight, other], compile=False)
    weight.grad, other.grad = torch.randn_like(weight), torch.randn_like(other)
    grads = weight.grad.flatten(1) @ frequencies(3), other.grad.flatten(2) @ frequencies(1)
    coordinates.take_gradients()
    assert coordinates.trained[0].grad is not None
    ours = coordinates.trained[0].grad.split([weight.numel(), other.numel()])
    for got, expected, shape in zip(ours, grads, (weight.shape, other.shape), strict=True):
        m, c = shape[:2]
        laid_out = got.view(m, 3, 3, c).permute(0, 3, 1, 2)
        torch.testing.assert_close(laid_out, expected.reshape(shape))


def losses(tuning: Tuning, **changes: object) -> list[float]:
    recipe: Recipe = replace(tiny_cnn().recipe, **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    network = TinyCnn()
    initial = copy.deepcopy(network.state_dict())
    step, (player,) = make_step(replace(tiny_cnn(), recipe=recipe), network, tuning, CPU, steps=20)

    def run() -> list[float]:
        return [step(*batch_of(8, seed)).item() for seed in range(20)]

    first = run()
    network.load_state_dict(initial)
    player.restart()
    assert run() == first  # coordinates begin anew with the weights
    assert all(weight.grad is None for weight in network.parameters())
    return first


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradient_descent_does_not_notice_and_adam_does(precision: str) -> None:
    tuning = replace(EAGER, precision=precision, fused_optimizer=True)
    assert losses(tuning, basis="frequencies") == pytest.approx(
        losses(tuning), rel=0.05 if precision == "fp16" else 1e-4
    )
    adam = {"optimizer": "adam", "learning_rate": 0.01}
    assert losses(tuning, **adam, basis="frequencies") != pytest.approx(losses(tuning, **adam), rel=0.01)
