"""The workloads: a network, its data set, its objective and its target, one function each.

`WORKLOADS` lists the six, `OPEN` those of the open division, and `VARIANTS` what runs only where it is named. A suite
turns a workload into the form in which it runs (`SUITES`). Specs are pure values: making one touches no GPU, file or
environment. A new network needs one file in `models/` and one function here.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

from torch import nn

from ..models.cifar10_cnn import Cifar10Cnn
from ..models.cifar100_cnn import Cifar100Cnn
from ..models.conv_autoencoder import ConvAutoencoder
from ..models.dcgan import Dcgan
from ..models.mnist_cnn import MnistCnn
from ..models.resnet50_transfer import ResNet50Transfer
from ..models.small_cnn import SmallCnn
from ..models.whitened_cnn import PAIRS, RESIDUAL, WhitenedCnn
from .errors import UserError

OptimizerName = Literal["sgd", "adam", "rmsprop", "muon"]
ScheduleName = Literal["constant", "one-cycle", "down", "up-down"]
BasisName = Literal["taps", "frequencies"]
Objective = Literal["classify", "reconstruct", "adversarial"]
Scaling = Literal["weak", "strong"]


def check_choice(name: str, value: str, choices: Any) -> None:
    """ValueError unless `value` is one of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(get_args(choices))}")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """What happens to an image between the stored uint8 values and the network."""

    mean: tuple[float, ...]  # per channel, of values scaled to [0, 1]
    std: tuple[float, ...]
    crop_padding: int = 0  # training, array sets: reflect-pad by so many pixels, then a random crop of the old size
    # training: mirror left-right with probability ½; "by turns": that in the first epoch, and then every other one
    flip: bool | Literal["by turns"] = False
    shear_deg: float = 0.0  # training, JPEG sets: uniform in ±shear_deg
    zoom: float = 0.0  # training, JPEG sets: factor uniform in [1 - zoom, 1 + zoom]
    image_size: int | None = None  # JPEG sets: side of the square that the network sees, in pixels

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError("mean and std need one value a channel, std above 0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a workload is trained. The closed division leaves it free; only the target counts."""

    batch_size: int
    epochs: int
    evaluate_every: int = 1  # so many epochs, trained as one; in the open division only a run's end is evaluated
    optimizer: OptimizerName
    learning_rate: float  # the peak, under a schedule
    momentum: float = 0.0  # sgd: momentum; adam: β₁
    weight_decay: float = 0.0
    schedule: ScheduleName = "constant"
    basis: BasisName = "taps"  # what of 3×3 filters the optimizer takes for coordinates
    train_images: int | None = None  # images of the training split that are used, spread evenly; None: all
    eval_images: int | None = None

    def __post_init__(self) -> None:
        if min(self.batch_size, self.epochs) < 1 or self.learning_rate <= 0:
            raise ValueError("batch_size and epochs must be at least 1, learning_rate above 0")
        if self.evaluate_every < 1 or self.epochs % self.evaluate_every:
            raise ValueError(f"an evaluation every {self.evaluate_every} epochs does not fit {self.epochs}")
        check_choice("optimizer", self.optimizer, OptimizerName)
        if self.optimizer == "muon" and not isinstance(self, OpenRecipe):
            raise ValueError("muon is of the open division: OpenRecipe")
        check_choice("schedule", self.schedule, ScheduleName)
        check_choice("basis", self.basis, BasisName)

    @property
    def evaluations(self) -> int:
        """Of a run."""
        return self.epochs // self.evaluate_every


