"""What runs inside the child process of a case: data, network, warm-up, timed epochs.

`bench/start.py` starts it; its parent is `bench/runner.py`.

The child says what it finds in JSON lines on its standard output, each as soon as it is known, so that whatever was
measured before a failure is kept:

    {"section": "timing", "value": {…}}     entries of a section of the record; later ones replace earlier ones
    {"stage": "compile"}                    what begins now
    {"timed": true}                         the timed region begins, or (false) ends
    {"progress": {"epoch": 1, …}}           for the progress bar
    {"status": "oom", "reason": "…"}        only when the run is not ok
    {"pids": [11, 12], "restarts": 0}       of the ranks, where there are several; all that was said before is void

Of several ranks (`bench/parallel.py`) the first one speaks for all; one that fails says why to the agent.
"""

import gc
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

from . import parallel
from .capture import Captured
from .data import baseline, dali, prepared, weights
from .data.loader import WHOLE, Batch, Loader, Share
from .data.prepared import ImageSet
from .errors import UserError
from .fuse import fuse
from .measure import TIMING_VERSION, BlockClock, MemoryParts, PeakMemory, call_s, mib, nvml_process_mib, warm_up
from .metrics import sliced_wasserstein
from .order import Order
from .stats import seconds_to_target
from .step import DTYPES, Player, Step, make_step, own_batch_size, why_uncaptured
from .train import Diverged, Evaluate, Evaluation, collect, make_evaluation, rehearse, train_epoch
from .tuning import TUNINGS, Tuning
from .workloads import Workload, describe, resolve

PICTURED = {1, 2, 5, 10, 20, 50, 100}  # evaluations, and the last
TRACED_STEPS = 5
TRACED_AFTER_S = 1.0
LIBRARY_BYTES = 256 << 20  # what cuDNN and cuBLAS may ask for at their start

Emit = Callable[..., None]


class Setting(NamedTuple):
    """What a case runs on and with, before anything is trained."""

    device: torch.device
    tuning: Tuning
    parts: MemoryParts
    workload: Workload
    network: nn.Module
    train_set: ImageSet
    eval_set: ImageSet  # of several ranks, this one's part
    place: Batch | None  # where batches come …
    eval_place: Batch | None  # … and those of evaluations


def set_up(order: Order, emit: Emit) -> Setting:
    """Brings about what a case needs, on the first GPU or else the CPU, and emits `case` and `data` of its record."""
    case = order.case
    device = pick_device(order.gpu)
    if case.gpus > 1:
        parallel.join(device)
        emit(pids=[int(pid) for pid in parallel.every(os.getpid())], restarts=parallel.restarts())
    tuning = TUNINGS[case.tuning](torch.cuda.get_device_capability() if device.type == "cuda" else None)
    torch.backends.cudnn.benchmark = tuning.compile and not tuning.deterministic
    if tuning.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts, which is later
        torch.use_deterministic_algorithms(True)
        torch._inductor.config.deterministic = True  # else the compiler picks some algorithms by the clock
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(case.seed)
    torch.empty(1, device=device)  # makes the CUDA context
    parts = MemoryParts(device)
    parts.take("context_mib")

    emit(stage="data")
    workload = resolve(case)
    if order.batch_size is not None:
        workload = replace(workload, recipe=replace(workload.recipe, batch_size=order.batch_size))
    train_set, eval_set = (image_set(workload, split, tuning, order.data) for split in ("train", "test"))
    workload, network = build(workload, train_set.classes)
    uncaptured = why_uncaptured(workload.recipe, tuning) if tuning.capture else None
    tuning = replace(tuning, capture=tuning.capture and uncaptured is None)
    execution = describe_precision(tuning, device) | {"captured": tuning.capture, "uncaptured_because": uncaptured}
    emit(section="case", value=describe(case, workload) | execution)
    emit(section="data", value=describe_data(train_set, eval_set, tuning))
    if workload.objective != "adversarial":
        eval_set = own_part(eval_set)
    both = places(workload, train_set, eval_set, tuning, device)
    return Setting(device, tuning, parts, workload, network, train_set, eval_set, *both)


