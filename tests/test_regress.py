"""The rule of verdicts: by hand where it can be, by simulation where it is a matter of rates."""

import copy
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_records import CPU, DRAWN, accuracy, make

from netdyno.bench import ab, regress
from netdyno.bench.calibration import contest, gate_rates, of_seed, slowed
from netdyno.bench.record import save
from netdyno.bench.regress import ALPHA, Comparison, Verdict, compare, rank_test, repeats_needed, signed_rank_test

Noise = Callable[[np.random.Generator, int], np.ndarray]


def runs(values: Sequence[float], first: int = 0, **changes: Any) -> list[dict[str, Any]]:
    """A run a value of images/s, with step times that follow it."""
    made = []
    for number, value in enumerate(values, first):
        record = make(1, images_per_s=float(value), block_s=[1280 / float(value)] * 3, **changes)
        record["id"] = record["created_utc"] = f"{number:06}"
        made.append(record)
    return made


def steady(count: int, level: float = 1000.0, *, seed: int = 0, spread: float = 0.003) -> list[float]:
    return list(level * np.exp(spread * np.random.default_rng(seed).standard_normal(count)))


def of(comparison: Comparison, quantity: str = "throughput") -> Verdict:
    return next(verdict for verdict in comparison.verdicts if verdict.quantity == quantity)


# Single verdicts


def test_a_case_is_called_by_what_sets_it_apart() -> None:
    """The open division by its suite alone, where that says it."""
    for suite, division, name in (
        ("full", "closed", "full"),
        ("open", "open", "open"),
        ("quick", "open", "quick open"),
    ):
        assert regress.case_name(make(1, suite=suite, division=division)) == f"mnist-cnn tuned e2e {name}"


def test_the_same_runs_are_the_same() -> None:
    old = runs(steady(20))
    comparison = compare(old, runs(steady(7, seed=1), 20))
    assert {row.verdict for row in comparison.verdicts} == {"SAME"}
    names = [row.quantity for row in comparison.verdicts]
    assert names == [
        *("throughput", "step time", "peak memory", "compile, warm", "compile, cold"),
        *("time to target", "epochs to target", "final metric"),
    ]
    assert comparison.notes == ()


def test_a_slowdown_is_a_regression_and_its_opposite_an_improvement() -> None:
    fast, slow = runs(steady(20)), runs(steady(7, 950, seed=1), 20)
    worse, better = of(compare(fast, slow)), of(compare(slow, fast))
    assert (worse.verdict, better.verdict) == ("REGRESSION", "IMPROVEMENT")
    assert worse.effect == pytest.approx(-0.05, abs=0.004)
    assert worse.low is not None
    assert worse.high is not None
    assert worse.low < worse.effect < worse.high < 0
    assert (worse.old, worse.new) == (pytest.approx(1000, rel=0.003), pytest.approx(950, rel=0.003))
    assert (worse.old_runs, worse.new_runs) == (20, 7)
    assert of(compare(fast, slow), "step time").verdict == "REGRESSION"  # longer is worse


def test_more_memory_is_a_regression() -> None:
    old, new = runs(steady(20)), runs(steady(7, seed=1), 20, nvml_process_mib=1636.5)
    assert of(compare(old, new), "peak memory").verdict == "REGRESSION"  # 100 MiB of 1536.5
    assert of(compare(new, old), "peak memory").verdict == "IMPROVEMENT"
    assert of(compare(old, new), "throughput").verdict == "SAME"


def test_the_effect_is_the_median_of_all_ratios() -> None:
    row = of(compare(runs([100, 110, 120]), runs([99, 105, 126], 10)))
    ratios = sorted(new / old for old in (100, 110, 120) for new in (99, 105, 126))
    assert row.effect == pytest.approx(ratios[4] - 1)


def test_separated_samples_are_no_regression_below_the_floor() -> None:
    """Fully separated, half a percent apart: significant, and not worth a word."""
    row = of(compare(runs(np.linspace(1000, 1001, 20)), runs(np.linspace(994, 995, 7), 20)))
    assert row.p_value is not None
    assert row.level is not None
    assert row.p_value < row.level
    assert (row.verdict, row.margin) == ("SAME", 0.01)


def test_the_margin_is_the_range_of_the_old_runs() -> None:
    """Of 1 … 19 %, the 10th percentile (Weibull's position 0.1 · 20 = 2) is the second, the 90th the eighteenth."""
    row = of(compare(runs([math.exp(number / 100) for number in range(1, 20)]), runs([1.0] * 7, 20)))
    assert row.margin == pytest.approx(math.expm1(0.16))


