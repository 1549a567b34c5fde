"""Records put in order for a report: what may stand side by side, what things are called, and what differs.

A *scope* is a suite, a kind of data and a mode. A *panel* is one workload in one scope with the same division, data,
number of GPUs and timing version: only entries of one panel stand in one chart. What else differs between them (recipe,
versions, precision) is said in words beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..stats import median, median_interval
from ..summary import MIN_RECORDS_FOR_SPREAD, Row, at, clean, rank, show_entry, summarise
from ..table import KINDS, MISSING
from .load import Found

MODES = {"e2e": "end to end", "compute": "training alone", "loader": "loader alone"}
TUNINGS = ("tuned", "eager")
LONGEST_LABEL = 48  # letters of a machine's name; a longer one gives way to the slug
MOST_NAMES = 4  # in one remark
RUNTIME_ONLY = {"driver"}  # versions that a machine may lack without being different for it


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the summary with its records: medians of what may be averaged, or a failure."""

    row: Row
    found: tuple[Found, ...]
    older: tuple[Found, ...]  # by older versions of the code, which are not in the row

    @property
    def ok(self) -> bool:
        return self.row.ok

    @property
    def machine(self) -> str:
        return self.row.machine or MISSING

    @property
    def tuning(self) -> str:
        return self.row.tuning or MISSING

    @property
    def caveats(self) -> list[str]:
        """Why its numbers should be taken with care, in words."""
        return [*self.row.doubts, *(["random weights"] if self.row.recipe.get("weights") == "random" else [])]

    @cached_property
    def precision(self) -> str:
        """ "bf16", where its records tell."""
        told = (at(one.record, "case", "precision") for one in self.found)
        return " and ".join(dict.fromkeys(precision for precision in told if precision is not None))

    def values(self, *path: str) -> list[float]:
        return [value for one in self.found if (value := at(one.record, *path)) is not None]

    def middle(self, *path: str) -> float | None:
        return median(values) if (values := self.values(*path)) else None

    @cached_property
    def properties(self) -> dict[str, str]:
        """Everything, apart from machine and tuning, that may set this entry apart from another one."""
        found: dict[str, list[str]] = {}
        for name, value in _flat(self.row.recipe):
            found[name] = [show_entry(value)]
        if self.row.target is not None:
            found["target"] = [show_entry(self.row.target)]
        found["precision"] = [self.precision or "not recorded"]
        for one in self.found:
            for name, version in (at(one.record, "machine", "versions") or {}).items():
                if version is not None:
                    found.setdefault(clean(name), []).append(clean(version))
            code = at(one.record, "code")
            if code:
                found.setdefault("Netdyno's code", []).append(clean(code)[:8])
        return {name: " and ".join(dict.fromkeys(values)) for name, values in found.items()}


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in recipe.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{label} ")
        else:
            yield label, value