@dataclass(frozen=True, kw_only=True)
class OpenRecipe(Recipe):
    """How a workload of the open division is trained: what it has beyond others."""

    head_rate: float = 0.0  # muon: the peak for the last layer …
    bias_rate: float = 0.0  # … and for biases, both trained by SGD …
    plain_momentum: float = 0.0  # … with this momentum (Nesterov's)
    label_smoothing: float = 0.0
    jitter: float = 0.0  # training: brightness and contrast of an image, uniform in so many standard deviations
    sides: tuple[tuple[int, float], ...] = ()  # (pixels of an image's side, so many epochs), in order; (): as stored
    unsure: float = 0.0  # the share of test images, the least certain, that are judged by five further views of each

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer == "muon" and min(self.head_rate, self.bias_rate) <= 0:
            raise ValueError("muon needs a head_rate and a bias_rate above 0")
        if self.sides and sum(epochs for _, epochs in self.sides) != self.epochs:
            raise ValueError(f"sides for {sum(epochs for _, epochs in self.sides)} epochs, not {self.epochs}")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The figure of merit of a workload."""

    name: str
    unit: str
    higher_is_better: bool


ACCURACY = Metric(name="test accuracy", unit="%", higher_is_better=True)
PSNR = Metric(name="PSNR", unit="dB", higher_is_better=True)
SWD = Metric(name="SWD", unit="×10³", higher_is_better=False)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One workload; `recipe` is ours, `source` the published one, `quick` a short form for any machine."""

    name: str
    dataset: str
    objective: Objective
    network: Callable[..., nn.Module]  # classify: called with the number of classes, else with nothing
    preprocess: Preprocess
    metric: Metric
    recipe: Recipe
    source: Recipe
    quick: Recipe
    eval_batch_size: int
    baseline_workers: int = 16  # of `eager`'s DataLoader, at most one a core: more load faster but start later
    target: float | None = None  # in the metric's unit; a run reaches it by its final metric
    also_at_least: Mapping[str, float] | None = None  # further metrics that the final epoch must reach
    target_share: float | None = None  # SWD: the share of (untrained - real) that may be left
    source_augments: bool = False  # whether the published recipe augments its images too
    weights: Literal["imagenet", "random"] | None = None  # what a transfer network starts from
    division: str = "closed"

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, Objective)


def mnist_cnn() -> Workload:
    """MNIST to 99.0 %. Source: SGD 0.01, momentum 0.9, batch 32, 10 epochs."""
    recipe = Recipe(batch_size=2048, epochs=12, optimizer="sgd", learning_rate=0.2, momentum=0.9, schedule="one-cycle")
    return Workload(
        name="mnist-cnn",
        dataset="mnist",
        objective="classify",
        network=MnistCnn,
        preprocess=Preprocess(mean=(0.0,), std=(1.0,)),
        metric=ACCURACY,
        target=99.0,
        recipe=recipe,
        source=Recipe(batch_size=32, epochs=10, optimizer="sgd", learning_rate=0.01, momentum=0.9),
        quick=replace(recipe, batch_size=128, epochs=2, learning_rate=0.1, train_images=12_800, eval_images=2_000),
        eval_batch_size=1_000,
    )


CIFAR10_PREPROCESS = Preprocess(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), crop_padding=4, flip=True)


def cifar10_cnn() -> Workload:
    """CIFAR-10. Source: SGD 0.001, momentum 0.9, batch 64, 100 epochs; its median over five seeds is the target."""
    recipe = Recipe(
        batch_size=2048,
        epochs=32,
        optimizer="sgd",
        learning_rate=0.06,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="one-cycle",
    )
    return Workload(
        name="cifar10-cnn",
        dataset="cifar10",
        objective="classify",
        network=Cifar10Cnn,
        preprocess=CIFAR10_PREPROCESS,
        metric=ACCURACY,
        target=74.46,
        recipe=recipe,
        source=Recipe(batch_size=64, epochs=100, optimizer="sgd", learning_rate=0.001, momentum=0.9),
        quick=replace(recipe, batch_size=128, epochs=2, learning_rate=0.05, train_images=6_400, eval_images=2_000),
        eval_batch_size=1_000,
    )


def cifar100_cnn() -> Workload:
    """CIFAR-100, fine labels, to 56 %. Source: RMSprop 1e-4, batch 64, 200 epochs; 30 s an epoch on a T4."""
    recipe = Recipe(
        batch_size=1024, epochs=20, optimizer="adam", learning_rate=1e-3, momentum=0.9, schedule="one-cycle"
    )
    return Workload(
        name="cifar100-cnn",
        dataset="cifar100",
        objective="classify",
        network=Cifar100Cnn,
        preprocess=Preprocess(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), crop_padding=4, flip=True),
        metric=ACCURACY,
        target=56.0,
        recipe=recipe,
        source=Recipe(batch_size=64, epochs=200, optimizer="rmsprop", learning_rate=1e-4),
        quick=replace(recipe, batch_size=64, epochs=2, train_images=1_600, eval_images=500),
        eval_batch_size=500,
    )


