"""Work of a known length, to be planted into a step: python tests/spin.py SECONDS says how many units take so long.

A unit is a nanosecond of spinning on a GPU, by its own clock of the real time, whatever its cores run at; on a CPU it
is a matrix product.
"""

import sys
import time
from statistics import median

import torch
import triton
from triton.language.extra.cuda import globaltimer

KERNELS = 200  # of a graph that calibrates
PRODUCTS = 2000


@triton.jit
def spin_kernel(nanoseconds):
    """One program that reads the clock until the time is over."""
    now = globaltimer()
    end = now + nanoseconds
    while now < end:
        now = globaltimer()


def spin(units: int, device: torch.device) -> None:
    if device.type == "cuda":
        spin_kernel[(1,)](units, num_warps=1)
        return
    for _ in range(units):
        torch.mm(torch.ones(256, 256), torch.ones(256, 256))


def units_for(seconds: float) -> int:
    """On a GPU less than the time itself, by what one kernel more in a graph costs however short it is."""
    if torch.cuda.is_available():
        units = round(1e9 * seconds)
        own_s = in_a_graph(units) - in_a_graph(None) - 1e-9 * units
        return round(1e9 * (seconds - own_s))
    times = []
    for _ in range(PRODUCTS):
        start = time.perf_counter()
        spin(1, torch.device("cpu"))
        times.append(time.perf_counter() - start)
    return max(1, round(seconds / median(times)))


def in_a_graph(units: int | None) -> float:
    """Seconds that each of many small kernels takes in a CUDA graph, with a spin of `units` before each, or without."""
    device = torch.device("cuda")
    small = torch.zeros(1, device=device)
    spin(units or 1, device)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(KERNELS):
            if units is not None:
                spin(units, device)
            small.add_(1)
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / KERNELS)
    return median(times)


if __name__ == "__main__":
    print(units_for(float(sys.argv[1])))
