"""The training step of each objective: forward and loss (compiled where the tuning says so), backward, update."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.dcgan import LATENT
from . import parallel
from .adam import MasterAdam, keep_large_in
from .basis import Coordinates
from .capture import Captured
from .fuse import in_groups
from .muon import Muon
from .tuning import Tuning
from .workloads import OpenRecipe, Recipe, Workload

# images and labels of n batches, one behind the other → the sum of their n losses, on the device
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

REAL_LABEL = 0.9  # one-sided label smoothing of 0.1 (Salimans et al. 2016)
RISE = 0.3  # of a one-cycle run, in which the learning rate rises from START of its peak
START = 0.04
RISE_OF_LINES = 0.25
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Player:
    """Trained parameters with their optimizer, schedule and (fp16) gradient scaler. A GAN has two, the others one.

    Under capture the learning rates are on the device, since a graph repeats what the host did while it was captured.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, tuning: Tuning, device: torch.device, steps: int) -> None:
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if tuning.kernels and tuning.precision == "bf16" and recipe.optimizer == "adam" and recipe.basis == "taps":
            keep_large_in(torch.bfloat16, self.parameters)
        self._half = DTYPES[tuning.precision]
        self._coordinates = Coordinates(self.parameters, tuning.compile) if recipe.basis == "frequencies" else None
        trained = self.parameters if self._coordinates is None else self._coordinates.trained
        self.optimizer = make_optimizer(trained, recipe, tuning)
        self.sharded = self.optimizer.sharded if isinstance(self.optimizer, MasterAdam) else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=tuning.precision == "fp16")
        self._new_scaler = self.scaler.state_dict()
        self._captured = tuning.capture
        where = device if tuning.capture else torch.device("cpu")
        share = SCHEDULES[recipe.schedule]
        shares = torch.tensor([share(step / steps) for step in range(steps + 1)], dtype=torch.float64)
        peaks = torch.tensor([group["lr"] for group in self.optimizer.param_groups], dtype=torch.float64)
        self._rates = torch.outer(shares, peaks).to(where, torch.float32)  # [step, group]
        self._done = torch.zeros(1, dtype=torch.int64, device=where)  # steps, until the schedule ends
        self._ahead: list[Any] = []

    def restart(self) -> None:
        """Optimizer, schedule and scaler as at the start, in the same memory: a graph may hold it.

        The weights are set back before.
        """
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
        if self._coordinates is not None:
            self._coordinates.read()
        self.scaler.load_state_dict(self._new_scaler)
        self._done.zero_()

    def adding_up(self, network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """`network`, which holds the parameters, to be called in one loss: their gradients come to be all ranks' sums.

        Either in the backward pass or, of what ranks share out, in the update.
        """
        if self.sharded is not None:
            return network
        return parallel.adding_up(network, self._half)

    def begin(self, steps: int) -> None:
        """Looks up the learning rates of the next `steps` updates."""
        ahead = (self._done + torch.arange(steps, device=self._done.device)).clamp_(max=len(self._rates) - 1)
        rates = self._rates[ahead]
        self._ahead = [list(row) for row in rates] if self._captured else rates.tolist()
        self._done.add_(steps).clamp_(max=len(self._rates) - 1)

    def update(self, loss: torch.Tensor) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._ahead[0], strict=True):
            group["lr"] = rate
        self._ahead = self._ahead[1:]
        self.scaler.scale(parallel.share(loss)).backward()
        if self._coordinates is not None:
            self._coordinates.take_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self._coordinates is not None:
            self._coordinates.write_back()
        self.optimizer.zero_grad(set_to_none=True)


def one_cycle(progress: float) -> float:
    """The learning rate as a share of its peak after `progress` of a run (0 to 1): up for 30 %, then a cosine down.

    Smith & Topin 2018. Beyond 1, where only warm-up comes, it stays at its end.
    """
    if progress < RISE:
        return START + (1 - START) * progress / RISE
    return 0.5 + 0.5 * math.cos(math.pi * (min(progress, 1.0) - RISE) / (1 - RISE))


