"""The six networks: sizes from their definition, initialisation, and that each can learn."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet50

from netdyno.bench import workloads
from netdyno.bench.step import make_step
from netdyno.bench.tuning import eager
from netdyno.models.cifar10_cnn import Cifar10Cnn
from netdyno.models.cifar100_cnn import Cifar100Cnn
from netdyno.models.conv_autoencoder import ConvAutoencoder
from netdyno.models.dcgan import Dcgan, Discriminator, Generator
from netdyno.models.mnist_cnn import MnistCnn
from netdyno.models.resnet50_transfer import ResNet50Transfer

CPU = torch.device("cpu")
FP16_MAX = 65_504.0

# Parameters as shared definitions of the networks have them: (in, out, side of the kernel) and (in, out).
MNIST = [(1, 32, 3), (32, 64, 3), (64, 64, 3), (1024, 100), (100, 10)]
CIFAR10 = [(3, 32, 3), (32, 32, 3), (32, 64, 3), (64, 64, 3), (64, 128, 3), (128, 128, 3), (2048, 128), (128, 10)]
CIFAR100 = [
    *[(3, 128, 3), (128, 128, 3), (128, 256, 3), (256, 256, 3), (256, 512, 3), (512, 512, 3)],
    *[(2048, 1024), (1024, 100)],
]
AUTOENCODER = [(3, 8, 3), (8, 4, 3), (4, 8, 3), (8, 3, 3)]


def with_bias(layers: list[tuple[int, ...]]) -> int:
    return sum(layer[0] * layer[1] * (layer[2] ** 2 if len(layer) == 3 else 1) + layer[1] for layer in layers)


def dcgan_generator(width: int, kernel: int) -> int:
    """No bias before a batch norm, whose scale and shift are two values a channel; the output layer has one."""
    channels = [8 * width, 4 * width, 2 * width, width]
    inner = sum(a * b * kernel**2 for a, b in pairwise(channels))
    return 100 * 8 * width * 16 + inner + 2 * sum(channels) + width * 3 * kernel**2 + 3


def dcgan_discriminator(width: int, kernel: int) -> int:
    """No batch norm after the first layer, which has a bias, as has the last, 4×4 to one logit."""
    channels = [width, 2 * width, 4 * width, 8 * width]
    inner = sum(a * b * kernel**2 for a, b in pairwise(channels))
    return 3 * width * kernel**2 + width + inner + 2 * sum(channels[1:]) + 8 * width * 16 + 1


def count(network: nn.Module, *, trained: bool | None = None) -> int:
    parameters = network.parameters()
    return sum(p.numel() for p in parameters if trained is None or p.requires_grad is trained)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (MnistCnn, with_bias(MNIST)),
        (Cifar10Cnn, with_bias(CIFAR10)),
        (Cifar100Cnn, with_bias(CIFAR100)),
        (ConvAutoencoder, with_bias(AUTOENCODER)),
        (Generator, dcgan_generator(128, 5)),
        (Discriminator, dcgan_discriminator(128, 5)),
        # the common form: 3,576,704 and 2,765,568 weights in the widely copied code, which has no bias anywhere
        (lambda: Generator(64, 4), 3_576_704 + 3),
        (lambda: Discriminator(64, 4), 2_765_568 + 64 + 1),
    ],
)
def test_parameter_count_follows_from_the_definition(network: Callable[[], nn.Module], expected: int) -> None:
    with torch.device("meta"):
        assert count(network()) == expected


def test_counts_in_docstrings_are_true() -> None:
    for network, expected in [
        (MnistCnn, with_bias(MNIST)),
        (Cifar10Cnn, with_bias(CIFAR10)),
        (Cifar100Cnn, with_bias(CIFAR100)),
        (ConvAutoencoder, with_bias(AUTOENCODER)),
        (Generator, dcgan_generator(128, 5)),
        (Discriminator, dcgan_discriminator(128, 5)),
        (ResNet50Transfer, 25_557_032 - with_bias([(2048, 1000)])),
        (ResNet50Transfer, with_bias([(2048, 1024), (1024, 5)])),
    ]:
        assert f"{expected:,}" in (network.__doc__ or ""), f"{network.__name__}: {expected:,}"


def test_resnet50_trains_the_head_alone() -> None:
    with torch.device("meta"):
        network = ResNet50Transfer(classes=5)
    assert count(network, trained=False) == 25_557_032 - with_bias([(2048, 1000)])  # torchvision's, without its head
    assert count(network, trained=True) == with_bias([(2048, 1024), (1024, 5)])


@pytest.mark.parametrize(
    ("network", "images", "expected"),
    [
        (lambda: MnistCnn(), (2, 1, 28, 28), (2, 10)),
        (lambda: MnistCnn(classes=7), (2, 1, 28, 28), (2, 7)),
        (lambda: Cifar10Cnn(), (2, 3, 32, 32), (2, 10)),
        (lambda: Cifar10Cnn(classes=3), (2, 3, 32, 32), (2, 3)),
        (lambda: Cifar100Cnn(), (2, 3, 32, 32), (2, 100)),
        (lambda: Cifar100Cnn(classes=20), (2, 3, 32, 32), (2, 20)),
        (lambda: ConvAutoencoder(), (2, 3, 32, 32), (2, 3, 32, 32)),
        (lambda: Generator(8, 5), (2, 100), (2, 3, 64, 64)),
        (lambda: Generator(8, 4), (2, 100), (2, 3, 64, 64)),
        (lambda: Discriminator(8, 5), (2, 3, 64, 64), (2,)),
        (lambda: Discriminator(8, 4), (2, 3, 64, 64), (2,)),
        (lambda: ResNet50Transfer(classes=5), (2, 3, 224, 224), (2, 5)),
    ],
)
def test_shapes(network: Callable[[], nn.Module], images: tuple[int, ...], expected: tuple[int, ...]) -> None:
    with torch.device("meta"):
        assert network()(torch.empty(images)).shape == expected


def test_layers_follow_the_design() -> None:
    def sequence(network: nn.Module) -> list[str]:
        return [type(layer).__name__ for layer in network.layers]  # type: ignore[union-attr]

    with torch.device("meta"):
        assert sequence(MnistCnn()) == (
            ["Conv2d", "ReLU", "MaxPool2d"]
            + ["Conv2d", "ReLU"] * 2
            + ["MaxPool2d", "Flatten", "Linear", "ReLU", "Linear"]
        )
        assert sequence(Cifar10Cnn()) == (
            ["Conv2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d"] * 3 + ["Flatten", "Linear", "ReLU", "Linear"]
        )
        assert sequence(Cifar100Cnn()) == (
            ["Conv2d", "ELU", "Conv2d", "ELU", "MaxPool2d", "Dropout"] * 3
            + ["Flatten", "Linear", "ELU", "Dropout", "Linear"]
        )
        dropout = [layer.p for layer in Cifar100Cnn().modules() if isinstance(layer, nn.Dropout)]
        assert dropout == [0.25, 0.25, 0.25, 0.5]
        assert sequence(ConvAutoencoder()) == ["Conv2d", "ReLU"] * 2 + ["ConvTranspose2d", "ReLU"] * 2
        assert sequence(Generator()) == (
            ["BatchNorm2d", "ReLU"] + ["ConvTranspose2d", "BatchNorm2d", "ReLU"] * 3 + ["ConvTranspose2d", "Tanh"]
        )
        assert sequence(Discriminator()) == (
            ["Conv2d", "LeakyReLU"] + ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3 + ["Conv2d", "Flatten"]
        )
        slopes = {layer.negative_slope for layer in Discriminator().modules() if isinstance(layer, nn.LeakyReLU)}
        assert slopes == {0.2}


def weighted(network: nn.Module) -> list[tuple[str, nn.Conv2d | nn.ConvTranspose2d | nn.Linear]]:
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, kinds)]


def he_bound(weight: torch.Tensor) -> float:
    return math.sqrt(6 / weight[0].numel())


def glorot_bound(weight: torch.Tensor) -> float:
    return math.sqrt(6 / ((weight.shape[0] + weight.shape[1]) * weight[0, 0].numel()))


@pytest.mark.parametrize(
    ("network", "bound"),
    [(MnistCnn, he_bound), (Cifar10Cnn, he_bound), (Cifar100Cnn, glorot_bound), (ConvAutoencoder, glorot_bound)],
)
def test_weights_are_uniform_up_to_the_bound_of_the_scheme(
    network: Callable[[], nn.Module], bound: Callable[[torch.Tensor], float]
) -> None:
    torch.manual_seed(0)
    for name, layer in weighted(network()):
        weight, limit = layer.weight.detach(), bound(layer.weight)
        assert 0.9 * limit < weight.abs().max() <= limit, name
        assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.15), name
        assert abs(weight.mean().item()) < 3 * limit / math.sqrt(3 * weight.numel()), name


def test_biases_start_at_zero_but_for_the_last_of_the_autoencoder() -> None:
    for network in (MnistCnn(), Cifar10Cnn(), Cifar100Cnn(), ConvAutoencoder(), Dcgan(8, 4)):
        for name, layer in weighted(network):
            last = isinstance(network, ConvAutoencoder) and name == "layers.6"
            if layer.bias is not None:
                assert (layer.bias == (0.5 if last else 0.0)).all(), f"{type(network).__name__} {name}"


def test_dcgan_starts_from_the_normal_distributions_of_the_paper() -> None:
    torch.manual_seed(0)
    network = Dcgan(32, 4)
    for name, layer in weighted(network):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1), name
        assert layer.weight.abs().max() > 0.04, name  # a uniform distribution of this deviation ends at 0.035
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 7
    scales = torch.cat([layer.weight.detach() for layer in norms])
    assert scales.mean().item() == pytest.approx(1.0, abs=0.005)
    assert scales.std().item() == pytest.approx(0.02, rel=0.15)
    assert all((layer.bias == 0).all() for layer in norms)


@pytest.mark.parametrize("kernel", [4, 5])
def test_projection_is_the_transposed_convolution_of_the_paper(kernel: int) -> None:
    torch.manual_seed(0)
    generator = Generator(8, kernel)
    noise = torch.randn(3, 100)
    projected = []
    generator.layers.register_forward_pre_hook(lambda layer, inputs: projected.append(inputs[0]))
    with torch.no_grad():
        generator(noise)
        weight = generator.project.weight.T.reshape(100, 64, 4, 4)
        convolved = F.conv_transpose2d(noise[:, :, None, None], weight)
    assert convolved.shape == (3, 64, 4, 4)
    assert torch.allclose(projected[0], convolved, atol=1e-6)


def test_resnet_features_are_frozen() -> None:
    torch.manual_seed(0)
    network = ResNet50Transfer(classes=3)
    assert not any(layer.training for layer in network.features.modules())  # from the first step on
    network.train()
    assert network.training
    assert network.head.training
    assert not any(layer.training for layer in network.features.modules())
    network.eval()
    assert not network.head.training
    network.train()

    before = {name: value.clone() for name, value in network.features.state_dict().items()}
    network(torch.randn(2, 3, 64, 64) + 1).sum().backward()
    assert all(parameter.grad is None for parameter in network.features.parameters())
    assert all(parameter.grad is not None for parameter in network.head.parameters())
    for name, value in network.features.state_dict().items():  # running statistics among them
        assert torch.equal(value, before[name]), name


def test_resnet_takes_torchvision_weights() -> None:
    torch.manual_seed(0)
    original = resnet50()
    with torch.no_grad():  # statistics unlike those that every new network has
        original.bn1.running_mean.fill_(0.1)
    network = ResNet50Transfer(classes=3, weights=original.state_dict())
    images = torch.randn(2, 3, 64, 64)
    original.fc = nn.Identity()
    with torch.no_grad():
        assert torch.equal(network.features(images), original.eval()(images))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (MnistCnn, (1, 28, 28)),
        (Cifar10Cnn, (3, 32, 32)),
        (Cifar100Cnn, (3, 32, 32)),
        (ConvAutoencoder, (3, 32, 32)),
        (lambda: Generator(16, 5), (100,)),
        (lambda: Discriminator(16, 5), (3, 64, 64)),
        (ResNet50Transfer, (3, 128, 128)),
    ],
)
def test_untrained_activations_are_alive_and_far_from_the_end_of_fp16(
    network: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    made = network()
    largest: dict[str, float] = {}

    def note(name: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        return lambda layer, inputs, output: largest.__setitem__(name, output.abs().max().item())

    for name, layer in made.named_modules():
        layer.register_forward_hook(note(name))
    with torch.no_grad():
        output = made(2 * torch.randn(4, *shape))
    assert len(largest) > 5
    for name, value in largest.items():
        assert 1e-4 < value < FP16_MAX / 10, name
    assert output.std(dim=0).max() > 1e-4, "all images look alike to it"


@pytest.mark.parametrize(
    ("workload", "network", "shape", "learning_rate", "steps"),
    [
        (workloads.mnist_cnn, MnistCnn, (1, 28, 28), 1e-3, 20),
        (workloads.cifar10_cnn, Cifar10Cnn, (3, 32, 32), 1e-3, 20),
        (workloads.cifar100_cnn, Cifar100Cnn, (3, 32, 32), 3e-4, 20),
        (workloads.conv_autoencoder, ConvAutoencoder, (3, 32, 32), 1e-2, 100),
        (workloads.dcgan, lambda: Dcgan(8, 4), (3, 64, 64), 1e-3, 20),
        (workloads.resnet50_transfer, lambda: ResNet50Transfer(classes=8), (3, 64, 64), 3e-3, 20),
    ],
)
def test_each_network_overfits_one_batch(
    workload: Callable[[], workloads.Workload],
    network: Callable[[], nn.Module],
    shape: tuple[int, ...],
    learning_rate: float,
    steps: int,
) -> None:
    torch.manual_seed(0)
    spec = workload()
    spec = replace(spec, recipe=replace(spec.source, optimizer="adam", learning_rate=learning_rate, momentum=0.5))
    step, _ = make_step(spec, network().train(), eager(None), CPU, steps)
    images = F.interpolate(torch.rand(8, shape[0], 4, 4), shape[1:], mode="bilinear")  # noise could not be compressed
    losses = [step(images, torch.arange(8)).item() for _ in range(steps)]
    assert sum(losses[-3:]) / 3 < 0.7 * losses[0]
