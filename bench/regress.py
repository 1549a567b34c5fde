"""Verdicts: did a change make a case slower, hungrier or less accurate? Pure: records → verdicts, no files, no torch.

What is compared: the runs of one case on one machine, all of the newest code and versions that a side holds. Two sides
whose timing version, data, target or recipe differ are refused with a reason; with another recipe, a case that has a
target is judged by its time to target and its final metric alone. A case is judged by each of `QUANTITIES`.

When a change is called, REGRESSION or IMPROVEMENT, all three must hold:

1. *Significant.* The exact permutation test of rank sums (Mann and Whitney 1947, ties by mid-ranks) over runs in
   fresh processes, at the level `ALPHA` ÷ the number of tests of the whole comparison (Bonferroni): at most one
   comparison in a hundred calls a change where there is none, however many quantities it holds. Where so few runs
   can't reach that level, AMBIGUOUS says how many can.
2. *Beyond the margin.* The effect, the median of all ratios new ÷ old (Hodges and Lehmann 1963), is larger than the
   range from the 10th to the 90th percentile of the old side's own runs, and than the quantity's `floor`. The range is
   not divided by the root of the number of runs: sessions differ more than runs of one session, and repeats don't
   average that out. Where both sides ran by turns they do: then it is the range × √(1/old runs + 1/new runs).
3. *Not the clock's.* Where the GPU's clocks differ, times in clock cycles say the same. A regression in only one of
   the two is AMBIGUOUS, an improvement in only one is SAME.

Where both sides ran by turns, a seed for each pair, the pairs are judged as soon as they are enough to reach the level
with one or two that disagree: their ratios, which only a drift within a pair touches, by the permutation test of signed
ranks and the median of all means of two ratios (Wilcoxon 1945, Hodges and Lehmann 1963), with the range of the ratios ÷
√pairs as the margin. Not so what is judged over seeds.

Everything else is SAME, or AMBIGUOUS where the new side is worse by more than the margin and the runs overlap all the
same, or MISSING where the new side lacks a case, a run or a number. Nothing that could not be compared is ever SAME.

Accuracy is judged over *seeds*, since runs of one seed repeat one another: one-sided (only a loss is called), and with
a margin that narrows with the number of seeds. With too few seeds, what is worse by more than the margin is AMBIGUOUS.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from .stats import Floats, median, seconds_to_target
from .summary import at, energy_j_per_1000_images, texts

Record = Mapping[str, Any]
Call = Literal["REGRESSION", "IMPROVEMENT", "SAME", "AMBIGUOUS", "MISSING"]

ALPHA = 0.01  # probability that a comparison without a change calls any
NOISE_RUNS = 10  # with fewer runs of the old side, the new side's spread counts for the margin too
RUNS_USED = 40  # the newest of a side; more would narrow an interval that the margin widens again
WIDEST_MARGIN = 0.5  # runs that spread more can't show that nothing changed
CLOCKS_DIFFER = 0.01  # as a share of the clock
CASE = ("workload", "division", "tuning", "mode", "suite", "gpus", "scaling")
RECIPE = "recipe's "
SPEED = ("throughput", "step time")
OF_ANY_RECIPE = ("time to target", "final metric")  # what a workload is judged by when its recipe changes


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Something that a record measures and a verdict judges; `read` gives None where a record lacks it."""

    name: str
    unit: str
    read: Callable[[Record], float | None]
    floor: float  # no smaller change is called: a share, or for a difference in the quantity's unit
    higher_is_better: bool = False
    difference: bool = False  # effects are new - old instead of new ÷ old
    one_sided: bool = False  # only a loss is called
    clocked: bool = False  # lasts as many clock cycles at any clock
    sample: Callable[[Record], Hashable] | None = None  # runs that share it are one sample; None: every run is one
    decides: bool = True  # False: shown, but no gate stands or falls by it


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one quantity of one case, or, as quantity "case", of the case as a whole.

    `effect`, its 95 % interval and `margin` are shares of the old value (0.05: 5 % more), with `difference` in `unit`.
    """

    machine: str
    case: str
    quantity: str
    verdict: Call
    reason: str
    unit: str = ""
    decides: bool = True
    difference: bool = False
    higher_is_better: bool = False
    old: float | None = None  # medians
    new: float | None = None
    old_runs: int = 0  # samples: runs, or seeds
    new_runs: int = 0
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    p_value: float | None = None
    level: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All verdicts of a comparison, and notes on what was left out of it."""

    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()

    def called(self, call: Call) -> list[Verdict]:
        """The verdicts of one kind that decide."""
        return [verdict for verdict in self.verdicts if verdict.verdict == call and verdict.decides]


