"""Tabs on speed and accuracy: overview, speed, time to target, accuracy, ladder, history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from ..stats import median
from ..summary import at, clean
from ..table import MISSING, Notes, figure, fixed
from ..tuning import LADDER
from .blocks import Block, Cell, Chart, Series, Table, Text, any_number, number
from .book import Book, Entry, Panel, differences, interval
from .points import FAR_APART, Point, by_machine, left_out

MOST_LINES = 12  # drawn from the start; the others are switched on in the legend
MOST_EPOCHS = 200  # points of one curve
MEDIANS = (
    "Medians of fresh processes. Intervals are of the median: 95 % from six records on, the range of three to five."
)
SELDOM = ("low", "high", "over eager", "scaling efficiency")  # columns that are left out where nothing is in them
TIMING = "Timing versions are rules of measuring, and the newest holds: never compare rows of two of them."


# Overview


def overview(book: Book, panels: Sequence[Panel], base: str) -> list[Block]:
    """The matrix workload × machine, each cell beside the machine `base`, and a chart of the same ratios."""
    label = book.machines[base].label
    present = {entry.machine for panel in panels for entry in panel.entries}
    slugs = [slug for slug in book.machines if slug in present]
    alone = slugs == [base]
    notes, points = Notes(), []
    rows: list[list[Cell]] = []
    flags = {}
    for panel in panels:
        for tuning in dict.fromkeys(entry.tuning for entry in panel.entries):
            cells = _row_of_matrix(panel, tuning, slugs)
            against = cells.get(base)
            if any(not entry.ok for entry in cells.values()):
                flags[len(rows)] = "failed"
            precisions = dict.fromkeys(entry.precision for entry in cells.values() if entry.precision)
            ran = Counter(entry.machine for entry in panel.entries if entry.tuning == tuning and entry.ok)
            numbers = [_matrix_cell(cells.get(slug), against, notes, ran[slug]) for slug in slugs]
            rows.append([panel.title, tuning, " and ".join(precisions) or MISSING, *numbers])
            for slug, entry in cells.items():
                ratio = _ratio(entry, against)
                if ratio is not None and slug != base:
                    category = f"{panel.title} · {tuning}"
                    points.append(Point(entry=entry, category=category, value=ratio[0], low=ratio[1], high=ratio[2]))
    what = f"images/s, and how many times as many as {label}" if base in slugs and not alone else "images/s"
    table = Table(
        title=f"Training speed: {what}",
        columns=["workload", "tuning", "precision", *(book.machines[slug].label for slug in slugs)],
        rows=rows,
        notes=[*notes.lines(), *_general(book)],
        flags=flags,
    )
    blocks: list[Block] = [table] if rows else []
    if alone:
        return blocks + list(_over_eager(book, panels))
    if base not in slugs:
        blocks.insert(0, Text(text=f"{label} has no record in this scope; nothing can be compared with it here."))
    title, times = f"Training speed relative to {label}", f"times {label}"
    return blocks + list(by_machine(book, points, title=title, value_label=times, level=(1.0, label), shared=True))


def _row_of_matrix(panel: Panel, tuning: str, slugs: Sequence[str]) -> dict[str, Entry]:
    """For each machine one entry: of the recipe that most machines ran, else the closest to it, else what failed."""
    entries = [entry for entry in panel.entries if entry.tuning == tuning]
    ran = [entry for entry in entries if entry.ok]
    recipes = Counter({str(entry.row.recipe): 0 for entry in ran})
    for recipe, _ in {(str(entry.row.recipe), entry.machine) for entry in ran}:
        recipes[recipe] += 1
    newest = {str(entry.row.recipe): entry for entry in sorted(ran, key=_age)}
    common = max(recipes, key=lambda recipe: (recipes[recipe], _age(newest[recipe])), default="")

    def fit(entry: Entry) -> tuple:
        same_batch = common != "" and entry.row.batch_size == newest[common].row.batch_size
        return entry.ok, str(entry.row.recipe) == common, same_batch, _age(entry)

    own = {slug: [entry for entry in entries if entry.machine == slug] for slug in slugs}
    return {slug: max(found, key=fit) for slug, found in own.items() if found}


def _age(entry: Entry) -> tuple[str, str]:
    newest = entry.found[-1].record
    return newest["created_utc"], newest["id"]


def _ratio(entry: Entry, base: Entry | None) -> tuple[float, float | None, float | None] | None:
    """How many times as fast, with the widest interval that the two medians' intervals allow."""
    if base is None or not entry.row.images_per_s or not base.row.images_per_s:
        return None
    low, high = None, None
    own, other = entry.row, base.row
    if own.images_per_s_low is not None and own.images_per_s_high is not None:
        if entry is base:
            low = high = 1.0
        elif other.images_per_s_low and other.images_per_s_high:
            low, high = own.images_per_s_low / other.images_per_s_high, own.images_per_s_high / other.images_per_s_low
    return entry.row.images_per_s / base.row.images_per_s, low, high


