"""NVML: the GPU's name and state, while it is timed read from outside the measured process, at no cost to it.

The timed region is many *stretches*, one an epoch, mostly parted by evaluations. A stretch may be shorter than the
distance of two readings, and what NVML answers may be 0.1 s old, from before the stretch began. So its energy is told
in two ways, each only where it holds:

- From the card's counter: the sum of its differences over the stretches. At each pause between two of them the energy
  of up to 0.1 s, or of the pause where that is shorter, may be put on the wrong side. Where such seconds would make
  more than a tenth of the timed ones, as with evaluations between epochs of less than a second, it is left aside.
- From sampled power: the mean of its readings × the timed seconds. Readings come at equal distances, so that this is
  the trapezoid rule with its ends held, and not every stretch needs one. The first of each stretch is left out, as it
  may tell of the pause before, and ten must remain: of epochs shorter than 0.1 s between evaluations nothing does.
"""

import hashlib
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from statistics import fmean
from types import TracebackType
from typing import Any, NamedTuple

SAMPLE_S = 0.1  # between two readings: no shorter than what they tell is old
COUNTER_AGE_S = 0.1  # the energy counter is renewed about every 100 ms, by some cards more often (ml.energy/zeus)
MISPLACED = 0.1  # of the timed seconds: the most whose energy the counter may put on the wrong side of a border
FEWEST_READINGS = 10  # of power, for an energy
IDLE = "idle"
# Bits of NVML's answer why the clocks are not higher. What its user has set, application and display clocks, throttles
# nothing.
REASONS = {
    IDLE: 0x001,
    "sw_power_cap": 0x004,
    "hw_slowdown": 0x008,
    "sync_boost": 0x010,
    "sw_thermal_slowdown": 0x020,
    "hw_thermal_slowdown": 0x040,
    "hw_power_brake": 0x080,
    "board_limit": 0x200,
    "reliability": 0x400,
}


class Gpu:
    """One GPU as NVML sees it."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.name: str = nvml.nvmlDeviceGetName(handle)
        self.driver: str = nvml.nvmlSystemGetDriverVersion()
        # Which card it is, for records to compare: the UUID itself is nobody's business. None where it does not tell.
        self.fingerprint: str | None = None
        self.uuid = ""
        with suppress(nvml.NVMLError):
            self.uuid = nvml.nvmlDeviceGetUUID(handle)
            self.fingerprint = hashlib.sha256(self.uuid.encode()).hexdigest()[:12]

    @staticmethod
    @contextmanager
    def open(card: str | None = None) -> Iterator["Gpu | None"]:
        """The GPU that `card` names; without one the first that CUDA_VISIBLE_DEVICES leaves visible.

        None where there is no driver or no such GPU.
        """
        with _nvml() as nvml:
            visible = card or os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
            yield nvml and Gpu._named(nvml, visible)

    @staticmethod
    def cards() -> dict[str, str]:
        """The name of each GPU that CUDA_VISIBLE_DEVICES leaves visible, by its UUID, in that order; {} without any.

        By UUID, since CUDA and NVML may count the cards of a machine in different orders.
        """
        found: dict[str, str] = {}
        with _nvml() as nvml:
            if nvml is None:
                return found
            every = ",".join(map(str, range(nvml.nvmlDeviceGetCount())))
            for visible in os.environ.get("CUDA_VISIBLE_DEVICES", every).split(","):
                gpu = Gpu._named(nvml, visible.strip())
                if gpu is None:  # for CUDA the list ends here
                    break
                found[nvml.nvmlDeviceGetUUID(gpu._handle)] = gpu.name
        return found

    @staticmethod
    def _named(nvml: Any, visible: str) -> "Gpu | None":
        """The GPU that CUDA would use: named by number, by UUID or the beginning of one, or as a MIG slice."""
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

    def reaches(self, uuid: str) -> bool:
        """Whether this GPU's kernels may read, write and atomically change another one's memory, on this machine."""
        nvml = self._nvml
        try:
            other = nvml.nvmlDeviceGetHandleByUUID(uuid)
            status = nvml.nvmlDeviceGetP2PStatus(self._handle, other, nvml.NVML_P2P_CAPS_INDEX_ATOMICS)
        except nvml.NVMLError:
            return False
        return status == nvml.NVML_P2P_STATUS_OK

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
            "mem_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_w": self._power_w,
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

    def _power_w(self) -> float:
        """The power now. `nvmlDeviceGetPowerUsage` is that too up to Turing and GA100, later the mean of a second."""
        nvml = self._nvml
        with suppress(nvml.NVMLError):
            (field,) = nvml.nvmlDeviceGetFieldValues(self._handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
            if field.nvmlReturn == nvml.NVML_SUCCESS:
                return field.value.uiVal / 1e3
        return nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3

    def reasons(self) -> frozenset[str] | None:
        """Why the clocks are not higher, by the names in `REASONS`; None where the card does not tell."""
        for call in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            try:
                mask = getattr(self._nvml, call)(self._handle)
            except (AttributeError, self._nvml.NVMLError):  # older drivers know the second name alone
                continue
            return frozenset(name for name, bit in REASONS.items() if mask & bit)
        return None

    def energy_j(self) -> float | None:
        """What the card has used since its driver was loaded; None where it does not count that (before Volta)."""
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
        except self._nvml.NVMLError:
            return None


@contextmanager
def _nvml() -> Iterator[Any]:
    """NVML while the block lasts; None where there is no driver."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pynvml
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


