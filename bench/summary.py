"""What tables, gates and reports show of records: groups that may be compared, their medians and speed-ups.

records → summarise → Row, one a group. Nothing here formats, and nothing here reads a file.

Records come from files that others may have made: what is missing or of the wrong type is None, and strings lose their
control characters.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from . import stats
from .stats import median, median_interval
from .tuning import LADDER

Record = Mapping[str, Any]

MIN_RECORDS_FOR_SPREAD = 3
MAX_TEXT = 300  # characters of one string from a record; a traceback belongs in the record, not in a cell
THROTTLED_FROM = 0.05  # of the readings; a single one happens at a change of clocks too
CLOCK_DRIFT = 0.05  # of the highest SM clock; warming up costs an unthrottled card some steps of 15 MHz, less than that


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: the medians over the records of one group, or failed records that failed in the same way.

    None: not measured, not known, or not applicable. Intervals (`_low`, `_high`) are of the median and stand from three
    records on. The numbers of failed records stay in the records.
    """

    machine: str | None
    gpu: str | None
    cpu: str | None
    cores: float | None
    memory_gib: float | None
    versions: tuple[str, ...]  # "torch 2.11.0"; more than one of a kind where the records differ
    suite: str | None
    data: str | None
    data_label: str | None
    synthetic: bool | None
    data_sha256: Mapping[str, Any]
    workload: str | None
    division: str | None
    tuning: str | None
    mode: str | None
    gpus: float | None
    scaling: str | None
    recipe: Mapping[str, Any]
    batch_size: float | None
    timing_version: float | None
    status: str
    reason: str | None
    n: int  # records
    images_per_s: float | None
    images_per_s_low: float | None
    images_per_s_high: float | None
    eager_images_per_s: float | None = None
    speedup_over_eager: float | None = None
    eager_ids: tuple[str, ...] = ()  # the records that it is compared with
    differs_from_eager: tuple[str, ...] = ()  # what else than the tuning sets this row's recipe apart from eager's
    share_of_compute: float | None = None  # end to end, of the same case's speed without a loader: the rest is waiting
    scaling_efficiency: float | None = None  # of several GPUs: of the same case's speed on one, times their number
    across_cards: tuple[str, ...] = ()  # which of "eager", "compute-only" and "one GPU" ran on none of its cards
    eval_images_per_s: float | None
    peak_allocated_mib: float | None
    peak_reserved_mib: float | None
    nvml_process_peak_mib: float | None
    host_rss_peak_mib: float | None
    energy_j_per_1000_images: float | None
    energy_source: str | None  # counter or sampled; where records differ, those with a counter make the median
    share_of_card: float | None  # of the images/s that the machine's measured ceilings allow
    metric: str | None
    metric_unit: str | None
    higher_is_better: bool | None
    metric_by_epoch: tuple[float | None, ...]
    metric_final: float | None
    metric_final_low: float | None
    metric_final_high: float | None
    final_metrics: Mapping[str, float]  # further metrics of the last epoch
    target: float | None
    reached_n: int | None  # records that reached the target; None without a target
    train_s_to_target: float | None  # a record that missed its target counts as endless
    compile_cold_s: float | None
    compile_warm_s: float | None
    recompiles: float | None  # the most of any record
    doubts: tuple[str, ...]  # what makes the speed of its records doubtful, in words
    fingerprints: tuple[str, ...]  # of the cards that its records are of, as far as they tell
    code: str | None
    ids: tuple[str, ...]
    paths: tuple[str, ...]  # relative to the results folder
    older_paths: tuple[str, ...] = ()  # of records of the same case by older versions of the code, which are not in it

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def on_another_card(self, what: str) -> list[str]:
        """What to say beside a comparison with `what`, one of `across_cards`; nothing where it is none of them."""
        return [f"{what} on another card"] if what in self.across_cards else []