@dataclass(frozen=True, kw_only=True)
class Side:
    """The runs of one case on one machine by the newest code and versions, oldest first."""

    machine: str
    case: str
    runs: tuple[Record, ...]  # that ended ok
    failed: tuple[Record, ...]
    left_out: int  # records of older code or other versions
    conditions: Mapping[str, Any]  # of the newest run: what must not differ between two sides; empty without runs
    mixed: tuple[str, ...]  # conditions in which the runs differ among themselves


# Quantities


def _number(record: Record, *path: str) -> float | None:
    """A finite number; None for anything else."""
    value = at(record, *path)
    if type(value) is float:
        return value if abs(value) < 1e300 else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e300 else None  # false for NaN too


def _positive(record: Record, *path: str) -> float | None:
    value = _number(record, *path)
    return value if value is not None and value > 0 else None


def step_s(record: Record) -> float | None:
    """Seconds of a step in the median block: blind to rare stalls, and steadier than the mean for it."""
    blocks, steps = at(record, "timing", "block_s"), _positive(record, "timing", "block_steps")
    if not isinstance(blocks, list) or not blocks or steps is None:
        return None
    try:
        whole = min(blocks) > 0 and math.isfinite(sum(blocks))
    except (TypeError, OverflowError):
        whole = False
    if not whole:
        return None
    return statistics.median(blocks) / steps


def _time_to_target(record: Record) -> float | None:
    if at(record, "accuracy", "seeds"):  # the open division: the mean of all seeds, whose mean metric is the final one
        return _positive(record, "accuracy", "train_s_to_target")
    return _to_target(record, lambda epoch: _positive(epoch, "train_s"))


def _to_target(record: Record, length: Callable[[Mapping[str, Any]], float | None]) -> float | None:
    """The sum of `length` over the curve's rows to the target; a run that misses it counts as one more than it has."""
    curve, target = at(record, "accuracy", "curve"), _number(record, "accuracy", "target")
    if target is None or not isinstance(curve, list) or not curve:
        return None
    lengths = [length(epoch) for epoch in curve]
    metrics = [_number(epoch, "metric") for epoch in curve]
    if None in lengths or metrics[-1] is None:
        return None
    rows = [
        {**epoch, "metric": metric, "train_s": one} for epoch, metric, one in zip(curve, metrics, lengths, strict=True)
    ]
    also = at(record, "accuracy", "also_at_least")
    reached = seconds_to_target(
        rows,
        target,
        higher_is_better=at(record, "accuracy", "higher_is_better") is not False,
        also_at_least=also if isinstance(also, Mapping) else None,
    )
    if reached is None:
        return sum(one for one in lengths if one is not None) * (1 + 1 / len(curve))
    return reached


def _epochs_to_target(record: Record) -> float | None:
    rows = _to_target(record, lambda row: 1.0)
    return rows and rows * (_number(record, "case", "recipe", "evaluate_every") or 1)


def _seed(record: Record) -> Hashable:
    return json.dumps(at(record, "case", "seed"))


def _timed(record: Record) -> Hashable:
    """The seed; a run of many seeds is a time of its own, since all runs have the same ones."""
    return record["id"] if at(record, "accuracy", "seeds") else _seed(record)


def _cold_start(record: Record) -> Hashable:
    """Runs that share a compiler cache carry the one cold start that filled it."""
    return _number(record, "compile", "cold_s"), _number(record, "compile", "cold_start_s")


