"""The training step of each objective: forward and loss (compiled where the tuning says so), backward, update."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.dcgan import LATENT
from .tuning import Tuning
from .workloads import Recipe, Workload

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # images, labels → loss, on the device

REAL_LABEL = 0.9  # one-sided label smoothing of 0.1 (Salimans et al. 2016)
RISE = 0.3  # of a one-cycle run, in which the learning rate rises from START of its peak
START = 0.04
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Player:
    """Trained parameters with their optimizer, schedule and (fp16) gradient scaler. A GAN has two, the others one."""

    def __init__(self, network: nn.Module, recipe: Recipe, tuning: Tuning, device: torch.device, steps: int) -> None:
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._recipe, self._tuning, self._device, self._steps = recipe, tuning, device, steps
        self.restart()

    def restart(self) -> None:
        """A fresh optimizer, schedule and scaler over the same parameters."""
        recipe = self._recipe
        self.optimizer = make_optimizer(self._parameters, recipe, fused=self._tuning.fused_optimizer)
        self.schedule = (
            torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: one_cycle(step / self._steps))
            if recipe.schedule == "one-cycle"
            else None
        )
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=self._tuning.precision == "fp16")

    def update(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.schedule is not None:
            self.schedule.step()


def one_cycle(progress: float) -> float:
    """The learning rate as a share of its peak after `progress` of a run (0 to 1): up for 30 %, then a cosine down.

    Smith & Topin 2018. Beyond 1, where only warm-up comes, it stays at its end.
    """
    if progress < RISE:
        return START + (1 - START) * progress / RISE
    return 0.5 + 0.5 * math.cos(math.pi * (min(progress, 1.0) - RISE) / (1 - RISE))


def make_optimizer(parameters: list[nn.Parameter], recipe: Recipe, *, fused: bool) -> torch.optim.Optimizer:
    """The recipe's optimizer; RMSprop has no fused form and takes the default one (ρ 0.9, as its source has it)."""
    common: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, alpha=0.9, **common)
    common["fused"] = fused or None
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, betas=(recipe.momentum, 0.999), **common)
    sgd = torch.optim.SGD(parameters, momentum=recipe.momentum, **common)
    if fused and recipe.momentum:
        # torch 2.11 leaves the buffers of a fused first step unwritten when the scaler skips that step, as it does with
        # fp16 more often than not, and then goes on from whatever lay there. From zeros the first step is the same.
        for parameter in parameters:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def execute(function: Callable[..., torch.Tensor], tuning: Tuning, device: torch.device) -> Callable[..., torch.Tensor]:
    """`function` under the tuning's autocast, compiled as one graph of constant shapes where the tuning compiles.

    A graph break is an error (fullgraph): nothing runs silently slower than its record says.
    """
    dtype = DTYPES[tuning.precision]

    def under_autocast(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            return function(*inputs)

    return torch.compile(under_autocast, fullgraph=True, dynamic=False) if tuning.compile else under_autocast


def make_step(
    workload: Workload, network: nn.Module, tuning: Tuning, device: torch.device, steps: int
) -> tuple[Step, list[Player]]:
    """The step that trains `network` on one batch, and the players that it updates; `steps` is the run's length."""
    if workload.objective == "adversarial":
        return _adversarial_step(workload, network, tuning, device, steps)
    player = Player(network, workload.recipe, tuning, device, steps)

    def classification_loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(network(images).float(), labels)

    def reconstruction_loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(network(images).float(), images.float())

    objective = classification_loss if workload.objective == "classify" else reconstruction_loss
    loss_of = execute(objective, tuning, device)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = loss_of(images, labels)
        player.update(loss)
        return loss.detach()

    return step, [player]


def _adversarial_step(
    workload: Workload, network: nn.Module, tuning: Tuning, device: torch.device, steps: int
) -> tuple[Step, list[Player]]:
    """One discriminator and one generator update a batch, on the same generated images (Radford et al. 2016)."""
    generator, discriminator = network.generator, network.discriminator
    assert isinstance(generator, nn.Module)
    assert isinstance(discriminator, nn.Module)
    generator_player = Player(generator, workload.recipe, tuning, device, steps)
    discriminator_player = Player(discriminator, workload.recipe, tuning, device, steps)

    def bce(logits: torch.Tensor, label: float) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, label, dtype=torch.float32))

    def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        return bce(discriminator(real), REAL_LABEL) + bce(discriminator(fake), 0.0)

    def generator_loss(fake: torch.Tensor) -> torch.Tensor:
        # detached weights: the discriminator's weight gradients, which nobody would use, are not computed
        frozen = {name: weight.detach() for name, weight in discriminator.named_parameters()}
        return bce(torch.func.functional_call(discriminator, frozen, (fake,)), 1.0)

    generate = execute(generator, tuning, device)
    discriminator_loss_of = execute(discriminator_loss, tuning, device)
    generator_loss_of = execute(generator_loss, tuning, device)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        fake = generate(torch.randn(len(images), LATENT, device=device))
        loss = discriminator_loss_of(images, fake.detach())
        discriminator_player.update(loss)
        generator_player.update(generator_loss_of(fake))
        return loss.detach()

    return step, [discriminator_player, generator_player]
