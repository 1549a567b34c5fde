"""The training step: each objective against its definition, compiled against eager, optimizers, schedule, scaler."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from new_network import COMPILED, CPU, EAGER, TinyCnn, batch_of, tiny_cnn
from torch import nn

from netdyno.bench import adam
from netdyno.bench.step import Player, execute, make_optimizer, make_step, one_cycle, why_uncaptured
from netdyno.bench.tuning import Tuning, t4
from netdyno.bench.workloads import OpenRecipe, Recipe, ScheduleName, Workload, conv_autoencoder, dcgan
from netdyno.models.conv_autoencoder import ConvAutoencoder
from netdyno.models.dcgan import Dcgan

FP16 = replace(EAGER, precision="fp16")
BF16 = replace(EAGER, precision="bf16")
SGD = Recipe(batch_size=8, epochs=1, optimizer="sgd", learning_rate=0.1, momentum=0.9)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Compiled code is counted by source line, and its number is limited: no test shall use up another one's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def seeded(network: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return network().train()


def losses(workload: Workload, network: nn.Module, tuning: Tuning, batches: int = 4) -> list[float]:
    step, _ = make_step(workload, network, tuning, CPU, steps=batches)
    return [step(*batch_of(8, seed)).item() for seed in range(batches)]


# Objectives


def test_classification_is_cross_entropy() -> None:
    network = seeded(TinyCnn)
    reference = copy.deepcopy(network)
    images, labels = batch_of(8)
    step, players = make_step(tiny_cnn(), network, EAGER, CPU, steps=1)
    assert len(players) == 1

    logits = reference(images)
    loss = (logits.exp().sum(dim=1).log() - logits[torch.arange(8), labels]).mean()
    loss.backward()
    found = step(images, labels)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    assert not found.requires_grad
    for name, weight in reference.named_parameters():  # the first step of SGD with momentum is a plain one
        expected = weight - 0.05 * weight.grad
        assert torch.allclose(network.get_parameter(name), expected, atol=1e-6), name


def test_reconstruction_is_the_mean_squared_error_to_the_input() -> None:
    network = seeded(ConvAutoencoder)
    images = torch.rand(4, 3, 16, 16)
    expected = (network(images) - images).square().mean().item()
    step, players = make_step(conv_autoencoder(), network, EAGER, CPU, steps=1)
    assert len(players) == 1
    assert step(images, torch.zeros(4)).item() == pytest.approx(expected, rel=1e-5)
    assert step(images, torch.full((4,), 7)).item() < expected  # labels mean nothing here


def adversarial(learning_rates: tuple[float, float] = (2e-4, 2e-4)) -> tuple[Callable, Dcgan, list[Player]]:
    """A step whose discriminator and generator learn at these rates."""
    network = seeded(lambda: Dcgan(4, 4))
    assert isinstance(network, Dcgan)
    step, players = make_step(dcgan(), network, EAGER, CPU, steps=4)
    for player, learning_rate in zip(players, learning_rates, strict=True):
        player._rates.fill_(learning_rate)
    return step, network, players


def test_adversarial_step_is_that_of_the_paper() -> None:
    """Written out as the paper has it: the discriminator's update on real and fake, then the generator's through it."""
    step, network, _ = adversarial()
    reference = copy.deepcopy(network)
    real = 2 * torch.rand(4, 3, 64, 64) - 1
    optimizers = [
        torch.optim.Adam(player.parameters(), lr=2e-4, betas=(0.5, 0.999))
        for player in (reference.discriminator, reference.generator)
    ]
    expected = []
    torch.manual_seed(5)
    for _ in range(2):
        fake = reference.generator(torch.randn(4, 100))
        judged, forged = reference.discriminator(real), reference.discriminator(fake.detach())
        loss = -(0.9 * F.logsigmoid(judged) + 0.1 * F.logsigmoid(-judged)).mean() - F.logsigmoid(-forged).mean()
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        (-F.logsigmoid(reference.discriminator(fake)).mean()).backward()
        optimizers[1].step()
        expected.append(loss.item())

    torch.manual_seed(5)
    assert [step(real, torch.zeros(4)).item() for _ in range(2)] == pytest.approx(expected, rel=1e-4)
    for name, value in reference.state_dict().items():  # batch norm's statistics among them
        assert torch.allclose(network.state_dict()[name], value, atol=1e-5), name


def test_an_adversarial_step_updates_both_players_and_leaves_no_gradients() -> None:
    step, network, players = adversarial()
    before = weights_of(network)
    step(torch.rand(4, 3, 64, 64), torch.zeros(4))
    assert len(players) == 2
    for name, weight in network.named_parameters():
        assert not torch.equal(weight, before[name]), name
        assert weight.grad is None, name


@pytest.mark.parametrize(("rates", "still"), [((0.0, 2e-4), "discriminator"), ((2e-4, 0.0), "generator")])
def test_each_player_is_moved_by_its_own_optimizer_alone(rates: tuple[float, float], still: str) -> None:
    step, network, _ = adversarial(rates)
    before = weights_of(network)
    for _ in range(2):
        step(torch.rand(4, 3, 64, 64), torch.zeros(4))
    for name, weight in network.named_parameters():
        assert torch.equal(weight, before[name]) is name.startswith(still), name


# Precision and compilation


def test_all_but_fp16_under_rmsprop_can_be_captured() -> None:
    rmsprop = replace(SGD, optimizer="rmsprop")
    assert [why_uncaptured(recipe, tuning) is None for recipe in (SGD, rmsprop) for tuning in (BF16, FP16)] == [
        *(True, True),
        *(True, False),
    ]


def test_bf16_agrees_with_fp32_within_rounding() -> None:
    exact = losses(tiny_cnn(), seeded(TinyCnn), EAGER)
    rounded = losses(tiny_cnn(), seeded(TinyCnn), BF16)
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_fp32_is_not_touched_by_autocast() -> None:
    types = []

    def look(images: torch.Tensor) -> torch.Tensor:
        types.append((images @ images.T).dtype)
        return images

    for tuning in (EAGER, BF16, FP16):
        execute(look, tuning, CPU)(torch.ones(2, 2))
    assert types == [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.slow
def test_compiled_agrees_with_eager_within_rounding(fresh_compiler: None) -> None:
    assert (COMPILED.compile, COMPILED.precision, COMPILED.fused_optimizer) == (True, "bf16", True)
    exact, eager = losses(tiny_cnn(), seeded(TinyCnn), EAGER), losses(tiny_cnn(), seeded(TinyCnn), BF16)
    torch._dynamo.utils.counters.clear()
    compiled = losses(tiny_cnn(), seeded(TinyCnn), COMPILED)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # it was compiled, and once
    assert compiled == pytest.approx(eager, rel=0.01)
    assert compiled[0] == pytest.approx(exact[0], rel=0.01)


def test_a_graph_break_is_an_error(fresh_compiler: None) -> None:
    class Breaks(TinyCnn):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = super().forward(images)
            return logits if logits.sum().item() > 0 else -logits

    def loss(tuning: Tuning) -> torch.Tensor:
        step, _ = make_step(tiny_cnn(), seeded(Breaks), tuning, CPU, steps=1)
        return step(*batch_of(8))

    assert loss(EAGER).isfinite()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        loss(COMPILED)


# Optimizers


def moved(optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> torch.Tensor:
    """A parameter after five updates along fixed gradients."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(50, generator=generator))
    optimizer = optimizer_of([parameter])
    for _ in range(5):
        parameter.grad = torch.randn(50, generator=generator)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.01)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.999), eps=1e-8, weight_decay=0.01)),
        ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.9, eps=1e-8, momentum=0, weight_decay=0.01)),
    ],
)
def test_optimizers_are_those_of_torch(
    kind: str, expected: Callable[[list[nn.Parameter]], torch.optim.Optimizer], fused: bool
) -> None:
    recipe = replace(SGD, optimizer=kind, momentum=0.8, weight_decay=0.01)
    tuning = replace(EAGER, fused_optimizer=fused)
    found = moved(lambda parameters: make_optimizer(parameters, recipe, tuning))
    assert torch.allclose(found, moved(expected), rtol=1e-5, atol=1e-6)
    fused_option = make_optimizer([nn.Parameter(torch.zeros(1))], recipe, tuning).defaults.get("fused")
    assert bool(fused_option) is (fused and kind != "rmsprop")