QUANTITIES: tuple[Quantity, ...] = (  # of those of one name, the first that the old side has counts
    Quantity(
        name="throughput",
        unit="images/s",
        read=lambda record: _positive(record, "throughput", "images_per_s"),
        floor=0.01,
        higher_is_better=True,
        clocked=True,
    ),
    Quantity(name="step time", unit="s", read=step_s, floor=0.01, clocked=True),
    Quantity(
        name="peak memory",
        unit="MiB by NVML",
        # Held after training, and with it what torch reserved at its peak. The sampled peak now and then meets the
        # trials of cuDNN before, which take 100 MiB for a moment.
        read=lambda record: _positive(record, "memory", "nvml_process_mib"),
        floor=0.01,
    ),
    Quantity(
        name="peak memory",
        unit="MiB by NVML, sampled",
        read=lambda record: _positive(record, "memory", "nvml_process_peak_mib"),  # all that older records have
        floor=0.01,
    ),
    Quantity(
        name="peak memory",
        unit="MiB by torch",
        read=lambda record: _positive(record, "memory", "peak_allocated_mib"),
        floor=0.01,
    ),
    Quantity(
        name="peak memory",
        unit="MiB of host",
        read=lambda record: _positive(record, "memory", "host_rss_peak_mib"),
        floor=0.01,
    ),
    Quantity(name="compile, warm", unit="s", read=lambda record: _positive(record, "compile", "warm_s"), floor=0.05),
    Quantity(
        name="compile, cold",
        unit="s",
        read=lambda record: _positive(record, "compile", "cold_s"),
        floor=0.25,
        sample=_cold_start,
        decides=False,  # one measurement for all runs that share a cache
    ),
    Quantity(name="energy", unit="J/1,000 images", read=energy_j_per_1000_images, floor=0.02),
    Quantity(
        name="time to target",
        unit="s",
        read=_time_to_target,
        floor=0.02,
        sample=_timed,
    ),
    Quantity(
        name="epochs to target",
        unit="epochs",
        read=_epochs_to_target,
        floor=0.02,
        one_sided=True,
        sample=_seed,
    ),
    Quantity(
        name="final metric",
        unit="",  # the metric's, and so are the floor and the direction: see `quantities`
        read=lambda record: _number(record, "accuracy", "final"),
        floor=0.0,
        difference=True,
        one_sided=True,
        sample=_seed,
    ),
)
METRIC_FLOORS = {"%": 0.1, "dB": 0.05, "×10³": 0.5}


def quantities(runs: Sequence[Record]) -> list[Quantity]:
    """What `runs` measure."""
    found: dict[str, Quantity] = {}
    for quantity in QUANTITIES:
        if quantity.name not in found and any(quantity.read(run) is not None for run in runs):
            found[quantity.name] = quantity
    if "final metric" in found:
        accuracy = at(runs[-1], "accuracy") or {}
        unit = _clean(accuracy.get("unit"))
        found["final metric"] = replace(
            found["final metric"],
            unit=f"{unit} {_clean(accuracy.get('metric'))}",
            floor=METRIC_FLOORS.get(unit, 0.0),
            higher_is_better=accuracy.get("higher_is_better") is not False,
        )
    return list(found.values())


# Sides


def sides(records: Iterable[Record]) -> dict[tuple[str, ...], Side]:
    """The newest runs of every machine and case."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        case = at(record, "case") or {}
        named = (str(at(case, name)) for name in CASE)
        groups.setdefault((str(at(record, "machine", "slug")), *named), []).append(record)
    return {key: _side(_clean(key[0]), group) for key, group in groups.items()}


def _side(machine: str, group: list[Record]) -> Side:
    group.sort(key=lambda record: (str(record.get("created_utc")), str(record.get("id"))))
    build = build_of(group[-1])
    newest = [record for record in group if build_of(record) == build]
    whole = [record for record in newest if record.get("status") == "ok"]
    failed = tuple(record for record in newest if record.get("status") != "ok")
    every = [conditions_of(record) for record in whole]
    conditions = _named(every[-1]) if every else {}
    mixed = {name: None for other in every if other != every[-1] for name in _differing(_named(other), conditions)}
    return Side(
        machine=machine,
        case=case_name(group[-1]),
        runs=tuple(whole[-RUNS_USED:]),
        failed=failed,
        left_out=len(group) - len(newest),
        conditions=conditions,
        mixed=tuple(mixed),
    )


def case_name(record: Record) -> str:
    """ "mnist-cnn tuned e2e quick"; division, number of GPUs and scaling where they aren't the common ones."""
    case = {name: _clean(at(record, "case", name)) for name in CASE}
    parts = [case["workload"], case["tuning"], case["mode"], case["suite"]]
    parts += [case["division"]] if case["division"] not in ("closed", case["suite"]) else []
    parts += [f"{case['gpus']} GPUs"] if case["gpus"] != "1" else []
    parts += [case["scaling"]] if at(record, "case", "scaling") else []
    return " ".join(parts)