def run(order: Order, emit: Emit) -> None:
    """Runs the case on the first GPU, or on the CPU where there is none, and emits the sections of its record."""
    case = order.case
    setting = set_up(order, emit)
    if setting.workload.division == "open":
        from .speedrun import run_seeds  # here, since it takes from this module

        return run_seeds(order, setting, emit)
    device, tuning, parts, workload, network, train_set, eval_set, place, eval_place = setting

    def train_loader() -> Loader:
        return make_loader(workload, train_set, tuning, device, train=True, seed=case.seed, into=place)

    if case.mode == "loader":
        with closing(train_loader()) as loader:
            steady = warm_up(partial(next, endless(loader)))
        with closing(train_loader()) as loader:
            memory = time_batches(workload, lambda images, labels: images, loader, device, lambda: None, emit)
            memory["nvml_process_mib"] = nvml_process_mib(device)
        emit(section="timing", value={"steady": steady})
        return emit(section="memory", value=memory | {"limit_mib": tuning.memory_limit_mib})

    prepare(network, tuning, device)
    loader = train_loader()
    eval_loader = make_loader(workload, eval_set, tuning, device, train=False, seed=case.seed, into=eval_place)
    steps = loader.batches_per_epoch * workload.recipe.evaluations
    step, players = make_step(workload, network, tuning, device, steps)
    evaluate = make_evaluation(workload, network, eval_loader, tuning, device)

    emit(stage="compile" if tuning.compile else "warm-up")
    initial = {name: on_host(value) for name, value in network.state_dict().items()}
    resident = Resident(loader)
    parts.take("loaders_mib")
    loader.close()
    compile_s = first_calls(step, resident, evaluate)
    start_s = round(time.time() - order.started, 3)
    if order.compile_only:
        emit(section="memory", value={"limit_mib": tuning.memory_limit_mib})
        return emit(section="compile", value={"cold_s": compile_s, "cold_start_s": start_s})
    if tuning.compile:
        emit(section="compile", value={"warm_s": compile_s, "warm_start_s": start_s})
    steady = warm_up(lambda: step(resident.batch.images, resident.batch.labels))
    rehearse(device)
    parts.take("libraries_mib")
    emit(section="memory", value=parts.parts | {"warm_up_reserved_mib": warm_up_reserved_mib(device)})

    def start_anew() -> None:
        network.load_state_dict(initial)
        for player in players:
            player.restart()

    start_anew()
    references = references_of(workload, train_set, eval_loader, evaluate, tuning, device)
    torch.manual_seed(parallel.seed_of(case.seed))
    graphs = new_graphs()

    if case.mode == "compute":
        memory = time_batches(workload, step, resident, device, start_anew, emit)
        memory["nvml_process_mib"] = nvml_process_mib(device)
    else:
        with closing(train_loader()) as loader:
            memory = train(workload, step, evaluate, loader, device, emit, order.pictures, references)
            memory["nvml_process_mib"] = nvml_process_mib(device)  # with what the loader holds
    emit(section="timing", value={"steady": steady})
    emit(section="memory", value=memory | {"limit_mib": tuning.memory_limit_mib})
    if tuning.compile:
        recompiles = int(sum(parallel.every(new_graphs() - graphs)))
        emit(section="compile", value={"recompiles": recompiles})
        if recompiles:
            emit(status="failed", reason=f"{recompiles} graphs were compiled or captured inside the timed region")
    if order.trace is not None:
        write_trace(order.trace, step, resident.batch, device)
    if case.gpus > 1:
        again = partial(make_step, workload, network, tuning, device, steps)
        emit(section="communication", value=communication(step, players, again, resident.batch, tuning))
    eval_loader.close()


