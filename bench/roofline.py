"""What one image of a training step needs at least: floating-point operations and bytes. No torch in here.

Operations are those of matrix products and convolutions, two for each multiply-add; what passes over tensors does is
not counted. Bytes are counted twice:

- *layer by layer*, in seven passes over each activation, which is what a convolution, linear layer or pooling gives
  out: it is written and read; its gradient is written and read, and it is read again for the slope; and both are read
  for the gradient of the weights. ReLU and batch norm cost nothing.
- *fused*: each of the products (forward, gradient of the weights, gradient of the inputs) reads its two operands once
  and writes its result once; all that follows it, pooling too, happens before the result is written.

What is counted of an update is autocast's: `adam.MasterAdam`, which casts nothing, moves 14 bytes less a weight.

In both, a sum of two branches reads one of them once more, and weights and their update come on top, once a step.
`kernels` lists what an execution really launches, in which norm, pooling and activations are passes of their own: the
projection adds up its times.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from .cards import Card
from .layers import Layer, layers

FEW = 16  # a convolution with fewer channels on both sides leaves most of a tensor core's tile empty: it counts as fp32
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Bytes of a step for each trained weight: the optimizer reads the weight, its gradient and its own state and writes all
# but the gradient, in fp32 …
UPDATE_BYTES = {"sgd": 20, "rmsprop": 20, "adam": 28}
# … and in mixed precision a half copy is made (4 + 2), read by both products that need it (4), and the half gradient is
# written, read and turned into fp32 (2 + 2 + 4). In fp32 the products read (8) and write (4) the weights themselves.
MIXED_BYTES, SINGLE_BYTES = 18, 12


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One run through a network in a step, forward and as far back as it is trained."""

    network: str
    weights: bool = True  # the gradients of the weights are computed …
    inputs: bool = True  # … and those of the layers' inputs, but for the first layer's, unless
    images: bool = False  # somebody behind it is trained
    folded: bool = (
        False  # a forward run whose batch norms, of fixed statistics, are part of the convolutions before them
    )

    @property
    def trained(self) -> bool:
        return self.weights or self.inputs


Step = tuple[Sweep, ...]


def forward(network: str, *, folded: bool = False) -> Sweep:
    return Sweep(network=network, weights=False, inputs=False, folded=folded)


def _adversarial(form: str = "") -> Step:
    generator, discriminator = (Sweep(network=f"dcgan {player}{form}") for player in ("generator", "discriminator"))
    judged = replace(discriminator, weights=False, images=True)  # the generator's loss, through the discriminator
    return (generator, discriminator, discriminator, judged)


STEPS: dict[str, Step] = {
    "mnist-cnn": (Sweep(network="mnist-cnn"),),
    "cifar10-cnn": (Sweep(network="cifar10-cnn"),),
    "cifar100-cnn": (Sweep(network="cifar100-cnn"),),
    "conv-autoencoder": (Sweep(network="conv-autoencoder"),),
    "dcgan": _adversarial(),
    "dcgan-common": _adversarial(", common form"),
    "resnet50-transfer": (forward("resnet50 features", folded=True), Sweep(network="resnet50 head")),
}
RESNET50_INFERENCE: Step = (forward("resnet50 features"), forward("resnet50 classifier"))
RESNET50_TRAINING: Step = (Sweep(network="resnet50 features"), Sweep(network="resnet50 classifier", images=True))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one image needs, and what a step needs however many images it has."""

    matrix_flops: int  # products and convolutions fit for tensor cores
    few_flops: int  # convolutions of few channels
    layered_bytes: int
    fused_bytes: int
    step_bytes: int  # weights, gradients and optimizer

    @property
    def flops(self) -> int:
        return self.matrix_flops + self.few_flops

    def images_per_s(self, card: Card, batch: int, *, fused: bool) -> float:
        """The most that a card can do in mixed precision: the longer of arithmetic and traffic."""
        arithmetic_s = self.matrix_flops / card.flop_per_s("half") + self.few_flops / card.flop_per_s("fp32")
        traffic = (self.fused_bytes if fused else self.layered_bytes) + self.step_bytes / batch
        return 1 / max(arithmetic_s, traffic / card.bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One launch: a product, or a pass over tensors or weights."""

    kind: str  # matrix, few, pass or weights
    layer: Layer | None = None  # of a product
    flops: int = 0  # for each image
    bytes: int = 0  # for each image
    unfolded_bytes: int = 0  # for each image; of a gradient of weights
    step_bytes: int = 0


def work(step: Step, optimizer: str, precision: str = "half") -> Work:
    """Counts a step."""
    flops = {"matrix": 0, "few": 0}
    layered = fused = 0
    for sweep in step:
        table = layers(sweep.network)
        for (layer, roles), stored in zip(products(sweep), _stored(table), strict=True):
            flops[_kind(layer)] += len(roles) * layer.flops
            fused += len(roles) * (layer.inputs + stored)
        passes = 2 + 3 * sweep.inputs + 2 * sweep.weights
        layered += passes * sum(layer.outputs for layer in table if layer.multiplies or layer.op == "pool")
        branches = sum(layer.outputs for layer in table if layer.op == "add")
        layered, fused = layered + branches, fused + branches
    size = ELEMENT_BYTES.get(precision, 2)
    return Work(
        matrix_flops=flops["matrix"],
        few_flops=flops["few"],
        layered_bytes=size * layered,
        fused_bytes=size * fused,
        step_bytes=trained_weights(step) * _weight_bytes(optimizer, precision),
    )