# Players


def player_of(recipe: Recipe, tuning: Tuning = EAGER, steps: int = 50) -> tuple[Player, nn.Parameter]:
    network = nn.Linear(3, 1, bias=False)
    nn.init.ones_(network.weight)
    return Player(network, recipe, tuning, CPU, steps), network.weight


def update(player: Player, loss: torch.Tensor) -> None:
    player.begin(1)
    player.update(loss)


def learning_rates(player: Player, weight: nn.Parameter, updates: int, at_once: int = 1) -> list[float]:
    """Of each update, looked up `at_once` at a time."""
    rates = []
    for done in range(updates):
        if done % at_once == 0:
            player.begin(at_once)
        player.update(weight.square().sum())
        rates.append(float(player.optimizer.param_groups[0]["lr"]))
    return rates


@pytest.mark.parametrize(
    ("schedule", "shares"), [("down", [1.0, 0.75, 0.5, 0.25, 0.0]), ("up-down", [0.2, 1.0, 0.667, 0.333, 0.0])]
)
def test_lines(schedule: ScheduleName, shares: list[float]) -> None:
    player, weight = player_of(replace(SGD, schedule=schedule), steps=4)
    assert learning_rates(player, weight, 5) == pytest.approx([0.1 * share for share in shares], abs=1e-4)


