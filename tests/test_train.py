"""One epoch, one evaluation; both by hand. And what a new network takes: `new_network.py`, nothing more."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from new_network import CPU, EAGER, TinyCnn, bright_and_dark, tiny_cnn
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from netdyno.bench import train
from netdyno.bench.data import baseline, dali
from netdyno.bench.data.loader import Batch, Loader
from netdyno.bench.measure import BlockClock
from netdyno.bench.metrics import sliced_wasserstein
from netdyno.bench.step import make_step
from netdyno.bench.train import Diverged, Trained, collect, make_evaluation, train_epoch
from netdyno.bench.workloads import Preprocess, Workload, conv_autoencoder, dcgan
from netdyno.models.dcgan import Dcgan

PLAIN = Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
ARRAY_LOADERS = {"dali": dali.array_loader, "torch": partial(baseline.array_loader, workers=0)}

both_loaders = pytest.mark.parametrize("kind", ARRAY_LOADERS)


def loader_of(
    kind: str,
    arrays: tuple[np.ndarray, np.ndarray | None],
    preprocess: Preprocess = PLAIN,
    *,
    train: bool,
    batch_size: int = 4,
    seed: int = 0,
) -> Loader:
    return ARRAY_LOADERS[kind](
        *arrays,
        preprocess=preprocess,
        batch_size=batch_size,
        train=train,
        seed=seed,
        device=CPU,
        dtype=torch.float32,
        channels_last=False,
    )


def pictures(count: int, side: int) -> np.ndarray:
    """uint8 [count, side, side, 3]: ramps of many colours under noise."""
    draw = np.random.default_rng(0)
    ramp = np.linspace(0, 120, side)[:, None, None] * draw.random((count, 1, 1, 3))
    return (ramp + draw.integers(0, 130, (count, side, side, 3))).astype(np.uint8)


# One epoch


def batches(count: int, size: int = 4) -> list[Batch]:
    return [Batch(torch.full((size, 1), float(k)), torch.full((size,), k), size) for k in range(count)]


def silent(steps: int, loss: float) -> None:
    """Shows no progress."""


def test_a_rehearsal_does_all_that_an_epoch_does_beside_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss comes to the host on the way, and their mean in the end."""
    checked: list[int] = []
    original = train._checked
    monkeypatch.setattr(train, "_checked", lambda steps, loss: checked.append(steps) or original(steps, loss))
    train.rehearse(CPU)
    assert checked == [1, 3]


def test_several_batches_at_once_are_as_many_steps() -> None:
    """A step over several batches returns the sum of their losses."""
    shown: list[tuple[int, float]] = []
    parts = [batch._replace(batches=4 if k < 11 else 1) for k, batch in enumerate(batches(12, size=8))]
    clock = BlockClock(CPU, 45, 4)
    trained = train_epoch(
        lambda images, labels: torch.tensor(8.0), parts, clock, lambda steps, loss: shown.append((steps, loss))
    )
    assert trained == Trained(loss=pytest.approx(8 * 12 / 45), images=96, steps=45)
    assert shown == [(k, 2.0) for k in range(4, 37, 4)]
    assert (clock.block_steps, len(clock.block_s)) == (4, 11)


