"""A case over time: where its level changed, the commit that changed it, and a plot. No torch in here."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import UserError
from .record import write_atomically
from .regress import ALPHA, Quantity, Record, build_of, conditions_of, quantities, sides
from .stats import mann_whitney, median

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHORTEST = 3  # runs of a level
MOST_COMMITS = 300  # looked at to find those that records were made by
SHOWN = ("throughput", "step time", "peak memory", "energy", "final metric")


@dataclass(frozen=True, kw_only=True)
class Series:
    """All runs of one case on one machine that may be compared, oldest first."""

    machine: str
    case: str
    runs: tuple[Record, ...]
    left_out: int  # runs under other conditions than the newest: another recipe, data or timing version


@dataclass(frozen=True, kw_only=True)
class Step:
    """A change of level in a series: the first run of the new level, and both levels."""

    quantity: Quantity
    position: int  # of the first run of the new level
    before: float  # medians
    after: float
    change: float  # as a share, or with `quantity.difference` in the unit
    last: Record  # of the old level
    first: Record  # of the new level


def series_of(records: Iterable[Record], case: str) -> list[Series]:
    """A series a machine and case; `case` is a case's name or words of it, the workload first."""
    wanted = case.split()
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if record.get("status") == "ok":
            for key, side in sides([record]).items():
                words = side.case.split()
                if wanted and words[0] == wanted[0] and set(wanted) <= set(words):
                    groups.setdefault((side.machine, side.case, *key), []).append(record)
    found = []
    for (machine, name, *_), group in groups.items():
        group.sort(key=lambda record: (str(record.get("created_utc")), str(record.get("id"))))
        runs = tuple(record for record in group if conditions_of(record) == conditions_of(group[-1]))
        found.append(Series(machine=machine, case=name, runs=runs, left_out=len(group) - len(runs)))
    return found


# Steps


def steps(series: Series) -> list[Step]:
    """Every change of level, by quantity and time."""
    return [step for quantity in quantities(series.runs) if quantity.decides for step in _steps(quantity, series.runs)]


def _steps(quantity: Quantity, runs: Sequence[Record]) -> list[Step]:
    measured = [(run, value) for run in runs if (value := quantity.read(run)) is not None]
    kept = [run for run, _ in measured]
    values = np.array([value for _, value in measured])
    scaled = values if quantity.difference else np.log(values)
    borders = {place for place in range(1, len(kept)) if build_of(kept[place - 1]) != build_of(kept[place])}
    places = sorted(_split(scaled, 0, len(kept), borders, quantity.floor))
    ends = [0, *places, len(kept)]
    found = []
    for before, place, after in zip(ends, places, ends[2:], strict=False):
        old, new = median(values[before:place]), median(values[place:after])
        found.append(
            Step(
                quantity=quantity,
                position=next(number for number, run in enumerate(runs) if run is kept[place]),
                before=old,
                after=new,
                change=new - old if quantity.difference else new / old - 1,
                last=kept[place - 1],
                first=kept[place],
            )
        )
    return found


def _split(values: np.ndarray, start: int, end: int, borders: set[int], floor: float) -> set[int]:
    """Places in `values[start:end]` where the level changes: binary segmentation by the rank sum.

    A split must be significant (Mann-Whitney, the level shared among all places where it could be) and larger than the
    floor and the spread around the levels on its two sides. Where it falls near a change of code or versions that
    explains it nearly as well, it is that change.
    """
    part = values[start:end]
    count = len(part)
    candidates = np.arange(SHORTEST, count - SHORTEST + 1)
    if not len(candidates):
        return set()
    _, group, counts = np.unique(part, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]
    sums = np.cumsum(ranks)[candidates - 1]
    deviations = np.abs(sums - candidates * (count + 1) / 2)
    weights = deviations / np.sqrt(candidates * (count - candidates) * (count + 1) / 12)
    near = {int(place): float(weight) for place, weight in zip(candidates, weights, strict=True)}
    best = max(near, key=lambda place: near[place])
    explained = [place for place in near if start + place in borders and near[place] >= 0.9 * near[best]]
    place = max(explained, key=lambda place: near[place], default=best)
    left, right = part[:place], part[place:]
    around = np.concatenate([left - np.median(left), right - np.median(right)])
    low, high = np.quantile(around, (0.1, 0.9), method="weibull")
    change = abs(float(np.median(right) - np.median(left)))
    if change <= max(floor, high - low) or mann_whitney(left, right).p_value > ALPHA / len(candidates):
        return set()
    middle = start + place
    return {middle} | _split(values, start, middle, borders, floor) | _split(values, middle, end, borders, floor)


