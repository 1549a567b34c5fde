"""What becomes of records: groups, medians, speed-ups and failures, computed by hand."""

import math
import random
import subprocess
import sys
from typing import Any

import pytest
from made_up_records import CPU, DRAWN, EAGER, OFFICIAL, accuracy, make, records, seen

from netdyno.bench.summary import Row, doubts, energy_j_per_1000_images, summarise


def one(*made: dict[str, Any]) -> Row:
    (row,) = summarise(made)
    return row


def test_a_row_is_the_median_of_its_records() -> None:
    row = one(
        make(1, images_per_s=100.0, host_rss_peak_mib=10.0, accuracy=accuracy([90.0, 98.0])),
        make(2, images_per_s=130.0, host_rss_peak_mib=30.0, accuracy=accuracy([92.0, 99.5])),
        make(3, images_per_s=110.0, host_rss_peak_mib=20.0, accuracy=accuracy([91.0, 99.0])),
    )
    assert (row.n, row.images_per_s, row.images_per_s_low, row.images_per_s_high) == (3, 110.0, 100.0, 130.0)
    assert row.host_rss_peak_mib == 20.0
    assert row.metric_by_epoch == (91.0, 99.0)
    assert (row.metric_final, row.metric_final_low, row.metric_final_high) == (99.0, 98.0, 99.5)
    assert (row.target, row.reached_n, row.train_s_to_target) == (99.0, 2, 10.0)
    assert row.paths[0] == "nvidia-h200/mnist-cnn/tuned-e2e-20261123T120001Z-000001.json"


def test_two_records_have_a_median_and_no_spread() -> None:
    row = one(make(1, images_per_s=100.0), make(2, images_per_s=130.0))
    assert (row.n, row.images_per_s, row.images_per_s_low) == (2, 115.0, None)


def test_a_record_that_misses_its_target_counts_as_endless() -> None:
    missed, reached = accuracy([90.0, 98.0]), accuracy([99.0, 99.0])
    assert one(make(1, accuracy=missed), make(2, accuracy=reached)).train_s_to_target is None
    row = one(make(1, accuracy=missed), make(2, accuracy=reached), make(3, accuracy=accuracy([97.0, 99.0])))
    assert (row.reached_n, row.train_s_to_target) == (2, 10.0)  # the middle of 5, 10 and never
    assert one(make(1, accuracy=accuracy([90.0], None))).reached_n is None


def test_energy_for_1000_images() -> None:
    record = make(1, images_per_s=1000.0, train_s=2.0, gpu=seen(500.0))  # 2,000 images
    assert energy_j_per_1000_images(record) == 250.0
    for broken in (None, {}, {"power_w_mean": 300.0}, seen(0.0), seen(math.nan)):
        assert energy_j_per_1000_images({**record, "gpu": broken}) is None
    for broken in (None, 0.0, -1.0, "2"):
        assert energy_j_per_1000_images(make(1, images_per_s=1000.0, train_s=broken, gpu=seen(500.0))) is None


def test_the_counter_comes_before_sampled_power() -> None:
    def run(number: int, energy_j: float, source: str) -> dict[str, Any]:
        return make(number, images_per_s=1000.0, train_s=1.0, gpu=seen(energy_j, source))

    sampled = [run(1, 100.0, "sampled"), run(2, 200.0, "sampled")]
    row = one(*sampled)
    assert (row.energy_j_per_1000_images, row.energy_source) == (150.0, "sampled")
    row = one(*sampled, run(3, 300.0, "counter"), make(4, gpu=None))
    assert (row.energy_j_per_1000_images, row.energy_source) == (300.0, "counter")
    row = one(make(1))
    assert (row.energy_j_per_1000_images, row.energy_source) == (None, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"gpu": seen(1.0)}, []),
        ({"gpu": seen(1.0, throttle_share={"hw_slowdown": 0.05})}, []),
        (
            {"gpu": seen(1.0, throttle_share={"hw_slowdown": 0.051, "sw_power_cap": 0.834})},
            [
                "throttled in 5 % of readings: hw slowdown",
                "throttled in 83 % of readings: sw power cap",
            ],
        ),
        (
            {"gpu": seen(1.0, throttle_share={"a\nlater_reason": 1.0})},
            ["throttled in 100 % of readings: a later reason"],
        ),
        ({"gpu": seen(1.0, other_processes=2)}, ["beside 2 other processes on the card"]),
        ({"gpu": seen(1.0, beside=[])}, []),
        (
            {"gpu": seen(1.0, beside=["dcgan on card 1", "mnist-cnn on card 1"])},
            ["beside 2 cases on other cards"],
        ),
        ({"gpu": seen(1.0, sm_clock_mhz_min=1881.0)}, []),
        ({"gpu": seen(1.0, sm_clock_mhz_min=1880.0)}, ["SM clock between 1,880 and 1,980 MHz"]),
        ({"gpu": {"sm_clock_mhz_mean": 900.0}}, []),  # an older record
        ({"recompiles": 2}, ["2 × recompiled during the run"]),
        ({"steady": False}, ["not steady after warm-up"]),
        ({"steady": None}, []),
    ],
)
def test_what_makes_the_speed_of_a_run_doubtful(changes: dict[str, Any], words: list[str]) -> None:
    record = make(1, **changes)
    assert [doubt.words for doubt in doubts(record)] == words
    assert one(record).doubts == tuple(words)


