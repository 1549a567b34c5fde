"""The layers of the networks as numbers: what each takes in, gives out and multiplies, for one image.

`layers.csv` beside this file is counted from `models/` by `python -m netdyno.bench.layers`, which needs torch; a test
counts anew and compares. Reading it needs none. A network that is added gets a line in `networks`.
"""

import csv
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

TABLE = Path(__file__).with_name("layers.csv")
PASSES = {  # ATen's names; views, detached copies and the making of dropout's mask count as nothing
    **dict.fromkeys(("relu", "relu_", "leaky_relu", "elu", "tanh", "mul"), "activation"),
    **dict.fromkeys(("max_pool2d_with_indices", "mean"), "pool"),
    "native_batch_norm": "norm",
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One operation of a network's forward pass. All but the weights are for one image."""

    network: str
    op: str  # conv and linear, which multiply matrices; activation, norm, pool and add, which only pass over tensors
    channels_in: int  # of matrices; 0 else
    channels_out: int
    inputs: int  # elements
    outputs: int
    weights: int  # elements, without biases
    flops: int  # two for each multiply-add

    @property
    def multiplies(self) -> bool:
        return self.op in ("conv", "linear")

    @property
    def unfolded(self) -> int:
        """Elements of the wider side's patches, of a convolution over more than 1×1; 0 else.

        That matrix is one of the two whose product is the weights' gradient; the other is the narrower side as it is.
        """
        taps = self.weights // (self.channels_in * self.channels_out) if self.op == "conv" else 1
        pixels = self.flops // (2 * self.weights) if self.weights else 0
        return pixels * taps * max(self.channels_in, self.channels_out) if taps > 1 else 0


@cache
def layers(network: str) -> tuple[Layer, ...]:
    """The layers of `network` in the order in which they run; KeyError for one that the table lacks."""
    found = tuple(layer for layer in read() if layer.network == network)
    if not found:
        raise KeyError(network)
    return found


@cache
def read() -> tuple[Layer, ...]:
    with TABLE.open(newline="") as file:
        return tuple(
            Layer(network=row.pop("network"), op=row.pop("op"), **{name: int(value) for name, value in row.items()})
            for row in csv.DictReader(file)
        )


def networks() -> dict[str, tuple["nn.Module", tuple[int, ...]]]:
    """Each network of the table, without memory behind it, and the shape of one of its inputs."""
    import torch
    from torchvision.models import resnet50

    from ..models.cifar10_cnn import Cifar10Cnn
    from ..models.cifar100_cnn import Cifar100Cnn
    from ..models.conv_autoencoder import ConvAutoencoder
    from ..models.dcgan import LATENT, Dcgan
    from ..models.mnist_cnn import MnistCnn
    from ..models.resnet50_transfer import ResNet50Transfer

    with torch.device("meta"):
        paper, common, transfer = Dcgan(), Dcgan(width=64, kernel=4), ResNet50Transfer()
        return {
            "mnist-cnn": (MnistCnn(), (1, 28, 28)),
            "cifar10-cnn": (Cifar10Cnn(), (3, 32, 32)),
            "cifar100-cnn": (Cifar100Cnn(), (3, 32, 32)),
            "conv-autoencoder": (ConvAutoencoder(), (3, 32, 32)),
            "dcgan generator": (paper.generator, (LATENT,)),
            "dcgan discriminator": (paper.discriminator, (3, 64, 64)),
            "dcgan generator, common form": (common.generator, (LATENT,)),
            "dcgan discriminator, common form": (common.discriminator, (3, 64, 64)),
            "resnet50 features": (transfer.features, (3, 224, 224)),
            "resnet50 head": (transfer.head, (2048,)),
            "resnet50 classifier": (resnet50().fc, (2048,)),
        }


def count(name: str, network: "nn.Module", shape: tuple[int, ...]) -> list[Layer]:
    """The layers that `network` runs on inputs of `shape`, seen below its modules: sums of branches count too."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    batch = 2  # batch norm in training mode wants more than one value a channel
    found: list[Layer] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            operation = function._schema.name.removeprefix("aten::")
            out = result[0] if isinstance(result, tuple) else result
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            channels, weights, flops = (0, 0), 0, 0
            if operation == "convolution":
                source, kernel = tensors[:2]
                transposed = args[6]
                channels = (source.shape[1], out.shape[1])
                weights = kernel.numel()
                # each position of the smaller picture meets the whole kernel once
                positions = (source if transposed else out)[0, 0].numel()
                op, flops = "conv", 2 * positions * weights
            elif operation in ("mm", "addmm"):
                source, matrix = tensors[-2:]
                channels, weights = (matrix.shape[0], matrix.shape[1]), matrix.numel()
                op, flops = "linear", 2 * weights
            elif operation in PASSES:
                source, op = tensors[0], PASSES[operation]
            elif operation in ("add", "add_") and out.dim() > 1:
                source, op = torch.cat(tensors), "add"
            else:
                return result
            found.append(
                Layer(
                    network=name,
                    op=op,
                    channels_in=channels[0],
                    channels_out=channels[1],
                    inputs=source.numel() // batch,
                    outputs=out.numel() // batch,
                    weights=weights,
                    flops=flops,
                )
            )
            return result

    with Watch():
        network.train()(torch.empty(batch, *shape, device="meta"))
    return found


def count_all() -> list[Layer]:
    return [layer for name, (network, shape) in networks().items() for layer in count(name, network, shape)]


if __name__ == "__main__":
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Layer))
        writer.writerows(map(astuple, count_all()))