def test_muon_has_rates_of_its_own_for_convolutions_the_last_layer_and_biases() -> None:
    recipe = OpenRecipe(
        batch_size=4, epochs=1, optimizer="muon", learning_rate=0.2, head_rate=1.0, bias_rate=8.0, schedule="down"
    )
    network = TinyCnn()
    player = Player(network, recipe, replace(EAGER, capture=True), CPU, steps=4)
    for share in (1.0, 0.75):
        player.begin(1)
        player.update(sum(parameter.square().sum() for parameter in network.parameters()))
        rates = [float(group["lr"]) for group in player.optimizer.param_groups]
        assert rates == pytest.approx([0.2 * share, 1.0 * share, 8.0 * share])


@pytest.mark.parametrize("tuning", [EAGER, replace(EAGER, capture=True)])
@pytest.mark.parametrize("at_once", [1, 3, 17])
def test_one_cycle_takes_the_whole_run(tuning: Tuning, at_once: int) -> None:
    player, weight = player_of(replace(SGD, schedule="one-cycle"), tuning, steps=50)
    rates = learning_rates(player, weight, 51, at_once)
    assert isinstance(player.optimizer.param_groups[0]["lr"], torch.Tensor if tuning.capture else float)
    peak = rates.index(max(rates))
    assert peak == 15  # 30 %
    assert rates[peak] == pytest.approx(0.1)
    assert rates[0] == pytest.approx(0.004)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-2] > 0
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert learning_rates(player, weight, 5) == pytest.approx([0] * 5, abs=1e-9)  # stays there


def test_one_cycle_by_hand() -> None:
    assert one_cycle(0) == pytest.approx(0.04)
    assert one_cycle(0.15) == pytest.approx(0.52)
    assert one_cycle(0.3) == pytest.approx(1)
    assert one_cycle(0.65) == pytest.approx(0.5)
    assert one_cycle(1) == one_cycle(7) == pytest.approx(0)


def test_a_constant_rate_is_constant() -> None:
    player, weight = player_of(SGD, steps=5)
    assert learning_rates(player, weight, 8) == pytest.approx([0.1] * 8)


@pytest.mark.parametrize("kind", ["sgd", "adam", "rmsprop"])
def test_restart_starts_anew(kind: str) -> None:
    player, weight = player_of(replace(SGD, optimizer=kind, schedule="one-cycle", learning_rate=0.01))

    def run() -> list[list[float]]:
        with torch.no_grad():
            weight.fill_(1.0)
        path = []
        for _ in range(5):
            update(player, weight.square().sum())
            path.append(weight.flatten().tolist())
        return path

    first = run()
    assert run() != first  # state and schedule went on
    state = list(player.optimizer.state.values())
    player.restart()
    assert list(player.optimizer.state.values()) == state  # in the same memory, which a captured step holds
    assert run() == first