def _matrix_cell(entry: Entry | None, base: Entry | None, notes: Notes, recipes: int) -> Cell:
    if entry is None:
        return (MISSING, None)
    if not entry.ok:
        return (notes.mark(entry.row.status, _why(entry)), None)
    if entry.row.images_per_s is None:
        return (MISSING, None)
    row = entry.row
    speed = f"{figure(row.images_per_s)}{_spread(row.images_per_s_low, row.images_per_s_high)}"
    ratio = _ratio(entry, base)
    remarks = [*([f"one of {recipes} recipes that Speed shows"] if recipes > 1 else []), *entry.caveats]
    if ratio is None or base is None or entry is base:
        return (notes.mark(speed, "; ".join(remarks)), row.images_per_s)
    times, low, high = ratio
    remarks = [part for part in (differences([entry, base]), *remarks) if part]
    return (notes.mark(f"{figure(times)} ×{_spread(low, high)}\n{speed}", "; ".join(remarks)), row.images_per_s)


def _spread(low: float | None, high: float | None) -> str:
    return f" ({figure(low)}–{figure(high)})" if low is not None and high is not None else ""


def _general(book: Book) -> list[str]:
    """What the notes of a table of speeds say whatever is in it."""
    return [MEDIANS, *([TIMING] if book.timing_versions > 1 else [])]


def _why(entry: Entry) -> str:
    return f"{entry.row.status}: {entry.row.reason or 'no reason was recorded'}"


def _over_eager(book: Book, panels: Sequence[Panel]) -> Iterator[Chart]:
    points = []
    for panel in panels:
        names = book.names(panel)
        for place, entry in enumerate(panel.entries):
            if entry.tuning != "eager" and entry.row.speedup_over_eager is not None:
                across = entry.row.on_another_card("eager")
                said = "; ".join([*entry.row.differs_from_eager, *across, *entry.caveats])
                category = f"{panel.title} · {names[place]}"
                points.append(Point(entry=entry, category=category, value=entry.row.speedup_over_eager, said=said))
    yield from by_machine(
        book, points, title="Training speed over eager", value_label="times eager", level=(1.0, "eager")
    )


# Speed


def speed(book: Book, panels: Sequence[Panel]) -> list[Block]:
    """All entries of a scope in one table, and a chart for each panel."""
    rows: list[list[Cell]] = []
    flags = {}
    charts: list[Block] = []
    for panel in panels:
        points = []
        names = book.names(panel)
        for place, entry in enumerate(panel.entries):
            row = entry.row
            across = [*row.on_another_card("eager"), *row.on_another_card("one GPU")]
            if not entry.ok:
                flags[len(rows)] = "failed"
            rows.append(
                [
                    panel.title,
                    book.label(entry),
                    entry.tuning,
                    entry.precision or MISSING,
                    number(row.batch_size, count=True),
                    number(row.images_per_s) if entry.ok else (row.status, None),
                    number(row.images_per_s_low),
                    number(row.images_per_s_high),
                    number(row.speedup_over_eager, "×"),
                    number(None if row.scaling_efficiency is None else 100 * row.scaling_efficiency, "%"),
                    number(row.eval_images_per_s),
                    (str(row.n), row.n),
                    "; ".join([*entry.caveats, *across]) if entry.ok else row.reason or "",
                ]
            )
            points.append(
                Point(
                    entry=entry,
                    category=names[place],
                    value=row.images_per_s if entry.ok else None,
                    low=row.images_per_s_low,
                    high=row.images_per_s_high,
                    said="; ".join(entry.caveats) if entry.ok else row.status,
                )
            )
        charts += by_machine(book, points, title=panel.title, value_label="images/s", notes=book.remarks(panel))
    columns = [
        *("workload", "machine", "tuning", "precision", "batch", "images/s", "low", "high", "over eager"),
        *("scaling efficiency", "evaluation, images/s", "n", "remark"),
    ]
    filled = [any(row[place] != number(None) for row in rows) for place in range(len(columns))]
    kept = [place for place, name in enumerate(columns) if filled[place] or name not in SELDOM]
    columns, rows = [columns[place] for place in kept], [[row[place] for place in kept] for row in rows]
    table = Table(title="Training speed", columns=columns, rows=rows, notes=_general(book), flags=flags)
    return [table, *charts] if rows else []