def summarise(records: Iterable[Record]) -> list[Row]:
    """All rows, in the order in which tables show them: each tuned row before its eager row.

    A row is of the newest version of the code that has records of it. A record that failed makes a row too, unless a
    newer one of the same case, on the same data, is ok.
    """
    ordered = sorted(records, key=_when)
    successes: dict[str, list[Record]] = {}
    for record in ordered:
        if _status(record) == "ok":
            successes.setdefault(_case(record), []).append(record)
    groups: dict[str, list[Record]] = {}
    for record in ordered:
        if _status(record) == "ok":
            groups.setdefault(comparable(record) + str(_text(record, "code")), []).append(record)
        elif not any(_supersedes(success, record) for success in successes.get(_case(record), [])):
            failure = comparable(record) + _status(record) + str(_text(record, "reason"))
            groups.setdefault(failure, []).append(record)
    by_age = sorted(groups.values(), key=lambda group: _when(group[-1]))
    rows = [(comparable(group[-1]), _row(group)) for group in by_age]
    newest: dict[str, Row] = {}
    for work, row in rows:
        if row.ok:
            before = newest.pop(work, None)  # so that they stay in order of age
            newest[work] = replace(row, older_paths=(*before.older_paths, *before.paths)) if before else row
    shown = [*newest.values(), *(row for _, row in rows if not row.ok)]
    eager: dict[tuple, list[Row]] = {}
    for row in shown:
        if row.ok and row.tuning == "eager":
            eager.setdefault(_contest(row), []).append(row)
    known = [row for _, row in rows if row.ok]
    compute = _by_code((_without_mode(row), row) for row in known if row.mode == "compute")
    alone = _by_code((_on_one(row), row) for row in known if row.gpus == 1)
    compared = (_beside_eager(row, eager.get(_contest(row), [])) for row in shown)
    compared = (_beside_compute(row, _of_code(compute, _without_mode(row), row.code)) for row in compared)
    return sorted((_beside_one(row, _of_code(alone, _on_one(row), row.code)) for row in compared), key=order)


def _by_code(rows: Iterable[tuple[tuple, Row]]) -> dict[tuple, dict[str | None, Row]]:
    """Of each key, the newest row of each version of the code, oldest first."""
    found: dict[tuple, dict[str | None, Row]] = {}
    for key, row in rows:
        versions = found.setdefault(key, {})
        versions.pop(row.code, None)
        versions[row.code] = row
    return found


def _of_code(rows: Mapping[tuple, Mapping[str | None, Row]], key: tuple, code: str | None) -> Row | None:
    """Of `code`, where there is one, else of the newest."""
    versions = rows.get(key)
    return (versions.get(code) or list(versions.values())[-1]) if versions else None


def _row(group: Sequence[Record]) -> Row:
    newest = group[-1]
    status = _status(newest)
    measured = group if status == "ok" else []

    def numbers(*path: str) -> list[float]:
        found = (_number(record, *path) for record in measured)
        return [number for number in found if number is not None]

    def middle(*path: str) -> float | None:
        return median(found) if (found := numbers(*path)) else None

    joules: dict[str | None, list[float]] = {}
    for record in measured:
        joule = energy_j_per_1000_images(record)
        if joule is not None:
            joules.setdefault(_text(record, "gpu", "energy_source"), []).append(joule)
    source = "counter" if "counter" in joules else next(iter(joules), None)
    low, high = _interval(numbers("throughput", "images_per_s"))
    metric_low, metric_high = _interval(numbers("accuracy", "final"))
    target = _number(newest, "accuracy", "target")
    reached = sum(_flag(record, "accuracy", "reached") is True for record in measured)
    times = [_number(record, "accuracy", "train_s_to_target") for record in measured]
    to_target = statistics.median(math.inf if time is None else time for time in times) if times else math.inf
    recipe = _mapping(newest, "case", "recipe")
    cards = _unique(card for record in measured for card in texts(record, "gpu", "fingerprints"))
    used = _number(newest, "case", "gpus") or 1
    several = ["not all runs on the same card" + ("s" if used > 1 else "")] if len(cards) > used else []
    return Row(
        machine=_text(newest, "machine", "slug"),
        gpu=_text(newest, "machine", "gpu"),
        cpu=_text(newest, "machine", "cpu"),
        cores=_number(newest, "machine", "cores"),
        memory_gib=_number(newest, "machine", "memory_gib"),
        versions=_unique(
            f"{name} {version}"
            for record in group
            for name, version in _mapping(record, "machine", "versions").items()
            if version is not None
        ),
        suite=_text(newest, "case", "suite"),
        data=_text(newest, "data", "name"),
        data_label=_text(newest, "data", "label"),
        synthetic=_synthetic(newest),
        data_sha256=_mapping(newest, "data", "sha256"),
        workload=_text(newest, "case", "workload"),
        division=_text(newest, "case", "division"),
        tuning=_text(newest, "case", "tuning"),
        mode=_text(newest, "case", "mode"),
        gpus=_number(newest, "case", "gpus"),
        scaling=_text(newest, "case", "scaling"),
        recipe=recipe,
        batch_size=_number(recipe, "batch_size"),
        timing_version=_number(newest, "timing", "timing_version"),
        status=status,
        reason=_text(newest, "reason"),
        n=len(group),
        images_per_s=middle("throughput", "images_per_s"),
        images_per_s_low=low,
        images_per_s_high=high,
        eval_images_per_s=middle("throughput", "eval_images_per_s"),
        peak_allocated_mib=middle("memory", "peak_allocated_mib"),
        peak_reserved_mib=middle("memory", "peak_reserved_mib"),
        nvml_process_peak_mib=middle("memory", "nvml_process_peak_mib"),
        host_rss_peak_mib=middle("memory", "host_rss_peak_mib"),
        energy_j_per_1000_images=median(joules[source]) if joules else None,
        energy_source=source,
        share_of_card=middle("roofline", "share"),
        metric=_text(newest, "accuracy", "metric"),
        metric_unit=_text(newest, "accuracy", "unit"),
        higher_is_better=_flag(newest, "accuracy", "higher_is_better"),
        metric_by_epoch=_by_epoch(measured),
        metric_final=middle("accuracy", "final"),
        metric_final_low=metric_low,
        metric_final_high=metric_high,
        final_metrics=_final_metrics(measured),
        target=target,
        reached_n=None if target is None else reached,
        train_s_to_target=to_target if math.isfinite(to_target) else None,
        compile_cold_s=middle("compile", "cold_s"),
        compile_warm_s=middle("compile", "warm_s"),
        recompiles=max(numbers("compile", "recompiles"), default=None),
        doubts=(*_doubts_of(measured), *several),
        fingerprints=cards,
        code=_text(newest, "code"),
        ids=tuple(str(_text(record, "id")) for record in group),
        paths=tuple(_path(record) for record in group),
    )