def rise_and_fall(progress: float) -> float:
    """Up along a line for the first `RISE_OF_LINES` of a run, then down along one to zero at its end."""
    if progress < RISE_OF_LINES:
        return (1 + progress / RISE_OF_LINES * 4) / 5
    return max(0.0, 1 - progress) / (1 - RISE_OF_LINES)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "one-cycle": one_cycle,
    "down": lambda progress: max(0.0, 1 - progress),
    "up-down": rise_and_fall,
}


def make_optimizer(parameters: list[nn.Parameter], recipe: Recipe, tuning: Tuning) -> torch.optim.Optimizer:
    """The recipe's optimizer; RMSprop has no fused form and takes the default one (ρ 0.9, as its source has it)."""
    if recipe.optimizer == "muon":
        assert isinstance(recipe, OpenRecipe)
        return make_muon(parameters, recipe, tuning)
    common: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, alpha=0.9, capturable=tuning.capture, **common)
    fused = tuning.fused_optimizer or None
    if recipe.optimizer == "adam":
        common["betas"] = (recipe.momentum, 0.999)
        if any(parameter.dtype is torch.bfloat16 for parameter in parameters):
            return MasterAdam(parameters, tuning.compile, **common)
        return torch.optim.Adam(parameters, fused=fused, capturable=tuning.capture, **common)
    sgd = torch.optim.SGD(parameters, fused=fused, momentum=recipe.momentum, **common)
    if tuning.fused_optimizer and recipe.momentum:
        # torch 2.11 leaves the buffers of a fused first step unwritten when the scaler skips that step, as it does with
        # fp16 more often than not, and then goes on from whatever lay there. From zeros the first step is the same.
        for parameter in parameters:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def make_muon(parameters: list[nn.Parameter], recipe: OpenRecipe, tuning: Tuning) -> Muon:
    """Convolutions by Muon; the linear layer's weight and the biases by SGD, each at a rate of its own."""
    kinds = [[weight for weight in parameters if weight.ndim == dimensions] for dimensions in (4, 2, 1)]
    convolutions, head, biases = kinds
    assert sum(map(len, kinds)) == len(parameters)
    plain = [
        {"params": members, "lr": rate, "weight_decay": recipe.weight_decay / rate}
        for members, rate in ((head, recipe.head_rate), (biases, recipe.bias_rate))
    ]
    return Muon(
        convolutions,
        plain,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        plain_momentum=recipe.plain_momentum,
        weight_decay=recipe.weight_decay,
        half=DTYPES[tuning.precision],
        compile=tuning.compile,
    )


def why_uncaptured(recipe: Recipe, tuning: Tuning) -> str | None:
    """Why this step cannot be one CUDA graph; None where it can."""
    if tuning.precision == "fp16" and recipe.optimizer in ("rmsprop", "muon"):
        return f"without a fused form of {recipe.optimizer} the gradient scaler asks the device whether to skip a step"
    return None