def pick_device(gpu: str | None) -> torch.device:
    """CUDA where the machine has a GPU; UserError where it has one that torch cannot use, instead of a slow CPU run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if gpu is not None:
        raise UserError(f"this machine has an {gpu}, but torch {torch.__version__} cannot use it: update its driver")
    return torch.device("cpu")


def describe_precision(tuning: Tuning, device: torch.device) -> dict[str, Any]:
    """The record's `precision`. By torch's default fp32 convolutions run as TF32 where a GPU has it, from sm_80 on."""
    tf32 = device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0) and torch.backends.cudnn.allow_tf32
    return {"precision": tuning.precision, "tf32_convolutions": tf32}


def endless(loader: Loader) -> Iterator[torch.Tensor]:
    while True:
        for batch in loader.epoch():
            yield batch.images


def image_set(workload: Workload, split: str, tuning: Tuning, root: Path) -> ImageSet:
    """One split, cut to the recipe's number of images, spread evenly; small JPEGs are decoded once for DALI."""
    images = prepared.load(workload.dataset, split, root)
    wanted = workload.recipe.train_images if split == "train" else workload.recipe.eval_images
    if wanted is not None:
        images = part(images, wanted)
    if tuning.loader == "dali" and images.files is not None and workload.objective == "adversarial":
        # by the host: nvJPEG's start takes 4 s more on an H200, and 6,500 faces 1 s on two cores
        images = replace(images, images=dali.decode(images.files, torch.device("cpu")), files=None)
    return images


def part(images: ImageSet, count: int) -> ImageSet:
    """`count` images, spread evenly, or all where there are no more."""
    if count >= len(images):
        return images
    picked = np.linspace(0, len(images) - 1, count).astype(np.int64)
    return rows_of(images, picked)


def own_part(images: ImageSet) -> ImageSet:
    """This rank's part of a set that all ranks share, one part behind the other; the whole where there is one rank."""
    if parallel.ranks() == 1:
        return images
    first, end = (len(images) * number // parallel.ranks() for number in (parallel.rank(), parallel.rank() + 1))
    return rows_of(images, np.arange(first, end))


def rows_of(images: ImageSet, picked: np.ndarray) -> ImageSet:
    """The images with the numbers `picked`."""
    return replace(
        images,
        images=None if images.images is None else images.images[picked],
        files=None if images.files is None else tuple(images.files[index] for index in picked),
        labels=None if images.labels is None else images.labels[picked],
    )


def build(workload: Workload, classes: int) -> tuple[Workload, nn.Module]:
    """The network, and the workload as it then is: where ImageNet weights are missing it has no target."""
    if workload.weights == "imagenet":
        imagenet = weights.load()
        if imagenet is None:
            workload = replace(workload, target=None, weights="random")
        return workload, workload.network(classes, imagenet)
    return workload, workload.network(classes) if workload.objective == "classify" else workload.network()


def prepare(network: nn.Module, tuning: Tuning, device: torch.device) -> None:
    """Brings `network` to the device, in the tuning's layout and with its kernels; ranks have equal weights."""
    network.to(device)
    parallel.broadcast(network)
    if tuning.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    if tuning.kernels:
        fuse(network, DTYPES[tuning.precision])
        # Sums over half a million pixels, as patches have them, are to be made in 32 bits, as cuDNN's are.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def on_host(value: torch.Tensor) -> torch.Tensor:
    """A copy of it in the host's memory, from where it goes back to a GPU in a few milliseconds."""
    return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value)


def make_loader(
    workload: Workload,
    images: ImageSet,
    tuning: Tuning,
    device: torch.device,
    *,
    train: bool,
    seed: int,
    into: Batch | None = None,
) -> Loader:
    """The tuning's loader: training batches in the network's precision, evaluation batches in fp32.

    `into` is where the batches come, one of `places`; with None each has memory of its own.
    """
    options: dict[str, Any] = {
        "preprocess": workload.preprocess,
        "batch_size": own_batch_size(workload) if train else eval_batch_size(workload, images),
        "train": train,
        "seed": seed,
        "device": device,
        "dtype": DTYPES[tuning.precision] if train else torch.float32,
        "channels_last": tuning.channels_last,
        "share": share_of(workload) if train else WHOLE,
    }
    if tuning.loader == "dali":
        module: Any = dali
        options["into"] = into
    else:
        module = baseline
        options["workers"] = min(workload.baseline_workers, parallel.cores())
    if images.images is not None:
        return module.array_loader(images.images, images.labels, **options)
    return module.jpeg_loader(images.files, images.labels, **options)