def differences(entries: Iterable[Entry]) -> str:
    """ "torch 2.11.0 against 2.15.0; batch size 128 against 512": what entries that are shown together do not share."""
    distinct: dict[str, list[str]] = {}
    groups = [entry.properties for entry in entries if entry.ok]
    for name in dict.fromkeys(name for properties in groups for name in properties):
        values = [properties.get(name) for properties in groups]
        if name in RUNTIME_ONLY:
            values = [value for value in values if value is not None]
        distinct[name] = list(dict.fromkeys(value if value is not None else "none" for value in values))
    return "; ".join(f"{name} {' against '.join(values)}" for name, values in distinct.items() if len(values) > 1)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Entries that may stand in one chart."""

    workload: str
    title: str  # unique among the panels of its scope
    scope: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class Machine:
    slug: str
    label: str
    gpu: str | None
    colour: int


class Book:
    """All records of a report, in order."""

    def __init__(self, found: Sequence[Found]) -> None:
        self.found = sorted(found, key=lambda one: (one.record["created_utc"], one.record["id"]))
        named = {one.name: one for one in self.found}
        rows = summarise(one.record for one in self.found)
        self.entries = [
            Entry(
                row=row,
                found=tuple(named[path] for path in row.paths),
                older=tuple(named[path] for path in row.older_paths),
            )
            for row in rows
        ]
        self.machines = _machines(self.entries)
        self.panels = _panels(self.entries)
        self.scopes = list(dict.fromkeys(panel.scope for panel in self.panels))

    def label(self, entry: Entry) -> str:
        return self.machines[entry.machine].label

    def colour(self, entry: Entry) -> int:
        return self.machines[entry.machine].colour

    def names(self, panel: Panel) -> dict[int, str]:
        """What each entry of a panel is called there, by its place: "NVIDIA T4 · tuned · batch size 512"."""
        siblings: dict[tuple[str, str, bool], list[Entry]] = {}
        for entry in panel.entries:
            siblings.setdefault((entry.machine, entry.tuning, entry.ok), []).append(entry)
        names: dict[int, str] = {}
        for place, entry in enumerate(panel.entries):
            alike = siblings[entry.machine, entry.tuning, entry.ok]
            parts = [self.label(entry), entry.tuning, _distinction(entry, alike)]
            name = " · ".join(part for part in parts if part)
            taken = sum(other == name or other.startswith(f"{name} (") for other in names.values())
            names[place] = f"{name} ({taken + 1})" if taken else name
        return names

    def remarks(self, panel: Panel, entries: Sequence[Entry] | None = None) -> list[str]:
        """What the notes of a chart say of those entries of the panel that it shows: what differs, what is doubtful."""
        shown = [entry for entry in (panel.entries if entries is None else entries) if entry.ok]
        words = differences(shown)
        doubtful: dict[str, list[str]] = {}
        for place, name in self.names(panel).items():
            entry = panel.entries[place]
            if entry.caveats and any(entry is one for one in shown):
                doubtful.setdefault("; ".join(entry.caveats), []).append(name)
        lines = [f"{_list(names, len(shown))}: {caveat}." for caveat, names in doubtful.items()]
        return [*([f"Not the same in all: {words}."] if words else []), *lines]

    @cached_property
    def timing_versions(self) -> int:
        """By how many rules of timing its records were measured."""
        return len({entry.row.timing_version for entry in self.entries} - {None})


def _list(names: Sequence[str], of: int) -> str:
    if len(names) == of > 1:
        return "All"
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _machines(entries: Sequence[Entry]) -> dict[str, Machine]:
    """GPUs first; called by GPU or CPU where that is short and unique, else by their slug."""
    newest: dict[str, Row] = {}
    for entry in entries:
        row = newest.get(entry.machine)
        if row is None or entry.row.ids[-1] >= row.ids[-1]:
            newest[entry.machine] = entry.row
    names = {slug: _hardware(row) or slug for slug, row in newest.items()}
    often = Counter(names.values())
    short = {slug for slug, name in names.items() if often[name] == 1 and len(name) <= LONGEST_LABEL}
    ordered = sorted(newest, key=lambda slug: (newest[slug].gpu is None, slug))
    return {
        slug: Machine(slug=slug, label=names[slug] if slug in short else slug, gpu=newest[slug].gpu, colour=colour)
        for colour, slug in enumerate(ordered)
    }


def _hardware(row: Row) -> str | None:
    if row.gpu is not None or row.cpu is None or row.cores is None:
        return row.gpu or row.cpu
    return f"{row.cpu}, {row.cores:.0f} cores"


def _panels(entries: Sequence[Entry]) -> list[Panel]:
    """Panels in the order of their scopes: real data first, then full suites, then end to end.

    A run that failed before it knew its data stands in every panel that it may have been meant for.
    """
    groups: dict[tuple, list[Entry]] = {}
    lost = []
    for entry in entries:
        if entry.ok or entry.row.data_sha256:
            groups.setdefault((_scope(entry.row), _contest(entry.row)), []).append(entry)
        else:
            lost.append(entry)
    known = list(groups)
    for entry in lost:
        suite, _, mode = _scope(entry.row)
        meant = [
            (scope, contest)
            for scope, contest in known
            if (scope[0], scope[2]) == (suite, mode) and contest[:4] == _contest(entry.row)[:4]
        ]
        for key in meant or [(_scope(entry.row), _contest(entry.row))]:
            groups.setdefault(key, []).append(entry)
    ordered = sorted(groups, key=lambda key: (_scope_order(key[0]), str(key[1][:-1]), -(key[1][-1] or 0)))
    titles = _titles(ordered)
    return [
        Panel(
            workload=contest[0],
            title=titles[scope, contest],
            scope=scope_name(*scope),
            entries=tuple(sorted(groups[scope, contest], key=_entry_order)),
        )
        for scope, contest in ordered
    ]


def _scope(row: Row) -> tuple[str | None, bool | None, str | None]:
    return row.suite, row.synthetic, row.mode


def scope_name(suite: str | None, synthetic: bool | None, mode: str | None) -> str:
    return f"{suite or 'no'} suite · {KINDS[synthetic]} · {MODES.get(mode or '', mode or MISSING)}"


def _scope_order(scope: tuple[str | None, bool | None, str | None]) -> tuple:
    suite, synthetic, mode = scope
    known = (list(KINDS).index(synthetic), rank(suite, ("full", "quick")), rank(mode, tuple(MODES)))
    return *known, suite or "", mode or ""


def _contest(row: Row) -> tuple:
    digests = json.dumps(row.data_sha256, sort_keys=True, default=str)
    case = (row.workload or MISSING, row.division, row.gpus, row.scaling)
    return *case, row.data, row.data_label, digests, row.timing_version


def _titles(keys: Sequence[tuple]) -> dict[tuple, str]:
    """A title for each panel that says what it is.

    Digests only where they tell panels apart; in a report of several timing versions, every title names its own.
    """
    versions = {contest[-1] for _, contest in keys} - {None}
    families: dict[tuple, list[tuple]] = {}
    for scope, contest in keys:
        families.setdefault((scope, contest[:4]), []).append(contest)
    titles: dict[tuple, str] = {}
    for scope, contest in keys:
        workload, division, gpus, scaling, data, label, digests, version = contest
        siblings = families[scope, contest[:4]]
        parts = [
            workload,
            f"{division} division" if division not in (None, "closed") else "",
            f"{gpus:,.0f} GPUs {scaling or ''}".rstrip() if gpus is not None and gpus > 1 else "",
            f"{show_entry(label)} data" if label not in (None, "synthetic") else "",
            f"data set {show_entry(data)}" if len({other[4] for other in siblings}) > 1 else "",
            f"data {_short(digests)}" if len({other[6] for other in siblings}) > 1 else "",
            f"timing version {show_entry(version)}" if len(versions) > 1 and version is not None else "",
        ]
        titles[scope, contest] = ", ".join(part for part in parts if part)
    return titles


def _short(digests: str) -> str:
    values = [str(value)[:8] for value in json.loads(digests).values()]
    return " and ".join(values) or "not known"


def _entry_order(entry: Entry) -> tuple:
    return entry.row.gpu is None, entry.machine, rank(entry.tuning, TUNINGS), entry.tuning, not entry.ok, entry.row.ids


def _distinction(entry: Entry, alike: Sequence[Entry]) -> str:
    """The settings that set one entry apart from others of its machine and tuning, the batch size first."""
    if not entry.ok:
        return entry.row.status
    own = dict(_flat(entry.row.recipe))
    others = [dict(_flat(other.row.recipe)) for other in alike]
    names = [name for name in own if any(own[name] != other.get(name) for other in others)]
    names.sort(key=lambda name: name != "batch size")
    return ", ".join(f"{name} {show_entry(own[name])}" for name in names[:3])


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The interval of the median, from as many records on as tables ask for."""
    if len(values) < MIN_RECORDS_FOR_SPREAD:
        return None, None
    found = median_interval(values)
    return found.low, found.high