class Doubt(NamedTuple):
    """Something that makes the speed of a run doubtful."""

    kind: str
    size: float  # the larger, the worse, within one kind
    words: str


def doubts(record: Record) -> list[Doubt]:
    """All that makes the speed of one record doubtful; empty where nothing does."""
    found = []
    recompiles = _number(record, "compile", "recompiles") or 0
    if recompiles > 0:
        found.append(Doubt("recompiled", recompiles, f"{recompiles:,.0f} × recompiled during the run"))
    others = _number(record, "gpu", "other_processes") or 0
    if others > 0:
        plural = "" if others == 1 else "es"
        found.append(Doubt("shared", others, f"beside {others:,.0f} other process{plural} on the card"))
    beside = at(record, "gpu", "beside")
    if isinstance(beside, list) and beside:
        words = "a case on another card" if len(beside) == 1 else f"{len(beside):,} cases on other cards"
        found.append(Doubt("beside", len(beside), f"beside {words}"))
    if _number(record, "gpu", "readings") == 0:
        found.append(Doubt("unread", 1, "too short for a reading of the card's clocks"))
    shares = _mapping(record, "gpu", "throttle_share")
    for reason in shares:
        share = _number(shares, reason) or 0
        if share > THROTTLED_FROM:
            words = f"throttled in {100 * share:.0f} % of readings: {reason.replace('_', ' ')}"
            found.append(Doubt(reason, share, words))
    low, high = _number(record, "gpu", "sm_clock_mhz_min"), _number(record, "gpu", "sm_clock_mhz_max")
    if low is not None and high is not None and high - low > CLOCK_DRIFT * high:
        found.append(Doubt("drift", high - low, f"SM clock between {low:,.0f} and {high:,.0f} MHz"))
    if _flag(record, "timing", "steady") is False:
        found.append(Doubt("unsteady", 1, "not steady after warm-up"))
    return found


def _doubts_of(group: Sequence[Record]) -> tuple[str, ...]:
    """The worst doubt of each kind, and of how many records there is one."""
    kinds: dict[str, list[Doubt]] = {}
    for record in group:
        for doubt in doubts(record):
            kinds.setdefault(doubt.kind, []).append(doubt)
    worst = [(max(found, key=lambda doubt: doubt.size).words, len(found)) for found in kinds.values()]
    return tuple(words if count == len(group) else f"{words} ({count} of {len(group)} runs)" for words, count in worst)


def energy_j_per_1000_images(record: Record) -> float | None:
    """Joules of the GPU for 1,000 images of the timed region; None where the record does not tell."""
    speed, seconds = _number(record, "throughput", "images_per_s"), _number(record, "timing", "train_s")
    energy = _number(record, "gpu", "energy_j")
    if speed is None or seconds is None or energy is None:
        return None
    try:
        return stats.energy_j_per_1000_images(energy, speed * seconds)
    except ValueError:
        return None


