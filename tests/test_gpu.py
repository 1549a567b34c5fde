"""NVML by a stand-in: two whole cards and a slice of one. What it answers is set on the instance."""

import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from made_up_records import seen

from netdyno.bench import gpu
from netdyno.bench.gpu import (
    Border,
    Gpu,
    Reading,
    Sampler,
    busy_clocks_mhz,
    counted_energy_j,
    energies,
    settled,
    together,
)

UUIDS = ["GPU-aaaa1111-0000", "GPU-bbbb2222-0000"]
FIRST, SECOND = "a05a365ba1d3", "3fac51b9addb"  # how their SHA-256 begin
SLICE = "MIG-cccc3333-0000"


class NVMLError(Exception):
    pass


def not_supported() -> Any:
    raise NVMLError("Not Supported")


class FakeNvml:
    """The calls that bench/gpu.py makes; a handle is the card's name."""

    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_P2P_CAPS_INDEX_ATOMICS = 3
    NVML_P2P_STATUS_OK = 0
    NVML_SUCCESS = 0
    NVML_TEMPERATURE_GPU = 0
    NVMLError = NVMLError

    def __init__(self) -> None:
        self.opened = 0
        self.processes: Callable[[], list[Any]] = lambda: []
        self.power: Callable[[], int] = lambda: 300_000
        self.power_now: Callable[[], Any] = lambda: SimpleNamespace(nvmlReturn=3)  # not supported
        self.reasons: Callable[[], int] = lambda: 0
        self.energy: Callable[[], int] = not_supported
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
        return SLICE if handle == "slice" else UUIDS[int(handle[-1])]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != SLICE and uuid not in UUIDS:
            raise NVMLError("Not Found")
        return "slice" if uuid == SLICE else f"card {UUIDS.index(uuid)}"

    def nvmlDeviceGetP2PStatus(self, handle: str, other: str, caps: int) -> int:
        assert caps == self.NVML_P2P_CAPS_INDEX_ATOMICS
        return 0 if {handle, other} == {"card 0", "card 1"} else 5

    def nvmlDeviceGetName(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return self.processes()

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return {self.NVML_CLOCK_SM: 1_980, self.NVML_CLOCK_MEM: 3_201}[clock]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self.power()

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[Any]:
        assert fields == [self.NVML_FI_DEV_POWER_INSTANT]
        return [self.power_now()]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.reasons()

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self.energy()

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


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, {UUIDS[0]: "card 0", UUIDS[1]: "card 1"}),
        ("1", {UUIDS[1]: "card 1"}),
        ("1, 0", {UUIDS[1]: "card 1", UUIDS[0]: "card 0"}),
        (f"{SLICE},GPU-aa", {SLICE: "slice", UUIDS[0]: "card 0"}),
        ("1,7,0", {UUIDS[1]: "card 1"}),  # CUDA reads no further than what is not there
        ("", {}),
        ("-1", {}),
    ],
)
def test_every_visible_gpu(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, found: dict[str, str]
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [*Gpu.cards().items()] == [*found.items()]
    assert nvml.opened == 0
    for card, name in found.items():
        with Gpu.open(card) as opened:  # whatever else is visible
            assert opened is not None
            assert opened.name == name


def test_a_card_is_known_by_its_fingerprint(nvml: FakeNvml) -> None:
    """The same in every process; and a card that does not tell its UUID is one all the same."""
    with Gpu.open("0") as first, Gpu.open("1") as second:
        assert first is not None
        assert second is not None
        assert (first.fingerprint, second.fingerprint) == (FIRST, SECOND)
    nvml.nvmlDeviceGetUUID = lambda handle: not_supported()  # type: ignore[method-assign]
    with Gpu.open() as silent:
        assert silent is not None
        assert silent.fingerprint is None


def test_which_cards_reach_each_other(nvml: FakeNvml) -> None:
    with Gpu.open("0") as card:
        assert card is not None
        assert [card.reaches(uuid) for uuid in (*UUIDS, "GPU-of another host")] == [False, True, False]


def test_without_a_driver_there_are_no_cards(nvml: FakeNvml) -> None:
    nvml.nvmlInit = not_supported  # type: ignore[method-assign]
    assert Gpu.cards() == {}


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
        assert opened.reading() == {
            "sm_clock_mhz": 1980.0,
            "mem_clock_mhz": 3201.0,
            "power_w": 300.0,
            "temperature_c": 51.0,
        }
        assert opened.energy_j() is None
        nvml.energy, nvml.power = lambda: 12_345, not_supported
        assert opened.energy_j() == 12.345
        assert "power_w" not in opened.reading()


def test_power_is_that_of_the_moment_where_the_card_tells_it(nvml: FakeNvml) -> None:
    with Gpu.open() as opened:
        assert opened is not None
        nvml.power_now = lambda: SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=123_456))
        assert opened.reading()["power_w"] == 123.456
        nvml.power_now = not_supported  # a driver without fields
        assert opened.reading()["power_w"] == 300.0