def execute(function: Callable[..., torch.Tensor], tuning: Tuning, device: torch.device) -> Callable[..., torch.Tensor]:
    """`function` under the tuning's autocast, compiled as one graph of constant shapes where the tuning compiles.

    A graph break is an error (fullgraph): nothing runs silently slower than its record says.
    """
    dtype = DTYPES[tuning.precision]

    def under_autocast(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            return function(*inputs)

    if not tuning.compile:
        return under_autocast
    options = None
    if parallel.ranks() > 1:
        from .overlap import OVERLAP  # here, since it takes the compiler's modules

        options = OVERLAP
    return torch.compile(under_autocast, fullgraph=True, dynamic=False, options=options)


def own_batch_size(workload: Workload) -> int:
    """Images of one training batch that are this rank's."""
    return workload.recipe.batch_size // parallel.ranks()


def make_step(
    workload: Workload, network: nn.Module, tuning: Tuning, device: torch.device, steps: int
) -> tuple[Step, list[Player]]:
    """The step that trains `network` on one batch after the other, and the players that it updates.

    `steps` is the run's length. Under capture the step is a `Captured`, one graph of all its batches.
    """
    make = _adversarial_step if workload.objective == "adversarial" else _plain_step
    one_batch, players = make(workload, network, tuning, device, steps)
    own_batch = own_batch_size(workload)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        batches = list(zip(*(rows.split(own_batch) for rows in (images, labels)), strict=True))
        for player in players:
            player.begin(len(batches))
        losses = [one_batch(*batch) for batch in batches]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    return Captured(step, "train") if tuning.capture else step, players


def _plain_step(
    workload: Workload, network: nn.Module, tuning: Tuning, device: torch.device, steps: int
) -> tuple[Step, list[Player]]:
    """One update of one network by one loss."""
    player = Player(network, workload.recipe, tuning, device, steps)

    recipe = workload.recipe
    smoothing, jitter = (recipe.label_smoothing, recipe.jitter) if isinstance(recipe, OpenRecipe) else (0.0, 0.0)

    def classification_loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen = jittered(images, jitter) if jitter else images
        logits = player.adding_up(network)(seen)
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)

    def reconstruction_loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rebuilt = player.adding_up(network)(images)
        return F.mse_loss(rebuilt.float(), images.float())

    objective = classification_loss if workload.objective == "classify" else reconstruction_loss
    loss_of = execute(objective, tuning, device)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = loss_of(images, labels)
        player.update(loss)
        return loss.detach()

    return step, [player]


def jittered(images: torch.Tensor, most: float) -> torch.Tensor:
    """Images [B, C, H, W] at another brightness and contrast each, uniform within ±`most` of a standard deviation."""
    shift, scale = most * (2 * torch.rand(2, len(images), 1, 1, 1, device=images.device, dtype=images.dtype) - 1)
    return (images + shift) * (1 + scale)


def _adversarial_step(
    workload: Workload, network: nn.Module, tuning: Tuning, device: torch.device, steps: int
) -> tuple[Step, list[Player]]:
    """One discriminator and one generator update a batch, on the same generated images (Radford et al. 2016)."""
    generator, discriminator = network.generator, network.discriminator
    assert isinstance(generator, nn.Module)
    assert isinstance(discriminator, nn.Module)
    generator_player = Player(generator, workload.recipe, tuning, device, steps)
    discriminator_player = Player(discriminator, workload.recipe, tuning, device, steps)
    # What is real and what is not as two batches at once: larger products, and one gradient instead of a sum of two.
    of_both = in_groups(discriminator, 2) if tuning.kernels else None

    def bce(logits: torch.Tensor, label: float) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, label, dtype=torch.float32))

    def generated(noise: torch.Tensor) -> torch.Tensor:
        return generator_player.adding_up(generator)(noise)

    def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        judge = discriminator_player.adding_up(discriminator if of_both is None else of_both)
        on_real, on_fake = (judge(real), judge(fake)) if of_both is None else judge(torch.cat([real, fake])).chunk(2)
        return bce(on_real, REAL_LABEL) + bce(on_fake, 0.0)

    def generator_loss(fake: torch.Tensor) -> torch.Tensor:
        # detached weights: the discriminator's weight gradients, which nobody would use, are not computed
        frozen = {name: weight.detach() for name, weight in discriminator.named_parameters()}
        return bce(torch.func.functional_call(discriminator, frozen, (fake,)), 1.0)

    generate = execute(generated, tuning, device)
    discriminator_loss_of = execute(discriminator_loss, tuning, device)
    generator_loss_of = execute(generator_loss, tuning, device)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        fake = generate(torch.randn(len(images), LATENT, device=device))
        loss = discriminator_loss_of(images, fake.detach())
        discriminator_player.update(loss)
        generator_player.update(generator_loss_of(fake))
        return loss.detach()

    return step, [discriminator_player, generator_player]