def _interval(samples: Sequence[float]) -> tuple[float | None, float | None]:
    if len(samples) < MIN_RECORDS_FOR_SPREAD:
        return None, None
    interval = median_interval(samples)
    return interval.low, interval.high


def _curve(record: Record) -> list[Record]:
    curve = at(record, "accuracy", "curve")
    return [epoch for epoch in curve if isinstance(epoch, Mapping)] if isinstance(curve, list) else []


def _by_epoch(group: Sequence[Record]) -> tuple[float | None, ...]:
    """The median metric of each epoch that any record has; None where no record has a number."""
    metrics: dict[float, list[float]] = {}
    for record in group:
        for position, epoch in enumerate(_curve(record), 1):
            number = _number(epoch, "epoch")
            found = metrics.setdefault(position if number is None else number, [])
            metric = _number(epoch, "metric")
            if metric is not None:
                found.append(metric)
    return tuple(median(metrics[epoch]) if metrics[epoch] else None for epoch in sorted(metrics))


def _final_metrics(group: Sequence[Record]) -> dict[str, float]:
    metrics: dict[str, list[float]] = {}
    for record in group:
        last = _mapping(_curve(record)[-1], "metrics") if _curve(record) else {}
        for name in last:
            number = _number(last, name)
            if number is not None:
                metrics.setdefault(name, []).append(number)
    return {name: median(found) for name, found in metrics.items()}


def _beside_eager(row: Row, eager: Sequence[Row]) -> Row:
    """`row` with what it is compared with: eager of the same recipe, else of the same batch, the newest."""
    if not row.ok or not eager:
        return row
    fit = [(other.recipe == row.recipe, other.batch_size == row.batch_size, age) for age, other in enumerate(eager)]
    best = eager[fit.index(max(fit))]
    speedup = row.images_per_s / best.images_per_s if row.images_per_s and best.images_per_s else None
    return replace(
        row,
        eager_images_per_s=best.images_per_s,
        speedup_over_eager=speedup,
        eager_ids=best.ids,
        differs_from_eager=_differences(row.recipe, best.recipe),
        across_cards=_across(row, best, "eager"),
    )


def _beside_compute(row: Row, compute: Row | None) -> Row:
    """`row`, if it is end to end, with its share of the same case's speed on data that stay on the device."""
    if row.mode != "e2e" or not row.ok or compute is None or not row.images_per_s or not compute.images_per_s:
        return row
    share = row.images_per_s / compute.images_per_s
    return replace(row, share_of_compute=share, across_cards=_across(row, compute, "compute-only"))


def _beside_one(row: Row, one: Row | None) -> Row:
    """`row`, if it is of several GPUs, with its share of so many times the same case's speed on one."""
    if not row.ok or one is None or row.gpus is None or row.gpus <= 1 or not row.images_per_s or not one.images_per_s:
        return row
    efficiency = row.images_per_s / (row.gpus * one.images_per_s)
    return replace(row, scaling_efficiency=efficiency, across_cards=_across(row, one, "one GPU"))


def _across(row: Row, other: Row, what: str) -> tuple[str, ...]:
    """The row's `across_cards`, with `what` where both tell their cards and share none."""
    apart = row.fingerprints and other.fingerprints and not set(row.fingerprints) & set(other.fingerprints)
    return (*row.across_cards, what) if apart else row.across_cards


def _on_one(row: Row) -> tuple:
    """What a row shares with that of one GPU: the recipe but for its length; under weak scaling the batch on each."""
    recipe = on_each(row.recipe, row.gpus if row.scaling == "weak" else 1)
    return *_contest(replace(row, gpus=1, scaling=None)), row.tuning, _key(recipe)


def on_each(recipe: Mapping[str, Any], gpus: float | None) -> dict[str, Any]:
    """What of a recipe weak scaling keeps on any number of GPUs: the batch on each, and all else but its length."""
    fixed = {name: value for name, value in recipe.items() if name not in ("batch_size", "epochs", "evaluate_every")}
    batch = _number(recipe, "batch_size")
    return fixed | {"batch_size": batch and batch / (gpus or 1)}


def _without_mode(row: Row) -> tuple:
    return *_contest(replace(row, mode=None)), row.tuning, _key(row.recipe)


def _contest(row: Row) -> tuple:
    """What two rows share whose speeds may be divided."""
    data = row.synthetic, row.data_label, _key(row.data_sha256)
    return (
        row.machine,
        row.suite,
        row.workload,
        row.division,
        row.mode,
        row.gpus,
        row.scaling,
        row.timing_version,
        *data,
    )


