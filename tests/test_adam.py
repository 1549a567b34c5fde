"""Adam with masters: the same as torch's on the masters, and weights that are their 16-bit form."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from netdyno.bench import adam, sharded
from netdyno.bench.adam import MasterAdam, keep_large_in, master_of, rounded
from netdyno.bench.parallel import in_memory


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convs = [nn.Conv2d(inputs, 24, 3, bias=False).to(memory_format=torch.channels_last) for inputs in (32, 3)]
    return nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 40, bias=False), nn.Linear(40, 2), *convs)


def lying(weight: nn.Parameter) -> torch.Tensor:
    """[N], as it lies in memory."""
    return weight.data.permute(in_memory(weight)).reshape(-1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps by the same gradients in either form, which are 16-bit numbers where a weight is large.

    They do not lie as a convolution's weights do. In none of the draws a gradient and its weight's decay cancel so far
    that the first step, which is as long whatever its gradient, goes by what rounding leaves of them.
    """
    draw = torch.Generator().manual_seed(2)
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
    large = [weight.numel() for weight in model.parameters() if weight.dtype is torch.bfloat16]
    assert large == [24 * 32, 32 * 40, 32 * 24 * 9]
    options = {"lr": 1e-2, "betas": (0.5, 0.999), "weight_decay": decay}
    reference = copy.deepcopy(model).float()
    plain = torch.optim.Adam(reference.parameters(), **options)
    optimizer = MasterAdam(list(model.parameters()), compile, **options)
    train(model, optimizer, 5)
    train(reference, plain, 5)
    for weight, expected in zip(model.parameters(), reference.parameters(), strict=True):
        if weight.dtype is torch.bfloat16:
            master = master_of(lying(weight), optimizer.state[weight]["rest"])
            torch.testing.assert_close(master, lying(expected), rtol=1e-5, atol=1e-6)
            assert torch.equal(lying(weight), master.bfloat16())
        else:
            torch.testing.assert_close(weight.data, expected.data, rtol=1e-5, atol=1e-6)


def kernels(what: Callable[[], object]) -> int:
    """How many a second call launches."""
    what()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        what()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.is_user_annotation for event in on_gpu)


@pytest.mark.gpu
def test_a_kernel_updates_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """And another one what they share."""
    monkeypatch.setattr(adam, "LARGE", 32 * 24)
    model = network().cuda()
    keep_large_in(torch.bfloat16, model.parameters())
    optimizer = MasterAdam(list(model.parameters()), compile=True, lr=torch.tensor(1e-3, device="cuda"))
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    assert kernels(optimizer.step) == 2


@pytest.mark.gpu
def test_a_kernel_gives_all_gradients_away() -> None:
    pairs = [(torch.empty(n, device="cuda"), torch.randn(n, device="cuda")) for n in (7, 300, 5_000)]
    assert kernels(partial(sharded.side_by_side(sharded.give), pairs)) == 1
    assert all(torch.equal(place, values) for place, values in pairs)


def test_a_weight_with_gaps_is_refused() -> None:
    with pytest.raises(RuntimeError, match="view size"):
        MasterAdam([nn.Parameter(torch.ones(4, 8)[:, :4])], compile=False, lr=1e-3)


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


def test_a_master_is_its_weight_and_a_rest() -> None:
    """Of all kinds of numbers, ties and what is none."""
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=draw).int()
    several = torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.finfo(torch.float32).max, 1e-45])
    masters = torch.cat([bits.view(torch.float32), several])
    masters = masters[~masters.isnan()]
    weight, rest = rounded(masters)
    assert torch.equal(weight, masters.bfloat16())
    ties = (masters.view(torch.int32) & 0x1FFFF) == 0x8000  # above an even number
    back = master_of(weight, rest)
    assert torch.equal(back[~ties].view(torch.int32), masters[~ties].view(torch.int32))
    assert rounded(torch.tensor([1 + 2**-8]))[0].item() == 1
    assert master_of(*rounded(torch.tensor([1 + 2**-8]))).item() == 1 + 2**-8 - 2**-23
    nan = torch.tensor([2**31 - 1, -1]).int().view(torch.float32)  # a GPU's, and one with its sign
    weight, rest = rounded(nan)
    assert weight.isnan().all()
    assert master_of(weight, rest).isnan().all()


def test_weights_set_anew_are_masters_again_without_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam, "LARGE", 4)
    weight = nn.Parameter(torch.ones(4))
    keep_large_in(torch.bfloat16, [weight])
    optimizer = MasterAdam([weight], compile=False, lr=0.001)
    for value in (1.0, 3.0):
        for name in ("rest", "exp_avg", "exp_avg_sq", "correction", "correction_sq"):
            optimizer.state[weight][name].zero_()
        with torch.no_grad():
            weight.fill_(value)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert optimizer.state[weight]["rest"].any()
        assert master_of(weight.data, optimizer.state[weight]["rest"]).tolist() == pytest.approx([value - 0.001] * 4)
