"""Whether this machine can run everything, check by check, and what it does at best.

Each check is a function that returns one `Finding`; `CHECKS` is their order. What could crash, hang or take CUDA down
runs in a process of its own (`bench/probes.py`), so that this one stays to tell of it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement

from .data import prepared
from .errors import UserError
from .gpu import Gpu
from .machine import DALI_PACKAGES, PACKAGES
from .record import save_ceilings

PROBES = (sys.executable, "-m", "netdyno.bench.probes")
PROBE_S = 300.0  # for one probe; the longest is a compilation, about 30 s on two busy cores
GPU_MEMORY_GIB = 5.0  # of one process at most: 4.1 GiB (dcgan, tuned, H200)
HOST_MEMORY_GIB = 4.0  # of one process at most: 3.0 GiB (resnet50-transfer, H200); a DataLoader's workers come on top
DISK_GIB = 2.0  # the image sets take less than 1 GiB, and a download lies beside what it becomes
SLOWDOWNS = (
    "HwSlowdown",
    "HwThermalSlowdown",
    "SwThermalSlowdown",
    "HwPowerBrakeSlowdown",
)  # nvmlClocksThrottleReason…

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found, and for all but `ok` what to do about it."""

    name: str  # of the check's function
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the checks look at."""

    machine: dict[str, Any]  # as machine.describe() returns it
    results: Path
    data: Path


Check = Callable[[Place], Finding]


class ProbeFailed(Exception):
    """A probe found that something does not work, in one line."""


def examine(check: Check, place: Place) -> Finding:
    """The finding of one check; an exception inside it is a failure like any other."""
    try:
        return check(place)
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, UserError):  # which says what to do
            advice = ""
        elif isinstance(error, ImportError):
            advice = "install what is missing: make setup, or pip install netdyno"
        else:
            advice = f"the check itself broke by {type(error).__name__}: report it"
        return Finding(name=check.__name__, state="fail", found=said, advice=advice)


# Software and devices


def versions(place: Place) -> Finding:
    """The packages that records name, against what Netdyno, torch and torchvision say they need of each other."""
    here = place.machine["versions"]
    installed = {package: here[name] for name, package in PACKAGES.items()} | dict.fromkeys(DALI_PACKAGES, here["dali"])
    problems = []
    for package in ("netdyno", "torch", "torchvision"):
        for need in map(Requirement, _requires(package)):
            if need.name not in installed or (need.marker and not need.marker.evaluate({"extra": ""})):
                continue
            version = installed[need.name]
            if version is None or not need.specifier.contains(version, prereleases=True):
                problems.append(f"{package} needs {need.name}{need.specifier}, here is {version or 'none'}")
    told = ", ".join(f"{name} {here[name]}" for name in ("python", *PACKAGES, "dali") if here[name])
    if problems:
        advice = "install the versions of constraints.txt (make setup does), or others that fit each other"
        return Finding(name="versions", state="fail", found="; ".join([*problems, told]), advice=advice)
    return Finding(name="versions", state="ok", found=told)


def gpu(place: Place) -> Finding:
    with Gpu.open() as card:
        if card is None:
            advice = "runs happen on the CPU; if there is a GPU, install its driver and make it visible"
            return Finding(name="gpu", state="warn", found=_why_no_gpu(), advice=advice)
        major, minor = _ask(card, "nvmlDeviceGetCudaComputeCapability") or ("?", "?")
        return Finding(name="gpu", state="ok", found=f"{card.name}, sm_{major}{minor}, driver {card.driver}")


def cuda(place: Place) -> Finding:
    """Whether torch can use the GPU: it must be built for CUDA, of no higher major version than the driver's."""
    import torch

    built = f"torch {torch.__version__}, built " + (
        f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    )
    with Gpu.open() as card:
        if card is None:
            return Finding(name="cuda", state="ok", found=f"{built}; no GPU to use it on")
        number = card._nvml.nvmlSystemGetCudaDriverVersion()
    found = f"{built}; the driver takes CUDA {number // 1000}.{number % 1000 // 10}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where it says no
        usable = torch.cuda.is_available()
    if usable:
        return Finding(name="cuda", state="ok", found=found)
    advice = "update the driver, or install a torch that is built for its CUDA version"
    return Finding(name="cuda", state="fail", found=f"{found}: torch cannot use the GPU", advice=advice)