def test_reasons_have_names_by_the_newer_call_or_the_older_one(nvml: FakeNvml) -> None:
    with Gpu.open() as opened:
        assert opened is not None
        assert opened.reasons() == frozenset()
        nvml.reasons = lambda: 0x1 | 0x2 | 0x4 | 0x40 | 0x100 | 0x1000  # two of them set by users, one not yet known
        assert opened.reasons() == {"idle", "sw_power_cap", "hw_thermal_slowdown"}
        nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0x8 | 0x80  # type: ignore[attr-defined]
        assert opened.reasons() == {"hw_slowdown", "hw_power_brake"}
        nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: not_supported()  # type: ignore[attr-defined]
        assert opened.reasons() == {"idle", "sw_power_cap", "hw_thermal_slowdown"}
        nvml.reasons = not_supported
        assert opened.reasons() is None


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
    powers = [100_000, 200_000, 300_000, 900_000]

    def power() -> int:
        if len(powers) == 1:
            sampler.mark(False)  # before the last was read to its end: it does not count
        return powers.pop(0)

    nvml.power = power
    reasons = [0x1, 0x4, 0x4 | 0x20]
    nvml.reasons = lambda: reasons.pop(0) if reasons else 0x10
    threads = threading.active_count()
    with Gpu.open() as opened, Sampler(opened, 7) as sampler:
        wait_until(lambda: not used)
        assert sampler.summary() is None  # nothing is averaged outside training
        sampler.mark(True)
        sampler.mark(True)  # it has begun already
        wait_until(lambda: not powers)
    assert threading.active_count() == threads
    assert sampler.process_peak_mib == 300.0
    assert sampler.summary() == {
        "sm_clock_mhz_mean": 1980.0,
        "sm_clock_mhz_min": 1980.0,
        "sm_clock_mhz_max": 1980.0,
        "mem_clock_mhz_mean": 3201.0,
        "power_w_mean": 200.0,
        "temperature_c_mean": 52.0,
        "temperature_c_max": 53.0,
        "throttle_share": {"sw_power_cap": 0.667, "sw_thermal_slowdown": 0.333},
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


def test_energy_in_the_summary(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 W by the readings, 250 W by the counter, which is renewed at once here."""
    monkeypatch.setattr(gpu, "COUNTER_AGE_S", 0.0)
    start = time.monotonic()
    nvml.energy = lambda: int(250_000 * (time.monotonic() - start))
    with Gpu.open() as opened, Sampler(opened, 7) as sampler:
        for stretch in (1, 2):
            sampler.mark(True)
            wait_until(lambda readings=30 * stretch: len(sampler._readings) >= readings)
            sampler.mark(False)
    summary = sampler.summary()
    assert summary is not None
    assert set(summary) == set(seen(1.0)) - {"utilisation_pct_mean"}
    assert summary["energy_source"] == "counter"
    assert summary["energy_j"] / summary["energy_sampled_j"] == pytest.approx(250 / 300, rel=0.1)


def test_a_card_that_tells_little_is_told_of_as_little(nvml: FakeNvml) -> None:
    """Neither power nor counter nor reasons, and a list of processes that fails now and then."""
    nvml.power = nvml.reasons = not_supported
    calls = iter(range(1_000_000))

    def processes() -> list[Any]:
        return [] if next(calls) % 5 else not_supported()

    nvml.processes = processes
    with Gpu.open() as opened, Sampler(opened, 7) as sampler:
        sampler.mark(True)
        wait_until(lambda: len(sampler._readings) >= 20)
        sampler.mark(False)
    summary = sampler.summary()
    assert summary is not None
    assert summary["failed_readings"] >= 5
    assert set(summary) == {
        *("sm_clock_mhz_mean", "sm_clock_mhz_min", "sm_clock_mhz_max", "mem_clock_mhz_mean"),
        *("temperature_c_mean", "temperature_c_max", "other_processes", "readings", "failed_readings"),
    }


def borders(*stretches: tuple[float, float], watts: float = 200.0) -> list[Border]:
    """Begin and end of each stretch, in s, with a counter that runs at `watts`."""
    return [Border(moment, 1e6 + watts * moment) for stretch in stretches for moment in stretch]


def test_energy_by_the_counter() -> None:
    assert counted_energy_j(borders((10.0, 13.0), (14.0, 17.0))) == pytest.approx(1200.0)  # not in the pause
    assert counted_energy_j(borders((10.0, 13.0), (14.0, 17.0))[:-1]) == pytest.approx(600.0)  # the last never ended
    assert counted_energy_j([]) is None
    assert counted_energy_j(borders((10.0, 13.0))[:1]) is None


def test_the_counter_cannot_tell_short_stretches_from_the_pauses_between() -> None:
    def epochs(length_s: float, pause_s: float, count: int) -> list[Border]:
        return borders(*((n * (length_s + pause_s), n * (length_s + pause_s) + length_s) for n in range(count)))

    assert counted_energy_j(epochs(0.9, 0.5, 50)) is None
    assert counted_energy_j(epochs(1.1, 0.5, 50)) == pytest.approx(11_000.0)
    assert counted_energy_j(epochs(0.025, 0.010, 50)) is None
    assert counted_energy_j(epochs(0.025, 0.001, 400)) == pytest.approx(2_000.0)  # without evaluations: as if one
    assert counted_energy_j(epochs(1.9, 0.0, 1)) is None
    assert counted_energy_j(epochs(2.1, 0.0, 1)) == pytest.approx(420.0)


def test_a_counter_that_was_reset_or_fails_tells_nothing() -> None:
    whole = borders((0.0, 5.0), (6.0, 11.0))
    for place in range(4):
        broken = list(whole)
        broken[place] = Border(whole[place].moment_s, None)
        assert counted_energy_j(broken) is None
    reset = [*whole[:3], Border(11.0, 12.0)]
    assert counted_energy_j(reset) is None
    between = [*whole[:2], Border(6.0, 1.0), Border(11.0, 901.0)]  # no stretch saw it
    assert counted_energy_j(between) == pytest.approx(1000.0 + 900.0)
    assert counted_energy_j(borders((0.0, 5.0), watts=0.0)) is None  # a virtual card's counter may stand still


def test_energy_by_both_ways_or_by_the_one_that_tells() -> None:
    long, short = borders((0.0, 5.0), (6.0, 11.0)), borders(*((n, n + 0.5) for n in range(8)))
    blind = [Border(border.moment_s, None) for border in long]
    powers = [190.0, 230.0] * 5  # 210 W on the mean
    assert energies(long, powers) == {"energy_j": 2000.0, "energy_source": "counter", "energy_sampled_j": 2100.0}
    assert energies(blind, powers) == {"energy_j": 2100.0, "energy_source": "sampled", "energy_sampled_j": 2100.0}
    assert energies(short, powers) == {"energy_j": 840.0, "energy_source": "sampled", "energy_sampled_j": 840.0}
    assert energies(long, powers[:9]) == {"energy_j": 2000.0, "energy_source": "counter"}
    assert energies(short, powers[:9]) == {}
    assert energies(short[:1], powers) == {}  # it died in its first epoch


def at(stretch: int, clock: float, *reasons: str) -> Reading:
    return Reading(stretch, {"sm_clock_mhz": clock}, frozenset(reasons))


def test_the_first_reading_of_a_stretch_may_tell_of_the_pause_before() -> None:
    readings = [at(1, 1.0), at(1, 2.0), at(1, 3.0), at(3, 4.0), at(5, 5.0), at(5, 6.0)]
    assert [reading.values["sm_clock_mhz"] for reading in settled(readings)] == [2.0, 3.0, 6.0]


def test_a_card_that_idles_does_not_drift() -> None:
    short = [at(1, 345.0), at(3, 1200.0), at(5, 1980.0)]
    assert busy_clocks_mhz(short) == []
    starved = [at(1, 900.0), at(1, 1980.0), at(1, 345.0, "idle"), at(1, 1100.0, "sw_power_cap"), at(1, 1965.0)]
    assert busy_clocks_mhz(starved) == [1980.0, 1965.0]  # 1,100 MHz is on the way up
    assert busy_clocks_mhz([at(1, 1980.0), at(1, 1400.0, "sw_power_cap")]) == [1400.0]
    untold = [
        Reading(1, {"sm_clock_mhz": 1980.0}, None),
        Reading(1, {"sm_clock_mhz": 1500.0}, None),
        at(1, 1.0, "idle"),
    ]
    assert busy_clocks_mhz(untold) == [1500.0]


def test_the_sampler_ends_with_an_error_of_the_body(nvml: FakeNvml) -> None:
    threads = threading.active_count()

    def body() -> None:
        with Gpu.open() as opened, Sampler(opened, 7):
            assert threading.active_count() == threads + 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()
    assert threading.active_count() == threads


def test_stretches_without_a_reading_still_tell_who_else_was_there(nvml: Any) -> None:
    nvml.processes = lambda: [SimpleNamespace(pid=pid, usedGpuMemory=2**20) for pid in (7, 8)]
    with Gpu.open() as opened, Sampler(opened, 7) as sampler:
        sampler.mark(True)
        sampler.mark(False)
        wait_until(lambda: sampler.summary() is not None)
    assert sampler.summary() == {"other_processes": 1, "readings": 0}


def test_without_a_gpu_the_sampler_idles() -> None:
    threads = threading.active_count()
    with Sampler(None, 7) as sampler:
        sampler.mark(True)
        assert threading.active_count() == threads
    assert sampler.process_peak_mib is None
    assert sampler.summary() is None


def test_several_cards_make_one_summary() -> None:
    one = {"power_w_mean": 300.0, "sm_clock_mhz_mean": 1900.0, "sm_clock_mhz_min": 1800.0, "sm_clock_mhz_max": 1980.0}
    one |= {"energy_j": 100.0, "energy_source": "counter", "throttle_share": {"sw_power_cap": 0.2}, "readings": 12}
    two = {"power_w_mean": 200.0, "sm_clock_mhz_mean": 1950.0, "sm_clock_mhz_min": 1900.0, "sm_clock_mhz_max": 1965.0}
    two |= {"energy_j": 80.0, "energy_source": "sampled", "throttle_share": {}, "readings": 10, "failed_readings": 1}
    assert together([one]) is one
    assert together([None, None]) is None
    assert together([one, two]) == {
        "cards": [one, two],
        "power_w_mean": 500.0,
        "sm_clock_mhz_mean": 1925.0,
        "sm_clock_mhz_min": 1800.0,
        "sm_clock_mhz_max": 1980.0,
        "energy_j": 180.0,
        "energy_source": "sampled",
        "throttle_share": {"sw_power_cap": 0.2},
        "readings": 10,
        "failed_readings": 1,
    }
    silent = {name: value for name, value in two.items() if not name.startswith("energy")}
    assert {"energy_j", "energy_source"}.isdisjoint(together([one, silent]) or {})  # of all cards or of none