def share_of(workload: Workload) -> Share:
    """What of the training set is this rank's between two evaluations."""
    return Share(parallel.rank(), parallel.ranks(), workload.recipe.evaluate_every)


def eval_batch_size(workload: Workload, eval_set: ImageSet) -> int:
    return min(workload.eval_batch_size, len(eval_set))


def places(
    workload: Workload, train_set: ImageSet, eval_set: ImageSet, tuning: Tuning, device: torch.device
) -> tuple[Batch | None, Batch | None]:
    """Where batches of training and of evaluation come for captured graphs, which read the same memory each time."""
    if not tuning.capture:
        return None, None

    def place(images: ImageSet, batch_size: int, batches: int, dtype: torch.dtype) -> Batch:
        side, channels = workload.preprocess.image_size, len(workload.preprocess.mean)
        height, width = (side, side) if images.images is None else images.images.shape[1:3]
        rows = batches * batch_size
        pixels = torch.empty(rows, height, width, channels, dtype=dtype, device=device).permute(0, 3, 1, 2)
        return Batch(pixels, torch.empty(rows, dtype=torch.int64, device=device), rows, batches)

    batch_size = own_batch_size(workload)
    images = train_set.images
    at_once = 1 if images is None else dali.batches_at_once(images, batch_size, share_of(workload))
    return (
        place(train_set, batch_size, at_once, DTYPES[tuning.precision]),
        place(eval_set, eval_batch_size(workload, eval_set), 1, torch.float32),
    )


def describe_data(train_set: ImageSet, eval_set: ImageSet, tuning: Tuning) -> dict[str, Any]:
    return {
        "name": train_set.name,
        "label": train_set.label,
        "synthetic": train_set.synthetic,
        "sha256": {"train": train_set.sha256, "test": eval_set.sha256},
        "images": {"train": len(train_set), "test": len(eval_set)},
        "loader": tuning.loader,
        "resident": tuning.loader == "dali" and train_set.images is not None and dali.is_resident(train_set.images),
    }


class Resident:
    """A loader's first batches, which stay on the device and come as often as the loader has batches."""

    def __init__(self, loader: Loader) -> None:
        self.batches_per_epoch = loader.batches_per_epoch
        self.images_per_epoch = loader.images_per_epoch
        self.batches_at_once = loader.batches_at_once
        self.batch = next(iter(loader.epoch()))

    def epoch(self) -> Iterator[Batch]:
        whole, rest = divmod(self.batches_per_epoch, self.batches_at_once)
        yield from repeat(self.batch, whole)
        if rest:
            yield self.batch.first(rest)

    def close(self) -> None:
        """Nothing to close: the loader belongs to the caller."""


def first_calls(step: Step, resident: Resident, evaluate: Evaluate) -> float:
    """The seconds by which the first steps and evaluation, which compile and capture, outlast the second ones.

    The steps are one of each form in which an epoch has them: so many batches at once, and the fewer of its end.
    """
    forms = {batch.batches: batch for batch in resident.epoch()}

    def both() -> float:
        start = time.perf_counter()
        for batch in forms.values():
            step(batch.images, batch.labels).item()
        evaluate()
        return time.perf_counter() - start

    return round(both() - both(), 3)


def warm_up_reserved_mib(device: torch.device) -> float | None:
    """The most that torch reserved so far: more than training needs, where algorithms were tried out."""
    if device.type != "cuda":
        return None
    return mib(max(torch.cuda.max_memory_reserved(), Captured.reserved_before))


