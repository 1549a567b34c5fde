"""What a report is made of: tables, charts, pictures and text, before anything is drawn.

HTML, Markdown and pictures are all drawn from these, so that they cannot disagree. Strings are plain text, markup for
nobody; who draws them escapes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..table import MISSING, figure

Position = str | float  # a category, an ISO time or a number
Cell = str | tuple[str, float | None]  # text, or what is shown of a number and what it is sorted by


def number(value: float | None, unit: str = "", *, count: bool = False) -> Cell:
    """A cell that shows a number rounded and sorts by it unrounded."""
    if value is None:
        return (MISSING, None)
    return (f"{figure(value, count=count)} {unit}".strip(), value)


@dataclass(frozen=True, kw_only=True)
class Text:
    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells may hold a line break. `flags` marks rows by their number: "failed" or "differs"."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    flags: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One colour of a chart: `value[i]` stands at `at[i]`; None where nothing was measured, and `said[i]` says why."""

    name: str
    at: Sequence[Position]
    value: Sequence[float | None]
    low: Sequence[float | None] = ()  # ends of the values' intervals
    high: Sequence[float | None] = ()
    start: Sequence[float] = ()  # where a bar begins, unless at 0
    said: Sequence[str] = ()  # a remark on each point
    colour: int = 0
    style: int = 0  # dash and marker, for series of one colour
    hidden: bool = False  # until it is switched on


@dataclass(frozen=True, kw_only=True)
class Chart:
    """`bars` and `dots` run from left to right at categories, one below the other; `lines` and `points` have two axes.

    `stack` is bars whose series follow each other; `dots` have a logarithmic value axis, for values far apart.
    """

    kind: Literal["bars", "stack", "dots", "lines", "points"]
    title: str
    at_label: str
    value_label: str
    series: Sequence[Series]
    series_label: str = "series"
    categories: Sequence[str] = ()  # their order, from above
    logarithmic: bool = False  # the axis of the values
    at_logarithmic: bool = False  # the other one
    level: tuple[float, str] | None = None  # a line across the chart, such as a target, and its name
    notes: Sequence[str] = ()

    def table(self) -> Table:
        """The chart's data, a row a point."""
        named, spread = len(self.series) > 1, any(any_number(one.low) for one in self.series)
        remarked = any(any(one.said) for one in self.series)
        started = any(one.start for one in self.series)
        columns = [
            *([self.series_label] if named else []),
            self.at_label,
            *(["from"] if started else []),
            self.value_label,
            *(["low", "high"] if spread else []),
            *(["remark"] if remarked else []),
        ]
        rows: list[list[Cell]] = []
        for one in self.series:
            for index, (at, value) in enumerate(zip(one.at, one.value, strict=True)):
                row: list[Cell] = [one.name] if named else []
                row.append(at if isinstance(at, str) else number(at, count=at == int(at)))
                if started:
                    row.append(number(one.start[index]))
                row.append(number(value))
                if spread:
                    row += [number(one.low[index] if one.low else None), number(one.high[index] if one.high else None)]
                if remarked:
                    row.append(one.said[index] if one.said else "")
                rows.append(row)
        return Table(title=f"{self.title}: data", columns=columns, rows=rows)


@dataclass(frozen=True, kw_only=True)
class Picture:
    label: str
    webp: bytes


@dataclass(frozen=True, kw_only=True)
class Pictures:
    title: str
    pictures: Sequence[Picture]
    notes: Sequence[str] = ()


Block = Text | Table | Chart | Pictures


@dataclass(frozen=True, kw_only=True)
class View:
    """What a tab shows in one scope and, where that matters, relative to one machine; None: always."""

    blocks: Sequence[Block]
    scope: str | None = None
    base: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tab:
    id: str
    title: str
    views: Sequence[View]
    needs: str = ""  # what it takes to show anything, said where there is nothing


@dataclass(frozen=True, kw_only=True)
class Page:
    title: str
    summary: str  # what was read, in one or two sentences
    problems: Sequence[str]  # files that are not shown, and why
    scopes: Sequence[str]  # what is comparable at all; the first is shown first
    bases: Sequence[str]  # machines that others can be compared with; the first is shown first
    tabs: Sequence[Tab]


def any_number(values: Sequence[float | None]) -> bool:
    return any(value is not None for value in values)