# Which commit


def commits_of(codes: Iterable[str], repository: Path) -> dict[str, list[str]]:
    """The newest commits, newest first, by the hash that their code gives records, back to the last of `codes`.

    Each is checked out and asked for its own hash, since what a hash covers may differ from commit to commit.
    """
    from .ab import MEASURED, checkout, git

    wanted = set(codes)
    found: dict[str, list[str]] = {}
    log = git(repository, "log", f"--max-count={MOST_COMMITS}", "--format=%H", "HEAD", "--", *MEASURED).split()
    with checkout("HEAD", repository) as place:
        for commit in log:
            git(place.tree, "checkout", "--quiet", "--detach", commit)
            code = place.python("-c", "from netdyno.bench.record import code_hash; print(code_hash())").stdout.strip()
            found.setdefault(code, []).append(commit)
            wanted.discard(code)
            if not wanted:
                break
    return found


def cause(step: Step, commits: dict[str, list[str]], repository: Path) -> str:
    """What changed between two levels: the commit, a range of commits, versions, or nothing that records know of."""
    from .ab import git

    old_code, old_versions = build_of(step.last)
    new_code, new_versions = build_of(step.first)
    parts = []
    if old_code != new_code:
        if old_code not in commits or new_code not in commits:
            missing = [str(code)[:12] for code in (old_code, new_code) if code not in commits]
            parts.append(f"code that is in no commit here: {' and '.join(missing)}")
        else:
            # of the commits with the same code, such as a merge and what it merged, the oldest made it
            old, new = commits[old_code][0], commits[new_code][-1]
            between = git(repository, "log", "--format=%h %s", f"{old}..{new}", "--", "bench", "kernels", "models")
            lines = between.strip().splitlines()
            if len(lines) == 1:
                parts.append(f"commit {lines[0]}")
            else:
                parts.append(f"one of {len(lines)} commits: netdyno bisect {old[:12]} {new[:12]} finds it")
    before, after = (versions if isinstance(versions, dict) else {} for versions in (old_versions, new_versions))
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    parts += [f"{name} {before.get(name)} → {after.get(name)}" for name in changed]
    return "; ".join(parts) or "no change of code or versions: the machine"


# Plot


def plot(series: Series, found: Sequence[Step], causes: Sequence[str]) -> Figure:
    """A panel a quantity: every run by its place in time, coloured by its code, the levels, and the steps named."""
    from matplotlib.figure import Figure

    shown = [quantity for quantity in quantities(series.runs) if quantity.name in SHOWN]
    figure = Figure(figsize=(9, 1 + 2.2 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)
    builds = list(dict.fromkeys(str(build_of(run)) for run in series.runs))
    colours = [f"C{builds.index(str(build_of(run))) % 10}" for run in series.runs]
    for panel, quantity in zip(panels[:, 0], shown, strict=True):
        values = [quantity.read(run) for run in series.runs]
        panel.scatter(
            range(len(values)), [math.nan if value is None else value for value in values], c=colours, s=14, zorder=2
        )
        own = [(step, text) for step, text in zip(found, causes, strict=True) if step.quantity.name == quantity.name]
        ends = [0, *(step.position for step, _ in own), len(values)]
        for start, end in pairwise(ends):
            level = [value for value in values[start:end] if value is not None]
            if level:
                panel.hlines(median(level), start - 0.5, end - 0.5, colors="0.4", linewidth=1, zorder=1)
        for step, text in own:
            panel.axvline(step.position - 0.5, color="0.7", linewidth=1, linestyle=":")
            panel.annotate(
                text if len(text) <= 40 else text[:39] + "…",
                (step.position - 0.5, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -9),
                textcoords="offset points",
                fontsize=7,
            )
        panel.set_ylabel(f"{quantity.name}\n{quantity.unit}", fontsize=8)
        panel.tick_params(labelsize=8)
    panels[-1, 0].set_xlabel("runs, oldest first; a colour for each code and versions", fontsize=8)
    panels[0, 0].set_title(f"{series.case} on {series.machine}", fontsize=10)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes the plot in the format that the file's name ends with; UserError for one that is not known."""
    known = figure.canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".")
    if kind not in known:
        raise UserError(f"{path}: a plot is written as .svg, .png or .pdf")
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=150)
    write_atomically(path, content.getvalue())