def new_graphs() -> int:
    """Graphs compiled or captured so far in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] + Captured.graphs


class Timing:
    """Adds up the clocks of the epochs and emits the record's `timing` and `throughput`.

    Of several ranks the slowest one's seconds count, for the images of all; the blocks are those of the first one.
    What Python has made until then is left out of its garbage collections from then on.
    """

    def __init__(self, device: torch.device, emit: Emit) -> None:
        gc.collect()
        gc.freeze()  # else a full collection, 0.2 s for what a compiler leaves, falls into some epoch
        self._device, self._emit = device, emit
        self._clocks: list[BlockClock] = []
        self._images = self._steps = 0

    def clock(self, steps: int, steps_at_once: int) -> BlockClock:
        self._clocks.append(BlockClock(self._device, steps, steps_at_once))
        return self._clocks[-1]

    def add(self, images: int, steps: int) -> None:
        self._images += images
        self._steps += steps
        rank_s = parallel.every(sum(clock.steps_s for clock in self._clocks))
        train_s = max(rank_s)
        timing = {
            "timing_version": TIMING_VERSION,
            "block_steps": self._clocks[0].block_steps,
            "block_s": [round(block, 6) for clock in self._clocks for block in clock.block_s],
            "blocks_thinned_by": 1,
            "train_s": round(train_s, 6),
            "wall_s": round(parallel.slowest(sum(clock.wall_s for clock in self._clocks)), 6),
            "steps": self._steps,
        }
        self._emit(section="timing", value=timing)
        if len(rank_s) > 1:
            self._emit(section="communication", value={"rank_train_s": [round(seconds, 6) for seconds in rank_s]})
        images = self._images * parallel.ranks()
        self._emit(section="throughput", value={"images_per_s": round(images / train_s, 3)})


def time_batches(
    workload: Workload, step: Step, loader: Loader, device: torch.device, begin: Callable[[], None], emit: Emit
) -> dict[str, float | None]:
    """The recipe's epochs without evaluation: the loader alone, or training on a resident batch; peaks of memory.

    `begin` is called before each epoch, or before each so many that are trained as one.

    Raises:
        Diverged: the last result of one of these is not finite.
    """
    timing = Timing(device, emit)
    memory = PeakMemory(device, Captured.own_bytes)
    epochs, every = workload.recipe.epochs, workload.recipe.evaluate_every
    emit(stage="measure", epochs=epochs, steps=loader.batches_per_epoch * workload.recipe.evaluations)
    before = 0
    for epoch in range(every, epochs + 1, every):
        clock = timing.clock(loader.batches_per_epoch, loader.batches_at_once)
        images = steps = 0
        begin()
        parallel.meet()
        emit(timed=True)
        with memory.during("train"):
            clock.start()
            for batch in loader.epoch():
                result = step(batch.images, batch.labels)
                images += len(batch.images)
                steps += batch.batches
                if clock.step(batch.batches):
                    emit(progress={"epoch": epoch, "step": before + steps})
            clock.stop()
        before += steps
        emit(timed=False)
        timing.add(images, steps)
        if not torch.isfinite(result).all():
            raise Diverged(f"a result that is not finite after {steps} steps")
    return memory.summary()


def references_of(
    workload: Workload,
    train_set: ImageSet,
    eval_loader: Loader,
    evaluate: Evaluate,
    tuning: Tuning,
    device: torch.device,
) -> dict[str, float]:
    """For generated images: the distance between real and held-out images, and of the untrained generator."""
    if workload.objective != "adversarial":
        return {}
    real = collect(eval_loader)
    with closing(make_loader(workload, part(train_set, len(real)), tuning, device, train=False, seed=0)) as loader:
        others = collect(loader)
    return {"real": round(sliced_wasserstein(others, real), 4), "untrained": round(evaluate().metric, 4)}


def train(
    workload: Workload,
    step: Step,
    evaluate: Evaluate,
    loader: Loader,
    device: torch.device,
    emit: Emit,
    pictures: Path,
    references: Mapping[str, float],
) -> dict[str, float | None]:
    """Every epoch of the recipe, with its evaluations; returns the peaks of memory.

    Emits timing, throughput and accuracy after each evaluation.
    """
    epochs, every = workload.recipe.epochs, workload.recipe.evaluate_every
    target = workload.target
    if workload.target_share is not None:
        target = references["real"] + workload.target_share * (references["untrained"] - references["real"])
    timing = Timing(device, emit)
    memory = PeakMemory(device, Captured.own_bytes)
    curve: list[dict[str, Any]] = []
    eval_s_total = 0.0
    emit(stage="train", epochs=epochs, steps=loader.batches_per_epoch * workload.recipe.evaluations)
    for epoch in range(every, epochs + 1, every):
        before = len(curve) * loader.batches_per_epoch
        clock = timing.clock(loader.batches_per_epoch, loader.batches_at_once)

        def progress(done: int, loss: float, epoch: int = epoch, before: int = before) -> None:
            emit(progress={"epoch": epoch, "step": before + done, "loss": loss})

        parallel.meet()
        emit(timed=True)
        with memory.during("train"):
            trained = train_epoch(step, loader.epoch(), clock, progress)
        emit(timed=False)
        timing.add(trained.images, trained.steps)
        with memory.during("eval"):
            start = time.perf_counter()
            evaluation = evaluate()
            eval_s = parallel.slowest(time.perf_counter() - start)
        if not math.isfinite(evaluation.metric):
            raise Diverged(f"{workload.metric.name} {evaluation.metric} after epoch {epoch}")
        loss = fmean(parallel.every(trained.loss))
        curve.append(curve_row(epoch, parallel.slowest(clock.total_s), eval_s, loss, evaluation))
        pictured = parallel.rank() == 0 and (len(curve) in PICTURED or epoch == epochs)
        if evaluation.picture is not None and pictured:
            to_pil_image(evaluation.picture.float().cpu()).save(pictures / f"{epoch}.webp", quality=85)
        eval_s_total += eval_s
        emit(section="throughput", value={"eval_images_per_s": round(evaluation.images * len(curve) / eval_s_total, 3)})
        emit(section="accuracy", value=accuracy(workload, curve, target, references))
        emit(progress={"epoch": epoch, "step": before + trained.steps, "loss": loss, "metric": evaluation.metric})
    return memory.summary()


def curve_row(epoch: int, train_s: float, eval_s: float, loss: float, evaluation: Evaluation) -> dict[str, Any]:
    row = {
        "epoch": epoch,
        "train_s": round(train_s, 4),
        "eval_s": round(eval_s, 4),
        "train_loss": float(f"{loss:.5g}"),
        "metric": round(evaluation.metric, 4),
    }
    further = {name: round(value, 5) for name, value in evaluation.further.items()}
    return row | ({"metrics": further} if further else {})


def accuracy(
    workload: Workload, curve: list[dict[str, Any]], target: float | None, references: Mapping[str, float]
) -> dict[str, Any]:
    """The record's `accuracy` after the epochs in `curve`."""
    metric = workload.metric
    values = [row["metric"] for row in curve]
    to_target = None
    if target is not None:
        to_target = seconds_to_target(
            curve, target, higher_is_better=metric.higher_is_better, also_at_least=workload.also_at_least
        )
    return {
        "metric": metric.name,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "final": values[-1],
        "best": max(values) if metric.higher_is_better else min(values),
        "target": None if target is None else round(target, 4),
        "also_at_least": workload.also_at_least,
        "reached": None if target is None else to_target is not None,
        "train_s_to_target": to_target,
        "references": dict(references) or None,
        "curve": curve,
    }