def build_of(record: Record) -> tuple[Any, Any]:
    """What was measured: the code, and the versions of what it ran on."""
    return record.get("code"), at(record, "machine", "versions")


def conditions_of(record: Record) -> tuple[Any, ...]:
    """What must be the same in records that are compared."""
    data, accuracy = at(record, "data"), at(record, "accuracy") or {}
    of_data = [at(data, name) for name in ("name", "label", "sha256")]
    target = "of the run" if at(accuracy, "references") else at(accuracy, "target")  # measured anew in every run
    version = at(record, "timing", "timing_version")
    seeds, recipe = (at(record, "case", name) for name in ("seeds", "recipe"))
    return version, of_data, target, seeds, recipe


def _named(conditions: tuple[Any, ...]) -> dict[str, Any]:
    timing_version, data, target, seeds, recipe = conditions
    entries = recipe if isinstance(recipe, dict) else {}
    return {
        "timing version": timing_version,
        "data": data,
        "set of seeds": seeds,
        "target": target,
        **{f"{RECIPE}{_clean(name)}": entries[name] for name in entries},
    }


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _clean(value: Any) -> str:
    """Text of a record on one line, without control or direction characters, at most 80 long."""
    text = str(value)
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(text.split())[:80]


# Comparison


class Test(NamedTuple):
    """One quantity of two sides that may be compared, with its values in their runs and in the calm ones."""

    quantity: Quantity
    old: Side
    new: Side
    noise: Side
    old_values: list[float | None]
    new_values: list[float | None]
    noise_values: list[float | None]


def compare(
    old: Iterable[Record],
    new: Iterable[Record],
    *,
    noise: Iterable[Record] | None = None,
    by_turns: bool = False,
    looks: int = 1,
) -> Comparison:
    """Every case of `old` against the same case of `new`.

    Args:
        noise: runs of the same cases, without a change among them, from which the margins come instead of from `old`.
        by_turns: whether the runs of `old` and `new` alternated, so that a drift of the machine fell on both alike.
        looks: how often the caller looks at growing samples before it stops; shares out `ALPHA`.
    """
    olds, news = sides(old), sides(new)
    calm = olds if noise is None else sides(noise)
    verdicts: list[Verdict] = []
    tests: list[Test] = []
    for key, side in olds.items():
        other = news.get(key)
        if other is None:
            machines = {_clean(machine) for machine, *case in news if case == list(key[1:])}
            verdicts.append(_missing(side, machines))
            continue
        found = comparable(side, other)
        verdicts += _whole(side, other, found)
        tests += [_test(quantity, side, other, calm.get(key, side)) for quantity in found]
    level = ALPHA / looks / max(1, sum(test.quantity.decides for test in tests))
    verdicts += [_judge(test, level, by_turns) for test in tests]
    places = {(side.machine, side.case): place for place, side in enumerate(olds.values())}
    verdicts.sort(key=lambda verdict: places[verdict.machine, verdict.case])
    notes = [
        f"{_where(side)}: {side.left_out} records of other code or versions left out"
        for side in [*olds.values(), *news.values()]
        if side.left_out
    ]
    notes += [
        f"{_where(side)}: another {', another '.join(_differing(side.conditions, news[key].conditions))}; judged by"
        f" {' and '.join(OF_ANY_RECIPE)} alone"
        for key, side in olds.items()
        if key in news and side.conditions != news[key].conditions and comparable(side, news[key])
    ]
    notes += [
        f"{_where(side)}: on another card than before"
        for key, side in olds.items()
        if key in news and _cards(side) and _cards(news[key]) and not _cards(side) & _cards(news[key])
    ]
    notes += [f"{_where(news[key])}: has nothing to be compared with" for key in news if key not in olds]
    return Comparison(verdicts=tuple(verdicts), notes=tuple(notes))


