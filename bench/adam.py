"""Adam of weights that are kept in 16 bits: updated in fp32, in one pass.

A network under autocast keeps its weights in fp32, casts them in each forward pass and gets its gradients in fp32, cast
as well: for dcgan's 36 million weights some 150 µs of a step of 4,050 (H200, by kernel). `Player` does it to the large
weights of each network that Adam trains in bf16 with the kernels: also cifar100-cnn's, dcgan-common's, and the head of
resnet50-transfer.

A master is kept as its weight, which is its upper 16 bits, rounded, and as what rounding took from it, which fits into
16 more: so a step moves 26 bytes for each weight instead of 28. The weights are rounded once more than under autocast:
at the start, where their masters are what the 16 bits hold.

All weights are updated by as few kernels as torch's compiler makes of them: 66 µs for cifar100-cnn, where a kernel for
each large weight and one for the small ones, which stay in fp32, took 81 (H100). Torch's fused Adam, which gives a
program 65,536 values of a weight, takes 67 for the small ones alone (H200).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from . import parallel
from .parallel import LARGE, as_it_lies, flat_gradient
from .sharded import Sharded, side_by_side


def keep_large_in(half: torch.dtype, weights: Iterable[nn.Parameter]) -> None:
    """Brings weights of at least `LARGE` elements to the type `half`, in place; they stay the parameters they are."""
    for weight in weights:
        if weight.numel() >= LARGE:
            weight.data = weight.data.to(half)


class MasterAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015) of parameters of which some are in bf16, which have fp32 masters, and some in fp32.

    A master starts as its weight is, also where the state is set to zeros. The rate of the one group may be a number
    or, under capture, on the device. compile: the update, and what gives gradients away.

    Ranks that reach each other's memory share the update out: weights in bf16 move there, and gradients, which are to
    be each rank's own, are added up here.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        compile: bool,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        assert {weight.dtype for weight in weights} <= {torch.bfloat16, torch.float32}
        super().__init__(weights, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._update = side_by_side(update) if compile else update
        self._weights = weights
        self.sharded = Sharded(weights, compile) if parallel.updates_are_shared() else None
        if self.sharded is not None:
            self._places = [portion.weights for portion in self.sharded.portions]
        else:
            self._places = [[as_it_lies(weight)] for weight in weights]
        # 1 - betaᵗ after t steps: the same for all
        corrections = {name: torch.zeros((), device=weights[0].device) for name in ("correction", "correction_sq")}
        for weight, (mine, *_) in zip(weights, self._places, strict=True):
            averages = {name: torch.zeros_like(mine, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
            rest = {"rest": torch.zeros_like(mine, dtype=torch.int16)} if weight.dtype is torch.bfloat16 else {}
            self.state[weight] = averages | rest | corrections

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        rate = torch.as_tensor(group["lr"], dtype=torch.float32, device=self._weights[0].device)
        own = [flat_gradient(weight) for weight in self._weights]
        gradients = [[gradient] for gradient in own] if self.sharded is None else self.sharded.exchange(own)
        states = [self.state[weight] for weight in self._weights]
        self._update(self._places, gradients, states, rate, group["betas"], group["eps"], group["weight_decay"])
        if self.sharded is not None:
            self.sharded.finish()


def master_of(weight: Tensor, rest: Tensor) -> Tensor:
    """The fp32 number of which a bf16 `weight` is the rounded form. rest: int16, the difference, in its last places."""
    return ((weight.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)


def rounded(master: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the rest of an fp32 `master`: see `master_of`.

    Of two numbers in bf16 that are as near, rounding takes the even one, and what lies between may be 2¹⁵, one more
    than 16 bits hold: such a master loses one in its last place.
    """
    weight = master.bfloat16()
    rest = master.view(torch.int32) - (weight.view(torch.int16).int() << 16)
    return weight, rest.clamp_max(2**15 - 1).to(torch.int16)


def update(
    weights: Sequence[list[Tensor]],
    gradients: Sequence[list[Tensor]],
    states: Sequence[dict[str, Tensor]],
    rate: Tensor,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> None:
    """One step of Adam for weights and their `states`, in place.

    Of each weight there are its places, of which the first is read and all are written, and the parts that its gradient
    is the sum of. One with a rest is in bf16, the others are in fp32.
    """
    correction, correction_sq = states[0]["correction"], states[0]["correction_sq"]
    for shared, beta in zip((correction, correction_sq), betas, strict=True):
        shared.mul_(beta).add_(1 - beta)
    for places, parts, state in zip(weights, gradients, states, strict=True):
        average, square = state["exp_avg"], state["exp_avg_sq"]
        master = master_of(places[0], state["rest"]) if "rest" in state else places[0]
        gradient = sum((part.float() for part in parts[1:]), parts[0].float())
        if decay:
            gradient = gradient + decay * master
        average.lerp_(gradient, 1 - betas[0])
        square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        spread = (square / correction_sq).sqrt() + eps
        weight = master - rate / correction * average / spread
        if "rest" in state:
            weight, rest = rounded(weight)
            state["rest"].copy_(rest)
        for place in places:
            place.copy_(weight)
