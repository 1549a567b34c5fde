"""Captured graphs, on a GPU: a replay is the function again, with other random numbers, in the same memory."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from new_network import TinyCnn, batch_of, tiny_cnn
from torch import nn

from netdyno.bench.capture import Captured
from netdyno.bench.step import make_step, why_uncaptured
from netdyno.bench.tuning import Tuning, t4, tuned
from netdyno.bench.workloads import Workload, dcgan
from netdyno.models.dcgan import LATENT, Dcgan

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
TUNED = replace(tuned((9, 0)), compile=False)
FP16 = replace(t4(None), compile=False)


def test_a_replay_is_the_function_again() -> None:
    total = torch.zeros(4, device=GPU)
    add = Captured(lambda one: total.add_(one).clone(), "train")
    one = torch.ones(4, device=GPU)
    add(one)
    before = total.clone()
    one.fill_(3)
    assert torch.equal(add(one), before + 3)
    assert torch.equal(total, before + 3)


def test_one_graph_for_each_place() -> None:
    double = Captured(lambda values: 2 * values, "train")
    before = Captured.graphs
    memory = torch.arange(8.0, device=GPU)
    elsewhere = torch.arange(8.0, device=GPU)
    for values in (memory, memory[:4], elsewhere, memory, memory[:4]):
        assert torch.equal(double(values), 2 * values)
    assert Captured.graphs == before + 3


def test_random_numbers_differ_and_follow_the_seed() -> None:
    dropout = nn.Dropout()
    drop = Captured(lambda values: dropout(values), "train")
    ones = torch.ones(1_000, device=GPU)
    drop(ones)

    def three() -> list[torch.Tensor]:
        torch.manual_seed(5)
        return [drop(ones).clone() for _ in range(3)]

    first = three()
    assert not any(torch.equal(first[a], first[b]) for a in range(3) for b in range(a))
    assert all(map(torch.equal, first, three()))


def test_the_peak_of_a_capture_is_kept() -> None:
    Captured.own_bytes.clear()
    spacious = Captured(lambda values: torch.cat([values] * 64).sum(), "eval")
    spacious(torch.ones(2**18, device=GPU))
    assert Captured.own_bytes == {"eval": pytest.approx(64 * 2**20, rel=0.05)}


def course(
    workload: Workload, network: Callable[[], nn.Module], side: int, tuning: Tuning, at_once: int
) -> tuple[list[float], list[float], list[float]]:
    """Sums of losses over stretches of six batches, and where they lead; then the same after a restart."""
    workload = replace(workload, recipe=replace(workload.recipe, batch_size=8, schedule="one-cycle"))
    torch.manual_seed(0)
    trained = network().to(GPU, memory_format=torch.channels_last).train()
    initial = {name: value.clone() for name, value in trained.state_dict().items()}
    step, players = make_step(workload, trained, tuning, GPU, steps=24)
    images, labels = batch_of(48)
    images = nn.functional.interpolate(images, (side, side)).to(GPU, memory_format=torch.channels_last)
    labels = labels.to(GPU)
    rows = [slice(8 * k, 8 * (k + at_once)) for k in range(0, 6, at_once)]
    for part in rows:
        step(images[part], labels[part])

    def run() -> list[float]:
        trained.load_state_dict(initial)
        for player in players:
            player.restart()
        torch.manual_seed(1)
        return [sum(step(images[part], labels[part]).item() for part in rows) for _ in range(4)]

    first = run()
    weights = torch.cat([weight.detach().flatten() for weight in trained.parameters()])
    return first, run(), weights[:: max(1, len(weights) // 1_000)].tolist()


@pytest.mark.parametrize("tuning", [TUNED, FP16, replace(TUNED, precision="fp32")], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("workload", "network", "side"),
    [
        (tiny_cnn(), TinyCnn, 8),
        (replace(tiny_cnn(), recipe=replace(tiny_cnn().recipe, optimizer="adam", learning_rate=1e-3)), TinyCnn, 8),
        (replace(tiny_cnn(), recipe=replace(tiny_cnn().recipe, optimizer="rmsprop", learning_rate=1e-3)), TinyCnn, 8),
        (replace(dcgan(), recipe=replace(dcgan().recipe, learning_rate=1e-3)), lambda: Dcgan(8, 4), 64),
    ],
    ids=["sgd", "adam", "rmsprop", "dcgan"],
)
def test_captured_steps_train_as_others_do(
    workload: Workload,
    network: Callable[[], nn.Module],
    side: int,
    tuning: Tuning,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under a schedule, with momentum and scaler, and from the start again after a restart."""
    if why_uncaptured(workload.recipe, tuning) is not None:
        pytest.skip("this step runs compiled")
    noise = torch.randn(8, LATENT, device=GPU)  # else a generator's depends on the number of draws before it
    monkeypatch.setattr(torch, "randn", lambda *size, device: noise)
    expected, _, weights = course(workload, network, side, replace(tuning, capture=False), 1)
    tolerance = {"rel": 0.1 if workload.objective == "adversarial" else 0.02}
    for at_once in (1, 2, 6):
        found, again, reached = course(workload, network, side, tuning, at_once)
        assert again == pytest.approx(found, **tolerance)
        assert found == pytest.approx(expected, **tolerance)
        if workload.objective == "classify":
            assert reached == pytest.approx(weights, abs=0.01)
