"""Bias, activation and pooling in one: against PyTorch's own operations in float64, eager and compiled."""

from itertools import product

import pytest
import torch
from torch import Tensor

from netdyno.kernels.pooled_activation import Activation, pooled_activation, pooled_activation_reference

SHAPES = [(2, 3, 8, 8), (1, 5, 9, 6), (3, 1, 2, 7), (2, 16, 11, 11)]  # even and odd sides
ACTIVATIONS: tuple[Activation | None, ...] = ("relu", "elu", None)


def gradients(function, images: Tensor, bias: Tensor | None, activation: Activation | None) -> list[Tensor | None]:
    """The result, and the gradients of a weighted sum of it."""
    images = images.clone().requires_grad_()
    bias = None if bias is None else bias.clone().requires_grad_()
    out = function(images, bias, activation)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    (out * weights).sum().backward()
    return [out.detach(), images.grad, None if bias is None else bias.grad]


def compare(function, dtype: torch.dtype, device: str, tolerance: float) -> None:
    for shape, activation, biased in product(SHAPES, ACTIVATIONS, (True, False)):
        draw = torch.Generator().manual_seed(0)
        images = torch.randn(shape, generator=draw, dtype=torch.float64).to(device, dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        # a bias that `dtype` can tell, or ReLU would cut off other values than in float64
        bias = torch.randn(shape[1], generator=draw).to(device, dtype).double() if biased else None
        torch._dynamo.reset()  # a graph for each case is more than it keeps
        found = gradients(
            function, images, bias if bias is None or dtype == torch.float64 else bias.float(), activation
        )
        assert found[0].dtype == found[1].dtype == dtype
        assert found[1].is_contiguous(memory_format=torch.channels_last)  # or cuDNN would turn it
        expected = gradients(pooled_activation_reference, images.double(), bias, activation)
        for got, exact in zip(found, expected, strict=True):
            assert (got is None) == (exact is None)
            if exact is not None:
                torch.testing.assert_close(got.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_equal_to_one_operation_after_the_other(dtype: torch.dtype, tolerance: float) -> None:
    compare(pooled_activation, dtype, "cpu", tolerance)


def test_compiled_as_one_graph() -> None:
    compare(torch.compile(pooled_activation, fullgraph=True, dynamic=False), torch.float32, "cpu", 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_compiled_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    compare(torch.compile(pooled_activation, fullgraph=True, dynamic=False), dtype, "cuda", tolerance)


def test_the_first_of_equal_pixels_gets_the_gradient() -> None:
    images = torch.ones(1, 1, 2, 2, requires_grad=True)
    pooled_activation(images, None, "relu").sum().backward()
    assert images.grad.tolist() == [[[[1.0, 0.0], [0.0, 0.0]]]]


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_what_is_no_number_is_not_hidden(place: tuple[int, int]) -> None:
    images = torch.ones(1, 1, 4, 4)
    images[0, 0, place[0], place[1]] = torch.nan
    images.requires_grad_()
    out = pooled_activation(images, None, "relu")
    assert out.isnan().sum() == 1
    (2 * out).sum().backward()
    assert images.grad[0, 0, place[0], place[1]] == 2


def test_other_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="'tanh', neither relu nor elu nor None"):
        pooled_activation(torch.ones(1, 1, 2, 2), None, "tanh")