def write_trace(path: Path, step: Step, batch: Batch, device: torch.device) -> None:
    """A profiler trace of a few further steps, after everything was measured, for chrome://tracing or Perfetto.

    A second of others comes before them, not kept, so that the clocks are those of a run that goes on.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    start = time.perf_counter()
    step(batch.images, batch.labels).sum().item()  # waits for the device
    others = math.ceil(TRACED_AFTER_S / parallel.slowest(time.perf_counter() - start))
    schedule = torch.profiler.schedule(wait=0, warmup=others, active=TRACED_STEPS, repeat=1)
    with torch.profiler.profile(activities=activities, acc_events=True, schedule=schedule) as profiler:
        for _ in range(others + TRACED_STEPS):
            step(batch.images, batch.labels)
            profiler.step()
    if parallel.rank() == 0:
        profiler.export_chrome_trace(str(path))


def communication(
    step: Step,
    players: list[Player],
    again: Callable[[], tuple[Step, list[Player]]],
    batch: Batch,
    tuning: Tuning,
) -> dict[str, float]:
    """What adding up the gradients costs a step, from further steps after everything else was measured.

    Seconds of a step as it was, and of the slowest rank's in which each is left to itself, made `again`; the difference
    is what of the communication no arithmetic hides, less what ranks save that share the update out: it may be
    negative, and holds no wait for a rank that is always slower. Beside it the seconds of sums of all the gradients
    alone, by the process group, and their size in MiB; and how much of that is added up in a shared update.
    """

    def seconds(step: Step) -> float:
        return call_s(lambda: step(batch.images, batch.labels)) / batch.batches

    together_s = seconds(step)
    half = DTYPES[tuning.precision]
    gradients = [[torch.randn_like(weight) for weight in player.parameters] for player in players]
    orders = [[parallel.in_memory(weight) for weight in player.parameters] for player in players]

    def add_up() -> torch.Tensor:
        for _ in range(batch.batches):  # as many as a step that is replayed has
            for group, order in zip(gradients, orders, strict=True):
                parallel.sums(group, order, half)
        return gradients[0][0]

    sent_bytes = sum(
        gradient.numel() * parallel.sent_as(gradient, half).itemsize for group in gradients for gradient in group
    )
    add_up_s = call_s(Captured(add_up, "train") if tuning.capture else add_up) / batch.batches
    shared = [weight for player in players if player.sharded for weight in player.parameters]
    with parallel.apart():
        if isinstance(step, Captured):
            step.forget()
        for player in players:
            player.optimizer.state.clear()  # it is needed no more, and its memory is
        alone, _ = again()
        alone(batch.images, batch.labels)  # compiles, where it has to
        apart_s = seconds(alone)
    return {
        "step_s": float(f"{together_s:.5g}"),
        "apart_step_s": float(f"{apart_s:.5g}"),
        "exposed_s": float(f"{together_s - apart_s:.5g}"),
        "add_up_s": float(f"{add_up_s:.5g}"),
        "add_up_mib": float(f"{sent_bytes / 2**20:.4g}"),
        "shared_mib": float(f"{sum(weight.nbytes for weight in shared) / 2**20:.4g}"),
    }


def main(order: Order) -> None:
    """Runs an order and emits on standard output; returns also when the run failed and could say so."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as lines:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not stand between the lines

        def emit(**event: Any) -> None:
            if parallel.rank() > 0:
                return
            lines.write(json.dumps(event, allow_nan=False) + "\n")  # a record holds no NaN
            lines.flush()

        if order.case.gpus > 1 and parallel.restarts() and os.environ["RANK"] == "0":
            lines.write("\n")  # the rank before this one may have been ended within a line
        fail = emit if order.case.gpus == 1 else parallel.last_words
        try:
            run(order, emit)
            parallel.leave()
        except UserError as error:
            fail(status="failed", reason=str(error), user_error=True)
        except Diverged as error:
            fail(status="diverged", reason=str(error))
        except Exception as error:
            if not is_out_of_memory(error):
                traceback.print_exc()
                return fail(status="failed", reason=f"{type(error).__name__}: {first_line(error)}"[:500])
            captured = Captured.own_bytes.get("train", 0)
            peak = mib(torch.cuda.max_memory_allocated() + captured) if torch.cuda.is_available() else None
            emit(section="memory", value={"peak_allocated_mib": peak})
            fail(status="oom", reason=first_line(error))


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device's memory was the reason: torch says so of its own; libraries and the driver have their words.

    A library that finds no room for its own state calls itself not initialised.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    said = str(error).lower()
    if re.search("out[ _]of[ _]memory|alloc(ation)?_failed", said):
        return True
    if "not_initialized" not in said:
        return False
    try:
        return torch.cuda.mem_get_info()[0] < LIBRARY_BYTES
    except (RuntimeError, AssertionError):  # no GPU, or one that answers no more
        return False


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