def test_a_row_tells_the_worst_of_its_runs_and_how_many_there_are() -> None:
    shares = ({"sync_boost": 0.1}, {"sync_boost": 0.7}, {})
    row = one(*(make(n, steady=False, gpu=seen(1.0, throttle_share=share)) for n, share in enumerate(shares)))
    assert row.doubts == ("throttled in 70 % of readings: sync boost (2 of 3 runs)", "not steady after warm-up")
    assert one(make(1, status="failed", reason="x", steady=False)).doubts == ()


def test_epochs_without_a_metric_keep_their_place() -> None:
    assert one(make(1, accuracy=accuracy([None, 50.0, None, 60.0], None))).metric_by_epoch == (None, 50.0, None, 60.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"machine": CPU},
        {"suite": "quick"},
        {"data": DRAWN},
        {"data": {**OFFICIAL, "label": "re-split"}},
        {"data": {**OFFICIAL, "sha256": {"train": "other", "test": "bb22"}}},
        {"workload": "cifar10-cnn"},
        {"division": "open"},
        {"tuning": "amp"},
        {"mode": "compute"},
        {"gpus": 8},
        {"timing_version": 2},
        {"recipe": {"batch_size": 128, "epochs": 3, "lr": 0.01}},
    ],
)
def test_records_that_differ_in_what_decides_a_number_never_share_a_row(changes: dict[str, Any]) -> None:
    assert [row.n for row in summarise([make(1), make(2, **changes)])] == [1, 1]


def test_seeds_share_a_row() -> None:
    assert one(make(1), make(2, seed=1)).n == 2


def test_share_of_compute() -> None:
    """End to end against the same case on data that stay on the device: same tuning and recipe, nothing else."""
    e2e, compute = make(1, images_per_s=900.0), make(2, images_per_s=1000.0, mode="compute")
    assert [row.share_of_compute for row in summarise([e2e, compute])] == [0.9, None]
    for other in ({"tuning": "eager"}, {"recipe": {"batch_size": 64}}, {"timing_version": 2}, {"suite": "quick"}):
        rows = summarise([e2e, make(2, images_per_s=1000.0, **{"mode": "compute", **other})])
        assert [row.share_of_compute for row in rows] == [None, None]


def test_speedup_over_eager() -> None:
    tuned, eager = summarise(
        [
            make(1, images_per_s=100.0, **EAGER),
            make(2, images_per_s=300.0, **EAGER),
            make(3, images_per_s=700.0),
            make(4, images_per_s=900.0),
        ]
    )
    assert (tuned.tuning, eager.tuning) == ("tuned", "eager")
    assert tuned.speedup_over_eager == 4.0  # 800 ÷ 200
    assert tuned.eager_images_per_s == 200.0
    assert tuned.eager_ids == eager.ids
    assert tuned.differs_from_eager == ()
    assert eager.speedup_over_eager == 1.0


def on(*cards: str) -> dict[str, Any]:
    return {"gpu": {"fingerprints": [*cards]}}