def test_an_epoch_counts_its_steps_and_images_and_averages_the_loss() -> None:
    seen: list[tuple[float, float]] = []
    shown: list[tuple[int, float]] = []
    reused = torch.zeros(())  # as a captured step does, the loss comes in the same memory each time

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append((images[0, 0].item(), labels[0].item()))
        return reused.fill_(len(seen))

    clock = BlockClock(CPU, 45)
    trained = train_epoch(step, batches(45), clock, lambda steps, loss: shown.append((steps, loss)))
    assert trained == Trained(loss=23.0, images=180, steps=45)
    assert seen == [(k, k) for k in range(45)]
    assert shown == [(k, float(k)) for k in range(2, 41, 2)]  # of each block, two blocks later
    assert len(clock.block_s) == 22
    assert 0 < sum(clock.block_s) < clock.total_s <= clock.wall_s


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("at", "steps", "message"),
    [
        (4, 8, "after 4 steps"),  # the last of a block: found two blocks later
        (3, 45, "after 45 steps"),  # within a block, and finite again after it: found in the mean
        (45, 45, "after 45 steps"),  # in the remainder, which is no block
    ],
)
def test_a_loss_that_is_no_number_ends_the_epoch(bad: float, at: int, steps: int, message: str) -> None:
    done = 0

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += 1
        return torch.tensor(bad if done == at else 1.0)

    with pytest.raises(Diverged, match=message):
        train_epoch(step, batches(45), BlockClock(CPU, 45), silent)
    assert done == steps


# One evaluation


