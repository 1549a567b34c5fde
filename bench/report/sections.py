"""The page of a report: which tabs it has. One that has nothing to show says what it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ..errors import UserError
from ..summary import clean
from .blocks import Block, Page, Tab, View
from .book import Book, Panel
from .lists import environment, failures, pictures, records
from .load import Found, Prices
from .performance import curves, history, ladder, overview, speed, time_to_target
from .resources import cost, memory, roofline

Section = Callable[[Book, Sequence[Panel]], list[Block]]

# What a tab needs to show anything
ENERGY = "the energy of a GPU, or a table of prices: --prices"
RUNGS = "two rungs of the ladder, such as eager and tuned, on one machine, under one timing version"
COUNTED_WORK = (
    "records that count their work, as netdyno run now writes them, and for ceilings netdyno doctor before it"
)


def page(
    found: Sequence[Found], problems: Sequence[str] = (), prices: Prices | None = None, base: str | None = None
) -> Page:
    """The whole report.

    Args:
        problems: lines on files that are not shown.
        base: the machine that others are compared with first, by its slug, GPU or name in the report.

    Raises:
        UserError: there is no machine `base`.
    """
    book = Book(found)
    tabs = [
        _relative("overview", "Overview", book),
        _scoped("speed", "Speed", book, speed, "records of training"),
        _scoped("target", "Time to target", book, time_to_target, "a workload that has a target"),
        _scoped("curves", "Accuracy", book, curves, "the metric of an epoch"),
        _scoped("memory", "Memory", book, memory, "peaks of memory"),
        _scoped("cost", "Energy and cost", book, lambda book, panels: cost(book, panels, prices), ENERGY),
        _scoped("ladder", "Ladder", book, ladder, RUNGS),
        _scoped("roofline", "Roofline", book, roofline, COUNTED_WORK),
        _whole("pictures", "Pictures", pictures(book)),
        _scoped("history", "History", book, history, "a run that was repeated at another time"),
        _whole("environment", "Environment", environment(book)),
        _whole("failures", "Failures", failures(book)),
        _whole("records", "Records", records(book)),
    ]
    return Page(
        title="Netdyno report",
        summary=_summary(book),
        problems=[clean(problem) for problem in problems],
        scopes=book.scopes,
        bases=_bases(book, base),
        tabs=[tab for tab in tabs if tab.views or tab.needs],
    )


def _bases(book: Book, first: str | None) -> list[str]:
    """The names of all machines, `first` or the GPU of most cases first."""
    cases = Counter(entry.machine for entry in book.entries)
    machines = sorted(book.machines.values(), key=lambda machine: (machine.gpu is None, -cases[machine.slug]))
    if first is not None:
        chosen = [machine for machine in machines if first in (machine.slug, machine.label, machine.gpu)]
        if len(chosen) != 1:
            known = ", ".join(machine.slug for machine in machines)
            raise UserError(f"{'several machines are' if chosen else 'there is no machine'} {first}; known are {known}")
        machines.sort(key=lambda machine: machine is not chosen[0])
    return [machine.label for machine in machines]


def _summary(book: Book) -> str:
    """ "12 records, 2 machines, 3 workloads, from 2026-11-20 to 2026-11-23. 1 did not end well: see Failures." """
    failed = sum(one.record["status"] != "ok" for one in book.found)
    counts = (
        (len(book.found), "record"),
        (len(book.machines), "machine"),
        (len({panel.workload for panel in book.panels}), "workload"),
    )
    what = ", ".join(f"{count:,} {noun}{'' if count == 1 else 's'}" for count, noun in counts)
    first, last = (book.found[end].record["created_utc"][:10] for end in (0, -1))
    when = f"of {first}" if first == last else f"from {first} to {last}"
    return f"{what}, {when}." + (f" {failed:,} did not end well: see Failures." if failed else "")


def _relative(id: str, title: str, book: Book) -> Tab:
    """The overview: a view for each scope and each machine to compare with."""
    views = [
        View(scope=scope, base=machine.label, blocks=overview(book, _panels(book, scope), slug))
        for scope in book.scopes
        for slug, machine in book.machines.items()
    ]
    return Tab(id=id, title=title, views=views)


def _scoped(id: str, title: str, book: Book, section: Section, needs: str) -> Tab:
    """A view for each scope in which there is something to show."""
    views = [View(scope=scope, blocks=section(book, _panels(book, scope))) for scope in book.scopes]
    return Tab(id=id, title=title, views=[view for view in views if view.blocks], needs=needs)


def _whole(id: str, title: str, blocks: Sequence[Block]) -> Tab:
    return Tab(id=id, title=title, views=[View(blocks=blocks)] if blocks else [])


def _panels(book: Book, scope: str) -> list[Panel]:
    return [panel for panel in book.panels if panel.scope == scope]