def products(sweep: Sweep) -> Iterator[tuple[Layer, list[str]]]:
    """The products of each layer that has any: forward, and for the gradients of its weights and its inputs."""
    first = True
    for layer in layers(sweep.network):
        if layer.multiplies:
            behind = sweep.inputs and (sweep.images or not first)
            yield layer, ["forward", *["weights"] * sweep.weights, *["inputs"] * behind]
            first = False


def trained_weights(step: Step) -> int:
    networks = {sweep.network for sweep in step if sweep.weights}
    return sum(layer.weights for network in networks for layer in layers(network))


def kernels(step: Step, optimizer: str, *, compiled: bool = True, precision: str = "half") -> list[Kernel]:
    """What a step launches. Compiled: the passes between two products are one kernel; else each is its own."""
    size = ELEMENT_BYTES.get(precision, 2)
    found: list[Kernel] = []
    for sweep in step:
        for layer, roles in products(sweep):
            found += [
                Kernel(
                    kind=_kind(layer),
                    layer=layer,
                    flops=layer.flops,
                    bytes=size * (layer.inputs + layer.outputs),
                    unfolded_bytes=size * layer.unfolded if role == "weights" else 0,
                    step_bytes=size * layer.weights,
                )
                for role in roles
            ]
        for run in runs(layers(sweep.network)):
            for passes in [run] if compiled else [(layer,) for layer in run]:
                if not sweep.folded or any(layer.op != "norm" for layer in passes):
                    found += _pass(passes, sweep, size)
        if sweep.weights:  # each layer's weights cast to half, their gradient cast back, and the bias's summed up
            for layer in layers(sweep.network):
                if layer.multiplies:
                    found += 3 * [Kernel(kind="weights", step_bytes=0 if precision == "fp32" else 4 * layer.weights)]
    found.append(Kernel(kind="weights", step_bytes=trained_weights(step) * UPDATE_BYTES[optimizer]))
    return found


def _pass(run: tuple[Layer, ...], sweep: Sweep, size: int) -> list[Kernel]:
    """The kernel of passes in a row, and where there is a way back, that of their gradient.

    Norm over the batch, which is that of training, reads everything twice: once for statistics, once to use them.
    """
    first, out = run[0], run[-1].outputs
    times = 2 if sweep.trained and any(layer.op == "norm" for layer in run) else 1
    branches = sum(layer.outputs for layer in run[1:] if layer.op == "add")
    found = [Kernel(kind="pass", bytes=size * (times * first.inputs + branches + out))]
    if sweep.trained:
        saved = 0 if first.op == "add" else first.inputs
        found.append(Kernel(kind="pass", bytes=size * (times * (saved + out) + first.inputs)))
    return found


def runs(table: tuple[Layer, ...]) -> Iterator[tuple[Layer, ...]]:
    """The passes between two products."""
    for multiplies, run in groupby(table, lambda layer: layer.multiplies):
        if not multiplies:
            yield tuple(run)


def _stored(table: tuple[Layer, ...]) -> list[int]:
    """The elements that are written for each layer that multiplies, when what follows it is fused to it."""
    stored: list[int] = []
    for layer in table:
        if layer.multiplies:
            stored.append(0)
        if stored:
            stored[-1] = layer.outputs
    return stored


def _kind(layer: Layer) -> str:
    few = layer.op == "conv" and max(layer.channels_in, layer.channels_out) < FEW
    return "few" if few else "matrix"


def _weight_bytes(optimizer: str, precision: str) -> int:
    return UPDATE_BYTES[optimizer] + (SINGLE_BYTES if precision == "fp32" else MIXED_BYTES)


# A record


def achieved(record: Mapping[str, Any], ceilings: Mapping[str, Any] | None) -> dict[str, float | None] | None:
    """The record's `roofline`; None where nothing was trained, or nobody counted the network.

    flop_per_s, bytes_per_s                  counted work (bytes layer by layer, with the update) over measured time
    ceiling_flop_per_s, ceiling_bytes_per_s  the machine's own, of machine.json, times its GPUs; None where not measured
    share                                    of the images/s that these ceilings allow
    """
    case, throughput = record["case"], record.get("throughput") or {}
    ranks = case.get("gpus") or 1
    gpus = ranks if (record.get("machine") or {}).get("gpu") else 1  # ranks share a CPU
    speed, step, recipe = throughput.get("images_per_s"), STEPS.get(case["workload"]), case.get("recipe") or {}
    if not speed or step is None or case.get("division", "closed") != "closed" or case["mode"] == "loader":
        return None
    if recipe.get("optimizer") not in UPDATE_BYTES or not recipe.get("batch_size"):
        return None
    precision = case.get("precision") or ("fp32" if case["tuning"] in ("eager", "fp32") else "half")
    counted = work(step, recipe["optimizer"], precision)
    traffic = counted.layered_bytes + ranks * counted.step_bytes / recipe["batch_size"]
    known = ceilings or {}
    names = ("bf16", "fp16") if precision == "half" else (precision,)
    tflops = next((value for name in names if (value := known.get(f"matmul_{name}_tflops"))), None)
    copies = known.get("copy_gb_per_s")
    share = speed / gpus * max(counted.flops / (1e12 * tflops), traffic / (1e9 * copies)) if tflops and copies else None
    return {
        "flop_per_s": speed * counted.flops,
        "bytes_per_s": speed * traffic,
        "ceiling_flop_per_s": gpus * 1e12 * tflops if tflops else None,
        "ceiling_bytes_per_s": gpus * 1e9 * copies if copies else None,
        "share": share,
    }
