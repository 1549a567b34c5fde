"""Kernels in networks: which layers they take, and that a network computes and learns the same with them."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from netdyno.bench.fuse import FusedNorm, Replacement, _pooled_conv, fuse, in_groups
from netdyno.bench.step import make_step
from netdyno.bench.tuning import tuned
from netdyno.bench.workloads import Workload, dcgan, mnist_cnn
from netdyno.models.cifar10_cnn import Cifar10Cnn
from netdyno.models.cifar100_cnn import Cifar100Cnn
from netdyno.models.conv_autoencoder import ConvAutoencoder
from netdyno.models.dcgan import Dcgan, Discriminator
from netdyno.models.mnist_cnn import MnistCnn
from netdyno.models.small_cnn import SmallCnn
from netdyno.models.whitened_cnn import PAIRS, WhitenedCnn


class Other(nn.BatchNorm2d):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -images


NETWORKS = [
    (MnistCnn, (1, 28, 28), [0, 5]),
    (Cifar10Cnn, (3, 32, 32), [0, 2, 7, 12]),
    (Cifar100Cnn, (3, 32, 32), [0, 2, 8, 14]),
    (ConvAutoencoder, (3, 32, 32), [0, 2, 4, 6]),
    (lambda: Dcgan(width=8).discriminator, (3, 64, 64), [0, 11]),
    (lambda: Dcgan(width=8).generator, (100,), [11]),
    (lambda: Dcgan(width=64, kernel=4).discriminator, (3, 64, 64), [0, 11]),
    (lambda: Dcgan(width=64).generator, (100,), [11]),
    (SmallCnn, (1, 28, 28), [0, 3]),
    (lambda: WhitenedCnn(10, PAIRS), (3, 24, 24), [0]),
]


def fused_places(network: nn.Module) -> list[int]:
    return [int(name.split(".")[-1]) for name, module in network.named_modules() if type(module) is Replacement]


@pytest.mark.parametrize(("make", "shape", "places"), NETWORKS)
def test_a_fused_network_computes_and_learns_the_same(
    make: Callable[[], nn.Module], shape: tuple[int, ...], places: list[int]
) -> None:
    torch.manual_seed(0)
    network = make().double().to(memory_format=torch.channels_last)
    images = torch.rand(3, *shape, dtype=torch.float64)
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    found = []
    for fused in (False, True):
        if fused:
            before = {name: parameter for name, parameter in network.named_parameters()}
            fuse(network, torch.float64)
            assert fused_places(network) == places
            after = dict(network.named_parameters())
            assert list(after) == list(before)
            assert all(after[name] is parameter for name, parameter in before.items())
        network.zero_grad()
        torch.manual_seed(1)  # dropout
        out = network(images)
        (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)).sum().backward()
        found.append([out.detach(), *(one.grad for one in network.parameters() if one.requires_grad)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("make", [Cifar10Cnn, Cifar100Cnn])
def test_a_first_layer_takes_its_activation_in(make: Callable[[], nn.Module]) -> None:
    network = make()
    fuse(network, torch.float32)
    layers = next(module for module in network.modules() if isinstance(module, nn.Sequential))
    assert [type(layer) for layer in layers[:2]] == [Replacement, nn.Identity]
    half = make()
    fuse(half, torch.float16)  # the policy of a T4
    layers = next(module for module in half.modules() if isinstance(module, nn.Sequential))
    assert type(layers[1]) is not nn.Identity


def test_a_convolution_takes_its_pooling_in_where_the_kernel_is_for_its_channels() -> None:
    """Of cifar10-cnn's three that are pooled, the first; none under the policy of a T4."""
    functions = []
    for dtype in (torch.bfloat16, torch.float16):
        network = Cifar10Cnn()
        fuse(network, dtype)
        found = [network.layers[place]._function.func for place in (2, 7, 12)]
        functions.append([function is _pooled_conv for function in found])
    assert functions == [[True, False, False], [False] * 3]


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.ReLU(), nn.LeakyReLU(0.2)], ids=repr)
def test_batch_norm_takes_pooling_and_activation_in(activation: nn.Module) -> None:
    """Values, running statistics and what they make of other images."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(64, momentum=0.4), activation)
    fused = nn.Sequential(*deepcopy(plain))
    fuse(fused, torch.float32)
    assert [type(layer) for layer in fused] == [nn.Identity, FusedNorm, nn.Identity]
    for training in (True, True, False):
        images = torch.randn(4, 64, 5, 6) + 1
        torch.testing.assert_close(fused.train(training)(images), plain.train(training)(images))
    assert fused.train()(images.bfloat16()).dtype is torch.bfloat16
    plain.train()(images.bfloat16())
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(fused[1], name), getattr(plain[1], name))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.BatchNorm2d(96), nn.ReLU()],
        [nn.BatchNorm2d(64, momentum=None), nn.ReLU()],
        [nn.BatchNorm2d(64), nn.Tanh()],
        [nn.BatchNorm2d(64, affine=False), nn.ReLU()],
        [nn.BatchNorm2d(64, track_running_stats=False), nn.ReLU()],
        [Other(64), nn.ReLU()],
        [nn.Conv2d(8, 32, 3), nn.Tanh(), nn.MaxPool2d(2)],
        [nn.Conv2d(8, 32, 3), nn.ELU(alpha=0.5), nn.MaxPool2d(2)],
        [nn.Conv2d(8, 32, 3, padding="same"), nn.ReLU(), nn.MaxPool2d(2)],
        [nn.Conv2d(8, 32, 3, padding_mode="reflect", padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        [nn.Conv2d(3, 33, 3, groups=3), nn.ReLU(), nn.MaxPool2d(2)],
        [nn.Conv2d(3, 33, 3, dilation=2), nn.ReLU()],
        [nn.Conv2d(3, 33, 3, stride=(1, 2)), nn.ReLU()],
        [nn.Conv2d(3, 33, (3, 5)), nn.ReLU()],
        [nn.Conv2d(8, 32, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2)],
        [nn.Conv2d(32, 32, 3), nn.MaxPool2d(3)],
        [nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(3)],
        [nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2, stride=1)],
        [nn.ConvTranspose2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2)],
        [nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=1), nn.ReLU()],
        [nn.Conv2d(32, 32, 3), nn.ReLU()],
        [nn.Linear(3, 3), nn.ReLU()],
    ],
)
def test_what_no_kernel_does_is_left_alone(layers: list[nn.Module]) -> None:
    network = nn.Sequential(*layers)
    fuse(network, torch.float32)
    assert list(network) == layers


@pytest.mark.parametrize(
    ("workload", "make", "shape"),
    [
        (mnist_cnn(), MnistCnn, (1, 28, 28)),
        (dcgan(), lambda: Dcgan(width=8), (3, 64, 64)),
        (dcgan(), lambda: Dcgan(width=64, kernel=4), (3, 64, 64)),
    ],
)
def test_a_fused_network_trains_the_same_compiled(
    workload: Workload, make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """Three steps as a run makes them: the discriminator called with other weights by their names, too.

    Where all its batch norms are kernels', it judges real and generated images at once.
    """
    workload = replace(workload, recipe=replace(workload.quick, batch_size=8))
    found, running = [], []
    for fused in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        network = make().to(memory_format=torch.channels_last).train()
        if fused:
            fuse(network, torch.float32)
        tuning = replace(tuned(None), precision="fp32", kernels=fused)
        step, _ = make_step(workload, network, tuning, torch.device("cpu"), steps=3)
        torch.manual_seed(1)
        images = torch.rand(8, *shape).contiguous(memory_format=torch.channels_last)
        found.append([step(images, torch.arange(8)).item() for _ in range(3)])
        running.append([value for name, value in network.named_buffers() if "running" in name])
    torch._dynamo.reset()
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][0] != pytest.approx(found[0][2], rel=1e-3)
    for plain, by_kernels in zip(*running, strict=True):
        torch.testing.assert_close(plain, by_kernels, rtol=5e-3, atol=5e-4)


@pytest.mark.parametrize("kernels", [False, True])
def test_with_the_kernels_real_and_generated_images_are_judged_at_once(
    monkeypatch: pytest.MonkeyPatch, kernels: bool
) -> None:
    judged = []
    forward = Discriminator.forward
    monkeypatch.setattr(
        Discriminator, "forward", lambda self, images: judged.append(len(images)) or forward(self, images)
    )
    network = Dcgan(width=64, kernel=4)
    if kernels:
        fuse(network, torch.float32)
    tuning = replace(tuned(None), precision="fp32", compile=False, kernels=kernels)
    workload = dcgan()
    workload = replace(workload, recipe=replace(workload.quick, batch_size=4))
    step, _ = make_step(workload, network, tuning, torch.device("cpu"), steps=1)
    step(torch.rand(4, 3, 64, 64), torch.zeros(4))
    assert judged == ([8, 4] if kernels else [4, 4, 4])


def test_in_groups_is_as_if_one_batch_came_after_the_other() -> None:
    torch.manual_seed(0)
    network = Dcgan(width=64, kernel=4).discriminator
    assert in_groups(Dcgan(width=8).discriminator, 2) is None  # batch norms that no kernel is for
    fuse(network, torch.float32)
    grouped = in_groups(network, 2)
    assert grouped is not None
    assert [id(one) for one in grouped.parameters()] == [id(one) for one in network.parameters()]
    batches = [torch.rand(4, 3, 64, 64) + shift for shift in (0.0, 1.0)]
    before = {name: value.clone() for name, value in network.named_buffers()}
    expected = [network(batch) for batch in batches]
    running = {name: value.clone() for name, value in network.named_buffers()}
    network.load_state_dict(before, strict=False)
    torch.testing.assert_close(grouped(torch.cat(batches)), torch.cat(expected))
    torch.testing.assert_close(dict(network.named_buffers()), running)