class Border(NamedTuple):
    """Where a stretch of the timed region begins or ends."""

    moment_s: float
    energy_j: float | None  # the card's counter


class Reading(NamedTuple):
    """The card's state at one moment of the timed region."""

    stretch: int
    values: dict[str, float]
    reasons: frozenset[str] | None


class Sampler:
    """Reads a process's memory and the card's state every 0.1 s while a `with` block lasts; idle without a GPU.

    `mark` tells it where the timed region lies: clocks, power and the like are taken from that alone.
    """

    def __init__(self, gpu: Gpu | None, pid: int) -> None:
        self._gpu, self.pid = gpu, pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._borders: list[Border] = []  # a begin, its end, the next begin, …
        self._readings: list[Reading] = []
        self._failures = 0
        self._others: int | None = None  # since the first stretch began
        self.process_peak_mib: float | None = None

    def __enter__(self) -> "Sampler":
        if self._gpu is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._gpu is not None:
            self._thread.join()

    def begin(self, pid: int) -> None:
        """From now on it is another process, and what was read of the one before does not count."""
        self._borders.clear()
        self._readings.clear()
        self._others = None
        self.pid = pid
        self.process_peak_mib = None

    def mark(self, timed: bool) -> None:
        """A stretch of the timed region begins, or ends, now. One that never ends has readings, but no energy."""
        if self._gpu is not None and timed != (len(self._borders) % 2 == 1):
            self._borders.append(Border(time.monotonic(), self._gpu.energy_j()))

    def _run(self) -> None:
        assert self._gpu is not None
        while not self._stop.wait(SAMPLE_S):
            try:
                used = self._gpu.process_memory_mib(self.pid)
                if used is not None:
                    self.process_peak_mib = max(used, self.process_peak_mib or 0.0)
                stretch = len(self._borders)
                if stretch:  # between stretches too: the shortest may pass without a reading
                    self._others = max(self._others or 0, self._gpu.other_processes(self.pid))
                if stretch % 2 == 0:
                    continue
                reading = Reading(stretch, self._gpu.reading(), self._gpu.reasons())
                if stretch == len(self._borders):  # else the stretch ended while it was read
                    self._readings.append(reading)
            except Exception:  # one reading that fails must not end the others; the summary counts them
                self._failures += 1

    def summary(self) -> dict[str, Any] | None:
        """The record's `gpu`, as bench/record.py lists it; what the card does not tell is left out.

        None where there was nothing to read.
        """
        failed = {"failed_readings": self._failures} if self._failures else {}
        others = {} if self._others is None else {"other_processes": self._others, "readings": len(self._readings)}
        if not self._readings:
            return others | failed or None
        names = sorted({name for reading in self._readings for name in reading.values})
        values = {name: _series(self._readings, name) for name in names}
        found: dict[str, Any] = {f"{name}_mean": round(fmean(series), 1) for name, series in values.items()}
        if "temperature_c" in values:
            found["temperature_c_max"] = max(values["temperature_c"])
        if clocks := busy_clocks_mhz(self._readings):
            found |= {"sm_clock_mhz_min": min(clocks), "sm_clock_mhz_max": max(clocks)}
        told = [reading.reasons for reading in self._readings if reading.reasons is not None]
        if told:
            shares = {name: sum(name in reasons for reasons in told) / len(told) for name in REASONS if name != IDLE}
            found["throttle_share"] = {name: round(share, 3) for name, share in shares.items() if share}
        found |= energies(self._borders, _series(settled(self._readings), "power_w"))
        return found | others | failed