def test_large_weights_that_adam_trains_in_bf16_by_kernels_have_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is a sixteenth of what bf16 tells from 1, so sixteen make one; after a restart they do so again."""
    monkeypatch.setattr(adam, "LARGE", 1)
    recipe = replace(SGD, optimizer="adam", learning_rate=2**-12)
    for tuning in (BF16, replace(EAGER, kernels=True), replace(FP16, kernels=True)):
        assert player_of(recipe, tuning)[1].dtype is torch.float32
    assert player_of(SGD, replace(BF16, kernels=True))[1].dtype is torch.float32
    player, weight = player_of(recipe, replace(BF16, kernels=True))
    assert isinstance(player.optimizer, adam.MasterAdam)
    for _ in range(2):
        with torch.no_grad():
            weight.fill_(1.0)
        player.restart()
        path = []
        for _ in range(24):
            update(player, weight.float().square().sum())
            path.append(weight.flatten()[0].item())
        assert path[0] == 1.0
        assert path[-1] == pytest.approx(1 - 24 * 2**-12, abs=2**-9)
        assert path[-1] < 1.0


def test_restart_leaves_the_weights_alone() -> None:
    player, weight = player_of(SGD)
    update(player, weight.square().sum())
    before = weight.detach().clone()
    player.restart()
    assert torch.equal(weight, before)
    update(player, weight.square().sum())
    assert not torch.equal(weight, before)  # the new optimizer holds the same parameters


def test_frozen_parameters_are_not_trained() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    network[0].requires_grad_(False)
    player = Player(network, replace(SGD, weight_decay=0.1), EAGER, CPU, steps=1)
    assert [id(p) for p in player.optimizer.param_groups[0]["params"]] == [id(p) for p in network[1].parameters()]


@pytest.mark.parametrize(("tuning", "scaled"), [(EAGER, False), (BF16, False), (FP16, True)])
def test_fp16_alone_scales_its_gradients(tuning: Tuning, scaled: bool) -> None:
    player, weight = player_of(SGD, tuning)
    assert player.scaler.is_enabled() is scaled
    update(player, weight.square().sum())
    assert weight.flatten().tolist() == pytest.approx([0.8] * 3)  # 1 - 0.1 · 2, whatever the scale


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_leaves_out_a_step_that_overflows(fused: bool) -> None:
    player, weight = player_of(SGD, replace(FP16, fused_optimizer=fused))
    update(player, weight.square().sum())
    scale, before = player.scaler.get_scale(), weight.detach().clone()
    update(player, weight.square().sum() * float("inf"))
    assert torch.equal(weight, before)
    assert player.scaler.get_scale() == scale / 2
    assert weight.grad is None
    player.restart()
    assert player.scaler.get_scale() == scale


@pytest.mark.gpu
@pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled:UserWarning")  # over two classes it gains nothing
@pytest.mark.parametrize("make", [tiny_cnn, dcgan])
def test_the_t4_step_runs_compiled_on_a_gpu(make: Callable[[], Workload], fresh_compiler: None) -> None:
    """fp16 with a gradient scaler and fused optimizers, against eager fp32; captured it is in test_capture.py."""
    device = torch.device("cuda")
    found = []
    for tuning in (EAGER, replace(t4(torch.cuda.get_device_capability()), capture=False)):
        network = seeded(TinyCnn if make is tiny_cnn else lambda: Dcgan(8, 4))
        network.to(device, memory_format=torch.channels_last)
        step, _ = make_step(make(), network, tuning, device, steps=3)
        images, labels = batch_of(8)
        if make is dcgan:
            images = F.interpolate(images, (64, 64))
        images, labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
        torch.manual_seed(1)
        found.append([step(images, labels).item() for _ in range(3)])
    assert found[1][0] == pytest.approx(found[0][0], rel=0.02)
    assert all(map(torch.isfinite, torch.tensor(found[1])))


def test_a_skipped_first_step_leaves_clean_momentum() -> None:
    """torch's fused SGD alone would go on from uninitialised memory, which deterministic mode fills with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        weight = nn.Parameter(torch.ones(8))
        optimizer = make_optimizer([weight], SGD, replace(EAGER, fused_optimizer=True))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for gradient in (float("inf"), 1.0, 1.0):
            scaler.scale((weight * gradient).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    finally:
        torch.use_deterministic_algorithms(False)
    assert weight.tolist() == pytest.approx([1 - 0.1 * 1 - 0.1 * 1.9] * 8)