def compiler(place: Place) -> Finding:
    """torch.compile calls a C++ compiler for a CPU, Triton a C compiler for a GPU; both include Python's headers."""
    on_gpu = place.machine["gpu"] is not None
    names = [os.environ["CC"]] if on_gpu and "CC" in os.environ else ["gcc", "clang"]
    if not on_gpu:
        names = [os.environ.get("CXX", "g++")]
    path = next(filter(None, map(shutil.which, names)), None)
    headers = Path(sysconfig.get_config_var("INCLUDEPY")) / "Python.h"
    missing = [] if path else [f"no {'C' if on_gpu else 'C++'} compiler ({' or '.join(names)})"]
    missing += [] if headers.is_file() else [f"no {headers}"]
    if missing:
        advice = "install a compiler and Python's headers (Debian and Ubuntu: apt install g++ python3-dev)"
        return Finding(name="compiler", state="fail", found=", ".join(missing), advice=advice)
    return Finding(name="compiler", state="ok", found=f"{path}, {headers}")


# What is tried out


def compiling(place: Place) -> Finding:
    return _tried("compiling", "the tuned and t4 tunings need torch.compile: look at compiler, cuda and versions above")


def dali(place: Place) -> Finding:
    return _tried("dali", "the tuned and t4 tunings need DALI: install nvidia-dali-cuda120, or nvidia-dali-cuda130")


def graphs(place: Place) -> Finding:
    if place.machine["gpu"] is None:
        return Finding(name="graphs", state="ok", found="no GPU whose work could be captured")
    return _tried("graphs", "end other work on the card and update the driver")


def _tried(name: str, advice: str) -> Finding:
    try:
        return Finding(name=name, state="ok", found=_probe(name))
    except ProbeFailed as error:
        return Finding(name=name, state="fail", found=str(error), advice=advice)


def _probe(name: str) -> str:
    """The last line that a probe prints, run with an empty compiler cache; ProbeFailed where it does not end well."""
    from .runner import child_environment, end  # it imports torch

    with (
        tempfile.TemporaryDirectory(prefix="netdyno-", ignore_cleanup_errors=True) as cache,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out,  # files: a compiler's worker that
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,  # stays would hold a pipe open
    ):
        child = subprocess.Popen(
            [*PROBES, name],
            stdout=out,
            stderr=errors,
            text=True,
            env=child_environment() | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache},
            start_new_session=True,  # so that its workers end with it
        )
        try:
            code = child.wait(PROBE_S)
        except subprocess.TimeoutExpired:
            raise ProbeFailed(f"no answer within {PROBE_S:.0f} s") from None
        finally:
            end(child)
        if code < 0:
            raise ProbeFailed(f"the process that tried it was ended by {signal.Signals(-code).name}")
        said = errors if code else out
        said.seek(0)
        lines = [line.strip() for line in said if line.strip()]
    if code or not lines:
        raise ProbeFailed(lines[-1] if lines else f"the process that tried it said nothing (exit code {code})")
    return lines[-1]


# State of the machine


def nvml(place: Place) -> Finding:
    """What records tell of the GPU's state, now."""
    with Gpu.open() as card:
        if card is None:
            return Finding(name="nvml", state="ok", found="no GPU to read")
        reading = card.reading()
        energy = _ask(card, "nvmlDeviceGetTotalEnergyConsumption")
        reasons = _ask(card, "nvmlDeviceGetCurrentClocksThrottleReasons")
        bits = {name: getattr(card._nvml, f"nvmlClocksThrottleReason{name}") for name in SLOWDOWNS}
    units = {"sm_clock_mhz": "MHz", "power_w": "W", "temperature_c": "°C"}
    told = [f"{reading[name]:,.0f} {unit}" for name, unit in units.items() if name in reading]
    told += ["energy counter"] if energy is not None else []
    missing = [name for name in units if name not in reading]
    missing += [name for name, value in (("energy", energy), ("throttle reasons", reasons)) if value is None]
    slowed = [name for name, bit in bits.items() if reasons is not None and reasons & bit]
    advice = []
    if missing:
        told.append(f"not told: {', '.join(missing)}")
        advice.append("records will lack what NVML does not tell; a newer driver, or a whole card, may tell it")
    if slowed:
        told.append(f"slowed down now: {', '.join(slowed)}")
        advice.append("cool the card, or give it the power it is meant to have")
    return Finding(name="nvml", state="warn" if advice else "ok", found=", ".join(told), advice="; ".join(advice))


def processes(place: Place) -> Finding:
    others = _others()
    if others is None:
        return Finding(name="processes", state="ok", found="no GPU, or one that tells of no processes")
    if others:
        advice = "end them: beside them no speed can be trusted"
        return Finding(name="processes", state="warn", found=f"{others} on the GPU", advice=advice)
    return Finding(name="processes", state="ok", found="none on the GPU")