OF_ALL = ("energy_j", "energy_sampled_j", "energy_source", "power_w_mean")  # of several cards: where each one tells it
LEAST = ("sm_clock_mhz_min", "readings")
MOST = ("sm_clock_mhz_max", "temperature_c_max", "other_processes", "failed_readings")


def together(cards: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """One `gpu` for a record of several cards: energy and power of all, extremes of any, and means of the rest.

    The cards' own summaries stand in `cards`.
    """
    told = [card for card in cards if card]
    if len(cards) == 1 or not told:
        return cards[0]
    found: dict[str, Any] = {"cards": told}
    for name in dict.fromkeys(name for card in told for name in card):
        values = [card[name] for card in told if name in card]
        if name in OF_ALL and len(values) < len(cards):
            continue
        if name == "throttle_share":
            reasons = dict.fromkeys(reason for shares in values for reason in shares)
            found[name] = {reason: max(shares.get(reason, 0.0) for shares in values) for reason in reasons}
        elif name == "energy_source":
            found[name] = "counter" if {*values} == {"counter"} else "sampled"
        elif name in LEAST + MOST:
            found[name] = min(values) if name in LEAST else max(values)
        else:
            found[name] = round(sum(values) if name in OF_ALL else fmean(values), 1)
    return found


def _series(readings: Sequence[Reading], name: str) -> list[float]:
    return [reading.values[name] for reading in readings if name in reading.values]


def settled(readings: Sequence[Reading]) -> list[Reading]:
    """All but the first of each stretch: they were taken 0.1 s or more after it began."""
    return [after for before, after in pairwise(readings) if before.stretch == after.stretch]


def busy_clocks_mhz(readings: Sequence[Reading]) -> list[float]:
    """SM clocks where this reading and the one before, in the same stretch, found the card busy.

    A card that idles, between short epochs or waiting for its loader, lowers its clock and needs a moment to raise it
    again: that is no drift.
    """
    busy = [reading if IDLE not in (reading.reasons or ()) else None for reading in readings]
    pairs = [(before, after) for before, after in pairwise(busy) if before and after]
    return _series([after for before, after in pairs if before.stretch == after.stretch], "sm_clock_mhz")


def energies(borders: Sequence[Border], power_w: Sequence[float]) -> dict[str, Any]:
    """`energy_j`, `energy_source` and `energy_sampled_j` of the timed region; without the ones that nothing tells."""
    timed_s = sum(end.moment_s - begin.moment_s for begin, end in _stretches(borders))
    counted = counted_energy_j(borders)
    sampled = fmean(power_w) * timed_s if timed_s and len(power_w) >= FEWEST_READINGS else None
    found: dict[str, Any] = {}
    if counted is not None:
        found = {"energy_j": round(counted, 1), "energy_source": "counter"}
    elif sampled is not None:
        found = {"energy_j": round(sampled, 1), "energy_source": "sampled"}
    return found if sampled is None else found | {"energy_sampled_j": round(sampled, 1)}


def counted_energy_j(borders: Sequence[Border]) -> float | None:
    """The energy of all stretches by the card's counter, in J; None where it cannot tell, as said above.

    Nor can it where a border has no reading, where it stands still, or where it fell within a stretch: it was reset.
    """
    stretches = _stretches(borders)
    timed_s = sum(end.moment_s - begin.moment_s for begin, end in stretches)
    pauses_s = [begin.moment_s - end.moment_s for (_, end), (begin, _) in pairwise(stretches)]
    misplaced_s = 2 * COUNTER_AGE_S + sum(min(pause, COUNTER_AGE_S) for pause in pauses_s)
    if misplaced_s > MISPLACED * timed_s:
        return None
    total = 0.0
    for begin, end in stretches:
        if begin.energy_j is None or end.energy_j is None or end.energy_j < begin.energy_j:
            return None
        total += end.energy_j - begin.energy_j
    return total or None


def _stretches(borders: Sequence[Border]) -> list[tuple[Border, Border]]:
    """Each begin with its end."""
    return list(zip(borders[::2], borders[1::2], strict=False))
