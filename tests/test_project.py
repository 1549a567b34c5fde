"""Projections: their arithmetic by hand, what they were fitted to, and figures to which they were not."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from netdyno.bench import projected
from netdyno.bench.cards import CARDS, Card, Rate
from netdyno.bench.host import COLAB_T4, KERAS_S, MEASURED_ON, Core, keras_on_colab_s, slowdown
from netdyno.bench.layers import Layer
from netdyno.bench.project import (
    FLOOR_S,
    OBSERVED,
    PUBLISHED,
    TRIALS_MIB,
    UNFOLDED,
    interval_factor,
    memory_mib,
    misses,
    parts_s,
    predict,
    project,
    step_s,
)
from netdyno.bench.roofline import RESNET50_TRAINING, STEPS, Kernel
from netdyno.bench.workloads import find

ROOT = Path(__file__).resolve().parents[1]
PLAIN = Card(
    name="a card",
    half_tflops=Rate(peak=2, rate=1),
    single_tflops=Rate(peak=0.2, rate=0.1),
    gb_per_s=Rate(peak=2, rate=1),
    memory_mib=1_000,
)


def convolution(channels_in: int, channels_out: int) -> Layer:
    shape = {"channels_in": channels_in, "channels_out": channels_out}
    return Layer(network="", op="conv", inputs=0, outputs=0, weights=0, flops=0, **shape)


@pytest.mark.parametrize(
    ("kernel", "precision", "seconds"),
    [
        (Kernel(kind="matrix", layer=convolution(64, 128), flops=10**9, bytes=10**5), "half", 10e9 / 1e12),
        (Kernel(kind="matrix", layer=convolution(32, 16), flops=10**9, bytes=10**5), "half", 8 * 10e9 / 1e12),
        (Kernel(kind="matrix", layer=convolution(32, 16), flops=10**9, bytes=10**5), "fp32", 10e9 / 1e11),
        (Kernel(kind="matrix", layer=convolution(64, 64), flops=10**6, unfolded_bytes=10**6), "half", 18e6 / 1e9),
        (Kernel(kind="pass", bytes=10**6), "half", 10e6 / 1e9),
        (Kernel(kind="weights", step_bytes=10**6), "half", 1e6 / 1e9),
    ],
)
def test_a_kernel_by_hand(kernel: Kernel, precision: str, seconds: float) -> None:
    """Ten images; the longer of arithmetic and traffic, and the floor."""
    assert step_s([kernel], 10, PLAIN, precision, floor_s=1e-3, unfolded=1.8) == pytest.approx(seconds + 1e-3)


def test_parts_of_a_step_by_hand() -> None:
    """Arithmetic 10 ms against traffic 1 ms; traffic 10 ms against none, and 1 ms; three launches."""
    launched = [
        Kernel(kind="matrix", layer=convolution(64, 128), flops=10**9, bytes=10**5),
        Kernel(kind="pass", bytes=10**6),
        Kernel(kind="weights", step_bytes=10**6),
    ]
    parts = parts_s(launched, 10, PLAIN, floor_s=1e-3)
    assert parts == pytest.approx({"arithmetic": 10e-3, "traffic": 11e-3, "launches": 3e-3})
    assert step_s(launched, 10, PLAIN, floor_s=1e-3) == pytest.approx(24e-3)


def test_slower_of_step_and_loader_sets_the_speed() -> None:
    step, card = STEPS["cifar100-cnn"], CARDS["t4"]
    free = project(step, 64, "rmsprop", card)
    assert project(step, 64, "rmsprop", card, loader_s=0.5 / free.images_per_s) == free
    fed = project(step, 64, "rmsprop", card, loader_s=0.01)
    assert (free.bound, fed.bound) == ("arithmetic", "loader")
    assert fed.images_per_s == pytest.approx(100)
    assert (fed.low, fed.high) == pytest.approx((100 / interval_factor(), 100 * interval_factor()))


def test_slowdown_by_hand() -> None:
    """Twice and eight times as long by two scores: four times in the geometric mean."""
    fast, slow = Core(name="", geekbench=2000, passmark=4000), Core(name="", geekbench=1000, passmark=500)
    assert slow.ratios(fast) == (2, 8)
    assert slowdown((slow,), fast) == pytest.approx(4)
    assert slowdown((slow, fast), fast) == pytest.approx(2)


def test_notebooks_loader_by_hand() -> None:
    """(2.341 · 1.988 · 2.274 · 2.001 · 2.050 · 2.052) to the power of 1/6 is 2.113; 4.87 ms · 2.113 = 10.29 ms."""
    ratios = [ratio for core in COLAB_T4 for ratio in core.ratios(MEASURED_ON)]
    assert ratios == pytest.approx([2.341, 1.988, 2.274, 2.001, 2.050, 2.052], abs=1e-3)
    assert KERAS_S == 4.87e-3
    assert keras_on_colab_s() == pytest.approx(10.29e-3, rel=1e-3)


def test_cards_sustain_no_more_than_their_peaks() -> None:
    for card in CARDS.values():
        for rate in (card.half_tflops, card.single_tflops, card.gb_per_s):
            assert 0.3 < rate.rate / rate.peak <= 1


# What it is fitted to


def test_constants_fit_the_observations_best() -> None:
    def cost(**constants: float) -> float:
        return sum(miss**2 for miss in misses(**constants))

    for change in (0.9, 1.1):
        assert cost() < cost(floor_s=change * FLOOR_S)
        assert cost() < cost(unfolded=change * UNFOLDED)


def test_observations_are_what_their_records_hold() -> None:
    recorded = [one for one in OBSERVED if one.record]
    assert len(recorded) == 5
    for one in recorded:
        (path,) = (ROOT / "results").glob(f"*h200*/{one.workload}/tuned-compute-{one.record}.json")
        record: dict[str, Any] = json.loads(path.read_text())
        assert record["case"]["recipe"]["batch_size"] == one.batch
        assert one.step_us == pytest.approx(1e6 * record["timing"]["train_s"] / record["timing"]["steps"], rel=0.002)


def test_interval_is_narrow_enough_to_mean_something() -> None:
    assert interval_factor() ** 2 <= 2
    assert interval_factor() > math.exp(1.81 * 0.1)


# What it is not fitted to


@pytest.mark.parametrize("one", PUBLISHED, ids=lambda one: f"{one.name} {one.gpu}")
def test_published_figures_lie_inside(one: Any) -> None:
    found = predict(one)
    assert found.high <= 2 * found.low
    assert found.low <= one.images_per_s <= found.high


def test_memory_lies_between_what_was_counted_and_that_with_trials() -> None:
    found = 0
    for path in (ROOT / "results").glob("*h200*/*/tuned-e2e-*.json"):
        record: dict[str, Any] = json.loads(path.read_text())
        if record["case"].get("division") == "open" or record["case"].get("gpus", 1) > 1:
            continue  # steps that are not counted, and what several GPUs share
        recipe = record["case"]["recipe"]
        projected_mib = memory_mib(STEPS[record["case"]["workload"]], recipe["batch_size"], recipe["optimizer"])
        peak_mib = record["memory"]["nvml_process_peak_mib"]
        decodes = record["case"]["workload"] == "resnet50-transfer"  # the projection is of data on the device
        decoders_mib = record["memory"]["loaders_mib"] if decodes else 0
        assert 0.9 * projected_mib <= peak_mib <= projected_mib + decoders_mib + TRIALS_MIB
        found += 1
    assert found >= 6


def test_what_ran_on_16_gb_fits_there_and_twice_of_it_does_not() -> None:
    assert project(RESNET50_TRAINING, 256, "sgd", CARDS["v100"]).fits(CARDS["v100"])
    assert not project(RESNET50_TRAINING, 512, "sgd", CARDS["v100"]).fits(CARDS["v100"])


# As it is shown


def test_every_line_says_that_it_is_projected() -> None:
    lines = [line for table in projected.page_tables().values() for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 3 * 2 + 6 + 6 + len(PUBLISHED)
    assert [line for line in lines if "projected" not in line and "images/s" not in line and "---" not in line] == []


def test_a_card_too_small_and_a_network_that_nobody_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not fit 1,000 MiB" in projected.speeds(PLAIN, [find("mnist-cnn")])
    monkeypatch.setattr(projected, "STEPS", {})
    assert "not counted" in projected.speeds(PLAIN, [find("mnist-cnn")])


def test_documentation_shows_these_tables() -> None:
    page = (ROOT / "docs" / "projection.md").read_text()
    assert projected.fill(page) == page, "run: python -m netdyno.bench.projected"
    assert re.findall(r"<!-- (\w+):begin -->", page) == list(projected.page_tables())
