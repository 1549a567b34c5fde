"""One epoch of training and one evaluation, as plain functions."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from itertools import cycle
from typing import NamedTuple

import torch
from torch import nn
from torchvision.utils import make_grid

from ..models.dcgan import LATENT
from . import parallel
from .capture import Captured
from .data.loader import Batch, Loader
from .measure import BlockClock
from .metrics import psnr, sliced_wasserstein, ssim
from .step import Step, execute
from .tuning import Tuning
from .workloads import Workload

PICTURED = 32  # images in a picture
ON_THE_WAY = 2  # losses, to the host
SAMPLE_SEED = 20_151_119  # the generator is always judged on the same noise


class Diverged(Exception):
    """The training loss is no longer a finite number."""


class Trained(NamedTuple):
    """What one epoch did."""

    loss: float  # mean over the steps
    images: int
    steps: int


class Evaluation(NamedTuple):
    """What one evaluation found: the main metric, further ones by name, and a picture where the objective has one."""

    metric: float
    further: dict[str, float]
    images: int
    picture: torch.Tensor | None  # [3, H, W] in [0, 1]


Evaluate = Callable[[], Evaluation]


def train_epoch(
    step: Step, batches: Iterable[Batch], clock: BlockClock, progress: Callable[[int, float], None]
) -> Trained:
    """Trains on every batch, timed by `clock`; calls `progress(steps, loss)` for each block, two blocks later.

    The loss of a block is that of its last batches. Raises `Diverged` where one of them, or in the end the mean of all,
    is not finite.
    """
    images = steps = 0
    total: torch.Tensor | None = None
    on_the_way: deque[tuple[int, int, torch.Tensor]] = deque()  # steps so far, and a loss of so many batches
    # on the host, and taken before the clock starts, as such memory comes slowly
    places = cycle([torch.empty((), pin_memory=torch.cuda.is_available()) for _ in range(ON_THE_WAY)])
    clock.start()
    for batch in batches:
        loss = step(batch.images, batch.labels)
        total = loss.clone() if total is None else total.add_(loss)
        images += len(batch.images)
        steps += batch.batches
        if clock.step(batch.batches):
            if len(on_the_way) == ON_THE_WAY:  # the copy was asked for before the block that is done by now
                done, count, arrived = on_the_way.popleft()
                progress(done, _checked(done, arrived.item() / count))
            on_the_way.append((steps, batch.batches, next(places).copy_(loss, non_blocking=True)))
    clock.stop()
    assert total is not None, "an epoch without a batch"
    return Trained(_checked(steps, total.item() / steps), images, steps)


def rehearse(device: torch.device) -> None:
    """Goes once through what an epoch does beside its steps: a GPU loads each kernel when it is first used."""
    loss = torch.zeros((), device=device)
    batches = [Batch(images=loss[None], labels=loss[None], valid=1)] * (ON_THE_WAY + 1)
    train_epoch(lambda *batch: loss, batches, BlockClock(device, len(batches)), lambda *done: None)


def _checked(steps: int, loss: float) -> float:
    if not math.isfinite(loss):
        raise Diverged(f"training loss {loss} after {steps} steps")
    return loss


def make_evaluation(
    workload: Workload, network: nn.Module, loader: Loader, tuning: Tuning, device: torch.device
) -> Evaluate:
    """The function that judges `network` by the workload's metric, on the images of all ranks' loaders together.

    Of generated images each rank judges all, on all held-out ones: `loader` brings those in every rank.
    """
    maker = {"classify": _classification, "reconstruct": _reconstruction, "adversarial": _generation}
    judge = maker[workload.objective](network, loader, tuning, device)

    def evaluate() -> Evaluation:
        parallel.average_statistics(network)
        return judge()

    return evaluate


def _classification(network: nn.Module, loader: Loader, tuning: Tuning, device: torch.device) -> Evaluate:
    """Share of right answers, in %."""
    logits_of = execute(network, tuning, device)

    def are_right(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits_of(images).argmax(dim=1) == labels

    judge = Captured(are_right, "eval") if tuning.capture else are_right

    @torch.no_grad()
    def evaluate() -> Evaluation:
        network.eval()
        right = torch.zeros((), dtype=torch.int64, device=device)
        images = 0
        for batch in loader.epoch():
            right += judge(batch.images, batch.labels)[: batch.valid].sum()
            images += batch.valid
        network.train()
        right_of_all, of_all = parallel.total(torch.stack([right, right.new_tensor(images)])).tolist()
        return Evaluation(100.0 * right_of_all / of_all, {}, of_all, None)

    return evaluate


def _reconstruction(network: nn.Module, loader: Loader, tuning: Tuning, device: torch.device) -> Evaluate:
    """PSNR in dB and SSIM, each averaged over the images; the picture shows originals above reconstructions."""
    network_of = execute(network, tuning, device)

    def rebuild_and_judge(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rebuilt, truth = network_of(images).float(), images.float()
        return rebuilt, torch.stack([psnr(rebuilt, truth), ssim(rebuilt, truth)])

    judge = Captured(rebuild_and_judge, "eval") if tuning.capture else rebuild_and_judge

    @torch.no_grad()
    def evaluate() -> Evaluation:
        network.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        images = 0
        picture = None
        for batch in loader.epoch():
            rebuilt, values = judge(batch.images)
            totals += values[:, : batch.valid].sum(1)
            images += batch.valid
            if picture is None:
                few = min(PICTURED // 2, batch.valid)
                picture = make_grid(torch.cat([batch.images[:few], rebuilt[:few].clamp(0, 1)]), nrow=few)
        network.train()
        psnr_sum, ssim_sum, of_all = parallel.total(torch.cat([totals, totals.new_tensor([images])])).tolist()
        return Evaluation(psnr_sum / of_all, {"ssim": ssim_sum / of_all}, int(of_all), picture)

    return evaluate


def _generation(network: nn.Module, loader: Loader, tuning: Tuning, device: torch.device) -> Evaluate:
    """Sliced Wasserstein distance ×10³ of held-out images and as many generated ones; the picture shows samples."""
    generator = network.generator
    assert isinstance(generator, nn.Module)
    generate = execute(generator, tuning, device)
    real = collect(loader)
    batch_size = len(next(iter(loader.epoch())).images)
    # drawn on the CPU: the same noise on every device
    noise = torch.randn(len(real) + batch_size, LATENT, generator=torch.Generator().manual_seed(SAMPLE_SEED)).to(device)

    @torch.no_grad()
    def evaluate() -> Evaluation:
        network.eval()
        fakes = [generate(noise[start : start + batch_size]).float() for start in range(0, len(real), batch_size)]
        network.train()
        fake = torch.cat(fakes)[: len(real)]
        distance = sliced_wasserstein(fake, real)
        return Evaluation(distance, {}, len(real), make_grid(fake[:PICTURED] / 2 + 0.5, nrow=8))

    return evaluate


def collect(loader: Loader) -> torch.Tensor:
    """All images of one epoch, without padding: float32 [N, C, H, W]."""
    return torch.cat([batch.images[: batch.valid].to(torch.float32, copy=True) for batch in loader.epoch()])