def _cards(side: Side) -> set[str]:
    """Fingerprints of the cards that the runs were on, as far as they tell."""
    return {card for run in side.runs for card in texts(run, "gpu", "fingerprints")}


def _test(quantity: Quantity, old: Side, new: Side, noise: Side) -> Test:
    values, new_values = ([quantity.read(run) for run in side.runs] for side in (old, new))
    calm = values if noise is old else [quantity.read(run) for run in noise.runs]
    return Test(quantity, old, new, noise, values, new_values, calm)


def _where(side: Side) -> str:
    return f"{side.case} on {side.machine}"


def _of_case(old: Side, call: Call, reason: str) -> Verdict:
    return Verdict(machine=old.machine, case=old.case, quantity="case", verdict=call, reason=reason)


def _missing(old: Side, machines: set[str]) -> Verdict:
    """A case without a new side, which may be recorded on other machines."""
    if machines:
        elsewhere = ", ".join(sorted(machines))
        return _of_case(old, "AMBIGUOUS", f"not comparable: recorded on {elsewhere}, not on {old.machine}")
    return _of_case(old, "MISSING", "no record of it on the new side")


def _whole(old: Side, new: Side, found: Sequence[Quantity]) -> list[Verdict]:
    """What can be said of a case before any number of what is comparable is looked at."""

    def verdict(call: Call, reason: str) -> list[Verdict]:
        return [_of_case(old, call, reason)]

    if new.failed:
        ends = sorted({_clean(record.get("status")) for record in new.failed})
        first = _clean(new.failed[0].get("reason"))
        count = len(new.failed) + len(new.runs)
        return verdict("MISSING", f"{len(new.failed)} of {count} runs ended {' or '.join(ends)}: {first}")
    if not old.runs:
        return verdict("AMBIGUOUS", "not comparable: no run of the old side ended ok")
    if old.mixed or new.mixed:
        names = " and more than one ".join(dict.fromkeys([*old.mixed, *new.mixed]))
        return verdict("AMBIGUOUS", f"not comparable: the runs of one code have more than one {names}")
    if not found and not quantities(old.runs):
        return verdict("AMBIGUOUS", "not comparable: the old side holds no number")
    if not found:
        names = ", another ".join(_differing(old.conditions, new.conditions))
        return verdict("AMBIGUOUS", f"not comparable: another {names}")
    return []


def comparable(old: Side, new: Side) -> list[Quantity]:
    """What can be compared between two sides: nothing under other conditions, unless it is the recipe.

    A workload with a target may be trained in any way that reaches it: time to target and final metric still count.
    """
    if not old.runs or not new.runs or old.mixed or new.mixed:
        return []
    found = quantities(old.runs)
    differing = _differing(old.conditions, new.conditions)
    if not differing:
        return found
    free = [quantity for quantity in found if quantity.name in OF_ANY_RECIPE]
    return free if len(free) == len(OF_ANY_RECIPE) and all(name.startswith(RECIPE) for name in differing) else []


