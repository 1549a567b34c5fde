"""The ceilings of a CPU, measured on little; those of a GPU by a stand-in for its clock, and by one."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch

from netdyno.bench import ceilings, schema, tuning

CPU = torch.device("cpu")


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough for two busy cores: what is measured is of the same kind."""
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": 512})
    monkeypatch.setattr(ceilings, "SECONDS", {"cpu": 0.2})
    monkeypatch.setattr(ceilings, "SMALLEST_COPY", ceilings.RANDOM_BLOCK)
    monkeypatch.setattr(ceilings, "last_level_cache", lambda device: 0)


@pytest.mark.usefixtures("little")
def test_a_cpus_ceilings_are_plausible_and_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "cpu_features", lambda: {"amx_bf16"})
    first, second = ceilings.measure(CPU), ceilings.measure(CPU)
    assert set(first) == {
        "measured_utc",
        "torch",
        "matmul_bf16_tflops",
        "matmul_fp32_tflops",
        "copy_gb_per_s",
        "copy_buffer_mib",
    }
    assert list(schema.machine_problems({"slug": "cpu", "ceilings": first})) == []
    assert datetime.strptime(first["measured_utc"], "%Y-%m-%dT%H:%M:%SZ")
    assert (first["torch"], first["copy_buffer_mib"]) == (torch.__version__, 64)
    for name, (least, most) in {
        "matmul_bf16_tflops": (0.0005, 1_000),
        "matmul_fp32_tflops": (0.001, 1_000),
        "copy_gb_per_s": (0.2, 10_000),
    }.items():
        assert math.isfinite(first[name])
        assert least < first[name] < most, name
        assert 1 / 10 < first[name] / second[name] < 10, name  # the machine has other work


def test_rates_are_worked_out_as_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "cpu_features", lambda: {"amx_bf16"})
    monkeypatch.setattr(ceilings, "time_product", lambda size, precision, *_: {"bf16": 0.002, "fp32": 0.01}[precision])
    monkeypatch.setattr(ceilings, "time_copy", lambda size, device: 0.1)
    monkeypatch.setattr(ceilings, "copy_size", lambda device: 1 << 30)
    found = ceilings.measure(CPU)
    assert found["matmul_bf16_tflops"] == pytest.approx(2 * 1024**3 / 0.002 / 1e12, abs=1e-4)  # 1.0737
    assert found["matmul_fp32_tflops"] == 0.2147
    assert found["copy_gb_per_s"] == 21.475  # 2 GiB in 0.1 s
    assert found["copy_buffer_mib"] == 1024


def test_nothing_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": 64})
    monkeypatch.setattr(torch, "mm", lambda left, right, out: seen.append((left, right)))
    monkeypatch.setattr(ceilings, "settled", lambda call, device, clocks: call() and 0.0)
    ceilings.time_product(64, "bf16", CPU, [])
    assert all(matrix.dtype == torch.bfloat16 and matrix.unique().numel() > 100 for matrix in seen[0])


@pytest.mark.parametrize(
    ("cache", "free", "size_mib"),
    [
        (50 << 20, 80 << 30, 1024),
        (1 << 30, 80 << 30, 2048),
        (480 << 20, 1 << 30, 256),  # a quarter of the memory
        (0, 100 << 20, 25),
    ],
)
def test_what_is_copied_outgrows_the_cache_and_fits(
    monkeypatch: pytest.MonkeyPatch, cache: int, free: int, size_mib: int
) -> None:
    monkeypatch.setattr(ceilings, "last_level_cache", lambda device: cache)
    monkeypatch.setattr(ceilings.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert ceilings.copy_size(CPU) == size_mib << 20


def test_the_last_level_cache_of_this_machine() -> None:
    assert 0 <= ceilings.last_level_cache(CPU) < 1 << 36


def test_a_gpus_calls_are_timed_by_its_events_and_its_clock_is_read_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.polls = 0

        def record(self) -> None:
            self.at = now

        def query(self) -> bool:
            self.polls += 1
            return self.polls > 3

        def synchronize(self) -> None:
            assert self.polls > 3

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    def call() -> None:
        nonlocal now
        now += 2.0  # ms

    @contextmanager
    def opened() -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(reading=lambda: next(readings))

    readings = iter([{"sm_clock_mhz": 1_700.0}, {}, {"sm_clock_mhz": 1_600.0}])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(ceilings.Gpu, "open", opened)
    clocks: list[float] = []
    assert ceilings.times(call, 4, torch.device("cuda"), clocks) == [0.002] * 4
    assert clocks == [1_700.0, 1_600.0]


@pytest.mark.gpu
def test_a_gpus_ceilings() -> None:
    found = ceilings.measure(torch.device("cuda"))
    (tflops,) = (value for name, value in found.items() if name.endswith("_tflops"))
    assert 1 < tflops < 10_000
    assert 20 < found["copy_gb_per_s"] < 50_000
    assert list(schema.machine_problems({"slug": "gpu", "ceilings": found})) == []