# Time to target


def time_to_target(book: Book, panels: Sequence[Panel]) -> list[Block]:
    charts: list[Block] = []
    without: list[str] = []
    for panel in panels:
        points = []
        names = book.names(panel)
        goals = dict.fromkeys(_goal(entry) for entry in panel.entries if entry.row.target is not None)
        for place, entry in enumerate(panel.entries):
            row = entry.row
            if row.target is None and entry.ok:
                continue
            times = entry.values("accuracy", "train_s_to_target")
            low, high = interval(times) if len(times) == row.n else (None, None)  # a miss counts as endless
            said = row.status
            if entry.ok:
                said = f"{row.reached_n} of {row.n} reached it" if row.train_s_to_target is not None else _missed(entry)
            value = row.train_s_to_target if entry.ok else None
            points.append(Point(entry=entry, category=names[place], value=value, low=low, high=high, said=said))
        measured = [point for point in points if point.entry.ok]
        if not measured:
            without.append(panel.title)
            continue
        title = f"{panel.title}: training time to {', '.join(goals)}"
        shown = [point.entry for point in points]
        chart = by_machine(book, points, title=title, value_label="s", notes=book.remarks(panel, shown))
        outcomes = [[point.category, point.said] for point in points]
        missed = Table(title=f"{title}: no run reached it", columns=["run", "outcome"], rows=outcomes)
        charts += chart or [missed]
    return [*charts, *left_out(without, "had no target")] if charts else []


def _goal(entry: Entry) -> str:
    sign = {True: "≥ ", False: "≤ ", None: ""}[entry.row.higher_is_better]
    parts = [f"{sign}{fixed(entry.row.target or 0)}", entry.row.metric_unit, entry.row.metric]
    also = at(entry.found[-1].record, "accuracy", "also_at_least") or {}
    parts += [f"and {clean(name)} ≥ {figure(least)}" for name, least in also.items()]
    return " ".join(part for part in parts if part)


def _missed(entry: Entry) -> str:
    final = entry.row.metric_final
    return "missed" if final is None else f"missed: {fixed(final)} {entry.row.metric_unit or ''}".rstrip()


# Accuracy


def curves(book: Book, panels: Sequence[Panel]) -> list[Block]:
    """For each panel and metric: the metric by epoch and by second of training."""
    charts: list[Block] = []
    for panel in panels:
        names = book.names(panel)
        runs = [(names[place], entry, _curve(entry)) for place, entry in enumerate(panel.entries) if entry.ok]
        for metric in dict.fromkeys((entry.row.metric, entry.row.metric_unit) for _, entry, curve in runs if curve):
            own = [run for run in runs if (run[1].row.metric, run[1].row.metric_unit) == metric and run[2]]
            value_label = ", ".join(part for part in metric if part) or "metric"
            targets = {entry.row.target for _, entry, _ in own}
            target = targets.pop() if len(targets) == 1 else None
            level = None if target is None else (target, "target")
            times = [elapsed for _, _, curve in own for _, elapsed, _ in curve[-1:] if elapsed]
            hidden = len(own) - MOST_LINES
            remarks = book.remarks(panel, [entry for _, entry, _ in own])
            notes = [*remarks, *([f"{hidden} more lines can be switched on."] if hidden > 0 else [])]
            for axis, column in (("epoch", 0), ("training time, s", 1)):
                series = [
                    Series(
                        name=name,
                        at=[at for point in curve if (at := point[column]) is not None],
                        value=[point[2] for point in curve if point[column] is not None],
                        colour=book.colour(entry),
                        style=_style(own, entry),
                        hidden=order >= MOST_LINES,
                    )
                    for order, (name, entry, curve) in enumerate(own)
                ]
                charts.append(
                    Chart(
                        kind="lines",
                        title=f"{panel.title}: {metric[0] or 'metric'} by {axis.split(',')[0]}",
                        at_label=axis,
                        value_label=value_label,
                        series=series,
                        series_label="run",
                        at_logarithmic=column == 1 and bool(times) and max(times) / min(times) > FAR_APART,
                        level=level,
                        notes=notes,
                    )
                )
    return charts


def _style(runs: Sequence[tuple[str, Entry, object]], entry: Entry) -> int:
    """Which of its machine's lines this one is, so that each gets a dash of its own."""
    same = [other for _, other, _ in runs if other.machine == entry.machine]
    return next(place for place, other in enumerate(same) if other is entry)


