"""Speed and memory of the workloads on a card that is not here. No torch in here. All of it is *projected*.

A step is the kernels that `roofline.kernels` lists, one after the other. Each takes the longer of its arithmetic, at
the rate of a large product on that card, and its traffic, at the rate of a large copy; and FLOOR_S on top. Two things
make convolutions slower than that:

- A tensor core's tile is TILE channels wide, in and out; a convolution of fewer leaves the rest empty. Not so in fp32.
- The gradient of the weights moves the patches of the wider side (im2col), UNFOLDED times, not only the tensors.

A loader that takes longer than the step, image for image, sets the speed instead: batches are made while others train.

FLOOR_S and UNFOLDED are the only fitted numbers: to OBSERVED, which is one H200. Nothing is fitted to PUBLISHED.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from .cards import CARDS, DISAGREEMENT, Card
from .host import keras_on_colab_s
from .layers import layers
from .roofline import (
    ELEMENT_BYTES,
    RESNET50_INFERENCE,
    RESNET50_TRAINING,
    STEPS,
    UPDATE_BYTES,
    Kernel,
    Step,
    forward,
    kernels,
    runs,
    trained_weights,
)

TILE = 64
FLOOR_S = 5.2e-6
UNFOLDED = 1.65
STUDENT = 1.81  # 90 % of Student's distribution with 10 degrees of freedom: 12 observations, two fitted numbers


@dataclass(frozen=True, kw_only=True)
class Observation:
    """How long one step took on an H200, in bf16, compiled and captured, on data that were on the device."""

    workload: str
    batch: int
    step_us: float
    record: str = ""  # its id; without one, measured by hand before the first record
    launches: int = 0  # beside those that are counted: the change of basis in this record


# `resnet50 features` is the frozen network alone, forward, batch norm folded, in fp16.
OBSERVED = (
    Observation(workload="mnist-cnn", batch=1024, step_us=726, record="20261124T180931Z-52ae86"),
    Observation(workload="cifar10-cnn", batch=512, step_us=1062, record="20261124T180910Z-e44a5f"),
    Observation(workload="cifar100-cnn", batch=512, step_us=3332, record="20261124T180948Z-b610b6"),
    Observation(workload="conv-autoencoder", batch=128, step_us=418, record="20261124T180842Z-de1822", launches=16),
    Observation(workload="dcgan", batch=128, step_us=5105, record="20261124T181014Z-342798"),
    Observation(workload="mnist-cnn", batch=128, step_us=234),
    Observation(workload="cifar10-cnn", batch=64, step_us=368),
    Observation(workload="cifar10-cnn", batch=2048, step_us=3098),
    Observation(workload="cifar100-cnn", batch=64, step_us=736),
    Observation(workload="cifar100-cnn", batch=2048, step_us=11977),
    Observation(workload="conv-autoencoder", batch=2048, step_us=2926),
    Observation(workload="resnet50 features", batch=64, step_us=2462),
)
OPTIMIZERS = {"mnist-cnn": "sgd", "cifar10-cnn": "sgd"}  # of OBSERVED; adam else


def parts_s(
    launched: Sequence[Kernel],
    batch: int,
    card: Card,
    precision: str = "half",
    *,
    floor_s: float = FLOOR_S,
    unfolded: float = UNFOLDED,
) -> dict[str, float]:
    """Seconds of one step: in kernels bound by arithmetic, in those bound by traffic, and for launches."""
    parts = {"arithmetic": 0.0, "traffic": 0.0, "launches": 0.0}
    for kernel in launched:
        layer, arithmetic_s = kernel.layer, 0.0
        if layer is not None:
            narrow = 1.0
            if layer.op == "conv" and precision != "fp32":
                narrow = min(1, layer.channels_in / TILE) * min(1, layer.channels_out / TILE)
            arithmetic_s = batch * kernel.flops / (card.flop_per_s(precision) * narrow)
        traffic_s = (batch * max(kernel.bytes, unfolded * kernel.unfolded_bytes) + kernel.step_bytes) / card.bytes_per_s
        parts["arithmetic" if arithmetic_s > traffic_s else "traffic"] += max(arithmetic_s, traffic_s)
        parts["launches"] += floor_s
    return parts


def step_s(
    launched: Sequence[Kernel],
    batch: int,
    card: Card,
    precision: str = "half",
    *,
    floor_s: float = FLOOR_S,
    unfolded: float = UNFOLDED,
) -> float:
    """Seconds of one step."""
    return sum(parts_s(launched, batch, card, precision, floor_s=floor_s, unfolded=unfolded).values())


def misses(floor_s: float = FLOOR_S, unfolded: float = UNFOLDED) -> list[float]:
    """The logarithm of projected over observed time of each of OBSERVED."""
    frozen: Step = (forward("resnet50 features", folded=True),)
    return [
        math.log(
            step_s(
                kernels(STEPS.get(one.workload, frozen), OPTIMIZERS.get(one.workload, "adam")),
                one.batch,
                CARDS["h200"],
                floor_s=floor_s,
                unfolded=unfolded,
            )
            / (1e-6 * one.step_us - one.launches * floor_s)
        )
        for one in OBSERVED
    ]


@cache
def interval_factor() -> float:
    """A projection times and over this is its 90 % interval.

    It holds how far OBSERVED are missed, and how far sources disagree on what a card sustains.
    """
    of_model = sum(miss**2 for miss in misses()) / (len(OBSERVED) - 2)
    return math.exp(STUDENT * math.sqrt(of_model + DISAGREEMENT**2))


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Images a second with the ends of its 90 % interval, and the memory of the process."""

    images_per_s: float
    low: float
    high: float
    bound: str  # what takes most of the time: arithmetic, traffic, launches; or the loader
    memory_mib: float

    def fits(self, card: Card) -> bool:
        return self.memory_mib + TRIALS_MIB <= card.memory_mib


