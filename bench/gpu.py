"""NVML: the GPU's name and state, read from outside the measured process, so that reading costs it nothing."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from types import TracebackType
from typing import Any

SAMPLE_S = 0.1  # between two readings


class Gpu:
    """One GPU as NVML sees it."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.name: str = nvml.nvmlDeviceGetName(handle)
        self.driver: str = nvml.nvmlSystemGetDriverVersion()

    @staticmethod
    @contextmanager
    def open() -> Iterator["Gpu | None"]:
        """The first GPU that CUDA_VISIBLE_DEVICES leaves visible; None where there is no driver or no GPU."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            yield None
            return
        try:
            yield Gpu._visible(pynvml)
        finally:
            pynvml.nvmlShutdown()

    @staticmethod
    def _visible(nvml: Any) -> "Gpu | None":
        """The GPU that CUDA would use: named by number, by UUID or the beginning of one, or as a MIG slice."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        try:
            if visible.isdigit():
                return Gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(int(visible)))
            if visible.startswith("MIG-"):
                return Gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(visible))
            if visible.startswith("GPU-"):
                handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
                found = (Gpu(nvml, handle) for handle in handles if nvml.nvmlDeviceGetUUID(handle).startswith(visible))
                return next(found, None)
        except nvml.NVMLError:  # there is no such GPU, which CUDA takes for none at all
            pass
        return None

    def process_memory_mib(self, pid: int) -> float | None:
        """What NVML counts for one process: CUDA context, torch, DALI and libraries together, in MiB."""
        for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
            if process.pid == pid and process.usedGpuMemory is not None:
                return process.usedGpuMemory / 2**20
        return None

    def other_processes(self, pid: int) -> int:
        """How many compute processes other than `pid` are on the card: beside them no speed can be trusted."""
        running = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        return sum(process.pid != pid for process in running)

    def reading(self) -> dict[str, float]:
        """Clocks in MHz, power in W, temperature in °C, utilisation in %; what this card does not tell is left out."""
        nvml, handle = self._nvml, self._handle
        readers = {
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "utilisation_pct": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        }
        values = {}
        for name, read in readers.items():
            try:
                values[name] = float(read())
            except nvml.NVMLError:
                continue
        return values


class Sampler:
    """Reads a process's memory and the card's state every 0.1 s while a `with` block lasts; idle without a GPU.

    `training` is set while the timed region lasts: clocks, power and the like are averaged over it alone.
    """

    def __init__(self, gpu: Gpu | None, pid: int) -> None:
        self._gpu, self._pid = gpu, pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._readings: list[dict[str, float]] = []
        self._failures = self._others = 0
        self.training = False
        self.process_peak_mib: float | None = None

    def __enter__(self) -> "Sampler":
        if self._gpu is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._gpu is not None:
            self._thread.join()

    def _run(self) -> None:
        assert self._gpu is not None
        while not self._stop.wait(SAMPLE_S):
            try:
                used = self._gpu.process_memory_mib(self._pid)
                if used is not None:
                    self.process_peak_mib = max(used, self.process_peak_mib or 0.0)
                if self.training:
                    self._others = max(self._others, self._gpu.other_processes(self._pid))
                    self._readings.append(self._gpu.reading())
            except Exception:  # one reading that fails must not end the others; the summary counts them
                self._failures += 1

    def summary(self) -> dict[str, Any] | None:
        """Means over the timed region, the highest temperature, the most other processes, and the number of readings.

        None where there was nothing to read.
        """
        failed = {"failed_readings": self._failures} if self._failures else {}
        if not self._readings:
            return failed or None
        names = sorted({name for reading in self._readings for name in reading})
        values = {name: [reading[name] for reading in self._readings if name in reading] for name in names}
        means = {f"{name}_mean": round(fmean(series), 1) for name, series in values.items()}
        hottest = {"temperature_c_max": max(values["temperature_c"])} if "temperature_c" in values else {}
        return means | hottest | {"other_processes": self._others, "readings": len(self._readings)} | failed