def test_a_row_says_what_it_is_compared_with_that_ran_on_another_card() -> None:
    two = {"gpus": 2, "scaling": "weak", "recipe": {"batch_size": 256, "epochs": 2, "lr": 0.01}}
    rest = [make(2, mode="compute", **on("b")), make(3, **EAGER, **on("a"))]
    tuned, *_ = summarise([make(1, **on("b")), *rest])
    assert (tuned.fingerprints, tuned.across_cards, tuned.doubts) == (("b",), ("eager",), ())
    tuned, *_ = summarise([make(1, **on("c")), *rest])
    assert tuned.across_cards == ("eager", "compute-only")
    tuned, *_ = summarise([make(1), *rest])  # of an older version, which did not tell
    assert (tuned.fingerprints, tuned.across_cards) == ((), ())
    tuned, *_ = summarise([make(1, **on("b")), make(3, **EAGER)])
    assert tuned.across_cards == ()
    tuned, *_ = summarise([make(1, **on("a")), make(4, **on("b")), *rest])
    assert (tuned.fingerprints, tuned.across_cards) == (("a", "b"), ())
    assert tuned.doubts == ("not all runs on the same card",)
    for cards, across in (("a", "b"), ()), (("c", "d"), ("one GPU",)):
        _, row = summarise([make(1, **on("a")), make(4, **two, **on(*cards))])
        assert (row.gpus, row.across_cards, row.doubts) == (2, across, ())


@pytest.mark.parametrize(
    "changes",
    [{"machine": CPU}, {"suite": "quick"}, {"data": DRAWN}, {"mode": "compute"}, {"gpus": 2}, {"timing_version": 2}],
)
def test_no_speedup_across_what_may_not_be_compared(changes: dict[str, Any]) -> None:
    tuned = next(row for row in summarise([make(1), make(2, **EAGER, **changes)]) if row.tuning == "tuned")
    assert tuned.speedup_over_eager is None


def test_a_row_is_of_the_newest_version_of_the_code() -> None:
    old = [make(n, images_per_s=100.0, code="old") for n in (1, 2)]
    new = [make(n, images_per_s=300.0, code="new") for n in (3, 4)]
    row = one(*old, *new)
    assert (row.images_per_s, row.n, row.code) == (300.0, 2, "new")
    again = make(5, images_per_s=110.0, code="old")  # which is then the newest
    row = one(*old, *new, again)
    assert (row.images_per_s, row.n, row.code) == (100.0, 3, "old")


def test_a_row_is_held_beside_those_of_its_own_version_where_there_are_such() -> None:
    alone = [make(n, images_per_s=speed, code=code) for n, speed, code in ((1, 100.0, "old"), (2, 300.0, "new"))]
    two = {"gpus": 2, "scaling": "weak", "recipe": {"batch_size": 256, "epochs": 2, "lr": 0.01}}
    for code, efficiency in (("old", 0.9), ("new", 0.3), ("other", 0.3)):
        found = summarise([*alone, make(3, images_per_s=180.0, code=code, **two)])
        assert [row.scaling_efficiency for row in found if row.gpus == 2] == [pytest.approx(efficiency)]
        assert [row.images_per_s for row in found if row.gpus == 1] == [300.0]
    compute = [
        make(n, images_per_s=speed, code=code, mode="compute")
        for n, speed, code in ((1, 90.0, "old"), (2, 400.0, "new"))
    ]
    assert [row.share_of_compute for row in summarise([make(3, images_per_s=90.0, code="old"), *compute])] == [
        1.0,
        None,
    ]


def test_scaling_efficiency_is_of_the_same_batch_on_each_gpu() -> None:
    def recipe(batch: int, epochs: int = 2) -> dict[str, Any]:
        return {"batch_size": batch, "learning_rate": 0.1, "epochs": epochs}

    one = make(1, images_per_s=1_000.0, recipe=recipe(128))
    other = make(2, images_per_s=3_000.0, recipe=recipe(256))
    weak = make(3, images_per_s=1_900.0, recipe=recipe(256, 4), gpus=2, scaling="weak")
    strong = make(4, images_per_s=4_500.0, recipe=recipe(256), gpus=2, scaling="strong")
    found = {(row.gpus, row.scaling): row.scaling_efficiency for row in summarise([one, other, weak, strong])}
    assert found == {(1, None): None, (2, "weak"): 0.95, (2, "strong"): 0.75}
    assert summarise([weak, other])[1].scaling_efficiency is None
    assert summarise([weak, one | {"machine": CPU}])[1].scaling_efficiency is None
    assert summarise([weak, make(5, status="failed", reason="x", recipe=recipe(128))])[1].scaling_efficiency is None