def conv_autoencoder() -> Workload:
    """CIFAR-10 images rebuilt from 4 channels. Source: Adam 1e-3, batch 32, 100 epochs; its median is the target."""
    recipe = Recipe(
        batch_size=512,
        epochs=40,
        optimizer="adam",
        learning_rate=4e-2,
        momentum=0.9,
        schedule="one-cycle",
        basis="frequencies",
    )
    return Workload(
        name="conv-autoencoder",
        dataset="cifar10",
        objective="reconstruct",
        network=ConvAutoencoder,
        preprocess=Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        metric=PSNR,
        target=28.9763,
        also_at_least={"ssim": 0.96},
        recipe=recipe,
        source=Recipe(batch_size=32, epochs=100, optimizer="adam", learning_rate=1e-3, momentum=0.9),
        quick=replace(recipe, batch_size=128, epochs=2, learning_rate=2e-2, train_images=6_400, eval_images=1_000),
        eval_batch_size=1_000,
    )


def dcgan() -> Workload:
    """Anime faces from the paper's DCGAN. Source: Adam 2e-4, β₁ 0.5, label smoothing 0.1, batch 128, 70 epochs."""
    source = Recipe(batch_size=128, epochs=70, optimizer="adam", learning_rate=2e-4, momentum=0.5)
    return Workload(
        name="dcgan",
        dataset="anime_faces",
        objective="adversarial",
        network=Dcgan,
        preprocess=Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=64),
        metric=SWD,
        target_share=0.25,
        recipe=replace(source, learning_rate=8e-4, schedule="one-cycle"),
        source=source,
        # at the full rate the discriminator's loss leaps between 1 and 15 in its first 50 steps
        quick=replace(source, batch_size=16, epochs=2, learning_rate=5e-5, train_images=400, eval_images=200),
        eval_batch_size=100,
        # an epoch of 42 steps waits for its first batch, and that for as many workers as share the cores
        baseline_workers=8,
    )


def dcgan_common() -> Workload:
    """The common form of `dcgan`, 64 wide with 4×4 kernels, to be held against others' loops: no target.

    Source: the DCGAN of pytorch/examples, Adam 2e-4, β₁ 0.5, batch 64, 25 epochs; ours has twice the batch. Labels
    of real images are smoothed and the first and last convolutions have biases, as `dcgan`'s, which those are not.
    """
    source = Recipe(batch_size=64, epochs=25, optimizer="adam", learning_rate=2e-4, momentum=0.5)
    return replace(
        dcgan(),
        name="dcgan-common",
        network=partial(Dcgan, width=64, kernel=4),
        target_share=None,
        recipe=replace(source, batch_size=128),
        source=source,
    )


def resnet50_transfer() -> Workload:
    """Flowers on frozen ImageNet features, to 89.05 %. Source: Adam, batch 32, 50 epochs; T4: 82 images/s.

    Ours: four times the batch at twice the rate, a quarter of the updates.
    Without ImageNet weights the features are random, and there is no target.
    """
    source = Recipe(batch_size=32, epochs=50, optimizer="adam", learning_rate=1e-3, momentum=0.9)
    return Workload(
        name="resnet50-transfer",
        dataset="flowers",
        objective="classify",
        network=ResNet50Transfer,
        preprocess=Preprocess(
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            image_size=224,
            shear_deg=11.5,  # 0.2 rad
            zoom=0.2,
            flip=True,
        ),
        metric=ACCURACY,
        target=89.05,
        recipe=replace(source, batch_size=128, learning_rate=2e-3),
        source=source,
        quick=replace(source, epochs=2, train_images=256, eval_images=64),
        eval_batch_size=32,
        source_augments=True,
        weights="imagenet",
    )