def _judge(test: Test, level: float, by_turns: bool) -> Verdict:
    quantity = test.quantity
    verdict = Verdict(
        machine=test.old.machine,
        case=test.old.case,
        quantity=quantity.name,
        unit=quantity.unit,
        decides=quantity.decides,
        difference=quantity.difference,
        higher_is_better=quantity.higher_is_better,
        verdict="MISSING",
        reason="",
        level=level,
    )
    lacking = test.new_values.count(None)
    old, new, paired = _samples_of_both(test, test.old_values, test.new_values, level, by_turns)
    verdict = replace(
        verdict, old=median(old), old_runs=len(old), new_runs=len(new), new=median(new) if len(new) else None
    )
    if lacking:
        return replace(verdict, reason=f"{lacking} of {len(test.new.runs)} runs have no such number")
    margin = _margin_of_pairs(quantity, old, new) if paired else _margin(test, len(old), len(new), by_turns)
    decision = decide(quantity, old, new, margin=margin, level=level, paired=paired)
    verdict = replace(verdict, margin=margin, **decision._asdict())
    clock = _clock_ratio(test) if quantity.clocked else 1.0
    if abs(clock - 1) > CLOCKS_DIFFER:
        cycles, new_cycles = ([_per_clock(quantity, run) for run in side.runs] for side in (test.old, test.new))
        old, new, paired = _samples_of_both(test, cycles, new_cycles, level, by_turns)
        if not len(old) or not len(new):
            return verdict
        by_clock = decide(quantity, old, new, margin=margin, level=level, paired=paired)
        clocks = f"the clock was {abs(clock - 1):.1%} {'higher' if clock > 1 else 'lower'}"
        if by_clock.verdict != decision.verdict:
            reason = f"{clocks}; {decision.verdict} in time, {by_clock.verdict} in clock cycles"
            harmless = {decision.verdict, by_clock.verdict} == {"IMPROVEMENT", "SAME"}
            return replace(verdict, verdict="SAME" if harmless else "AMBIGUOUS", reason=reason)
        return replace(verdict, reason=f"{decision.reason}; {clocks}, and clock cycles say the same")
    return verdict


def _samples_of_both(
    test: Test, old_values: Sequence[float | None], new_values: Sequence[float | None], level: float, by_turns: bool
) -> tuple[Floats, Floats, bool]:
    """The samples of both sides, and whether they are pairs, one by one."""
    if by_turns and test.quantity.sample is None:
        old, new = _pairs(test, old_values, new_values)
        if 8 / 2 ** np.count_nonzero(new - old) <= level:
            return old, new, True
    return _samples(test.quantity, test.old, old_values), _samples(test.quantity, test.new, new_values), False


def _pairs(test: Test, old_values: Sequence[float | None], new_values: Sequence[float | None]) -> tuple[Floats, Floats]:
    """The values of runs of one seed; of none where a side has two runs of a seed."""
    old, new = (
        {_seed(run): value for run, value in zip(side.runs, values, strict=True)}
        for side, values in ((test.old, old_values), (test.new, new_values))
    )
    if len(old) < len(test.old.runs) or len(new) < len(test.new.runs):
        return np.empty(0), np.empty(0)
    found = [(value, new[seed]) for seed, value in old.items() if value is not None and new.get(seed) is not None]
    return np.array([one for one, _ in found]), np.array([other for _, other in found])


def _samples(quantity: Quantity, side: Side, values: Sequence[float | None]) -> Floats:
    """The quantity's samples: its value in each run that has one, or its median over the runs that are one sample."""
    if quantity.sample is None:
        return np.array([value for value in values if value is not None])
    groups: dict[Hashable, list[float]] = {}
    for run, value in zip(side.runs, values, strict=True):
        if value is not None:
            groups.setdefault(quantity.sample(run), []).append(value)
    return np.array([statistics.median(group) for group in groups.values()])


def _margin(test: Test, old_count: int, new_count: int, by_turns: bool) -> float:
    """The smallest effect that is called: see the module's docstring; as a share, or a difference in the unit."""
    quantity = test.quantity
    every_run = replace(quantity, sample=None)
    noise = _scaled(quantity, _samples(quantity, test.noise, test.noise_values))
    over_seeds = quantity.sample is not None and len(noise) >= NOISE_RUNS // 2
    if not over_seeds:
        noise = _scaled(quantity, _samples(every_run, test.noise, test.noise_values))
    if len(noise) < NOISE_RUNS and not over_seeds:
        both = ((test.old, test.old_values), (test.new, test.new_values))
        runs = [_scaled(quantity, _samples(every_run, side, values)) for side, values in both]
        noise = np.concatenate([side - np.median(side) for side in runs])
    averaged = over_seeds or by_turns
    spread = _range(noise) * (math.sqrt(1 / old_count + 1 / new_count) if averaged else 1.0)
    return max(quantity.floor, _unscaled(quantity, spread))


