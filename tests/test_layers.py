"""The table of layers: counted from the models, and two layers by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from netdyno.bench.layers import Layer, count, count_all, layers, networks, read


def test_table_is_what_the_models_give() -> None:
    assert list(read()) == count_all(), "run: python -m netdyno.bench.layers"


def test_convolution_by_hand() -> None:
    """MNIST's second: 32 → 64 channels, 13×13 → 11×11, each output from 32 · 9 products."""
    layer = [layer for layer in layers("mnist-cnn") if layer.op == "conv"][1]
    assert layer == Layer(
        network="mnist-cnn",
        op="conv",
        channels_in=32,
        channels_out=64,
        inputs=32 * 13 * 13,
        outputs=64 * 11 * 11,
        weights=64 * 32 * 9,
        flops=2 * 64 * 11 * 11 * 32 * 9,
    )
    assert layer.unfolded == 11 * 11 * 9 * 64


def test_transposed_convolution_by_hand() -> None:
    """DCGAN's first: 1,024 → 512 channels, 4×4 → 8×8; each of the 16 inputs meets the 5×5 kernel once."""
    layer = next(layer for layer in layers("dcgan generator") if layer.op == "conv")
    assert (layer.channels_in, layer.channels_out) == (1024, 512)
    assert (layer.inputs, layer.outputs, layer.weights) == (1024 * 16, 512 * 64, 1024 * 512 * 25)
    assert layer.flops == 2 * 16 * 1024 * 512 * 25
    assert layer.unfolded == 16 * 25 * 1024


def test_linear_layers_and_1x1_convolutions_have_no_patches() -> None:
    found = [*layers("resnet50 features"), *layers("resnet50 head")]
    assert {layer.unfolded for layer in found if layer.op == "linear" or layer.weights == 64 * 64} == {0}


def test_sums_of_branches_are_seen() -> None:
    assert [layer.op for layer in layers("resnet50 features")].count("add") == 16


@pytest.mark.parametrize("name", ["cifar100-cnn", "dcgan generator", "dcgan discriminator", "conv-autoencoder"])
def test_torch_counts_the_same(name: str) -> None:
    network, shape = networks()[name]
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(2, *shape, device="meta"))
    assert sum(layer.flops for layer in count(name, network, shape)) == counter.get_total_flops() / 2


def test_unknown_network() -> None:
    with pytest.raises(KeyError):
        layers("lenet")
