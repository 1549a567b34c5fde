"""Statistics against values computed by hand, and against literals from SciPy 1.17.1 with the call that made them.

SciPy is no dependency: as literals the comparison always runs.
"""

import math
import subprocess
import sys

import numpy as np
import pytest

from netdyno.bench import stats

X = [10.2, 9.8, 10.5, 11.1, 9.9, 10.0, 10.7, 10.3, 12.9, 10.1, 10.4, 9.7]
Y = [9.6, 9.5, 10.6, 9.4, 9.3, 10.8, 9.2, 9.1, 9.05]
# scipy.signal.lfilter([1], [1, -0.8], np.random.default_rng(3).normal(size=64)).round(2): neighbours are alike
CORRELATED = [
    *(2.04, -0.92, -0.32, -0.82, -1.11, -1.11, -2.9, -2.56, -2.91, 1.0, 1.02, 0.47, 0.09, -0.6, -1.53, -1.62),
    *(-0.81, -0.89, 0.25, -0.0, 0.02, 1.56, 1.8, 0.93, 0.56, 0.99, 2.73, 1.91, 1.29, 2.03, 0.74, 0.3),
    *(1.12, 1.48, 1.27, 1.69, -1.48, -0.16, -1.09, -2.54, -1.75, -0.7, -1.01, -1.88, -1.48, -1.24, 0.42, 1.08),
    *(1.06, 1.96, 1.36, 0.16, 0.71, 1.15, 0.71, -0.22, 0.06, -2.45, -1.27, -0.52, -2.06, -1.58, -2.23, -1.03),
]


def curve(*rows: tuple[float, float | None]) -> list[dict]:
    return [{"epoch": epoch, "train_s": train_s, "metric": metric} for epoch, (train_s, metric) in enumerate(rows, 1)]


def test_energy_for_1000_images() -> None:
    assert stats.energy_j_per_1000_images(500.0, 2_000) == 250.0
    for energy_j, images in ((0.0, 10), (-1.0, 10), (math.nan, 10), (math.inf, 10), (1e307, 1), (5.0, 0), (5.0, -1)):
        with pytest.raises(ValueError, match="no energy"):
            stats.energy_j_per_1000_images(energy_j, images)


def test_images_per_s() -> None:
    assert stats.images_per_s(12_800, 2.0) == 6400.0
    for images, seconds in ((1, 0.0), (1, -1.0), (1, math.nan), (1, math.inf), (-1, 1.0)):
        with pytest.raises(ValueError, match="no rate"):
            stats.images_per_s(images, seconds)


def test_seconds_to_target_sums_training_until_the_first_epoch_that_reaches_it() -> None:
    rows = curve((5.0, 97.0), (4.0, 99.0), (3.0, 98.5), (2.0, 99.2))
    assert stats.seconds_to_target(rows, 99.0, higher_is_better=True) == 9.0
    assert stats.seconds_to_target(rows, 97.0, higher_is_better=True) == 5.0
    assert stats.seconds_to_target(rows, 99.1, higher_is_better=True) == 14.0


def test_seconds_to_target_counts_the_final_metric_not_the_best() -> None:
    rows = curve((5.0, 97.0), (4.0, 99.5), (3.0, 98.5))
    assert stats.seconds_to_target(rows, 99.0, higher_is_better=True) is None


def test_seconds_to_target_where_lower_is_better() -> None:
    rows = curve((5.0, 90.0), (4.0, 30.0), (3.0, 20.0))
    assert stats.seconds_to_target(rows, 30.0, higher_is_better=False) == 9.0
    assert stats.seconds_to_target(rows, 19.0, higher_is_better=False) is None


def test_seconds_to_target_without_target_epochs_or_metric() -> None:
    assert stats.seconds_to_target([], 99.0, higher_is_better=True) is None
    assert stats.seconds_to_target(curve((5.0, 97.0)), None, higher_is_better=True) is None
    assert stats.seconds_to_target(curve((5.0, 99.0), (5.0, None)), 99.0, higher_is_better=True) is None
    assert stats.seconds_to_target(curve((5.0, 99.0), (5.0, math.nan)), 99.0, higher_is_better=True) is None
    assert stats.seconds_to_target(curve((5.0, None), (5.0, 99.0)), 99.0, higher_is_better=True) == 10.0


def test_median_and_quantiles() -> None:
    assert stats.median([3, 1, 2]) == 2.0
    assert stats.median([4, 1, 3, 2]) == 2.5
    assert stats.quantiles([4, 1, 3, 2], (0.0, 0.5, 0.9, 1.0)) == pytest.approx((1.0, 2.5, 3.7, 4.0))
    # scipy.stats.mstats.mquantiles(X, [.05, .25, .5, .9], alphap=1, betap=1)
    assert stats.quantiles(X, (0.05, 0.25, 0.5, 0.9)) == pytest.approx((9.755, 9.975, 10.25, 11.06))