def mnist_99() -> Workload:
    """MNIST to 99 %, open."""
    recipe = OpenRecipe(
        batch_size=256,
        epochs=1,
        optimizer="adam",
        learning_rate=0.01,
        momentum=0.7,
        schedule="one-cycle",
        label_smoothing=0.1,
    )
    return Workload(
        name="mnist-99",
        dataset="mnist",
        objective="classify",
        network=SmallCnn,
        preprocess=Preprocess(mean=(0.1307,), std=(0.3081,)),
        metric=ACCURACY,
        target=99.0,
        recipe=recipe,
        source=recipe,
        quick=replace(recipe, batch_size=128, epochs=1, train_images=6_400, eval_images=2_000),
        eval_batch_size=10_000,
        division="open",
    )


def cifar10_94() -> Workload:
    """CIFAR-10 to 94 %, open."""
    recipe = OpenRecipe(
        batch_size=1536,
        epochs=10,
        sides=((24, 4), (28, 3), (32, 3)),
        optimizer="muon",
        learning_rate=0.24,
        momentum=0.65,
        head_rate=1.1,
        bias_rate=88.0,
        plain_momentum=0.825,
        weight_decay=1.6e-3,
        schedule="down",
        label_smoothing=0.1,
        jitter=0.14,
        unsure=0.25,
    )
    return Workload(
        name="cifar10-94",
        dataset="cifar10",
        objective="classify",
        network=partial(WhitenedCnn, groups=PAIRS),
        preprocess=replace(CIFAR10_PREPROCESS, crop_padding=2, flip="by turns"),
        metric=ACCURACY,
        target=94.0,
        recipe=recipe,
        source=recipe,
        quick=replace(
            recipe, batch_size=128, epochs=1, sides=((24, 0.5), (32, 0.5)), train_images=768, eval_images=500
        ),
        eval_batch_size=10_000,
        division="open",
    )


def cifar100_70() -> Workload:
    """CIFAR-100, fine labels, to 70 %, open; without further views of test images."""
    recipe = OpenRecipe(
        batch_size=1024,
        epochs=5,
        sides=((20, 1), (24, 2), (32, 2)),
        optimizer="muon",
        learning_rate=0.18,
        momentum=0.6,
        head_rate=1.38,
        bias_rate=64.0,
        plain_momentum=0.9,
        weight_decay=5e-4,
        schedule="up-down",
        label_smoothing=0.25,
    )
    return Workload(
        name="cifar100-70",
        dataset="cifar100",
        objective="classify",
        network=partial(WhitenedCnn, groups=RESIDUAL),
        preprocess=Preprocess(
            mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), crop_padding=2, flip="by turns"
        ),
        metric=ACCURACY,
        target=70.0,
        recipe=recipe,
        source=recipe,
        quick=replace(recipe, batch_size=64, epochs=1, sides=((20, 0.5), (32, 0.5)), train_images=384, eval_images=500),
        eval_batch_size=10_000,
        division="open",
    )


WORKLOADS: tuple[Callable[[], Workload], ...] = (
    mnist_cnn,
    cifar10_cnn,
    cifar100_cnn,
    conv_autoencoder,
    dcgan,
    resnet50_transfer,
)
OPEN: tuple[Callable[[], Workload], ...] = (mnist_99, cifar10_94, cifar100_70)  # of the open division
VARIANTS: tuple[Callable[[], Workload], ...] = (dcgan_common,)  # of one of the six, to be held against others' code


def quick(workload: Workload) -> Workload:
    """Two short epochs on a part of the data: shows that everything works, and has no target."""
    return replace(_without_target(workload), recipe=workload.quick)


def full(workload: Workload) -> Workload:
    """Our recipe, to the target."""
    return workload


def source(workload: Workload) -> Workload:
    """The published recipe, augmented only where its source did so: it sets targets and so has none."""
    preprocess = workload.preprocess
    if not workload.source_augments:
        preprocess = replace(preprocess, crop_padding=0, flip=False, shear_deg=0.0, zoom=0.0)
    return replace(_without_target(workload), recipe=workload.source, preprocess=preprocess)


