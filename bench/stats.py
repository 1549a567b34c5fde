"""Statistics of measured samples: pure functions of numbers, without torch.

Records keep raw samples; every derived number in a table, a gate or a report comes from one of these functions.
Samples are one-dimensional, finite and not empty (anything else is a ValueError); results have the samples' unit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Samples = Sequence[float] | Floats


class MedianInterval(NamedTuple):
    """A median and an interval for the median of the population behind it."""

    median: float
    low: float
    high: float
    coverage: float  # the probability that [low, high] holds the population's median, whatever its distribution


class MannWhitney(NamedTuple):
    """Statistic and two-sided p-value of a Mann-Whitney test."""

    u: float  # pairs (x, y) with x > y, ties counted half
    p_value: float


def images_per_s(images: int, seconds: float) -> float:
    """Images that were really trained on, once each, divided by the time of exactly those steps."""
    if images < 0 or not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"no rate from {images} images in {seconds} s")
    return images / seconds


def energy_j_per_1000_images(energy_j: float, images: float) -> float:
    """Joules for 1,000 images, of the energy in which `images` were trained on."""
    energy = 1000 * energy_j / images if images > 0 else math.nan
    if not (math.isfinite(energy) and energy > 0):
        raise ValueError(f"no energy for 1,000 images from {energy_j} J for {images} images")
    return energy


def seconds_to_target(
    curve: Sequence[Mapping[str, Any]],
    target: float | None,
    *,
    higher_is_better: bool,
    also_at_least: Mapping[str, float] | None = None,
) -> float | None:
    """Training time, in seconds, until the first evaluation whose metric reaches `target`.

    `curve` is a record's `accuracy.curve`: a row an evaluation, with `train_s` and `metric`. A run reaches its target
    by its final metric, not its best: None where the last row's metric misses the target, is null or is not a number,
    and where there is no target. `also_at_least` names further metrics (a row's `metrics`) that the same row must
    reach.
    """

    def reaches(row: Mapping[str, Any]) -> bool:
        metric = row["metric"]
        if metric is None or target is None:
            return False
        further = row.get("metrics") or {}
        if any(not further.get(name, -math.inf) >= least for name, least in (also_at_least or {}).items()):
            return False
        return metric >= target if higher_is_better else metric <= target

    if not curve or not reaches(curve[-1]):
        return None
    first = next(number for number, row in enumerate(curve) if reaches(row))
    return float(sum(row["train_s"] for row in curve[: first + 1]))


def median(samples: Samples) -> float:
    """The middle sample, or the mean of the two in the middle."""
    return float(statistics.median(_array(samples).tolist()))  # of few samples fifty times as fast as NumPy's


def quantiles(samples: Samples, probabilities: Sequence[float]) -> tuple[float, ...]:
    """Quantiles by linear interpolation between order statistics (Hyndman and Fan 1996, type 7)."""
    return tuple(float(value) for value in np.quantile(_array(samples), probabilities))


def median_interval(samples: Samples, confidence: float = 0.95) -> MedianInterval:
    """The median with the shortest symmetric pair of order statistics that covers it with `confidence`.

    Free of assumptions about the distribution, and deterministic. Below six samples no pair reaches 95 %: the interval
    is then their range, and `coverage` says what that is worth (three samples: 75 %). Source: David and Nagaraja,
    Order Statistics, 3rd ed., section 7.1.
    """
    _check_confidence(confidence)
    ordered = np.sort(_array(samples))
    count = len(ordered)
    # The interval from the k-th smallest to the k-th largest misses the median when fewer than k samples lie on one
    # side of it: probability 2 P(Binomial(n, 1/2) < k). Integers, because floats underflow beyond 1,000 samples.
    outcomes = 1 << count
    term = misses = 1
    rank = 1
    while rank < (count + 1) // 2:
        term = term * (count - rank + 1) // rank
        if 2 * (misses + term) / outcomes > 1 - confidence:
            break
        misses += term
        rank += 1
    low, high = float(ordered[rank - 1]), float(ordered[count - rank])
    return MedianInterval(float(np.median(ordered)), low, high, max(0.0, 1 - 2 * misses / outcomes))


def bootstrap_interval(
    samples: Samples,
    statistic: Callable[[Floats], Floats] = lambda resamples: np.median(resamples, axis=-1),
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic (Efron 1979); the same seed gives the same interval.

    `statistic` maps [resamples, n] to [resamples]. With few samples the interval is too narrow: below about ten,
    `median_interval` is the honest one.
    """
    _check_confidence(confidence)
    values = _array(samples)
    picks = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistic(values[picks]), (tail, 1 - tail))
    return float(low), float(high)