@pytest.mark.parametrize(
    ("samples", "expected"),
    [  # coverage by hand: 1 - 2 (1/2)^n for the range
        ([7.0], (7.0, 7.0, 7.0, 0.0)),
        ([7.0, 9.0], (8.0, 7.0, 9.0, 0.5)),
        ([3.0, 1.0, 2.0], (2.0, 1.0, 3.0, 0.75)),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], (3.5, 1.0, 6.0, 0.96875)),
    ],
)
def test_median_interval_of_few_samples_is_their_range(samples: list[float], expected: tuple[float, ...]) -> None:
    assert stats.median_interval(samples) == expected


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [  # scipy.stats.quantile_test(samples, q=0, p=0.5).confidence_interval(0.95)
        (40, -0.5705885430127494, 0.24150018409746557),
        (41, -0.5440478173910653, 0.36928102698558257),
        (3000, -0.011562837375038151, 0.0713474474994687),
    ],
)
def test_median_interval_of_many_samples(count: int, low: float, high: float) -> None:
    interval = stats.median_interval(np.random.default_rng(count).normal(size=count))
    assert (interval.low, interval.high) == (low, high)
    assert interval.low < interval.median < interval.high
    assert 0.95 <= interval.coverage < 0.98


def test_median_interval_narrows_with_less_confidence() -> None:
    # scipy.stats.quantile_test(X, p=0.5).confidence_interval(0.95): third and third to last of twelve
    assert stats.median_interval(X)[1:3] == (9.9, 10.7)
    assert stats.median_interval(X).coverage == pytest.approx(1 - 2 * (1 + 12 + 66) / 4096)
    assert stats.median_interval(X, confidence=0.5)[1:3] == (10.1, 10.4)


def test_bootstrap_interval() -> None:
    # scipy.stats.bootstrap((X,), np.median, method="percentile", n_resamples=9999, rng=np.random.default_rng(0))
    assert stats.bootstrap_interval(X) == pytest.approx((9.95, 10.6))
    # scipy.stats.bootstrap((X,), np.mean, method="percentile", n_resamples=999, confidence_level=0.9,
    #                       rng=np.random.default_rng(7))
    mean = stats.bootstrap_interval(X, lambda picks: picks.mean(axis=-1), confidence=0.9, resamples=999, seed=7)
    assert mean == pytest.approx((10.133333333333333, 10.900833333333333))


@pytest.mark.parametrize(
    ("x", "y", "u", "p_value"),
    [
        ([1, 2, 3], [4, 5, 6], 0.0, 0.1),  # by hand: 2 of the 20 orders are as extreme
        ([4, 5, 6], [1, 2, 3], 9.0, 0.1),
        (X, Y, 89.0, 0.011757901541183275),  # scipy.stats.mannwhitneyu(X, Y, method="exact")
        # scipy.stats.mannwhitneyu(x, y, method="asymptotic"): ties; more than 2,500 pairs
        ([10.2, 9.8, 10.5, 10.5, 9.8, 10.0], [10.5, 11.0, 10.2, 11.2, 12.0], 3.5, 0.041722710069543374),
        (range(0, 120, 2), range(7, 107, 2), 1575.0, 0.6547135743048665),
        ([5, 5, 5], [5, 5], 3.0, 1.0),
        ([1, 4], [2, 3], 2.0, 1.0),
    ],
)
def test_mann_whitney(x: list[float], y: list[float], u: float, p_value: float) -> None:
    result = stats.mann_whitney(list(x), list(y))
    assert result.u == u
    assert result.p_value == pytest.approx(p_value, rel=1e-12)


def test_mean_error_of_independent_samples_is_the_textbook_one() -> None:
    # scipy.stats.sem(X); no two neighbours of X resemble each other
    assert stats.mean_error(X) == pytest.approx(0.24903855528853766)
    assert stats.mean_error([1.0, 3.0]) == pytest.approx(1.0)
    assert stats.mean_error([0.1] * 7) == pytest.approx(0.0, abs=1e-15)


def test_mean_error_of_correlated_samples_is_wider() -> None:
    # deviations = CORRELATED - mean; c = scipy.signal.correlate(deviations, deviations)[63:];
    # 1 + 2 * cumsum(c[1:] / c[0]) at the first lag >= 5 times it, lag 13; times scipy.stats.sem(CORRELATED)
    assert stats.autocorrelation_time(CORRELATED) == pytest.approx(1.9849113079872729)
    assert stats.mean_error(CORRELATED) == pytest.approx(0.24880998426017997)


def test_mean_error_holds_for_a_known_process() -> None:
    # x(t) = φ x(t-1) + noise: the mean of n has standard error 1 / ((1 - φ) √n), three times the one that ignores φ.
    phi, count = 0.8, 1000
    noise = np.random.default_rng(5).normal(size=(100, count))
    chains = np.zeros_like(noise)
    for step in range(count):
        chains[:, step] = phi * chains[:, step - 1] + noise[:, step]
    errors = [stats.mean_error(chain) for chain in chains]
    assert np.mean(errors) == pytest.approx(1 / ((1 - phi) * math.sqrt(count)), rel=0.1)


def test_constant_samples_have_no_autocorrelation() -> None:
    assert stats.autocorrelation_time([0.1] * 50) == 1.0
    assert stats.autocorrelation_time([1.0]) == 1.0


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [1.0, math.inf], [[1.0], [2.0]]])
def test_samples_that_are_none_are_refused(samples: list) -> None:
    calls = (stats.median, stats.median_interval, stats.bootstrap_interval, stats.mean_error)
    for call in calls:
        with pytest.raises(ValueError, match="samples"):
            call(samples)
    with pytest.raises(ValueError, match="samples"):
        stats.quantiles(samples, (0.5,))
    with pytest.raises(ValueError, match="samples"):
        stats.mann_whitney([1.0], samples)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="two samples"):
        stats.mean_error([1.0])
    for confidence in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match="confidence"):
            stats.median_interval([1.0], confidence)


def test_statistics_need_no_torch() -> None:
    code = "import netdyno.bench.stats, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
