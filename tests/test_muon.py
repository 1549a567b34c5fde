"""Muon against the same arithmetic in float64, and against the orthogonal matrix that it is to come near."""

import numpy as np
import pytest
import torch
from torch import nn

from netdyno.bench.muon import Muon, orthogonalised

RATE, MOMENTUM, DECAY = 0.2, 0.6, 0.01


@pytest.mark.parametrize("shape", [(3, 16, 40), (1, 8, 8), (2, 24, 10)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    """By five iterations within the polynomial's own band, whatever they were; directions stay."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonalised(matrices, iterations=5) @ right.mT
    kept = torch.diagonal(found, dim1=1, dim2=2)
    assert (kept.min(), kept.max()) == (pytest.approx(0.9, abs=0.25), pytest.approx(1.0, abs=0.25))
    torch.testing.assert_close(found, torch.diag_embed(kept), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_half_precision_is_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    matrices = torch.randn(2, 64, 216, generator=torch.Generator().manual_seed(0))
    exact = orthogonalised(matrices.double())
    assert (orthogonalised(matrices, dtype).double() - exact).abs().max() < tolerance


def test_zeros_at_the_end_of_a_row_change_nothing() -> None:
    matrices = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    filled = nn.functional.pad(matrices, (0, 4))
    torch.testing.assert_close(orthogonalised(filled)[:, :, :7], orthogonalised(matrices))
    assert (orthogonalised(filled)[:, :, 7:] == 0).all()


def reference(weights: list[np.ndarray], plain: np.ndarray, gradients: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Convolutions by Muon, one at a time, and `plain` by SGD with Nesterov's momentum, in float64."""
    buffers = [np.zeros_like(weight) for weight in weights]
    velocity = np.zeros_like(plain)
    for *of_weights, of_plain in gradients:
        for weight, buffer, gradient in zip(weights, buffers, of_weights, strict=True):
            buffer *= MOMENTUM
            buffer += gradient
            x = (gradient + MOMENTUM * buffer).reshape(len(weight), -1)
            x = x / np.linalg.norm(x)
            for _ in range(3):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            weight *= len(weight) ** 0.5 / np.linalg.norm(weight)
            weight -= RATE * x.reshape(weight.shape)
            weight *= 1 - RATE * DECAY
        decayed = of_plain + DECAY * plain
        velocity = 0.9 * velocity + decayed
        plain -= 0.05 * (decayed + 0.9 * velocity)
    return [*weights, plain]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps_equal_float64(compiled: bool) -> None:
    """Of convolutions of several shapes, two of which are stacked, and of a bias."""
    draw = np.random.default_rng(0)
    shapes = [(8, 3, 3, 3), (8, 8, 3, 3), (16, 8, 1, 1), (6,)]
    start = [draw.standard_normal(shape) for shape in shapes]
    gradients = [[draw.standard_normal(shape) for shape in shapes] for _ in range(4)]
    *convolutions, bias = [nn.Parameter(torch.tensor(values, dtype=torch.float32)) for values in start]
    optimizer = Muon(
        convolutions,
        [{"params": [bias], "lr": 0.05}],
        lr=RATE,
        momentum=MOMENTUM,
        plain_momentum=0.9,
        weight_decay=DECAY,
        compile=compiled,
    )
    for of_step in gradients:
        for parameter, gradient in zip([*convolutions, bias], of_step, strict=True):
            parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    *first, last = [values.copy() for values in start]
    for found, expected in zip([*convolutions, bias], reference(first, last, gradients), strict=True):
        np.testing.assert_allclose(found.detach().numpy(), expected, atol=2e-5)


def test_a_rate_may_be_a_tensor() -> None:
    """As a captured step has it."""
    found = []
    for rate in (RATE, torch.tensor(RATE)):
        weight = nn.Parameter(torch.ones(2, 3, 1, 1))
        optimizer = Muon([weight], lr=0.0, momentum=MOMENTUM)
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.arange(6.0).view(2, 3, 1, 1)
        optimizer.step()
        found.append(weight.detach().clone())
    torch.testing.assert_close(*found)
