"""The block clock and the warm-up, under a clock that the tests move, and the memory readings."""

import time
from types import SimpleNamespace

import pytest
import torch

from netdyno.bench import measure
from netdyno.bench.measure import BlockClock, PeakMemory, warm_up

CPU = torch.device("cpu")
RESULT = torch.zeros(())


class Time:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock_time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: time.now))
    return time


def test_blocks_tile_the_total_and_the_remainder_is_no_block(clock_time: Time) -> None:
    clock = BlockClock(CPU, 45)
    assert clock.block_steps == 2  # 45 // 20
    clock.start()
    closed = []
    for step in range(1, 46):
        clock_time.pass_by(step)
        closed.append(clock.step())
    clock_time.pass_by(0.5)  # what comes after the last step belongs to the remainder
    clock.stop()
    assert closed == [step % 2 == 0 for step in range(1, 46)]
    assert clock.block_s == pytest.approx([step + step - 1 for step in range(2, 45, 2)])
    assert clock.total_s == pytest.approx(sum(range(1, 46)) + 0.5)
    assert clock.wall_s == pytest.approx(clock.total_s)
    assert sum(clock.block_s) == pytest.approx(clock.total_s - 45.5)


def test_what_a_loader_does_behind_the_last_step_counts_where_steps_fill_blocks_too(clock_time: Time) -> None:
    clock = BlockClock(CPU, 100)
    assert clock.block_steps == 5
    clock.start()
    for _ in range(100):
        clock_time.pass_by(0.25)
        clock.step()
    clock_time.pass_by(7)
    clock.stop()
    assert clock.block_s == pytest.approx([1.25] * 20)
    assert (clock.steps_s, clock.total_s, clock.wall_s) == pytest.approx((32, 32, 32))


def test_blocks_are_whole_numbers_of_replays(clock_time: Time) -> None:
    clock = BlockClock(CPU, 234, 30)
    assert clock.block_steps == 30
    clock.start()
    for steps in [30] * 7 + [24]:
        clock_time.pass_by(steps / 10)
        assert clock.step(steps) is (steps == 30)
    clock.stop()
    assert clock.block_s == pytest.approx([3.0] * 7)
    assert clock.total_s == pytest.approx(23.4)
    assert BlockClock(CPU, 1_200, 10).block_steps == 60  # still about twenty blocks an epoch


def test_time_before_the_start_does_not_count(clock_time: Time) -> None:
    clock = BlockClock(CPU, 1)
    clock_time.pass_by(100)
    clock.start()
    clock_time.pass_by(2)
    assert clock.step()
    clock.stop()
    assert clock.block_s == pytest.approx([2])
    assert clock.wall_s == pytest.approx(2)


@pytest.mark.parametrize(("steps", "block_steps"), [(1, 1), (19, 1), (39, 1), (40, 2), (1_000, 50)])
def test_an_epoch_has_about_twenty_blocks(steps: int, block_steps: int) -> None:
    assert BlockClock(CPU, steps).block_steps == block_steps


def test_warm_up_ends_when_three_stretches_are_alike(clock_time: Time) -> None:
    durations = iter([1.0, 0.3, 0.2, 0.100, 0.104, 0.102, 0.1])

    def step() -> torch.Tensor:
        clock_time.pass_by(next(durations))
        return RESULT

    assert warm_up(step)
    assert list(durations) == [0.1]


def test_fast_steps_are_judged_in_stretches_of_50_ms(clock_time: Time) -> None:
    steps = 0

    def step() -> torch.Tensor:
        nonlocal steps
        steps += 1
        clock_time.pass_by(0.001)
        return RESULT

    assert warm_up(step)
    assert steps == 1 + 2 + 4 + 8 + 16 + 32 + 3 * 64


def test_longer_stretches_are_not_compared_with_shorter_ones(clock_time: Time) -> None:
    durations = iter([0.055, 0.055, 0.045, *[0.0275] * 7])  # after 45 ms a stretch is two steps, of 55 ms again

    def step() -> torch.Tensor:
        clock_time.pass_by(next(durations))
        return RESULT

    assert warm_up(step)
    assert list(durations) == [0.0275]


def test_warm_up_gives_up_on_a_step_that_is_never_steady(clock_time: Time) -> None:
    start = clock_time.now
    duration = 0.1

    def step() -> torch.Tensor:
        nonlocal duration
        duration = 0.3 - duration  # 0.2, 0.1, 0.2 …
        clock_time.pass_by(duration)
        return RESULT

    assert not warm_up(step)
    assert 10 <= clock_time.now - start < 10.5


def test_memory_on_a_cpu_is_that_of_the_host() -> None:
    memory = PeakMemory(CPU)
    before = memory.summary()["host_rss_peak_mib"]
    assert before is not None
    with memory.during("train"):
        held = torch.ones(int(before) * 2**18 + 2**25)  # as many MiB again, and 128
    after = memory.summary()
    assert after["peak_allocated_mib"] is None
    assert after["peak_reserved_mib"] is None
    assert after["eval_peak_allocated_mib"] is None
    assert after["host_rss_peak_mib"] is not None
    assert after["host_rss_peak_mib"] >= held.nbytes / 2**20


@pytest.mark.gpu
def test_blocks_on_a_gpu_are_its_own_time() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(4_096, 4_096, device=device)
    (matrix @ matrix).sum().item()
    clock = BlockClock(device, 40)
    clock.start()
    for _ in range(41):
        matrix @ matrix
        clock.step()
    clock.stop()
    assert len(clock.block_s) == 20
    assert sum(clock.block_s) < clock.total_s <= 1.05 * clock.wall_s
    assert clock.total_s > 0.5 * clock.wall_s  # launching them alone would take a small part of it


@pytest.mark.gpu
def test_the_host_runs_ahead_by_a_block() -> None:
    """The end of a block is waited for when the next one ends, so that the device has work meanwhile."""
    clock = BlockClock(torch.device("cuda"), 20)
    torch.cuda._sleep(1_000)
    clock.start()
    waits = []
    for _ in range(5):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        start = time.perf_counter()
        clock.step()
        waits.append(time.perf_counter() - start)
    clock.stop()
    assert waits[0] < 0.01
    assert min(waits[1:]) > 0.02
    assert clock.total_s == pytest.approx(clock.wall_s, rel=0.02)


@pytest.mark.gpu
def test_training_and_evaluation_have_their_own_peaks() -> None:
    memory = PeakMemory(torch.device("cuda"))
    before = torch.cuda.memory_allocated() / 2**20
    for what, sizes in (("train", (64, 128, 32)), ("eval", (256, 16, 16))):
        for size in sizes:
            with memory.during(what):  # type: ignore[arg-type]
                torch.empty(size * 2**20, dtype=torch.uint8, device="cuda")
    found = memory.summary()
    assert found["peak_allocated_mib"] == pytest.approx(before + 128, abs=1)
    assert found["eval_peak_allocated_mib"] == pytest.approx(before + 256, abs=1)


@pytest.mark.gpu
def test_what_captured_graphs_use_comes_on_top() -> None:
    memory = PeakMemory(torch.device("cuda"), {"train": 300 * 2**20})
    before = torch.cuda.memory_allocated() / 2**20
    for what in ("train", "eval"):
        with memory.during(what):  # type: ignore[arg-type]
            torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    found = memory.summary()
    assert found["peak_allocated_mib"] == pytest.approx(before + 364, abs=1)
    assert found["eval_peak_allocated_mib"] == pytest.approx(before + 64, abs=1)
