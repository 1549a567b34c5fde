"""Which machine this is: the hardware that its slug names, and the versions of what runs on it. No torch in here."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from .gpu import Gpu

PACKAGES = {"torch": "torch", "torchvision": "torchvision", "triton": "triton", "numpy": "numpy"}
DALI_PACKAGES = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")


def describe() -> dict[str, Any]:
    """The record's `machine`: slug, GPU (None without one), CPU, cores, memory in GiB, operating system, versions.

    The slug holds the GPU's and the CPU's name and the number of cores: the loader's speed hangs on them too.
    """
    with Gpu.open() as gpu:
        gpu_name, driver = (gpu.name, gpu.driver) if gpu else (None, None)
    cpu = _cpu_name()
    cores = len(os.sched_getaffinity(0))
    return {
        "slug": f"{_slug(gpu_name or 'cpu')}-{_slug(cpu)}-{cores}c",
        "gpu": gpu_name,
        "cpu": cpu,
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "os": platform.system(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(package) for name, package in PACKAGES.items()},
            "dali": next(filter(None, map(_version, DALI_PACKAGES)), None),
            "driver": driver,
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.machine() or "unknown"


def _slug(name: str) -> str:
    """Lower-case letters, digits and single hyphens, without the words that say nothing."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    telling = [word for word in words if word not in {"r", "tm", "cpu", "processor", "with"}]
    return "-".join(telling or words) or "unknown"
