"""Timers and memory. The timing contract, version 3:

- Warm-up, compilation and graph capture lie outside the timed region. Warm-up lasts until the step is steady: three
  stretches of at least 50 ms in a row within 5 % of their median; a step that is not so within 10 s is recorded as not
  steady. After warm-up the weights, the optimizer, the loader and the random state start anew, so nothing learned in
  warm-up is timed as if it had been free.
- Time is read around *blocks* of K steps: between CUDA events on a GPU, by the wall clock on a CPU. There is one
  synchronisation a block, for the end of the block before it, so that the device never waits for the host to ask. A
  block begins where the one before it ended, so the blocks of an epoch tile it, and whatever the loader or the host
  costs is inside: the start of a DataLoader's workers and DALI's first fill too. A loader may fetch ahead across the
  border of epochs, and make the next one's first batches, which counts for the epoch in which it does so: DALI's ends
  when all that it has begun has arrived, so that it does nothing while nobody times; of a set that is streamed, a
  thread gathers the next super-batch meanwhile. A set that stays on the device, as the record's `data.resident` says,
  is brought there before, and DALI's threads and memory come by a run before the first epoch, on images that are not
  the epoch's. Until November 26th 2026 version 3 had that inside the first epoch, 1.5 to 2.5 ms, and let JPEGs of the
  next evaluation be decoded in the training time after one.
  Python's garbage is collected before; within, only what came since is looked through for it. Until November 27th 2026
  a full collection could fall into the timed region, some 0.2 s in one epoch of a compiled network.
  Where several steps are one CUDA graph, a block is a whole number of replays. The wall clock of the
  epoch is recorded beside them.
- Training and evaluation of an epoch are timed apart. Time to target is the sum of training times until the first
  evaluation whose metric reaches the target, and exists only where the final metric reaches it too. Several GPUs under
  weak scaling are evaluated every so many epochs, as the record's `case.recipe.evaluate_every` says: until November
  27th 2026 after each one.
  In the open division, where many seeds are trained in one process, a seed's time is that of its training and its one
  evaluation together; images per second count its steps alone.
- Peak memory is that of torch's allocations in training, and what a captured step allocated while it was captured:
  its replays use that memory without allocating it.
- Raw block times are kept; medians, intervals and verdicts are derived later.
- Compute-only, on images that stay the same, starts anew in each epoch. While it went on, until November 27th 2026, in
  version 3, some runs became up to 8 % faster at a card's power cap (H200, cifar100-cnn): a network that has learned
  them by heart, or has collapsed, seems to take less power.
- Images per second counts images that were really trained on, once each, over the time of exactly those steps.
- Records whose `timing_version` differs are never compared. Version 1 counted evaluation and warm-up in peak memory, an
  evaluation in compile times, and the evaluations' share in the means of the GPU's state; version 2 left the loader's
  super-batches out of a captured run's peak memory and had blocks of up to an epoch.
"""

import os
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from statistics import median
from typing import Any, Literal

import torch

from . import parallel
from .gpu import Gpu

TIMING_VERSION = 3
BLOCKS_PER_EPOCH = 20  # enough for a spread within the epoch; one synchronisation in 20th of an epoch costs nothing
STRETCH_S = 0.05
STRETCHES = 3
STEADY_WITHIN = 0.05
WARM_UP_S = 10.0


def warm_up(step: Callable[[], torch.Tensor]) -> bool:
    """Runs `step`, which returns a tensor on its device, until it is steady; whether it is, by the timing contract."""
    steps = 1
    stretches: deque[float] = deque(maxlen=STRETCHES)
    elapsed = 0.0
    while elapsed < WARM_UP_S:
        stretch = stretch_s(step, steps)
        elapsed += stretch
        if stretch < STRETCH_S:
            steps *= 2
            stretches.clear()
            continue
        stretches.append(stretch)
        middle = median(stretches)
        if len(stretches) == STRETCHES and all(abs(one - middle) <= STEADY_WITHIN * middle for one in stretches):
            return True
    return False


def stretch_s(call: Callable[[], torch.Tensor], calls: int) -> float:
    """Seconds of so many calls, each of which returns a tensor on its device: those of the slowest rank."""
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    result.sum().item()  # waits for the device
    return parallel.slowest(time.perf_counter() - start)


def call_s(call: Callable[[], torch.Tensor]) -> float:
    """Seconds of one call, which returns a tensor on its device: the median of stretches of at least 50 ms each."""
    calls = 1
    while stretch_s(call, calls) < STRETCH_S:
        calls *= 2
    return median(stretch_s(call, calls) / calls for _ in range(STRETCHES))