def mann_whitney(x: Samples, y: Samples) -> MannWhitney:
    """Two-sided Mann-Whitney test: could `x` and `y` come from the same distribution?

    Exact up to 2,500 pairs without ties, else the normal approximation with corrections for ties and continuity.
    Source: Mann and Whitney 1947.
    """
    x_array, y_array = _array(x), _array(y)
    x_count, y_count = len(x_array), len(y_array)
    pairs = x_count * y_count
    differences = np.subtract.outer(x_array, y_array)
    u = float((differences > 0).sum() + 0.5 * (differences == 0).sum())
    extreme = max(u, pairs - u)
    _, ties = np.unique(np.concatenate([x_array, y_array]), return_counts=True)
    if ties.max() == 1 and pairs <= 2500:
        counts = _u_counts(x_count, y_count)
        p_value = 2 * sum(counts[round(extreme) :]) / sum(counts)
    else:
        total = x_count + y_count
        variance = pairs / 12 * (total + 1 - float((ties**3 - ties).sum()) / (total * (total - 1)))
        if variance == 0:  # all samples are equal
            return MannWhitney(u, 1.0)
        p_value = math.erfc((extreme - pairs / 2 - 0.5) / math.sqrt(2 * variance))
    return MannWhitney(u, min(1.0, p_value))


def autocorrelation_time(samples: Samples) -> float:
    """How many successive samples carry the information of one independent sample; at least 1.

    1 + 2 Σ ρ(k) over lags up to the first one that is at least five times the sum so far (Sokal 1997, section 3). Not
    below 1: an alternation that seems to narrow the error is more often chance than fact.
    """
    values = _array(samples)
    if values.min() == values.max():  # their mean is rounded, so that their deviations need not be 0
        return 1.0
    deviations = values - values.mean()
    count = len(values)
    variance = float(deviations @ deviations)
    time = 1.0
    for lag in range(1, count):
        time += 2 * float(deviations[:-lag] @ deviations[lag:]) / variance
        if lag >= 5 * time:
            break
    return max(1.0, time)


def mean_error(samples: Samples) -> float:
    """Standard error of the mean of successive samples, such as the block times of one run.

    s ÷ √n, widened by the root of their autocorrelation time: neighbouring blocks share clocks and temperature, so that
    n of them say less than n independent ones. Needs at least two samples, and is to be trusted from about 50
    autocorrelation times on.
    """
    values = _array(samples)
    if len(values) < 2:
        raise ValueError("the error of a mean needs at least two samples")
    return float(values.std(ddof=1)) * math.sqrt(autocorrelation_time(values) / len(values))


def _array(samples: Samples) -> Floats:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("samples must be one-dimensional, finite and not empty")
    return values


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")


def _u_counts(x_count: int, y_count: int) -> list[int]:
    """In how many orders of the samples U takes each value 0 … x_count · y_count, when both come from one population.

    The counts are the coefficients of the Gaussian binomial coefficient, Π (1 - qʸ⁺ⁱ) ÷ (1 - qⁱ) for i = 1 … x_count.
    """
    size = x_count * y_count + 1
    counts = [1] + [0] * (size - 1)
    for factor in range(1, x_count + 1):
        for power in range(size - 1, y_count + factor - 1, -1):
            counts[power] -= counts[power - y_count - factor]
        for power in range(factor, size):
            counts[power] += counts[power - factor]
    return counts
