"""Adam with masters: the same as torch's on the masters, and weights that are their 16-bit form."""

import copy

import pytest
import torch
from torch import nn

from netdyno.bench import adam
from netdyno.bench.adam import MasterAdam, keep_large_in


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 40, bias=False), nn.Linear(40, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps by the same gradients in either form, which are 16-bit numbers where a weight is large."""
    draw = torch.Generator().manual_seed(1)
    for step in range(steps):
        for weight in model.parameters():
            gradient = torch.randn(weight.shape, generator=draw)
            if weight.numel() >= adam.LARGE:
                gradient = gradient.bfloat16()
            weight.grad = gradient.to(weight.dtype)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_masters_are_what_torch_makes_of_the_weights(
    monkeypatch: pytest.MonkeyPatch, decay: float, compile: bool
) -> None:
    monkeypatch.setattr(adam, "LARGE", 32 * 24)
    model = network()
    keep_large_in(torch.bfloat16, model.parameters())
    assert [weight.dtype is torch.bfloat16 for weight in model.parameters()] == [True, False, True, False, False]
    options = {"lr": 1e-2, "betas": (0.5, 0.999), "weight_decay": decay}
    reference = copy.deepcopy(model).float()
    plain = torch.optim.Adam(reference.parameters(), **options)
    optimizer = MasterAdam(list(model.parameters()), compile, **options)
    train(model, optimizer, 5)
    train(reference, plain, 5)
    for weight, expected in zip(model.parameters(), reference.parameters(), strict=True):
        if weight.dtype is torch.bfloat16:
            master = optimizer.state[weight]["master"]
            torch.testing.assert_close(master, expected.data, rtol=1e-5, atol=1e-6)
            assert torch.equal(weight.data, master.bfloat16())
        else:
            torch.testing.assert_close(weight.data, expected.data, rtol=1e-5, atol=1e-6)


def test_steps_too_small_for_16_bits_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to 1 the least step in bf16 is 2⁻⁸; twenty of a thousandth are more than that."""
    monkeypatch.setattr(adam, "LARGE", 4)
    weight = nn.Parameter(torch.ones(4))
    keep_large_in(torch.bfloat16, [weight])
    optimizer = MasterAdam([weight], compile=False, lr=1e-3)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.tolist() == pytest.approx([0.98] * 4, abs=2**-8)


def test_weights_set_anew_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam, "LARGE", 4)
    weight = nn.Parameter(torch.ones(4))
    keep_large_in(torch.bfloat16, [weight])
    optimizer = MasterAdam([weight], compile=False, lr=0.5)
    with torch.no_grad():
        weight.fill_(3)
    optimizer.read()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.tolist() == pytest.approx([2.5] * 4)