def _margin_of_pairs(quantity: Quantity, old: Floats, new: Floats) -> float:
    spread = _range(_scaled(quantity, new) - _scaled(quantity, old)) / math.sqrt(len(old))
    return max(quantity.floor, _unscaled(quantity, spread))


def _range(values: Floats) -> float:
    """From the 10th to the 90th percentile; of few values nearly the whole."""
    low, high = np.quantile(values, (0.1, 0.9), method="weibull")
    return float(high - low)


def _scaled(quantity: Quantity, values: Floats) -> Floats:
    return values if quantity.difference else np.log(values)


def _unscaled(quantity: Quantity, effect: float) -> float:
    return float(effect) if quantity.difference else math.expm1(effect)


def _clock_ratio(test: Test) -> float:
    """New over old mean SM clock; 1 where a side does not know it."""
    clocks = [[_positive(run, "gpu", "sm_clock_mhz_mean") for run in side.runs] for side in (test.old, test.new)]
    old, new = ([clock for clock in side if clock is not None] for side in clocks)
    return median(new) / median(old) if old and new else 1.0


def _per_clock(quantity: Quantity, run: Record) -> float | None:
    value, clock = quantity.read(run), _positive(run, "gpu", "sm_clock_mhz_mean")
    if value is None or clock is None:
        return None
    return value / clock if quantity.higher_is_better else value * clock


class Decision(NamedTuple):
    verdict: Call
    reason: str
    effect: float
    low: float | None
    high: float | None
    p_value: float


