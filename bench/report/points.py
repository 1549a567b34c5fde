"""Charts with one bar or dot for each entry, coloured by machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .blocks import Chart, Series, Text
from .book import Book, Entry

FAR_APART = 30  # largest ÷ smallest value from which bars are drawn as dots on a logarithmic axis


@dataclass(frozen=True, kw_only=True)
class Point:
    """One entry in a chart of bars or dots."""

    entry: Entry
    category: str
    value: float | None
    low: float | None = None
    high: float | None = None
    said: str = ""


def by_machine(
    book: Book,
    points: Sequence[Point],
    *,
    title: str,
    value_label: str,
    level: tuple[float, str] | None = None,
    notes: Sequence[str] = (),
    shared: bool = False,
) -> list[Chart]:
    """The chart of the points, or none where nothing was measured; the axis is logarithmic where they lie far apart.

    `shared`: machines meet in one category, as dots.
    """
    values = [point.value for point in points if point.value]
    if not values:
        return []
    apart = shared or max(values) / min(values) > FAR_APART
    series = []
    for slug, machine in book.machines.items():
        own = [point for point in points if point.entry.machine == slug]
        if own:
            series.append(
                Series(
                    name=machine.label,
                    at=[point.category for point in own],
                    value=[None if apart and point.value == 0 else point.value for point in own],
                    low=[point.low for point in own],
                    high=[point.high for point in own],
                    said=[point.said for point in own],
                    colour=machine.colour,
                )
            )
    return [
        Chart(
            kind="dots" if apart else "bars",
            title=title,
            value_label=value_label,
            level=level,
            notes=notes,
            series=series,
            series_label="machine",
            at_label="run",
            categories=list(dict.fromkeys(point.category for point in points)),
            logarithmic=apart,
        )
    ]


def left_out(titles: Sequence[str], why: str) -> list[Text]:
    """Words in the place of charts that are not there."""
    return [Text(text=f"Not shown, because it {why}: {'; '.join(titles)}.")] if titles else []