def project(
    step: Step,
    batch: int,
    optimizer: str,
    card: Card,
    *,
    compiled: bool = True,
    precision: str = "half",
    loader_s: float = 0.0,
) -> Projection:
    """Training of `step` on `card`, fed by a loader that takes `loader_s` an image: 0 if the data are on the device."""
    parts = parts_s(kernels(step, optimizer, compiled=compiled, precision=precision), batch, card, precision)
    trained_s = sum(parts.values()) / batch
    speed = 1 / max(trained_s, loader_s)
    factor = interval_factor()
    return Projection(
        images_per_s=speed,
        low=speed / factor,
        high=speed * factor,
        bound="loader" if loader_s > trained_s else max(parts, key=parts.__getitem__),
        memory_mib=memory_mib(step, batch, optimizer, precision),
    )


CONTEXT_MIB = 1_150  # of a process: CUDA, libraries, DALI and the graphs themselves
HELD = 3  # times what belongs to the weights: a clean copy to start from after warm-up, gradients, torch's reserve
JUDGING_MIB = 2_400  # what torch reserves while generated images are judged, at least: 2,406 to 3,136 on H200s
# What cuDNN may take on top while it tries its algorithms, before anything is timed. So counted, no process peak of the
# H200's tuned records of one GPU lies more than 10 % below the rest, and none above both, if what decodes JPEGs is left
# aside, as on one with data on the device: for resnet50-transfer some 390 MiB, and 37 for each thread, one a core.
TRIALS_MIB = 1_300


def memory_mib(step: Step, batch: int, optimizer: str, precision: str = "half") -> float:
    """Peak of the process: context, weights with all that belongs to them, and tensors that wait for their way back.

    Or, where that is more, what judging generated images takes.
    """
    size = ELEMENT_BYTES.get(precision, 2)
    kept = 0
    for sweep in step:
        table = layers(sweep.network)
        tensors = [layer.outputs for layer in table if layer.multiplies] + [run[-1].outputs for run in runs(table)]
        kept += sum(tensors) if sweep.trained else 2 * max(tensors)
    weights = sum(layer.weights for name in {sweep.network for sweep in step} for layer in layers(name))
    states = (UPDATE_BYTES[optimizer] - 12) // 8  # fp32 values that the optimizer keeps for each weight
    held = weights * (4 + 2) + trained_weights(step) * (4 + 4 * states)
    training_mib = (HELD * held + size * batch * kept) / 2**20
    generates = any("generator" in sweep.network for sweep in step)
    return CONTEXT_MIB + max(training_mib, JUDGING_MIB if generates else 0)


# What others published


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure of others, and the execution that it is a figure of."""

    name: str
    gpu: str
    images_per_s: float
    step: Step
    batch: int
    optimizer: str
    precision: str
    source: str
    loader_s: float = 0.0  # an image; 0 where it is not counted: fed from memory, or from a host of many cores


EXAMPLES = "NVIDIA DeepLearningExamples, PyTorch, 21.03"
PUBLISHED = (
    Published(
        name="ResNet-50 inference, AMP",
        gpu="t4",
        images_per_s=1198,
        step=RESNET50_INFERENCE,
        batch=256,
        optimizer="sgd",
        precision="half",
        source=EXAMPLES,
    ),
    Published(
        name="ResNet-50 training, AMP",
        gpu="a100",
        images_per_s=2470,
        step=RESNET50_TRAINING,
        batch=256,
        optimizer="sgd",
        precision="half",
        source=EXAMPLES,
    ),
    Published(
        name="ResNet-50 training, AMP",
        gpu="v100",
        images_per_s=1200,
        step=RESNET50_TRAINING,
        batch=256,
        optimizer="sgd",
        precision="half",
        source=EXAMPLES,
    ),
    Published(
        name="cifar100-cnn training, fp32",
        gpu="t4",
        images_per_s=50_000 / 30,
        step=STEPS["cifar100-cnn"],
        batch=64,
        optimizer="rmsprop",
        precision="fp32",
        source="source notebook, Keras: 30 s an epoch",
    ),
    Published(
        name="resnet50-transfer training, fp32",
        gpu="t4",
        images_per_s=1557 / 19,
        step=STEPS["resnet50-transfer"],
        batch=32,
        optimizer="adam",
        precision="fp32",
        source="source notebook, Keras: 19 s an epoch",
        loader_s=keras_on_colab_s(),
    ),
)


def predict(published: Published) -> Projection:
    """The projection of a published figure: eager, each pass a kernel of its own."""
    one = published
    return project(
        one.step,
        one.batch,
        one.optimizer,
        CARDS[one.gpu],
        compiled=False,
        precision=one.precision,
        loader_s=one.loader_s,
    )
