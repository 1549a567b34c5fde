"""The networks of the open division."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netdyno.models.small_cnn import SmallCnn
from netdyno.models.whitened_cnn import PAIRS, PATCH, RESIDUAL, Groups, WhitenedCnn


def images(count: int, side: int = 32) -> torch.Tensor:
    """Neighbouring pixels alike, as in photographs."""
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fine = 0.1 * torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, (side, side), mode="bilinear") + fine


def test_patches_come_out_uncorrelated_and_of_unit_variance() -> None:
    network = WhitenedCnn(10, ((8, (3, 3), 0),))
    network.whiten(images(200))
    seen = network.whitening[0](images(200)).transpose(0, 1).flatten(1)
    axes = 3 * PATCH**2
    whitened, negated = seen[:axes], seen[axes:]
    covariance = whitened @ whitened.T / whitened.shape[1]
    torch.testing.assert_close(covariance, torch.diag(covariance.diagonal()), atol=1e-3, rtol=0)
    assert covariance.diagonal().min() > 0.8  # weak axes are held back
    assert covariance.diagonal().max() < 1.01
    torch.testing.assert_close(negated, -whitened)


@pytest.mark.parametrize("groups", [PAIRS, RESIDUAL])
@pytest.mark.parametrize("side", [20, 24, 28, 32])
def test_any_side_gives_logits(groups: Groups, side: int) -> None:
    torch.manual_seed(0)
    network = WhitenedCnn(7, groups)
    network.whiten(images(4))
    with torch.no_grad():
        logits = network(images(3, side))
    assert logits.shape == (3, 7)
    assert logits.isfinite().all()
    assert logits.abs().max() < 1  # all classes begin about as likely


def test_the_first_outputs_of_a_convolution_begin_as_its_inputs() -> None:
    conv = WhitenedCnn(10, PAIRS).groups[1].first[0]
    seen = torch.randn(2, 64, 9, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(conv(seen)[:, :64], seen)


def test_what_is_trained() -> None:
    """No scale of a batch norm and not the whitened axes."""
    network = WhitenedCnn(10, PAIRS)
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert f"{name}.bias" in trained
            assert f"{name}.weight" not in trained
    assert not any(name.startswith("whitening") for name in trained)
    assert len(trained) == 6 + 6 + 1


def test_parameters_of_the_small_network() -> None:
    """25·24 + 24, 9·24·32 + 32, 800·256 + 256, 256·10 + 10."""
    assert sum(value.numel() for value in SmallCnn().parameters()) == 624 + 6_944 + 205_056 + 2_570