def test_ways_to_scale_are_apart() -> None:
    records = [make(number, gpus=2, scaling=scaling) for number, scaling in enumerate(("weak", "strong", "weak"))]
    assert [(row.scaling, row.n) for row in summarise(records)] == [("strong", 1), ("weak", 2)]


def test_eager_of_the_same_recipe_is_preferred_and_a_difference_is_told() -> None:
    small, large = {"batch_size": 128, "lr": 0.01}, {"batch_size": 2048, "lr": 0.1}
    same = make(1, images_per_s=100.0, recipe=large, **EAGER)
    newer = make(2, images_per_s=50.0, recipe=small, **EAGER)
    tuned = make(3, images_per_s=200.0, recipe=large)
    row = summarise([same, newer, tuned])[0]
    assert (row.speedup_over_eager, row.differs_from_eager) == (2.0, ())
    row = summarise([newer, tuned])[0]
    assert row.speedup_over_eager == 4.0
    assert row.differs_from_eager == ("batch_size 2,048 against 128", "lr 0.1 against 0.01")


def test_failures_are_rows_until_a_newer_record_of_the_case_is_ok() -> None:
    oom = make(2, status="oom", reason="CUDA out of memory")
    row = one(oom)
    assert (row.status, row.reason, row.n, row.images_per_s) == ("oom", "CUDA out of memory", 1, None)
    assert [row.status for row in summarise([make(1), oom])] == ["ok", "oom"]
    assert [row.status for row in summarise([oom, make(3)])] == ["ok"]
    before_its_data = make(2, status="failed", reason="no such file", data=None)
    assert [row.status for row in summarise([before_its_data, make(3)])] == ["ok"]


@pytest.mark.parametrize("changes", [{"seed": 1}, {"data": DRAWN}, {"mode": "compute"}, {"machine": CPU}])
def test_success_elsewhere_hides_no_failure(changes: dict[str, Any]) -> None:
    oom = make(2, status="oom", reason="CUDA out of memory")
    assert sorted(row.status for row in summarise([oom, make(3, **changes)])) == ["ok", "oom"]


def test_equal_failures_share_a_row() -> None:
    failures = [make(number, status="timeout", reason="600 s", seed=number) for number in (1, 2)]
    assert one(*failures).n == 2


def test_failed_records_add_nothing_to_a_median() -> None:
    ok, failed = summarise([make(1, images_per_s=100.0), make(2, images_per_s=900.0, status="diverged", reason="NaN")])
    assert (ok.images_per_s, ok.n, failed.images_per_s, failed.metric_final) == (100.0, 1, None, None)
    assert failed.speedup_over_eager is None


def test_the_order_of_records_does_not_matter() -> None:
    shuffled = records()
    random.Random(0).shuffle(shuffled)
    assert summarise(shuffled) == summarise(records())


def branches(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    below = [branches(item, (*path, name)) for name, item in value.items()] if isinstance(value, dict) else []
    return [path, *(branch for found in below for branch in found)] if path else [b for found in below for b in found]


JUNK = ["absent", None, "text", [], {}, True, math.nan, -math.inf, 10**400, -1, [{}], [None]]


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:9])
def test_any_part_of_a_record_may_be_missing_or_wrong(junk: Any) -> None:
    for path in branches(make(1, gpu=seen(1.0, throttle_share={"sync_boost": 0.5}))):
        record = make(9, gpu=seen(1.0, throttle_share={"sync_boost": 0.5}))
        parent: Any = record
        for name in path[:-1]:
            parent = parent[name]
        if junk == "absent":
            del parent[path[-1]]
        else:
            parent[path[-1]] = junk
        of_one_code = path != ("code",)  # else it stands alone, as the newest version
        assert sum(row.n for row in summarise([record, make(2), make(3, **EAGER)])) == 2 + of_one_code


def test_numbers_that_are_none_are_missing() -> None:
    for images_per_s in (math.nan, math.inf, "12", True, None):
        assert one(make(1, images_per_s=images_per_s)).images_per_s is None
    assert one(make(1, images_per_s=math.nan), make(2, images_per_s=5.0)).images_per_s == 5.0


def test_strings_lose_line_breaks_and_invisible_characters() -> None:
    row = one(make(1, workload="a\nb\x1b[31m\u202e c", recipe={"batch_size": 1, "k\n": "v\n" + "x" * 500}))
    assert row.workload == "a b [31m c"
    assert len(row.recipe["k"]) == 300


def test_summary_needs_no_torch() -> None:
    code = "import netdyno.bench.summary, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
