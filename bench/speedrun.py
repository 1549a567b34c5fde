"""The open division: seed after seed in one process, each trained anew to its end by the same captured steps.

A seed's time goes from before its first step to the end of its one evaluation: whitening, the loader's first fill and
all further views of test images are inside. Outside are what is done once, compilation, capture, two seeds that do not
count and the sets that stay on the device, and between two seeds the drawing of new weights and a new loader.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.whitened_cnn import WhitenedCnn
from . import child
from .capture import Captured
from .child import Emit, Setting
from .data.loader import Batch, Loader, count_epoch
from .errors import UserError
from .measure import BlockClock, PeakMemory, nvml_process_mib
from .order import Order
from .stats import bootstrap_interval
from .step import execute, make_step
from .train import Diverged
from .workloads import OpenRecipe

WHITENED = 960  # training images whose patches are whitened
CHUNK = 2_500  # test images that are judged at a time
WARM_UP_SEED = 2**31 - 1
FEWEST = 30  # seeds whose mean can reach a target
BELOW = 0.95  # the confidence that the mean is above its lower bound


class Speedrun:
    """A network and everything that trains and judges it, for one seed after the other."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        device, tuning, workload = setting.device, setting.tuning, setting.workload
        recipe = workload.recipe
        assert isinstance(recipe, OpenRecipe)
        if tuning.loader != "dali" or setting.train_set.images is None:
            raise UserError(f"the open division is fed by DALI, from arrays; --tuning {tuning.name} is not")
        self._network = setting.network
        child.prepare(self._network, tuning, device)
        batches, _ = count_epoch(len(setting.train_set), recipe.batch_size, train=True)
        self.steps_at_once = 1 if setting.place is None else setting.place.batches
        self._side = setting.train_set.images.shape[1]
        sides = recipe.sides or ((self._side, float(recipe.epochs)),)
        self._plan = [side for side, epochs in sides for _ in range(round(epochs * batches / self.steps_at_once))]
        self.steps = len(self._plan) * self.steps_at_once
        self._scale = torch.compile(scale, fullgraph=True, dynamic=False) if tuning.compile else scale
        self._small: dict[int, Tensor] = {}  # where images of other sides come: a captured step reads one place
        self._step, self._players = make_step(workload, self._network, tuning, device, self.steps)
        self._eval_loader = child.make_loader(
            workload, setting.eval_set, tuning, device, train=False, seed=0, into=setting.eval_place
        )
        logits_of = execute(self._network, tuning, device)

        def are_right(images: Tensor, labels: Tensor) -> Tensor:
            logits = in_chunks(images)
            if recipe.unsure:
                rows = least_sure(logits, round(recipe.unsure * len(images)))
                again = in_chunks(views(images[rows])).unflatten(0, (-1, len(rows)))
                logits = logits.index_copy(0, rows, again.mean(0))
            return logits.argmax(1) == labels

        def in_chunks(images: Tensor) -> Tensor:
            chunks = (chunk.contiguous(memory_format=torch.channels_last) for chunk in images.split(CHUNK))
            return torch.cat([logits_of(chunk).float() for chunk in chunks])

        self._are_right = Captured(are_right, "eval") if tuning.capture else are_right

    def close(self) -> None:
        self._eval_loader.close()

    def run(
        self, seed: int, clock: BlockClock, memory: PeakMemory, progress: Callable[[int], None]
    ) -> tuple[float, float]:
        """Trains and judges from new weights: the metric and the last loss; `progress` is told of steps, by block.

        Raises:
            Diverged: the last loss is not finite.
        """
        self._restart(seed)
        steps = 0
        with closing(self._loader(seed)) as loader:
            with memory.during("train"):
                clock.start()
                if isinstance(self._network, WhitenedCnn):
                    self._network.whiten(self._first_images())
                for side, batch in zip(self._plan, endless(loader), strict=False):
                    loss = self._step(self._at(side, batch.images), batch.labels)
                    steps += batch.batches
                    if clock.step(batch.batches):
                        progress(steps)
                clock.end_steps()
            with memory.during("eval"):
                metric = self._evaluate()
                clock.stop()
        last = loss.item() / self.steps_at_once
        if not math.isfinite(last):
            raise Diverged(f"training loss {last} at the end of seed {seed}")
        return metric, last

    def _first_images(self) -> Tensor:
        """As the network sees them: [N, C, H, W]."""
        images = self._setting.train_set.images
        assert images is not None
        first = torch.tensor(np.ascontiguousarray(images[:WHITENED]), device=self._setting.device)
        preprocess = self._setting.workload.preprocess
        mean, std = (torch.tensor(values, device=first.device) for values in (preprocess.mean, preprocess.std))
        return ((first / 255 - mean) / std).permute(0, 3, 1, 2)

    def _restart(self, seed: int) -> None:
        torch.manual_seed(seed)
        fresh = self._setting.workload.network(self._setting.train_set.classes)
        self._network.load_state_dict(fresh.state_dict())
        for player in self._players:
            player.restart()
        self._network.train()

    def _loader(self, seed: int) -> Loader:
        _, tuning, _, workload, *_ = self._setting
        return child.make_loader(
            workload,
            self._setting.train_set,
            tuning,
            self._setting.device,
            train=True,
            seed=seed,
            into=self._setting.place,
        )

    def _at(self, side: int, images: Tensor) -> Tensor:
        """Images [B, C, side, side], always at the same place."""
        if side == self._side:
            return images
        if side not in self._small:
            small = images.new_empty(*images.shape[:2], side, side)
            self._small[side] = small.contiguous(memory_format=torch.channels_last)
        self._scale(images, self._small[side])
        return self._small[side]

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Share of right answers, in %."""
        self._network.eval()
        right = torch.zeros((), dtype=torch.int64, device=self._setting.device)
        images = 0
        for batch in self._eval_loader.epoch():
            right += self._are_right(batch.images, batch.labels)[: batch.valid].sum()
            images += batch.valid
        return 100.0 * right.item() / images


def scale(images: Tensor, small: Tensor) -> None:
    """Images [B, C, H, W] to the size of `small` [B, C, h, w], which takes them."""
    small.copy_(F.interpolate(images, small.shape[2:], mode="bilinear", align_corners=False))


def endless(loader: Loader) -> Iterator[Batch]:
    """Batches of whole calls, epoch after epoch."""
    while True:
        for batch in loader.epoch():
            if batch.batches == loader.batches_at_once:
                yield batch


def least_sure(logits: Tensor, count: int) -> Tensor:
    """The rows of `logits` [N, classes] whose likeliest class is the least likely."""
    return logits.softmax(1).amax(1).topk(count, largest=False, sorted=False).indices


def views(images: Tensor) -> Tensor:
    """Six views of images [N, C, H, W], one set behind the other: as they are and a pixel up and left, down and right,
    reflected at the border; and all of these mirrored."""
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    moved = torch.cat([images, padded[:, :, :height, :width], padded[:, :, 2:, 2:]])
    return torch.cat([moved, moved.flip(3)])


def run_seeds(order: Order, setting: Setting, emit: Emit) -> None:
    """Runs the seeds of a case of the open division and emits the sections of its record."""
    case, device, tuning, parts = order.case, setting.device, setting.tuning, setting.parts
    if case.mode != "e2e" or order.trace is not None:
        raise UserError("the open division is timed end to end, untraced: leave --mode and --trace out")
    with closing(Speedrun(setting)) as speedrun:

        def warm_up() -> float:
            start = time.perf_counter()
            clock, memory = BlockClock(device, speedrun.steps, speedrun.steps_at_once), PeakMemory(device)
            speedrun.run(WARM_UP_SEED, clock, memory, lambda steps: emit(progress={"epoch": 1, "step": steps}))
            return time.perf_counter() - start

        emit(stage="compile" if tuning.compile else "warm-up")
        parts.take("loaders_mib")
        first_s = warm_up()
        start_s = round(time.time() - order.started, 3)
        reserved_mib = child.warm_up_reserved_mib(device)
        compile_s = round(first_s - warm_up(), 3)
        if order.compile_only:
            emit(section="memory", value={"limit_mib": tuning.memory_limit_mib})
            return emit(section="compile", value={"cold_s": compile_s, "cold_start_s": start_s})
        if tuning.compile:
            emit(section="compile", value={"warm_s": compile_s, "warm_start_s": start_s})
        parts.take("libraries_mib")
        emit(section="memory", value=parts.parts | {"warm_up_reserved_mib": reserved_mib})

        graphs = child.new_graphs()
        timing = child.Timing(device, emit)
        memory = PeakMemory(device, Captured.own_bytes)
        seeds: list[dict[str, Any]] = []
        eval_s = 0.0
        emit(stage="train", epochs=case.seeds, steps=case.seeds * speedrun.steps, each="seed")
        for number, seed in enumerate(range(case.seed, case.seed + case.seeds), 1):
            clock = timing.clock(speedrun.steps, speedrun.steps_at_once)
            before = len(seeds) * speedrun.steps

            def progress(steps: int, number: int = number, before: int = before) -> None:
                emit(progress={"epoch": number, "step": before + steps})

            emit(timed=True)
            metric, loss = speedrun.run(seed, clock, memory, progress)
            emit(timed=False)
            timing.add(speedrun.steps * setting.workload.recipe.batch_size, speedrun.steps)
            eval_s += clock.total_s - clock.steps_s
            emit(section="throughput", value={"eval_images_per_s": round(number * len(setting.eval_set) / eval_s, 3)})
            seeds.append({"seed": seed, "train_s": round(clock.total_s, 5), "metric": round(metric, 4)})
            emit(section="accuracy", value=accuracy(setting, seeds))
            emit(progress={"epoch": number, "step": before + speedrun.steps, "loss": loss, "metric": metric})
        counted = {"nvml_process_mib": nvml_process_mib(device), "limit_mib": tuning.memory_limit_mib}
        emit(section="memory", value=memory.summary() | counted)
    if tuning.compile:
        recompiles = child.new_graphs() - graphs
        emit(section="compile", value={"recompiles": recompiles})
        if recompiles:
            emit(status="failed", reason=f"{recompiles} graphs were compiled or captured inside the timed region")


def accuracy(setting: Setting, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """The record's `accuracy` after `seeds`: the mean is the final metric, and the time to target that of all of them.

    Fewer than `FEWEST` seeds reach nothing. `surely`: the mean's lower confidence bound reaches the target too.
    """
    workload = setting.workload
    metrics = [row["metric"] for row in seeds]
    mean, target = fmean(metrics), workload.target
    bound = mean
    if len(metrics) > 1:
        bound, _ = bootstrap_interval(metrics, lambda resamples: resamples.mean(axis=-1), confidence=2 * BELOW - 1)
    if len(metrics) < FEWEST:
        target = None
    reached = None if target is None else mean >= target
    return {
        "metric": workload.metric.name,
        "unit": workload.metric.unit,
        "higher_is_better": workload.metric.higher_is_better,
        "final": round(mean, 4),
        "best": max(metrics),
        "target": target,
        "reached": reached,
        "surely": None if target is None else bound >= target,
        "train_s_to_target": round(fmean(row["train_s"] for row in seeds), 5) if reached else None,
        "standard_deviation": round(stdev(metrics), 4) if len(metrics) > 1 else None,
        "lower_bound": round(bound, 4) if len(metrics) > 1 else None,
        "seeds": seeds,
    }
