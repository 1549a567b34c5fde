"""What all benchmarks share: the GPU's clock, the rate that a benchmark reports, and the machine in its report.

pytest tests/benchmarks --benchmark-only --benchmark-json=report.json && netdyno import-benchmarks report.json
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from netdyno.bench import machine
from netdyno.bench.record import code_hash


class GpuClock:
    """Seconds by CUDA events; what was launched before is done when it returns."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last: Any = None

    def __call__(self) -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        if self._last is not None:
            self._seconds += self._last.elapsed_time(now) / 1e3
        self._last = now
        return self._seconds


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["netdyno"] = {"machine": machine.describe(), "code": code_hash()}


@pytest.fixture
def rate(benchmark: BenchmarkFixture) -> Callable[..., None]:
    """Times a function that works on so many images; reports images/s and, where one is given, its share of a limit.

    Each round is one call; on a GPU it is timed by the GPU's clock.
    """

    def rate(run: Callable[[], object], images: int, *, on_gpu: bool, limit_images_per_s: float | None = None) -> None:
        benchmark._timer = GpuClock() if on_gpu else time.perf_counter
        benchmark.pedantic(run, rounds=20 if on_gpu else 5, warmup_rounds=3 if on_gpu else 1)
        if benchmark.stats:  # none under --benchmark-disable
            images_per_s = images / benchmark.stats.stats.median
            benchmark.extra_info |= {
                "images_per_s": images_per_s,
                "images": images,
                "device": "gpu" if on_gpu else "cpu",
            }
            if limit_images_per_s is not None:
                benchmark.extra_info["share_of_limit"] = images_per_s / limit_images_per_s

    return rate


@pytest.fixture(scope="session")
def copy_bytes_per_s() -> float:
    """What a large copy on the GPU moves, read and written."""
    source, target = torch.empty(2, 1 << 28, dtype=torch.uint8, device="cuda")
    target.copy_(source)
    clock = GpuClock()
    begin = clock()
    for _ in range(10):
        target.copy_(source)
    return 10 * 2 * source.numel() / (clock() - begin)