def _differences(recipe: Mapping[str, Any], eager: Mapping[str, Any]) -> tuple[str, ...]:
    """ "batch_size 1,024 against 128" for each entry in which two recipes differ, the batch size first."""
    names = [name for name in {**recipe, **eager} if recipe.get(name) != eager.get(name)]
    names.sort(key=lambda name: name != "batch_size")
    return tuple(f"{name} {show_entry(recipe.get(name))} against {show_entry(eager.get(name))}" for name in names)


def show_entry(value: Any) -> str:
    """One value of a recipe, as a note shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        return text if len(text) <= 40 else text[:39] + "…"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def order(row: Row) -> tuple:
    """Sort key: by workload, then end to end first, then tuned before eager, what failed last."""
    modes, tunings = ("e2e", "compute", "loader"), tuple(reversed(LADDER))
    return (
        *(row.workload or "", row.division != "closed", row.division or "", row.gpus or 0, row.scaling or ""),
        *(rank(row.mode, modes), row.mode or "", rank(row.tuning, tunings), row.tuning or ""),
        *(not row.ok, row.batch_size or 0, row.status, row.ids),
    )


def rank(value: str | None, known: Sequence[str]) -> int:
    """The place of `value` among the known ones; others come after all of them."""
    return known.index(value) if value in known else len(known)


# What records are the same, and which is newer


def _when(record: Record) -> tuple[str, str]:
    return _text(record, "created_utc") or "", _text(record, "id") or ""


def _case(record: Record) -> str:
    names = ("workload", "division", "tuning", "mode", "suite", "seed", "seeds", "gpus", "scaling")
    return _key(at(record, "machine", "slug"), *(at(record, "case", name) for name in names))


def comparable(record: Record) -> str:
    """The same for records of the same work on the same machine, whatever their code and seed."""
    names = ("workload", "division", "tuning", "mode", "suite", "seeds", "gpus", "scaling", "recipe")
    case = (at(record, "case", name) for name in names)
    return _key(at(record, "machine", "slug"), *case, _data(record), at(record, "timing", "timing_version"))


def _data(record: Record) -> str:
    return _key(at(record, "data", "label"), _synthetic(record), at(record, "data", "sha256"))


def _supersedes(success: Record, failure: Record) -> bool:
    same_data = _data(failure) in (_data(success), _data({}))  # a run may have failed before it saw its data
    return same_data and bool(_when(failure)[0]) and _when(success) > _when(failure)


def _key(*values: Any) -> str:
    return json.dumps(values, sort_keys=True, default=str)


# Reading a record that may lack anything


def at(record: Any, *path: str) -> Any:
    """The entry at `path`; None where there is none, or nothing that has entries."""
    try:
        for name in path:
            record = record[name]
    except (KeyError, TypeError):
        return None
    return record


def _text(record: Record, *path: str) -> str | None:
    value = at(record, *path)
    return clean(value) if isinstance(value, str) else None


def texts(record: Record, *path: str) -> list[str]:
    """The texts in the list at `path`; none where there is no list."""
    values = at(record, *path)
    return [clean(value) for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _number(record: Record, *path: str) -> float | None:
    value = at(record, *path)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond the range of floats
        return None


def _flag(record: Record, *path: str) -> bool | None:
    value = at(record, *path)
    return value if isinstance(value, bool) else None


def _mapping(record: Record, *path: str) -> dict[str, Any]:
    value = at(record, *path)
    return _plain(value) if isinstance(value, Mapping) else {}


def _plain(value: Any) -> Any:
    """`value` with clean strings and null for what JSON cannot hold."""
    if isinstance(value, Mapping):
        return {clean(str(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return clean(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def clean(text: str) -> str:
    """One line without control, direction and other invisible characters, at most MAX_TEXT long."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 1] + "…"


def _status(record: Record) -> str:
    return _text(record, "status") or "unknown"


def _synthetic(record: Record) -> bool | None:
    return True if _text(record, "data", "label") == "synthetic" else _flag(record, "data", "synthetic")


def _path(record: Record) -> str:
    folder, workload = _text(record, "machine", "slug"), _text(record, "case", "workload")
    tuning, mode = _text(record, "case", "tuning"), _text(record, "case", "mode")
    return f"{folder}/{workload}/{tuning}-{mode}-{_text(record, 'id')}.json"


def _unique(values: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value is not None))
