"""What this machine does at best, measured: the rates of large matrix products and of copies.

- Data are random, since a chip that multiplies zeros draws less power and clocks higher: 894 TFLOP/s on zeros, 788 on
  random data (bf16, 8,192 × 8,192, H200). Calls before the timed ones let clocks and heat settle.
- Calls are timed one by one, between CUDA events on a GPU and by the wall clock on a CPU; their median counts.
- A copy's source and target are together four times the last-level cache or more, unless memory is short.
"""

import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from .gpu import Gpu
from .step import DTYPES
from .tuning import precision_for

# Rows and columns of the matrices. A CPU's are smaller: some take half a second for a bf16 product of that size.
SIZES = {"cuda": 8192, "cpu": 1024}
SECONDS = {"cuda": 1.0, "cpu": 0.5}  # of timed calls for each rate
WARM_UP = 0.25  # of that time, before it
FEWEST_CALLS = 3
POLL_S = 0.05
SMALLEST_COPY = 1 << 30  # bytes
RANDOM_BLOCK = 64 << 20  # bytes, repeated: two cores take 3 s for 1 GiB of random numbers


def measure(device: torch.device) -> dict[str, Any]:
    """The ceilings of `device`, as `machine.json` holds them.

    measured_utc, torch     when, and by which version
    matmul_*_tflops         10¹² floating-point operations a second, two for each multiply-add, in the precision of the
                            `tuned` tuning and on a CPU in fp32 too
    matmul_sm_clock_mhz     median while the products ran; only where NVML tells it
    copy_gb_per_s           10⁹ bytes a second, read plus written
    copy_buffer_mib         size of what is copied
    """
    on_cpu = device.type == "cpu"
    precision = precision_for(None if on_cpu else torch.cuda.get_device_capability(device))
    clocks: list[float] = []
    size = SIZES[device.type]
    products = {
        f"matmul_{name}_tflops": round(2 * size**3 / time_product(size, name, device, clocks) / 1e12, 4)
        for name in ((precision, "fp32") if on_cpu else (precision,))
    }
    copied = copy_size(device)
    return {
        "measured_utc": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
        "torch": torch.__version__,
        **products,
        **({"matmul_sm_clock_mhz": median(clocks)} if clocks else {}),
        "copy_gb_per_s": round(2 * copied / time_copy(copied, device) / 1e9, 3),
        "copy_buffer_mib": copied >> 20,
    }


def time_product(size: int, precision: str, device: torch.device, clocks: list[float]) -> float:
    """The seconds of one product of two [size, size] matrices; adds the SM clocks meanwhile, in MHz, to `clocks`."""
    left, right, out = (torch.randn(size, size, dtype=DTYPES[precision], device=device) for _ in range(3))
    return settled(lambda: torch.mm(left, right, out=out), device, clocks)


def time_copy(size: int, device: torch.device) -> float:
    """The seconds of one copy of `size` bytes, a multiple of RANDOM_BLOCK or less than one."""
    block = torch.empty(min(RANDOM_BLOCK, size) // 8, dtype=torch.int64, device=device).random_()
    source = block.repeat(size // block.nbytes)
    target = torch.empty_like(source)
    return settled(lambda: target.copy_(source), device, [])


def copy_size(device: torch.device) -> int:
    """The bytes to copy: at least twice the last-level cache, in a quarter of the free memory at most."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    size = min(max(SMALLEST_COPY, 2 * last_level_cache(device)), free // 4)
    return size // RANDOM_BLOCK * RANDOM_BLOCK or size >> 20 << 20


def last_level_cache(device: torch.device) -> int:
    """Bytes of a GPU's L2, or of the last-level caches of the cores that this process may use; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    found = {}
    for core in os.sched_getaffinity(0):
        caches = Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*")
        try:
            last = max(caches, key=lambda cache: int((cache / "level").read_text()))
            found[(last / "shared_cpu_list").read_text()] = int((last / "size").read_text().strip().removesuffix("K"))
        except (OSError, ValueError):  # no such folder, or one of another form
            continue
    return sum(found.values()) << 10


def settled(call: Callable[[], object], device: torch.device, clocks: list[float]) -> float:
    """The median seconds of one call, after warm-up; adds the SM clocks that NVML tells meanwhile to `clocks`."""
    call()  # which may load libraries and touch memory for the first time
    calls = SECONDS[device.type] / median(times(call, FEWEST_CALLS, device))
    times(call, max(1, round(WARM_UP * calls)), device)
    return median(times(call, max(FEWEST_CALLS, round(calls)), device, clocks))


def times(
    call: Callable[[], object], count: int, device: torch.device, clocks: list[float] | None = None
) -> list[float]:
    """The seconds of each of `count` calls in a row; adds the SM clocks meanwhile to `clocks`, if given."""
    if device.type == "cpu":
        moments = [time.perf_counter()]
        for _ in range(count):
            call()
            moments.append(time.perf_counter())
        return [end - start for start, end in pairwise(moments)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:  # the host runs ahead of the device: no call waits for its launch
        call()
        event.record()
    if clocks is not None:
        clocks += clocks_until(events[-1].query)
    events[-1].synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def clocks_until(done: Callable[[], bool]) -> Iterator[float]:
    """The SM clock in MHz, every 0.05 s until `done`, where NVML tells it."""
    with Gpu.open() as gpu:
        while gpu is not None and not done():
            reading = gpu.reading()
            if "sm_clock_mhz" in reading:
                yield reading["sm_clock_mhz"]
            time.sleep(POLL_S)