class BlockClock:
    """Times one stretch of steps in blocks of `block_steps`, as the timing contract above says.

    After `stop`, `block_s` holds the seconds of each full block, `steps_s` those of all steps, `total_s` those until
    `stop`, more where the steps had an `end_steps`, and `wall_s` the same by the host's clock. `steps_at_once` steps
    come at a time, but for fewer at the end.
    """

    def __init__(self, device: torch.device, steps: int, steps_at_once: int = 1) -> None:
        self.block_steps = steps_at_once * max(1, steps // steps_at_once // BLOCKS_PER_EPOCH)
        self.block_s: list[float] = []
        self.steps_s = 0.0
        self.total_s = 0.0
        self.wall_s = 0.0
        self._cuda = device.type == "cuda"
        self._steps = 0
        self._start = 0.0
        self._marks: list[Any] = []  # of the start and the end of each block: CUDA events, or seconds
        self._ends: tuple[int, int] | None = None  # how many marks there were with the last whole block and last step

    def start(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self._start = time.perf_counter()
        self._mark()

    def step(self, steps: int = 1) -> bool:
        """Counts steps; True when they closed a block, and then the block before that one is done on the device."""
        self._steps += steps
        if self._steps % self.block_steps:
            return False
        self._mark()
        if self._cuda:
            self._marks[-2].synchronize()
        return True

    def end_steps(self) -> None:
        """The last step is behind, and what its loader did: what comes until `stop` is none, and in `total_s` alone."""
        whole = len(self._marks)
        self._mark()
        self._ends = whole, len(self._marks)

    def stop(self) -> None:
        if self._ends is None:
            self.end_steps()
        else:
            self._mark()
        assert self._ends is not None
        whole, steps = self._ends
        if self._cuda:
            self._marks[-1].synchronize()
        self.wall_s = time.perf_counter() - self._start
        laps = [self._seconds(one, two) for one, two in pairwise(self._marks)]
        self._marks = []  # a CUDA event holds memory
        self.block_s = laps[: whole - 1]
        self.steps_s = sum(laps[: steps - 1])
        self.total_s = sum(laps)

    def _mark(self) -> None:
        if self._cuda:
            # blocking: who waits for it leaves its core to the loader's threads
            event = torch.cuda.Event(enable_timing=True, blocking=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def _seconds(self, one: Any, two: Any) -> float:
        return one.elapsed_time(two) / 1e3 if self._cuda else two - one


class PeakMemory:
    """The peaks of memory in training and in evaluation, told apart, in MiB.

    `captured` is what graphs of training and of evaluation use for themselves, in bytes, which replays do not show.
    """

    def __init__(self, device: torch.device, captured: Mapping[str, int] | None = None) -> None:
        self._device = device
        self._captured = captured or {}
        self._peaks: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what warm-up left reserved is not this run's

    @contextmanager
    def during(self, what: Literal["train", "eval"]) -> Iterator[None]:
        """Adds what torch allocates and reserves while the block lasts to the peaks of `what`; nothing on a CPU."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        found = {
            "allocated": torch.cuda.max_memory_allocated(self._device) + self._captured.get(what, 0),
            "reserved": torch.cuda.max_memory_reserved(self._device),
        }
        for name, size in found.items():
            key = f"{what} {name}"
            self._peaks[key] = max(self._peaks.get(key, 0.0), mib(size))

    def summary(self) -> dict[str, float | None]:
        """The record's figures; those of torch are None on a CPU.

        `host_rss_peak_mib` is the process alone, since its start: a DataLoader's workers come on top of it.
        """
        return {
            "peak_allocated_mib": self._peaks.get("train allocated"),
            "peak_reserved_mib": self._peaks.get("train reserved"),
            "eval_peak_allocated_mib": self._peaks.get("eval allocated"),
            "host_rss_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1),
        }


def nvml_process_mib(device: torch.device) -> float | None:
    """What NVML counts for this process now, in MiB; None on a CPU and where NVML does not know it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with suppress(Exception), Gpu.open() as gpu:  # a driver may refuse to tell: that must not end the run
        return None if gpu is None else gpu.process_memory_mib(os.getpid())
    return None


class MemoryParts:
    """What of the GPU's memory is none of torch's: by NVML's count for this process, in MiB. None each on a CPU.

    A part is the difference of two moments, and so an estimate: whatever else took or gave memory meanwhile is in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._outside = 0.0
        self.parts: dict[str, float | None] = {}

    def take(self, name: str) -> None:
        """What came since the part before is `name`; None where NVML does not know this process."""
        self.parts[name] = None
        used = nvml_process_mib(self._device)
        if used is None:
            return
        outside = used - mib(torch.cuda.memory_reserved(self._device))
        self.parts[name] = round(outside - self._outside, 1)
        self._outside = outside


def mib(size: int) -> float:
    """Bytes as MiB, to one decimal."""
    return round(size / 2**20, 1)