def decide(
    quantity: Quantity, old: Floats, new: Floats, *, margin: float, level: float, paired: bool = False
) -> Decision:
    """The rule for one quantity, of samples that are finite and not empty; `paired` where they are one by one."""
    old, new = _scaled(quantity, old), _scaled(quantity, new)
    if paired:
        ratios = _means_of_two(new - old)
        cut = _interval_cut_of_pairs(len(old))
        less, greater = signed_rank_test(new - old)
    else:
        ratios = np.sort(np.subtract.outer(new, old), axis=None)
        cut = _interval_cut(len(old), len(new))
        less, greater = rank_test(old, new)
    effect = _unscaled(quantity, (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2)
    low, high = (_unscaled(quantity, ratios[cut - 1]), _unscaled(quantity, ratios[-cut])) if cut else (None, None)
    worse_p, better_p = (less, greater) if quantity.higher_is_better else (greater, less)
    p_value = worse_p if quantity.one_sided else min(1.0, 2 * min(worse_p, better_p))
    worse = (effect < 0) == quantity.higher_is_better and effect != 0
    beyond = (effect > margin or effect < (-margin if quantity.difference else 1 / (1 + margin) - 1)) and (
        worse or not quantity.one_sided
    )

    def decision(call: Call, reason: str) -> Decision:
        return Decision(call, reason, effect, low, high, p_value)

    needed = repeats_needed(level, one_sided=quantity.one_sided)
    if _smallest_p(len(old), len(new), one_sided=quantity.one_sided) > level:
        what = "repeats" if quantity.sample is None else "seeds" if quantity.sample is _seed else "cold starts"
        needs = f"needs at least {needed} {what} a side, has {len(old)} and {len(new)}"
        if quantity.sample is None or (beyond and worse):
            return decision("AMBIGUOUS", needs)
        return decision("SAME", f"{'better' if beyond else 'within the margin'}; to say more it {needs}")
    if beyond and p_value <= level:
        return decision("REGRESSION" if worse else "IMPROVEMENT", "significant and beyond the margin")
    if beyond:
        overlap = f"the {'pairs disagree' if paired else 'runs overlap'} (p {p_value:.2g} > {level:.2g})"
        return (
            decision("AMBIGUOUS", f"worse, but {overlap}: repeat")
            if worse
            else decision("SAME", f"better, but {overlap}")
        )
    if margin > WIDEST_MARGIN and not quantity.difference:
        return decision("AMBIGUOUS", "the runs spread too much to show anything: steady the machine")
    return decision("SAME", "significant, but within the margin" if p_value <= level else "no change beyond the margin")


# The rank tests


def rank_test(old: Floats, new: Floats) -> tuple[float, float]:
    """Exact one-sided p-values of the permutation test of rank sums: that `new` is so much less, so much greater."""
    _, place, counts = np.unique(np.concatenate([old, new]), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = 2 * ends - counts + 1  # twice the mid-ranks, which are whole numbers
    shares = _rank_sums(tuple(counts.tolist()), len(new))
    total = int(ranks[place[len(old) :]].sum())
    return min(1.0, float(shares[: total + 1].sum())), min(1.0, float(shares[total:].sum()))


@lru_cache(maxsize=4096)
def _rank_sums(ties: tuple[int, ...], drawn: int) -> Floats:
    """The probability of each sum of twice the mid-ranks of `drawn` samples, all choices being equally likely."""
    ends = np.cumsum(ties)
    ranks = np.repeat(2 * ends - np.array(ties) + 1, ties)
    largest = int(ranks[len(ranks) - drawn :].sum())
    ways = np.zeros((drawn + 1, largest + 1))
    ways[0, 0] = 1
    reached = 0
    for number, rank in enumerate(ranks.tolist(), 1):
        # only as many drawn, and as large a sum, as these ranks can give and the others can complete
        reached = min(reached + rank, largest)
        low, high = max(1, drawn - len(ranks) + number), min(number, drawn)
        ways[low : high + 1, rank : reached + 1] += ways[low - 1 : high, : reached + 1 - rank].copy()
    return ways[drawn] / math.comb(len(ranks), drawn)


def _smallest_p(old_count: int, new_count: int, *, one_sided: bool) -> float:
    return (1 if one_sided else 2) / math.comb(old_count + new_count, new_count)


def repeats_needed(level: float, *, one_sided: bool = False) -> int:
    """The fewest samples a side, as many on both, whose test can reach `level`."""
    count = 1
    while _smallest_p(count, count, one_sided=one_sided) > level:
        count += 1
    return count


@lru_cache(maxsize=4096)
def _interval_cut(old_count: int, new_count: int) -> int:
    """Which smallest and largest of all ratios bound the 95 % interval of their median; 0 where none does."""
    shares = _rank_sums((1,) * (old_count + new_count), new_count)[new_count * (new_count + 1) :: 2]
    return int((np.cumsum(shares) <= 0.025).sum())


def signed_rank_test(differences: Floats) -> tuple[float, float]:
    """Exact one-sided p-values of the permutation test of signed ranks: of so much less than 0, of so much more.

    Wilcoxon 1945; a difference of 0 is left out, ties have mid-ranks.
    """
    found = differences[differences != 0]
    _, place, counts = np.unique(np.abs(found), return_inverse=True, return_counts=True)
    ranks = (2 * np.cumsum(counts) - counts + 1)[place]  # twice the mid-ranks, which are whole numbers
    shares = _signed_sums(tuple(sorted(ranks.tolist())))
    total = int(ranks[found > 0].sum())
    return min(1.0, float(shares[: total + 1].sum())), min(1.0, float(shares[total:].sum()))


@lru_cache(maxsize=4096)
def _signed_sums(ranks: tuple[int, ...]) -> Floats:
    """The probability of each sum of those ranks that are positive, each being so by the toss of a coin."""
    shares = np.zeros(sum(ranks) + 1)
    shares[0] = 1
    for rank in ranks:
        with_it = np.zeros_like(shares)
        with_it[rank:] = shares[: len(shares) - rank]
        shares = (shares + with_it) / 2
    return shares


def _means_of_two(values: Floats) -> Floats:
    """The means of any two of `values`, each with itself too, in order."""
    one, other = np.triu_indices(len(values))
    return np.sort((values[one] + values[other]) / 2)


@lru_cache(maxsize=4096)
def _interval_cut_of_pairs(count: int) -> int:
    """Which smallest and largest of all means of two bound the 95 % interval of their median; 0 where none does."""
    return int((np.cumsum(_signed_sums(tuple(range(1, count + 1)))) <= 0.025).sum())