def _curve(entry: Entry) -> list[tuple[float, float | None, float | None]]:
    """(epoch, seconds of training so far, metric): medians over the records that have the epoch; thinned when long."""
    epochs: dict[float, tuple[list[float], list[float]]] = {}
    for one in entry.found:
        elapsed: float | None = 0.0
        for row in at(one.record, "accuracy", "curve") or []:
            train_s = row.get("train_s")
            elapsed = None if train_s is None or elapsed is None else elapsed + train_s
            times, metrics = epochs.setdefault(row["epoch"], ([], []))
            if elapsed is not None:
                times.append(elapsed)
            if row.get("metric") is not None:
                metrics.append(row["metric"])
    curve = [(epoch, _median(times), _median(metrics)) for epoch, (times, metrics) in sorted(epochs.items())]
    if len(curve) > MOST_EPOCHS:
        step = -(-len(curve) // MOST_EPOCHS)
        curve = [*curve[:-1:step], curve[-1]]
    return curve if any_number([metric for _, _, metric in curve]) else []


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


# Ladder


def ladder(book: Book, panels: Sequence[Panel]) -> list[Block]:
    """From eager up, what each rung adds; a chart for each machine with at least two of them."""
    charts: list[Block] = []
    for panel in panels:
        for slug, machine in book.machines.items():
            rungs = _rungs([entry for entry in panel.entries if entry.machine == slug])
            if len(rungs) < 2:
                continue
            speeds = [rung.row.images_per_s or 0.0 for rung in rungs]
            charts.append(
                Chart(
                    kind="bars",
                    title=f"{panel.title} on {machine.label}: from {rungs[0].tuning} to {rungs[-1].tuning}",
                    at_label="tuning",
                    value_label="images/s",
                    series=[
                        Series(
                            name=machine.label,
                            at=[rung.tuning for rung in rungs],
                            value=speeds,
                            start=[0.0, *speeds[:-1]],
                            said=["", *(f"{figure(b / a)} ×" for a, b in pairwise(speeds))],
                            colour=machine.colour,
                        )
                    ],
                    categories=[rung.tuning for rung in rungs],
                    notes=book.remarks(panel, rungs),
                )
            )
    return charts


def _rungs(entries: Sequence[Entry]) -> list[Entry]:
    """One entry a rung, of tuned's recipe where there is one, from the lowest up."""
    ran = [entry for entry in entries if entry.row.images_per_s and entry.tuning in LADDER]
    tuned = max((entry for entry in ran if entry.tuning == "tuned"), key=_age, default=None)
    best: dict[str, Entry] = {}
    for entry in sorted(ran, key=_age):
        kept = best.get(entry.tuning)
        if kept is None or tuned is None or entry.row.recipe == tuned.row.recipe or kept.row.recipe != tuned.row.recipe:
            best[entry.tuning] = entry

    return [best[tuning] for tuning in LADDER if tuning in best]


# History


def history(book: Book, panels: Sequence[Panel]) -> list[Block]:
    """Images/s of every record over time, a chart for each panel in which anything was measured twice."""
    charts: list[Block] = []
    for panel in panels:
        names = book.names(panel)
        runs = []
        for place, entry in enumerate(panel.entries):
            points = [
                (one.record["created_utc"], value, clean(one.record.get("code") or "")[:8])
                for one in sorted((*entry.older, *entry.found), key=lambda one: one.record["created_utc"])
                if (value := at(one.record, "throughput", "images_per_s")) is not None
            ]
            if entry.ok and len({time for time, _, _ in points}) > 1:
                runs.append((names[place], entry, points))
        if not runs:
            continue
        series = [
            Series(
                name=name,
                at=[time for time, _, _ in points],
                value=[value for _, value, _ in points],
                said=[f"code {code}" if code else "" for _, _, code in points],
                colour=book.colour(entry),
                style=_style(runs, entry),
                hidden=order >= MOST_LINES,
            )
            for order, (name, entry, points) in enumerate(runs)
        ]
        values = [value for one in series for value in one.value if value]
        charts.append(
            Chart(
                kind="lines",
                title=f"{panel.title}: images/s over time",
                at_label="time, UTC",
                value_label="images/s",
                series=series,
                series_label="run",
                logarithmic=bool(values) and max(values) / min(values) > FAR_APART,
                notes=book.remarks(panel, [entry for _, entry, _ in runs]),
            )
        )
    return charts