def memory(place: Place) -> Finding:
    host = psutil.virtual_memory()
    sizes = [("host", host.available / 2**30, host.total / 2**30, HOST_MEMORY_GIB)]
    with Gpu.open() as card:
        if card is not None and (of_gpu := _ask(card, "nvmlDeviceGetMemoryInfo")) is not None:
            sizes.insert(0, ("GPU", of_gpu.free / 2**30, of_gpu.total / 2**30, GPU_MEMORY_GIB))
    found = ", ".join(f"{free:.1f} of {total:.1f} GiB free on the {name}" for name, free, total, _ in sizes)
    short = [f"{name} ({least:.0f} GiB)" for name, free, _, least in sizes if free < least]
    if short:
        advice = f"end other processes: the largest workloads take about as much on the {' and the '.join(short)}"
        return Finding(name="memory", state="warn", found=found, advice=advice)
    return Finding(name="memory", state="ok", found=found)


def data(place: Place) -> Finding:
    """Which image sets are there, as `netdyno data list` says it."""
    states: dict[str, str] = {}
    problems = []
    for name in prepared.FORMS:
        try:
            folder = prepared.locate(name, place.data)
            manifest = prepared.read_manifest(folder, name) if folder else None
        except UserError as error:
            problems.append(str(error))
            states[name] = "damaged"
        else:
            states[name] = "missing" if manifest is None else "synthetic" if manifest.get("synthetic") else "real"
    found = ", ".join(f"{name} {state}" for name, state in states.items())
    if problems:
        return Finding(name="data", state="fail", found=found, advice="; ".join(problems))
    if set(states.values()) != {"real"}:
        advice = "runs draw stand-ins for what is missing; netdyno data fetch gets the real sets"
        return Finding(name="data", state="warn", found=found, advice=advice)
    return Finding(name="data", state="ok", found=found)


def disk(place: Place) -> Finding:
    """Free space where image sets, records and compiled code go. Image sets may lie where nothing can be written."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folders = {"data": place.data, "results": place.results, "cache": cache}
    there = {name: _nearest(folder.absolute()) for name, folder in folders.items()}
    free = {name: shutil.disk_usage(folder).free / 2**30 for name, folder in there.items()}
    found = ", ".join(f"{free[name]:.1f} GiB free for {name}" for name in folders)
    closed = [name for name in ("results", "cache") if not os.access(there[name], os.W_OK)]
    if closed:
        found = f"{' and '.join(str(folders[name]) for name in closed)} cannot be written; {found}"
        advice = "choose another folder: --results for records, XDG_CACHE_HOME for the cache"
        return Finding(name="disk", state="fail", found=found, advice=advice)
    short = [str(folders[name]) for name in folders if free[name] < DISK_GIB]
    if short:
        advice = f"make room: runs may need {DISK_GIB:.0f} GiB in {', '.join(short)}"
        return Finding(name="disk", state="warn", found=found, advice=advice)
    return Finding(name="disk", state="ok", found=found)


def ceilings(place: Place) -> Finding:
    """Measures the machine's ceilings and keeps them in its machine.json, in place of earlier ones."""
    others = _others()
    try:
        measured = json.loads(_probe("ceilings"))
    except ProbeFailed as error:
        return Finding(name="ceilings", state="fail", found=str(error), advice="mend what failed above first")
    if others is not None:
        measured["other_processes"] = others
    path = save_ceilings(measured, place.machine, place.results)
    rates = [
        f"{precision} matrix products {measured[f'matmul_{precision}_tflops']:,.2f} TFLOP/s"
        for precision in ("bf16", "fp16", "fp32")
        if f"matmul_{precision}_tflops" in measured
    ]
    found = f"{', '.join(rates)}, copies {measured['copy_gb_per_s']:,.1f} GB/s; kept in {path}"
    if others:
        advice = "end the other processes on the GPU and run netdyno doctor again"
        return Finding(name="ceilings", state="warn", found=found, advice=advice)
    return Finding(name="ceilings", state="ok", found=found)


CHECKS: tuple[Check, ...] = (
    versions,
    gpu,
    cuda,
    compiler,
    compiling,
    dali,
    graphs,
    nvml,
    processes,
    memory,
    data,
    disk,
    ceilings,
)


def _requires(package: str) -> list[str]:
    try:
        return requires(package) or []
    except PackageNotFoundError:  # Netdyno may run from a bare checkout; `cuda` tells that there is no torch
        return []


def _why_no_gpu() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pynvml
    try:
        pynvml.nvmlInit()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return f"no GPU: {error}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "no GPU" if visible is None else f"no GPU that CUDA_VISIBLE_DEVICES={visible} leaves visible"


def _ask(card: Gpu, question: str) -> Any:
    """What NVML answers about a card to a question that runs do not ask; None where it does not tell."""
    try:
        return getattr(card._nvml, question)(card._handle)
    except card._nvml.NVMLError:
        return None


def _others() -> int | None:
    """The compute processes on the GPU, none of which is ours; None without a GPU, or where NVML does not tell."""
    with Gpu.open() as card:
        running = None if card is None else _ask(card, "nvmlDeviceGetComputeRunningProcesses")
    return None if running is None else len(running)


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
