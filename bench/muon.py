"""Muon (Jordan et al. 2024): momentum whose step is an orthogonal matrix, for convolutions; plain SGD for the rest.

A convolution's weight counts as a matrix of its outputs by its inputs and taps. A step brings it to unit scale (norm
√outputs), as the batch norm behind it makes its scale meaningless, and moves it by the learning rate along the nearest
orthogonal matrix to its gradient, roughly: some iterations of a Newton-Schulz polynomial bring all singular values near
one. Nothing is asked of the device, so that a step can be captured.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # of Jordan's Muon: X → aX + b(XXᵀ)X + c(XXᵀ)²X
ITERATIONS = 3
EPSILON = 1e-7


def orthogonalised(matrices: Tensor, dtype: torch.dtype | None = None, iterations: int = ITERATIONS) -> Tensor:
    """Matrices [N, R, C] with their singular values brought near one, by products in `dtype`, their own by default.

    Sides that are longer than needed may be filled up with zeros, which stay.
    """
    a, b, c = POLYNOMIAL
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + EPSILON)).to(dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Groups of `convolutions` and, by `{"params": …, "lr": …}`, of what plain SGD with Nesterov's momentum trains.

    A group's `lr` is a number or a tensor of one. `weight_decay` of the plain groups adds to the gradient; of
    convolutions it shrinks the weight by lr · weight_decay. half: the type of the polynomial's products.
    """

    def __init__(
        self,
        convolutions: Iterable[nn.Parameter],
        plain: Iterable[dict[str, Any]] = (),
        *,
        lr: float,
        momentum: float,
        plain_momentum: float = 0.0,
        weight_decay: float = 0.0,
        half: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        common = {"weight_decay": weight_decay}
        groups = [{"params": list(convolutions), "lr": lr, "momentum": momentum, "orthogonal": True} | common]
        groups += [common | {"momentum": plain_momentum, "orthogonal": False} | group for group in plain]
        super().__init__(groups, {})
        self._half = half
        self._move: Callable[..., None] = (
            torch.compile(move_orthogonally, fullgraph=True) if compile else move_orthogonally
        )
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = group["params"]
            gradients = [weight.grad for weight in weights]
            buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
            rate = torch.as_tensor(group["lr"], device=weights[0].device)
            momentum, decay = group["momentum"], group["weight_decay"]
            if group["orthogonal"]:
                self._move(weights, gradients, buffers, rate, momentum, decay, self._half)
                continue
            if decay:
                gradients = list(torch._foreach_add(gradients, weights, alpha=decay))
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, gradients)
            steps = torch._foreach_add(gradients, buffers, alpha=momentum)
            torch._foreach_mul_(steps, -rate)
            torch._foreach_add_(weights, steps)


def move_orthogonally(
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    rate: Tensor,
    momentum: float,
    decay: float,
    half: torch.dtype,
) -> None:
    """One step of `weights` [O, I, k, k] and their momentum `buffers`, in place."""
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, gradients)
    ahead = torch._foreach_add(gradients, buffers, alpha=momentum)
    together: dict[int, list[int]] = {}  # of as many rows each
    for number, weight in enumerate(weights):
        together.setdefault(len(weight), []).append(number)
    for height, numbers in together.items():
        flat = [ahead[number].flatten(1) for number in numbers]
        widest = max(matrix.shape[1] for matrix in flat)
        stacked = torch.stack([F.pad(matrix, (0, widest - matrix.shape[1])) for matrix in flat])
        directions = orthogonalised(stacked, half).to(rate.dtype)
        for number, direction in zip(numbers, directions, strict=True):
            weight = weights[number]
            columns = weight[0].numel()
            scaled = weight * (height**0.5 / (weight.norm() + EPSILON))
            moved = scaled - rate * direction[:, :columns].view(weight.shape)
            weight.copy_(moved * (1 - rate * decay))