class Watched(nn.Module):
    """A network that does one thing to its images and notes in which state it was asked."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.states: list[tuple[bool, bool, int]] = []  # training, with gradients, batch size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.states.append((self.training, torch.is_grad_enabled(), len(images)))
        return self.function(images)


def brightness_logits(images: torch.Tensor) -> torch.Tensor:
    """[B, 2]: class 1 where the mean is above ½."""
    mean = images.mean(dim=(1, 2, 3))
    return torch.stack([1 - mean, mean], dim=1)


@both_loaders
def test_accuracy_by_hand_without_padding(kind: str) -> None:
    images = np.full((10, 8, 8, 3), 50, np.uint8)
    images[[1, 4, 9]] = 200
    labels = np.array([0, 1, 1, 0, 1, 0, 1, 0, 0, 1])  # 0, 1, 3, 4, 5, 7, 8 and 9 are right: 8 of 10
    guesses = images.mean(axis=(1, 2, 3)) > 127.5
    by_hand = 100 * np.mean(guesses == labels)
    assert by_hand == 80  # with the last image three times, as padding has it, it were 10 of 12

    network = Watched(brightness_logits).train()
    loader = loader_of(kind, (images, labels), train=False)
    evaluate = make_evaluation(tiny_cnn(), network, loader, EAGER, CPU)
    for _ in range(2):  # the second one starts from nothing again
        found = evaluate()
        assert found.metric == pytest.approx(by_hand)
        assert (found.images, found.further, found.picture) == (10, {}, None)
        assert network.training
    assert network.states == [(False, False, 4)] * 6
    loader.close()


@both_loaders
def test_psnr_and_ssim_are_averaged_over_images_without_padding(kind: str) -> None:
    images = pictures(10, 16)
    images[9] = 0  # rebuilt without error, and the one that padding repeats

    network = Watched(lambda batch: (batch * 0.8 + 0.3 * batch.square()).clamp(0, 1.2)).train()
    loader = loader_of(kind, (images, None), train=False)
    found = make_evaluation(conv_autoencoder(), network, loader, EAGER, CPU)()
    loader.close()

    truth = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    rebuilt = (truth * 0.8 + 0.3 * truth.square()).clamp(0, 1)
    psnrs = [10 * np.log10(1 / max(1e-10, error)) for error in ((rebuilt - truth) ** 2).mean(dim=(1, 2, 3)).tolist()]
    assert psnrs[9] == pytest.approx(100)
    for one, two, value in zip(rebuilt[:9], truth[:9], psnrs[:9], strict=True):
        assert peak_signal_noise_ratio(one, two, data_range=1.0).item() == pytest.approx(value, abs=1e-3)
    _, ssims = structural_similarity_index_measure(rebuilt, truth, data_range=1.0, return_full_image=True)
    by_hand = ssims[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))  # of the windows, Gaussian, 11×11, that lie inside the image
    assert found.metric == pytest.approx(np.mean(psnrs), abs=1e-3)
    assert found.further == {"ssim": pytest.approx(by_hand.mean().item(), abs=1e-4)}
    assert found.images == 10
    assert network.training
    assert network.states == [(False, False, 4)] * 3

    assert found.picture is not None
    assert found.picture.shape == (3, 2 * (16 + 2) + 2, 4 * (16 + 2) + 2)  # 4 originals over 4 rebuilt, 2 pixels apart
    assert torch.allclose(found.picture[:, 2:18, 2:18], truth[0], atol=1e-6)
    assert torch.allclose(found.picture[:, 20:36, 2:18], rebuilt[0], atol=1e-6)


def test_the_picture_shows_no_padding() -> None:
    loader = loader_of("dali", (pictures(3, 16), None), train=False, batch_size=8)
    found = make_evaluation(conv_autoencoder(), Watched(lambda batch: batch), loader, EAGER, CPU)()
    loader.close()
    assert found.picture is not None
    assert found.picture.shape == (3, 2 * 18 + 2, 3 * 18 + 2)


def test_generated_images_are_judged_on_the_same_noise_against_all_real_ones() -> None:
    torch.manual_seed(0)
    network = Dcgan(4, 4).train()
    images = pictures(10, 64)
    loader = loader_of("dali", (images, None), dcgan().preprocess, train=False)
    evaluate = make_evaluation(dcgan(), network, loader, EAGER, CPU)
    first = evaluate()
    assert network.training
    assert network.generator.training
    torch.manual_seed(99)
    assert evaluate().metric == first.metric  # no matter where the random state stands
    assert (first.images, first.further) == (10, {})

    shown: list[torch.Tensor] = []
    network.generator.register_forward_hook(lambda layer, inputs, output: shown.append(output))
    evaluate()
    loader.close()
    fakes = torch.cat(shown)[:10]
    real = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    assert first.metric == pytest.approx(sliced_wasserstein(fakes, real), rel=1e-4)
    assert not torch.allclose(fakes[0], fakes[4])  # each batch has noise of its own
    assert first.picture is not None
    assert first.picture.shape == (3, 2 * 66 + 2, 8 * 66 + 2)
    assert torch.allclose(first.picture[:, 2:66, 2:66], fakes[0] / 2 + 0.5, atol=1e-5)


def test_the_distance_follows_the_generator() -> None:
    """A generator that paints the real images is far closer to them than an untrained one."""
    torch.manual_seed(0)
    images = pictures(16, 64)
    real = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    network = Dcgan(4, 4)
    loader = loader_of("dali", (images, None), dcgan().preprocess, train=False, batch_size=16)
    untrained = make_evaluation(dcgan(), network, loader, EAGER, CPU)().metric
    network.generator = Watched(lambda noise: real[: len(noise)])  # type: ignore[assignment]
    assert make_evaluation(dcgan(), network, loader, EAGER, CPU)().metric < 0.5 * untrained
    assert network.generator.states == [(False, False, 16)]
    loader.close()


@both_loaders
def test_collect_leaves_padding_out(kind: str) -> None:
    images = pictures(10, 8)
    loader = loader_of(kind, (images, None), train=False)
    found = collect(loader)
    loader.close()
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.from_numpy(images).permute(0, 3, 1, 2) / 255, atol=1e-6)


# Seeds


def training(kind: str, seed: int) -> tuple[list[float], torch.Tensor]:
    """Every loss of two epochs, and the weights after them."""
    torch.manual_seed(seed)
    workload = tiny_cnn()
    network = nn.Sequential(TinyCnn(), nn.Dropout(0.1)).train()
    loader = loader_of(kind, bright_and_dark(40), workload.preprocess, train=True, batch_size=8, seed=seed)
    step, _ = make_step(workload, network, EAGER, CPU, steps=10)
    losses = [step(batch.images, batch.labels).item() for _ in range(2) for batch in loader.epoch()]
    loader.close()
    return losses, torch.cat([weight.detach().flatten() for weight in network.parameters()])


@both_loaders
def test_a_seed_decides_every_bit(kind: str) -> None:
    losses, weights = training(kind, seed=1)
    assert len(losses) == 10
    again, weights_again = training(kind, seed=1)
    assert again == losses
    assert torch.equal(weights_again, weights)
    others, other_weights = training(kind, seed=2)
    assert all(one != other for one, other in zip(losses, others, strict=True))
    assert not torch.equal(other_weights, weights)


@both_loaders
def test_seeds_and_epochs_differ_in_order_and_augmentation(kind: str) -> None:
    images, _ = bright_and_dark(40)
    one_image = np.repeat(images[:1], 40, axis=0)
    augmenting = tiny_cnn().preprocess

    def order(seed: int) -> list[list[int]]:
        loader = loader_of(kind, (images, np.arange(40)), train=True, batch_size=8, seed=seed)
        return [torch.cat([batch.labels for batch in loader.epoch()]).tolist() for _ in range(2)]

    def looks(seed: int) -> list[torch.Tensor]:  # of one image, so that the order is nothing
        loader = loader_of(kind, (one_image, np.zeros(40, np.int64)), augmenting, train=True, batch_size=8, seed=seed)
        return [torch.cat([batch.images for batch in loader.epoch()]) for _ in range(2)]

    orders, appearances = [*order(1), *order(2)], [*looks(1), *looks(2)]
    for a in range(4):
        assert sorted(orders[a]) == list(range(40))
        for b in range(a):
            assert orders[a] != orders[b]
            assert not torch.equal(appearances[a], appearances[b])


def test_seeds_differ_in_the_weights() -> None:
    def first_loss(seed: int) -> float:
        torch.manual_seed(seed)
        step, _ = make_step(tiny_cnn(), TinyCnn(), EAGER, CPU, steps=1)
        loader = loader_of("dali", bright_and_dark(8), train=False, batch_size=8)
        return next(step(batch.images, batch.labels).item() for batch in loader.epoch())

    assert first_loss(1) == first_loss(1)
    assert first_loss(1) != first_loss(2)


# A new network


def run(workload: Workload, kind: str) -> tuple[list[Trained], list[float]]:
    """The epochs of the workload's recipe and the metric before and after them, as `child.run` has them."""
    torch.manual_seed(0)
    network = workload.network(2) if workload.objective == "classify" else workload.network()
    batch_size = workload.recipe.batch_size
    loader = loader_of(kind, bright_and_dark(203), workload.preprocess, train=True, batch_size=batch_size)
    eval_loader = loader_of(kind, bright_and_dark(61, seed=1), workload.preprocess, train=False)
    step, _ = make_step(workload, network, EAGER, CPU, loader.batches_per_epoch * workload.recipe.epochs)
    evaluate = make_evaluation(workload, network, eval_loader, EAGER, CPU)
    trained, metrics = [], [evaluate().metric]
    for _ in range(workload.recipe.epochs):
        clock = BlockClock(CPU, loader.batches_per_epoch)
        trained.append(train_epoch(step, loader.epoch(), clock, silent))
        metrics.append(evaluate().metric)
    loader.close()
    eval_loader.close()
    return trained, metrics


@both_loaders
def test_a_new_network_takes_one_module_and_one_spec(kind: str) -> None:
    trained, metrics = run(tiny_cnn(), kind)
    assert [(epoch.images, epoch.steps) for epoch in trained] == [(200, 25)] * 3  # the remainder is dropped
    assert trained[-1].loss < 0.5 * trained[0].loss
    assert metrics[0] < 80
    assert metrics[-1] > 95


def test_chance_is_what_a_network_reaches_that_does_not_train() -> None:
    """The test above would fail without training."""
    workload = tiny_cnn()
    still = replace(workload, recipe=replace(workload.recipe, learning_rate=1e-12))
    _, metrics = run(still, "dali")
    assert metrics[-1] == metrics[0] < 80
