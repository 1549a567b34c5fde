"""NVML by a stand-in: two whole cards and a slice of one. What it answers is set on the instance."""

import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from netdyno.bench import gpu
from netdyno.bench.gpu import Gpu, Sampler

UUIDS = ["GPU-aaaa1111-0000", "GPU-bbbb2222-0000"]
SLICE = "MIG-cccc3333-0000"


class NVMLError(Exception):
    pass


class FakeNvml:
    """The calls that bench/gpu.py makes; a handle is the card's name."""

    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    NVMLError = NVMLError

    def __init__(self) -> None:
        self.opened = 0
        self.processes: Callable[[], list[Any]] = lambda: []
        self.power: Callable[[], int] = lambda: 300_000
        self.temperature = 50

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetCount(self) -> int:
        return len(UUIDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index >= len(UUIDS):
            raise NVMLError("Invalid Argument")
        return f"card {index}"

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return UUIDS[int(handle[-1])]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != SLICE:
            raise NVMLError("Not Found")
        return "slice"

    def nvmlDeviceGetName(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return self.processes()

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return 1_980

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self.power()

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        self.temperature += 1
        return self.temperature

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        raise NVMLError("Not Supported")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(gpu, "SAMPLE_S", 0.002)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, "card 0"),
        ("0", "card 0"),
        ("1", "card 1"),
        (" 1,0", "card 1"),
        (UUIDS[1], "card 1"),
        ("GPU-bb", "card 1"),  # CUDA takes the beginning of a UUID
        (f"{UUIDS[1]},{UUIDS[0]}", "card 1"),
        (SLICE, "slice"),
        ("", None),
        ("-1", None),
        ("NoDevFiles", None),
        ("7", None),
        ("GPU-dddd", None),
        ("MIG-dddd", None),
    ],
)
def test_the_first_visible_gpu(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, found: str | None
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with Gpu.open() as opened:
        assert (opened.name if opened else None) == found
        assert opened is None or opened.driver == "580.1"
        assert nvml.opened == 1
    assert nvml.opened == 0


def test_without_a_driver_there_is_none(nvml: FakeNvml) -> None:
    def refuse() -> None:
        raise NVMLError("Driver Not Loaded")

    nvml.nvmlInit = refuse  # type: ignore[method-assign]
    with Gpu.open() as opened:
        assert opened is None
    assert nvml.opened == 0


def test_an_error_of_the_body_is_not_swallowed(nvml: FakeNvml) -> None:
    def body() -> None:
        with Gpu.open():
            raise NVMLError("of the body")

    with pytest.raises(NVMLError, match="of the body"):
        body()
    assert nvml.opened == 0


def test_process_memory(nvml: FakeNvml) -> None:
    nvml.processes = lambda: [
        SimpleNamespace(pid=7, usedGpuMemory=512 * 2**20),
        SimpleNamespace(pid=8, usedGpuMemory=None),
    ]
    with Gpu.open() as opened:
        assert opened is not None
        assert opened.process_memory_mib(7) == 512.0
        assert opened.process_memory_mib(8) is None  # NVML knows the process, but not its memory
        assert opened.process_memory_mib(9) is None
        assert [opened.other_processes(pid) for pid in (7, 8, 9)] == [1, 1, 2]


def test_a_reading_leaves_out_what_the_card_does_not_tell(nvml: FakeNvml) -> None:
    with Gpu.open() as opened:
        assert opened is not None
        assert opened.reading() == {"sm_clock_mhz": 1980.0, "power_w": 300.0, "temperature_c": 51.0}


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_the_sampler_keeps_the_peak_and_the_means_of_training(nvml: FakeNvml) -> None:
    used = [100, 300, 200]
    nvml.processes = lambda: [
        SimpleNamespace(pid=7, usedGpuMemory=(used.pop(0) if used else 150) * 2**20),
        SimpleNamespace(pid=8, usedGpuMemory=10**12),
    ]
    powers = [100_000, 200_000, 300_000]

    def power() -> int:
        if len(powers) == 1:
            sampler.training = False
        return powers.pop(0)

    nvml.power = power
    threads = threading.active_count()
    with Gpu.open() as opened, Sampler(opened, 7) as sampler:
        wait_until(lambda: not used)
        assert sampler.summary() is None  # nothing is averaged outside training
        sampler.training = True
        wait_until(lambda: not powers)
    assert threading.active_count() == threads
    assert sampler.process_peak_mib == 300.0
    assert sampler.summary() == {
        "sm_clock_mhz_mean": 1980.0,
        "power_w_mean": 200.0,
        "temperature_c_mean": 52.0,
        "temperature_c_max": 53.0,
        "other_processes": 1,
        "readings": 3,
    }


def test_a_reading_that_fails_does_not_end_sampling(nvml: FakeNvml) -> None:
    answers: list[Any] = [NVMLError("Unknown Error"), RuntimeError("another"), 100, 200]

    def processes() -> list[Any]:
        answer = answers.pop(0) if answers else 50
        if isinstance(answer, Exception):
            raise answer
        return [SimpleNamespace(pid=7, usedGpuMemory=answer * 2**20)]

    nvml.processes = processes
    with Gpu.open() as opened, Sampler(opened, 7) as sampler:
        wait_until(lambda: sampler.process_peak_mib == 200.0)
    assert sampler.summary() == {"failed_readings": 2}


def test_the_sampler_ends_with_an_error_of_the_body(nvml: FakeNvml) -> None:
    threads = threading.active_count()

    def body() -> None:
        with Gpu.open() as opened, Sampler(opened, 7):
            assert threading.active_count() == threads + 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()
    assert threading.active_count() == threads


def test_without_a_gpu_the_sampler_idles() -> None:
    threads = threading.active_count()
    with Sampler(None, 7) as sampler:
        sampler.training = True
        assert threading.active_count() == threads
    assert sampler.process_peak_mib is None
    assert sampler.summary() is None