def _without_target(workload: Workload) -> Workload:
    return replace(workload, target=None, also_at_least=None, target_share=None)


def ladder(workload: Workload) -> Workload:
    """Our recipe, two epochs of it: how fast each rung of the ladder is, not what it reaches."""
    return replace(_without_target(workload), recipe=replace(workload.recipe, epochs=2))


SUITES: dict[str, Callable[[Workload], Workload]] = {
    "quick": quick,
    "full": full,
    "source": source,
    "ladder": ladder,
    "open": full,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one child process runs: a workload in a suite's form, under a tuning, in a mode, from a seed."""

    workload: str
    suite: str
    tuning: str
    mode: Literal["e2e", "compute", "loader"] = "e2e"
    seed: int = 0
    seeds: int = 1  # in the open division: so many from `seed` on, one after the other
    gpus: int = 1  # or processes, where there is no GPU: what `bench/parallel.py` calls ranks
    scaling: Scaling = "weak"  # of several: the recipe's work on each of them, or (strong) shared out

    def __str__(self) -> str:
        seeds = f"seed {self.seed}" if self.seeds == 1 else f"seeds {self.seed} to {self.seed + self.seeds - 1}"
        gpus = "" if self.gpus == 1 else f" {self.gpus} GPUs {self.scaling}"
        return f"{self.workload} {self.tuning} {self.mode}{gpus} {seeds}"


def names(suite: str = "full") -> list[str]:
    """The workloads that a suite runs unless told which."""
    return [function().name for function in (OPEN if suite == "open" else WORKLOADS)]


def find(name: str) -> Workload:
    """The workload called `name`; a `UserError` that lists the known ones otherwise."""
    known = [function() for function in WORKLOADS + OPEN + VARIANTS]
    for workload in known:
        if workload.name == name:
            return workload
    raise UserError(f"unknown workload {name!r}; known are {', '.join(workload.name for workload in known)}")


def resolve(case: Case) -> Workload:
    """The workload in the form in which `case` runs it: with the batch and the rate of all its GPUs together.

    UserError for a suite of another division, and for GPUs that it cannot be shared out to.
    """
    workload = find(case.workload)
    if case.suite != "quick" and (case.suite == "open") != (workload.division == "open"):
        fitting = "open" if workload.division == "open" else "full"
        raise UserError(f"{workload.name} is of the {workload.division} division: run it by --suite {fitting} or quick")
    workload = SUITES[case.suite](workload)
    return workload if case.gpus == 1 else on_many(workload, case.gpus, case.scaling)


def on_many(workload: Workload, gpus: int, scaling: Scaling) -> Workload:
    """The workload on several GPUs; `recipe.batch_size` is that of all together.

    Strong scaling leaves the recipe as it is. Under weak scaling each GPU trains as one would, with the recipe's batch,
    as many steps and as many evaluations, so that N have N times the batch and N times the epochs and are evaluated
    after every N-th. The learning rate stays: these recipes are at the edge of what trains.
    """
    recipe = workload.recipe
    if workload.division == "open":
        raise UserError(f"{workload.name} is of the open division, which runs on one GPU")
    if scaling == "weak":
        many = {name: gpus * getattr(recipe, name) for name in ("batch_size", "epochs", "evaluate_every")}
        recipe = replace(recipe, **many)
    if recipe.batch_size % gpus:
        raise UserError(f"{workload.name}: a batch of {recipe.batch_size} cannot be shared out to {gpus} GPUs")
    return replace(workload, recipe=recipe)


def describe(case: Case, workload: Workload) -> dict[str, Any]:
    """The record's `case`: which case it was and, under `recipe`, every setting that decides its work."""
    recipe = asdict(workload.recipe) | {"preprocess": asdict(workload.preprocess)}
    if workload.weights is not None:
        recipe["weights"] = workload.weights
    described = asdict(case) | {"division": workload.division, "recipe": recipe}
    if case.gpus == 1:
        described["scaling"] = None
    if workload.division == "closed":
        del described["seeds"]  # always one
    else:
        described["seeds"] = list(range(case.seed, case.seed + case.seeds))
    return described