def test_the_margin_of_runs_that_took_turns_narrows_with_them() -> None:
    """A drift of the machine falls on both sides alike, so that repeats average the rest out."""
    values = [1000.0] * 3 + [1100.0] * 15 + [1210.0] * 2
    calm, turns = (of(compare(runs(values), runs(values[8:]), by_turns=by_turns)) for by_turns in (False, True))
    assert calm.margin == pytest.approx(math.expm1(1.9 * math.log(1.1)))
    assert math.log1p(turns.margin) == pytest.approx(math.log1p(calm.margin) * math.sqrt(1 / 20 + 1 / 12))
    alike = of(compare(runs([1000.0] * 20), runs([1000.0] * 20), by_turns=True))
    assert alike.margin == 0.01  # never below the floor


def drifting_pairs(count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs on a machine that slows down by a third, of which the new side is 3 % slower."""
    drift = [1000.0 * 0.975**pair for pair in range(count)]
    slower = [0.97 * speed * (1.002 if pair % 2 else 0.998) for pair, speed in enumerate(drift)]
    return tuple([of_seed(run, seed) for seed, run in enumerate(runs(side, accuracy=None))] for side in (drift, slower))  # type: ignore[return-value]


def test_pairs_are_judged_by_their_ratios_whatever_the_machine_did_meanwhile() -> None:
    old, new = drifting_pairs(16)
    assert of(compare(old, new)).verdict == "SAME"
    turns = of(compare(old, new, by_turns=True))
    assert (turns.verdict, turns.margin) == ("REGRESSION", 0.01)
    assert turns.effect == pytest.approx(-0.03, abs=0.001)
    assert turns.low is not None
    assert turns.high is not None
    assert -0.033 < turns.low < turns.high < -0.027


def test_pairs_are_told_by_their_seed() -> None:
    """A run that failed, or lacks a number, takes its partner with it and no other; the newest forty runs count."""
    old, new = drifting_pairs(45)
    old[20] |= {"status": "oom", "reason": "out of memory"}
    old[30]["throughput"] = {"images_per_s": None}
    found = of(compare(old, new, by_turns=True))
    assert found.effect == pytest.approx(-0.03, abs=0.001)
    assert (found.old_runs, found.new_runs) == (38, 38)
    alike = (
        [{**run, "created_utc": "at once"} for run in old[:16]],
        [{**run, "created_utc": "at once"} for run in new[:16]],
    )
    assert of(compare(*alike, by_turns=True)).effect == pytest.approx(-0.03, abs=0.001)


def test_runs_of_one_seed_are_no_pairs() -> None:
    old, new = drifting_pairs(16)
    old[1] = of_seed(old[1], 0)
    assert of(compare(old, new, by_turns=True)).verdict == "SAME"


def test_pairs_that_are_alike_do_not_count_towards_the_level() -> None:
    old, new = drifting_pairs(10)
    assert of(compare(old, new, by_turns=True)).verdict != "REGRESSION"  # too few, of five quantities
    for pairs in range(16, 20):
        old, new = drifting_pairs(pairs)
        for seed in (0, 1):
            new[seed]["throughput"] = old[seed]["throughput"]
        assert of(compare(old, new, by_turns=True)).verdict == "REGRESSION"


def test_pairs_in_clock_cycles_are_those_whose_clocks_are_known() -> None:
    old, new = drifting_pairs(20)
    old, new = at_clock(old, 1980.0), at_clock(new, 1900.0)
    del old[0]["gpu"]["sm_clock_mhz_mean"], new[-1]["gpu"]["sm_clock_mhz_mean"]
    found = of(compare(old, new, by_turns=True))
    assert (found.verdict, found.effect) == ("AMBIGUOUS", pytest.approx(-0.03, abs=0.001))
    assert "IMPROVEMENT in clock cycles" in found.reason
    for run in old[1:]:
        del run["gpu"]["sm_clock_mhz_mean"]
    assert of(compare(old, new, by_turns=True)).verdict == "REGRESSION"  # nobody knows the clock


def test_few_old_runs_share_the_spread_of_the_new_ones() -> None:
    old, new = runs(steady(7, spread=1e-6)), runs(steady(7, 950, seed=1, spread=0.03), 20)
    assert of(compare(old, new)).verdict != "REGRESSION"
    assert of(compare(runs(steady(20, spread=1e-6)), new)).margin == 0.01  # twenty speak for themselves


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_too_few_repeats_are_ambiguous_and_say_how_many_it_takes(count: int) -> None:
    row = of(compare(runs(steady(count)), runs(steady(count, 500, seed=1), 20)))
    assert row.verdict == "AMBIGUOUS"
    assert f"needs at least 7 repeats a side, has {count} and {count}" in row.reason
    assert of(compare(runs(steady(7)), runs(steady(7, 500, seed=1), 20))).verdict == "REGRESSION"


def test_runs_that_overlap_beyond_the_margin_are_ambiguous() -> None:
    bimodal = [1000.0] * 3 + [900.0] * 4
    row = of(compare(runs(steady(20)), runs(bimodal, 20)))
    assert (row.verdict, "worse, but the runs overlap" in row.reason) == ("AMBIGUOUS", True)
    row = of(compare(runs(steady(20)), runs([1000.0] * 3 + [1100.0] * 4, 20)))
    assert (row.verdict, "better, but the runs overlap" in row.reason) == ("SAME", True)


def test_a_faster_change_with_one_seed_is_not_held_up_by_its_time_to_target() -> None:
    fast = runs(steady(7, 1200, seed=1), 20)
    for record in fast:
        for epoch in record["accuracy"]["curve"]:
            epoch["train_s"] /= 1.2
    row = of(compare(runs(steady(20)), fast), "time to target")
    assert (row.verdict, row.reason.split(";")[0]) == ("SAME", "better")
    assert of(compare(fast, runs(steady(20))), "time to target").verdict == "AMBIGUOUS"


def test_runs_that_spread_widely_cannot_show_that_nothing_changed() -> None:
    wild = [1000.0 * 2**number for number in (0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1)]
    row = of(compare(runs(wild), runs(wild, 20)))
    assert (row.verdict, "spread too much" in row.reason) == ("AMBIGUOUS", True)


# Clocks


def at_clock(records: list[dict[str, Any]], clock: float) -> list[dict[str, Any]]:
    return [{**record, "gpu": {"sm_clock_mhz_mean": clock + number}} for number, record in enumerate(records)]


def test_a_slower_clock_is_no_regression() -> None:
    old, new = at_clock(runs(steady(20)), 1980), at_clock(runs(steady(7, 900, seed=1), 20), 1782)
    row = of(compare(old, new))
    assert row.verdict == "AMBIGUOUS"
    assert "clock was 10.3% lower; REGRESSION in time, SAME in clock cycles" in row.reason


def test_a_faster_clock_hides_no_regression() -> None:
    old, new = at_clock(runs(steady(20)), 1800), at_clock(runs(steady(7, seed=1), 20), 1980)
    row = of(compare(old, new))
    assert (row.verdict, "SAME in time, REGRESSION in clock cycles" in row.reason) == ("AMBIGUOUS", True)


def test_a_faster_clock_is_no_improvement_and_holds_nothing_up() -> None:
    old, new = at_clock(runs(steady(20)), 1800), at_clock(runs(steady(7, 1100, seed=1), 20), 1980)
    row = of(compare(old, new))
    assert (row.verdict, "IMPROVEMENT in time, SAME in clock cycles" in row.reason) == ("SAME", True)


def test_a_regression_that_clock_cycles_confirm_stands() -> None:
    old, new = at_clock(runs(steady(20)), 1980), at_clock(runs(steady(7, 800, seed=1), 20), 1950)
    row = of(compare(old, new))
    assert (row.verdict, "clock cycles say the same" in row.reason) == ("REGRESSION", True)


# Accuracy


def seeded(finals: Sequence[float], first: int = 0, **changes: Any) -> list[dict[str, Any]]:
    made = runs(steady(len(finals), seed=first), first)
    for seed, (record, final) in enumerate(zip(made, finals, strict=True), first):
        record["case"]["seed"] = seed
        record["accuracy"] = accuracy([97.0, final], **changes)
    return made


ACCURATE = [99.2, 99.3, 99.25, 99.35, 99.28, 99.22, 99.31, 99.27]


def test_a_speed_up_that_costs_accuracy_fails() -> None:
    less = seeded([value - 0.6 for value in ACCURATE], 20)
    for record in less:
        record["throughput"]["images_per_s"] *= 1.5
    comparison = compare(seeded(ACCURATE), less)
    assert of(comparison).verdict == "IMPROVEMENT"
    assert of(comparison, "final metric").verdict == "REGRESSION"
    assert of(comparison, "final metric").effect == pytest.approx(-0.6, abs=0.05)


def test_more_accuracy_is_never_called() -> None:
    assert (
        of(compare(seeded([value - 2 for value in ACCURATE]), seeded(ACCURATE, 20)), "final metric").verdict == "SAME"
    )


def test_a_distance_is_worse_when_it_grows() -> None:
    def distances(values: Sequence[float], first: int) -> list[dict[str, Any]]:
        return seeded(values, first, target=None, metric="SWD", unit="×10³", higher_is_better=False)

    near, far = [20 + number / 10 for number in range(8)], [30 + number / 10 for number in range(8)]
    assert of(compare(distances(near, 0), distances(far, 20)), "final metric").verdict == "REGRESSION"
    assert of(compare(distances(far, 0), distances(near, 20)), "final metric").verdict == "SAME"


def test_runs_of_one_seed_are_one_sample() -> None:
    """Twenty runs of one seed that repeat one another bit for bit say nothing of other seeds."""
    old, new = runs(steady(20)), runs(steady(20, seed=1), 20)
    for record in new:
        record["accuracy"] = accuracy([97.0, 99.05])  # 0.05 below, within the floor
    row = of(compare(old, new), "final metric")
    assert (row.verdict, row.old_runs, row.new_runs) == ("SAME", 1, 1)
    for record in new:
        record["accuracy"] = accuracy([97.0, 98.5])
    row = of(compare(old, new), "final metric")
    assert row.verdict == "AMBIGUOUS"
    assert "needs at least 6 seeds a side, has 1 and 1" in row.reason


def test_a_missed_target_counts_as_one_epoch_more() -> None:
    old = seeded([99.1] * 8)
    new = seeded([98.0] * 8, 20)  # two epochs of 5 s each, never there
    comparison = compare(old, new)
    epochs, seconds = of(comparison, "epochs to target"), of(comparison, "time to target")
    assert (epochs.old, epochs.new, epochs.verdict) == (2.0, 3.0, "REGRESSION")
    assert (seconds.old, seconds.new, seconds.verdict) == (10.0, 15.0, "REGRESSION")


def test_a_target_of_several_metrics_is_reached_by_all_of_them() -> None:
    record = make(1, accuracy=accuracy([99.5, 99.5], also_at_least={"ssim": 0.96}))
    for row, ssim in zip(record["accuracy"]["curve"], (0.9, 0.97), strict=True):
        row["metrics"] = {"ssim": ssim}
    epochs = next(quantity for quantity in regress.QUANTITIES if quantity.name == "epochs to target")
    assert epochs.read(record) == 2.0
    record["accuracy"]["curve"][1]["metrics"]["ssim"] = 0.95
    assert epochs.read(record) == 3.0


def test_epochs_are_counted_where_an_evaluation_comes_after_several() -> None:
    record = make(1, accuracy=accuracy([98.5, 99.5]))
    record["case"]["recipe"] = record["case"]["recipe"] | {"evaluate_every": 8}
    epochs = next(quantity for quantity in regress.QUANTITIES if quantity.name == "epochs to target")
    assert epochs.read(record) == 16.0


# What cannot be compared


OTHERS: dict[str, dict[str, Any]] = {
    "not on nvidia-h200": {"machine": CPU},
    "another timing version": {"timing_version": 2},
    "another data": {"data": {**DRAWN, "loader": "dali"}},
    "another target": {"accuracy": accuracy([97.0, 99.1], 98.0)},
    "another recipe's batch_size": {"recipe": {"batch_size": 256, "epochs": 2, "lr": 0.01}, "accuracy": None},
}


@pytest.mark.parametrize("reason", OTHERS)
def test_what_is_not_comparable_is_refused(reason: str) -> None:
    changes = OTHERS[reason]
    common = {"accuracy": None} if changes.get("accuracy", 0) is None else {}
    comparison = compare(runs(steady(20), **common), runs(steady(20, seed=1), 20, **changes))
    assert [row.verdict for row in comparison.verdicts] == ["AMBIGUOUS"]
    assert "not comparable" in comparison.verdicts[0].reason
    assert reason in comparison.verdicts[0].reason


def of_seeds(seconds: float, metric: float, count: int = 30, **changes: Any) -> list[dict[str, Any]]:
    """Runs of the open division, each of `count` seeds that take so long and reach so much, about."""
    made = runs(steady(20), **changes)
    for record, factor in zip(made, steady(20, 1.0, seed=2), strict=True):
        record["case"] |= {"division": "open", "suite": "open", "seeds": list(range(count))}
        rows = [{"seed": seed, "train_s": seconds * factor, "metric": metric} for seed in range(count)]
        record["accuracy"] = {
            "metric": "test accuracy",
            "unit": "%",
            "higher_is_better": True,
            "final": metric,
            "target": 94.0,
            "reached": metric >= 94.0,
            "train_s_to_target": seconds * factor if metric >= 94.0 else None,
            "seeds": rows,
        }
    return made


def test_the_open_division_is_judged_by_its_time_whatever_the_recipe() -> None:
    old = of_seeds(1.0, 94.1)
    other = {"recipe": {"batch_size": 256, "lr": 0.5}}
    assert of(compare(old, of_seeds(0.9, 94.1, **other)), "time to target").verdict == "IMPROVEMENT"
    assert of(compare(old, of_seeds(1.1, 94.1, **other)), "time to target").verdict == "REGRESSION"
    assert of(compare(old, of_seeds(0.5, 93.0, **other)), "time to target").verdict == "MISSING"


def test_means_of_other_numbers_of_seeds_are_not_compared() -> None:
    (verdict,) = compare(of_seeds(1.0, 94.1), of_seeds(1.0, 94.1, count=2)).verdicts
    assert (verdict.verdict, verdict.quantity) == ("AMBIGUOUS", "case")
    assert "another set of seeds" in verdict.reason


def test_another_recipe_is_judged_by_the_target_alone() -> None:
    """Twice the batch: other images/s, other memory; what counts is how long it takes, and how good it gets."""
    new = seeded([value - 0.6 for value in ACCURATE], 20, target=98.0)
    for record in new:
        record["accuracy"]["target"] = 99.0
        record["case"]["recipe"] = {"batch_size": 256, "epochs": 2, "lr": 0.02}
    comparison = compare(seeded(ACCURATE), new)
    assert {row.quantity: row.verdict for row in comparison.verdicts} == {
        "time to target": "REGRESSION",
        "final metric": "REGRESSION",
    }
    assert comparison.notes == (
        "mnist-cnn tuned e2e full on nvidia-h200: another recipe's batch_size, another recipe's lr; judged by time to"
        " target and final metric alone",
    )


@pytest.mark.parametrize("side", ["old", "new"])
def test_runs_of_one_code_under_other_conditions_are_refused(side: str) -> None:
    """Else half of them would silently not count."""
    sides = {"old": runs(steady(20)), "new": runs(steady(20, seed=1), 20)}
    for record in sides[side][:5]:
        record["case"]["recipe"] = {"batch_size": 1, "epochs": 2, "lr": 0.01}
        record["timing"]["timing_version"] = 2
    (row,) = compare(**sides).verdicts
    assert row.verdict == "AMBIGUOUS"
    assert "the runs of one code have more than one timing version and more than one recipe's batch_size" in row.reason


def test_runs_on_another_card_are_noted() -> None:
    a, b = ({"gpu": {"fingerprints": [card]}} for card in "ab")
    noted = ("mnist-cnn tuned e2e full on nvidia-h200: on another card than before",)
    for old, new, notes in (a, b, noted), (a, a, ()), (a, {}, ()), ({}, b, ()):
        assert compare(runs(steady(20), **old), runs(steady(20, seed=1), 20, **new)).notes == notes


def test_a_missing_case_is_missing_and_a_new_one_is_noted() -> None:
    comparison = compare(runs(steady(20)), runs(steady(20, seed=1), 20, workload="dcgan"))
    assert [(row.case, row.verdict) for row in comparison.verdicts] == [("mnist-cnn tuned e2e full", "MISSING")]
    assert comparison.notes == ("dcgan tuned e2e full on nvidia-h200: has nothing to be compared with",)


def test_a_run_that_failed_is_missing() -> None:
    new = runs(steady(7, seed=1), 20)
    new[3] |= {"status": "oom", "reason": "CUDA out of memory\nmore"}
    row = compare(runs(steady(20)), new).verdicts[0]
    assert (row.verdict, row.reason) == ("MISSING", "1 of 7 runs ended oom: CUDA out of memory more")
    old = runs(steady(20))
    for record in old:
        record["status"] = "failed"
    row = compare(old, runs(steady(7, seed=1), 20)).verdicts[0]
    assert (row.verdict, "no run of the old side ended ok" in row.reason) == ("AMBIGUOUS", True)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1000", True, -5.0, 0, 10**400])
def test_what_is_no_number_is_missing(value: Any) -> None:
    new = runs(steady(7, seed=1), 20)
    new[2]["throughput"]["images_per_s"] = value
    row = of(compare(runs(steady(20)), new))
    assert (row.verdict, row.reason) == ("MISSING", "1 of 7 runs have no such number")


@pytest.mark.parametrize("section", ["throughput", "timing", "memory", "compile", "accuracy"])
def test_a_section_that_is_gone_is_missing(section: str) -> None:
    new = runs(steady(7, seed=1), 20)
    for record in new:
        record[section] = None
    verdicts = {row.verdict for row in compare(runs(steady(20)), new).verdicts}
    assert verdicts & {"MISSING", "AMBIGUOUS"}


def test_an_old_side_without_a_number_is_ambiguous() -> None:
    old = runs(steady(20))
    for record in old:
        record |= {"throughput": None, "memory": None, "compile": None, "accuracy": None}
        record["timing"] = {"timing_version": 1}
    assert [row.verdict for row in compare(old, runs(steady(7, seed=1), 20)).verdicts] == ["AMBIGUOUS"]


def test_nothing_against_nothing_has_no_verdict() -> None:
    assert compare([], []).verdicts == ()


def test_only_the_newest_code_and_versions_of_a_side_count() -> None:
    old = runs(steady(20, 500)) + runs(steady(20), 20, code="c0de2")
    new = runs(steady(7, 2000), 40, code="c0de3")
    new += runs(steady(7, seed=1), 50, code="c0de3", machine={**make(1)["machine"], "versions": {"torch": "2.12"}})
    comparison = compare(old, new)
    assert of(comparison).verdict == "SAME"
    assert [note.split(": ")[1] for note in comparison.notes] == [
        "20 records of other code or versions left out",
        "7 records of other code or versions left out",
    ]


def test_the_cold_start_of_a_cache_is_one_measurement_and_decides_nothing() -> None:
    old, new = runs(steady(20)), runs(steady(20, seed=1), 20, cold_s=62.0)
    row = of(compare(old, new), "compile, cold")
    assert (row.verdict, row.decides, row.old_runs, row.new_runs) == ("AMBIGUOUS", False, 1, 1)


def test_records_of_any_shape_raise_nothing() -> None:
    odd: list[Any] = [None, [], {}, "text", 7, math.nan, {"a": [None]}]
    for section in ("case", "machine", "timing", "throughput", "memory", "accuracy", "compile", "gpu", "data", "code"):
        for value in odd:
            broken = [{**record, section: copy.deepcopy(value)} for record in runs(steady(7, seed=1), 20)]
            for comparison in (compare(runs(steady(20)), broken), compare(broken, runs(steady(20)))):
                json.dumps([row.verdict for row in comparison.verdicts])


# The rank test


def by_hand(old: Sequence[float], new: Sequence[float]) -> tuple[float, float]:
    """One-sided p-values by trying every choice."""

    def rank_sum(chosen: Sequence[float], others: Sequence[float]) -> float:
        return sum((one > other) + (one == other) / 2 for one in chosen for other in others)

    pooled = [*old, *new]
    seen = rank_sum(new, old)
    sums = []
    for places in combinations(range(len(pooled)), len(new)):
        chosen = [pooled[place] for place in places]
        others = [value for place, value in enumerate(pooled) if place not in places]
        sums.append(rank_sum(chosen, others))
    return sum(one <= seen for one in sums) / len(sums), sum(one >= seen for one in sums) / len(sums)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([1, 2, 3, 4], [5, 6, 7]),
        ([1, 5, 2, 8], [3, 4, 9]),
        ([1, 1, 2, 2, 2], [2, 3, 3, 1]),
        ([512.0] * 4, [512.0] * 3),
        ([512.0] * 4, [612.0] * 4),
        ([3], [1, 2, 4, 5, 6]),
    ],
)
def test_the_rank_test_is_exact_with_ties_too(old: list[float], new: list[float]) -> None:
    assert rank_test(np.array(old), np.array(new)) == pytest.approx(by_hand(old, new))


@pytest.mark.parametrize(
    "differences", [[3, 1, 2, 5], [3, -1, 2, -5, 4], [1, 1, -1, 2, -2, 3], [0, 0, 2, -1], [0.0] * 3]
)
def test_the_test_of_pairs_is_exact_with_ties_too(differences: list[float]) -> None:
    found = [one for one in differences if one]
    ranks = [sum((abs(two) < abs(one)) + (abs(two) == abs(one)) / 2 for two in found) + 0.5 for one in found]
    seen = sum(rank for rank, one in zip(ranks, found, strict=True) if one > 0)
    sums = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in product((0, 1), repeat=len(found))
    ]
    expected = sum(one <= seen for one in sums) / len(sums), sum(one >= seen for one in sums) / len(sums)
    assert signed_rank_test(np.array(differences)) == pytest.approx(expected)


@pytest.mark.parametrize("paired", [False, True])
def test_the_interval_covers_a_shift_as_often_as_it_says(paired: bool) -> None:
    random = np.random.default_rng(5)
    quantity = regress.QUANTITIES[0]
    inside = 0
    for _ in range(400):
        old, new = np.exp(0.1 * random.standard_normal(8)), 0.9 * np.exp(0.1 * random.standard_normal(8))
        decision = regress.decide(quantity, old, new, margin=0.01, level=0.01, paired=paired)
        assert decision.low is not None
        assert decision.high is not None
        inside += decision.low <= -0.1 <= decision.high
    assert 0.93 <= inside / 400 <= 0.985


def test_repeats_needed_are_the_fewest_that_reach_the_level() -> None:
    assert repeats_needed(2 / math.comb(14, 7)) == 7
    assert repeats_needed(1.99 / math.comb(14, 7)) == 8
    assert repeats_needed(1 / math.comb(14, 7), one_sided=True) == 7


def test_the_level_is_shared_by_all_tests_of_a_comparison() -> None:
    old = runs(steady(20)) + runs(steady(20), 20, workload="dcgan")
    new = runs(steady(7), 40) + runs(steady(7), 60, workload="dcgan")
    verdicts = compare(old, new).verdicts
    assert len([row for row in verdicts if row.decides]) == 14
    assert {row.level for row in verdicts} == {ALPHA / 14}
    assert {row.level for row in compare(old, new, looks=4).verdicts} == {ALPHA / 56}


# Rates

# Run-to-run noise of 1 % or so, in shapes that real machines have.


def lognormal(random: np.random.Generator, count: int) -> np.ndarray:
    return 0.01 * random.standard_normal(count)


def drifting(random: np.random.Generator, count: int) -> np.ndarray:
    """1 % of noise, and 1 % up or down in the course of the session."""
    return lognormal(random, count) + random.choice([-1, 1]) * np.linspace(-0.005, 0.005, count)


def heavy_tailed(random: np.random.Generator, count: int) -> np.ndarray:
    """Student's t with two degrees of freedom, which has no variance."""
    return 0.004 * random.standard_t(2, count)


def autocorrelated(random: np.random.Generator, count: int) -> np.ndarray:
    """AR(1): half of a run's deviation is the one of the run before."""
    shocks = 0.01 * random.standard_normal(count)
    values = [shocks[0]]
    for shock in shocks[1:]:
        values.append(0.5 * values[-1] + math.sqrt(0.75) * shock)
    return np.array(values)


def bimodal(random: np.random.Generator, count: int) -> np.ndarray:
    """One run in five is 2 % slower, such as one whose memory lies on the other node."""
    return 0.003 * random.standard_normal(count) - 0.02 * (random.random(count) < 0.2)


def disturbed(random: np.random.Generator, count: int) -> np.ndarray:
    """One run in twenty meets a neighbour and is slower by anything up to 30 %."""
    return 0.005 * random.standard_normal(count) - random.uniform(0, 0.3, count) * (random.random(count) < 0.05)


NOISES: list[Noise] = [lognormal, drifting, heavy_tailed, autocorrelated, bimodal, disturbed]


def session(noise: Noise, random: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Runs of one session: throughput, step time, memory, compile time and energy, each with noise of its own."""
    shared, own, power = (noise(random, count) for _ in range(3))
    compile_s, memory = 1.5 * noise(random, count), random.integers(0, 2, count)
    base = make(1, accuracy=None)
    return [
        {
            **base,
            "id": f"{number:06}",
            "created_utc": f"{number:06}",
            "throughput": {"images_per_s": round(1000 * math.exp(shared[number]), 3)},
            "timing": {**base["timing"], "block_s": [round(1.28 * math.exp(-shared[number] + own[number] / 5), 6)]},
            "memory": {"nvml_process_mib": 1536.0 + 2 * float(memory[number])},
            "compile": {"warm_s": round(6.5 * math.exp(-compile_s[number]), 3)},
            "gpu": {"energy_j": round(570 * math.exp(power[number]), 1)},
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.__name__)
def test_one_gate_in_a_hundred_at_most_is_wrong(noise: Noise) -> None:
    """Later runs of the same session against a baseline of its first twenty, over five quantities."""
    random = np.random.default_rng(7)
    gates, wrong, silent = 500, 0, 0
    for _ in range(gates):
        made = session(noise, random, 27)
        comparison = compare(made[:20], made[20:])
        assert len(comparison.verdicts) == 5
        wrong += bool(comparison.called("REGRESSION") or comparison.called("IMPROVEMENT"))
        silent += len(comparison.called("SAME")) == 5
    assert wrong / gates <= 0.01
    assert silent / gates >= 0.98  # nor does it cry AMBIGUOUS


def detection(noise: Noise, *, gates: int = 200) -> float:
    """How often 5 % are called a regression of the throughput, with 7 runs against a baseline of 20."""
    random = np.random.default_rng(8)
    seen = 0
    for _ in range(gates):
        made = session(noise, random, 27)
        slower = [slowed(record, 0.05) for record in made[20:]]
        seen += of(compare(made[:20], slower)).verdict == "REGRESSION"
    return seen / gates


@pytest.mark.parametrize(
    "noise", [noise for noise in NOISES if noise is not disturbed], ids=lambda noise: noise.__name__
)
def test_five_percent_are_seen_with_seven_repeats(noise: Noise) -> None:
    assert detection(noise) >= 0.95


def test_a_disturbed_baseline_sees_less_and_is_wrong_no_more_often() -> None:
    """Where two of its twenty runs met a neighbour, the margin takes that for the machine's own spread."""
    assert 0.6 < detection(disturbed) < 0.95


@pytest.mark.parametrize("noise", [lognormal, bimodal], ids=lambda noise: noise.__name__)
def test_recorded_runs_calibrate_the_gate(noise: Noise) -> None:
    """As noise that was really recorded is judged: margins of one half, gates of 7 against 7 of the other."""
    made = session(noise, np.random.default_rng(9), 40)
    calm = gate_rates(made[1::2], made[::2], gates=300)
    assert calm.wrong <= 0.01
    planted = [gate_rates(made[1::2], made[::2], gates=60, effect=effect).detected for effect in (0.01, 0.05, 0.1)]
    assert planted[0] < 0.5
    assert planted[1] >= 0.95
    assert planted[2] == 1.0


def by_turns(noise: Noise, random: np.random.Generator, *, times: float, effect: float) -> Comparison:
    """A contest of 24 pairs, A B, B A …, on a machine that is so many times as noisy; B is slower by `effect`."""
    made = session(lambda drawn, count: times * noise(drawn, count), random, 48)
    a = [of_seed(made[run], run // 2) for run in range(48) if run % 4 in (0, 3)]
    b = [slowed(of_seed(made[run], run // 2), effect) for run in range(48) if run % 4 in (1, 2)]
    return contest(a, b)


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.__name__)
def test_one_contest_in_a_hundred_at_most_is_wrong(noise: Noise) -> None:
    random = np.random.default_rng(11)
    for times in (1, 3):
        ends = [by_turns(noise, random, times=times, effect=0.0) for _ in range(200)]
        assert sum(bool(end.called("REGRESSION") or end.called("IMPROVEMENT")) for end in ends) <= 2


@pytest.mark.parametrize(
    "noise", [noise for noise in NOISES if noise is not disturbed], ids=lambda noise: noise.__name__
)
def test_contests_do_not_miss_five_percent_on_a_noisy_machine(noise: Noise) -> None:
    """Which gates do: their margin is the spread. At three times the noise some are undecided after 24 pairs."""
    random = np.random.default_rng(12)
    for times, least_seen in ((2.5, 95), (3, 85)):
        ends = [by_turns(noise, random, times=times, effect=0.05) for _ in range(100)]
        seen = [any(row.quantity in regress.SPEED for row in end.called("REGRESSION")) for end in ends]
        missed = [not end.called("AMBIGUOUS") and not found for end, found in zip(ends, seen, strict=True)]
        assert sum(seen) >= least_seen
        assert sum(missed) <= 2


def test_a_disturbed_contest_sees_less() -> None:
    """Runs that meet a neighbour widen the margin of a contest as they do a gate's."""
    random = np.random.default_rng(12)
    ends = [by_turns(disturbed, random, times=1, effect=0.05) for _ in range(100)]
    seen = [any(row.quantity in regress.SPEED for row in end.called("REGRESSION")) for end in ends]
    assert 70 < sum(seen) < 95


def test_a_contest_is_undecided_while_five_percent_would_be_missed() -> None:
    def judged(pairs: int, spread: float, ratio: float = 1.0) -> Comparison:
        a, b = steady(pairs, spread=spread), steady(pairs, 1000 * ratio, seed=1, spread=spread)
        return ab.judge(runs(a, accuracy=None), runs(b, first=pairs, accuracy=None))

    assert ab.decided(judged(7, 0.003))
    blunt = judged(7, 0.04)
    assert not ab.decided(blunt)
    assert of(blunt).verdict == "AMBIGUOUS"
    assert "5 % might not have been seen: that takes about" in of(blunt).reason
    assert ab.decided(judged(40, 0.04))
    assert ab.decided(judged(7, 0.04, 0.7))  # a regression is one with any margin


def test_a_rule_without_its_parts_would_fail_here() -> None:
    """What the margin and the shared level are for: without them, autocorrelated noise is called all the time."""
    random = np.random.default_rng(10)
    naive = 0
    for _ in range(200):
        made = session(autocorrelated, random, 27)
        rows = [row for row in compare(made[:20], made[20:]).verdicts if row.p_value is not None]
        naive += any(row.p_value is not None and row.p_value < 0.05 for row in rows)
    assert naive / 200 > 0.2


# Speed


PARSING_S = 0.25  # of these 10,000 records by `json` alone, on a core that is to compare them within two seconds


def test_ten_thousand_records_in_two_seconds_without_torch(tmp_path: Path) -> None:
    """20 runs a case and side, as files; processor time of the whole command, since other work may run beside it.

    On a core that parses them more slowly than in `PARSING_S` in proportion, which nothing of ours can stretch.
    """
    made = session(lognormal, np.random.default_rng(11), 20)
    for side in ("old", "new"):
        for case in range(250):
            folder = tmp_path / side / f"machine-{case % 10}" / f"w{case}"
            folder.mkdir(parents=True)
            for number, record in enumerate(made):
                record["machine"] = {**record["machine"], "slug": f"machine-{case % 10}"}
                record["case"] = {**record["case"], "workload": f"w{case}"}
                record["timing"]["block_s"] = record["timing"]["block_s"][:1] * 40
                (folder / f"tuned-e2e-{number}.json").write_text(json.dumps(record))
    code = (
        "import sys, time, resource\n"
        "from netdyno.bench.cli import app\n"
        "app(['compare', *sys.argv[1:]], standalone_mode=False)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print('torch' in sys.modules, used.ru_utime + used.ru_stime, file=sys.stderr)\n"
    )
    sides = [str(tmp_path / side) for side in ("old", "new")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path / "bytecode")  # which the first of two commands fills
    for folders in (["here", "there"], sides):
        start = time.perf_counter()
        command = [sys.executable, "-c", code, *folders]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall_s = time.perf_counter() - start
    assert done.stdout.count("throughput") == 250, done.stderr
    torch, used_s = done.stderr.split()[-2:]
    assert torch == "False"
    contents = [path.read_bytes() for side in sides for path in Path(side).rglob("*.json")]
    assert len(contents) == 10_000
    gc.disable()  # as where they are read
    begin = time.process_time()
    parsed = [json.loads(content) for content in contents]
    slowness = max(1.0, (time.process_time() - begin) / PARSING_S)
    gc.enable()
    del parsed
    assert float(used_s) < 2 * slowness, (wall_s, slowness)


def test_records_come_back_from_files_as_they_were_compared(tmp_path: Path) -> None:
    from netdyno.bench.gate import read_records

    made = runs(steady(20))
    for record in made:
        save(record, tmp_path)
    found = read_records(str(tmp_path), tmp_path)
    assert sorted(found, key=lambda record: str(record["id"])) == made
