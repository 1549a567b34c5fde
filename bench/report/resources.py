"""Tabs on what a run takes and what the machine could give: memory, energy and cost, roofline."""

from __future__ import annotations

from collections.abc import Sequence

from ..table import figure
from .blocks import Block, Chart, Series, Text
from .book import Book, Entry, Panel
from .load import Prices
from .points import Point, by_machine

# Memory
OWNERS_FROM = 3  # the colours of memory's owners begin behind those of the first machines


def memory(book: Book, panels: Sequence[Panel]) -> list[Block]:
    """Peaks by owner on the GPU, and the host's."""
    blocks: list[Block] = []
    for panel in panels:
        names = book.names(panel)
        named = [(names[place], entry) for place, entry in enumerate(panel.entries) if entry.ok]
        owners: dict[str, list[tuple[str, float]]] = {}
        for name, entry in named:
            for owner, mib in _owners(entry).items():
                owners.setdefault(owner, []).append((name, mib))
        if owners:
            blocks.append(
                Chart(
                    kind="stack",
                    title=f"{panel.title}: peak GPU memory by owner",
                    at_label="run",
                    value_label="MiB",
                    series_label="owner",
                    series=[
                        Series(
                            name=owner,
                            at=[at for at, _ in parts],
                            value=[mib for _, mib in parts],
                            colour=colour + OWNERS_FROM,
                        )
                        for colour, (owner, parts) in enumerate(owners.items())
                    ],
                    categories=[name for name, entry in named if _owners(entry)],
                    notes=["Parts are differences of peaks, which need not fall on the same moment.", *panel.differs],
                )
            )
        points = [Point(entry=entry, category=name, value=entry.row.host_rss_peak_mib) for name, entry in named]
        title = f"{panel.title}: peak host memory, resident"
        blocks += by_machine(book, points, title=title, value_label="MiB", notes=panel.differs)
    return blocks


def _owners(entry: Entry) -> dict[str, float]:
    """MiB by owner; together they are the peak of the process, where NVML told it."""
    allocated, reserved = entry.row.peak_allocated_mib, entry.row.peak_reserved_mib
    process = entry.row.nvml_process_peak_mib
    owners = {}
    if allocated is not None:
        owners["torch, in use"] = allocated
        if reserved is not None:
            owners["torch, cached"] = max(0.0, reserved - allocated)
    torch = sum(owners.values())
    if process is not None:
        owners["outside torch: CUDA context, DALI, libraries" if owners else "the process, undivided"] = max(
            0.0, process - torch
        )
    return owners


# Energy and cost
SOURCES = {"counter": "GPU alone, energy counter", "sampled": "GPU alone, sampled power"}  # of an energy


def cost(book: Book, panels: Sequence[Panel], prices: Prices | None) -> list[Block]:
    blocks: list[Block] = []
    for panel in panels:
        names = book.names(panel)
        energy, dollars, to_target = [], [], []
        for place, entry in enumerate(panel.entries):
            if not entry.ok:
                continue
            joule, how = entry.row.energy_j_per_1000_images, SOURCES.get(entry.row.energy_source or "", "")
            energy.append(Point(entry=entry, category=names[place], value=joule, said=how))
            price = prices.of(entry.row.machine, entry.row.gpu) if prices else None
            if price is not None:
                said = f"at {figure(price)} $ an hour"
                speed, seconds = entry.row.images_per_s, entry.row.train_s_to_target
                each = speed * 3600 / price if speed is not None else None
                dollars.append(Point(entry=entry, category=names[place], value=each, said=said))
                whole = seconds * price / 3600 if seconds is not None else None
                to_target.append(Point(entry=entry, category=names[place], value=whole, said=said))
        differs = panel.differs
        title = f"{panel.title}: energy for 1,000 images"
        blocks += by_machine(book, energy, title=title, value_label="J/1,000 images", notes=differs)
        if prices is not None:
            source = [f"Prices: {prices.source}.", *differs]
            blocks += by_machine(
                book, dollars, title=f"{panel.title}: images per dollar", value_label="images/$", notes=source
            )
            blocks += by_machine(
                book, to_target, title=f"{panel.title}: price of reaching the target", value_label="$", notes=source
            )
    if blocks and prices is None:
        blocks.insert(0, Text(text="No prices were given: netdyno report --prices FILE adds images per dollar."))
    return blocks


# Roofline


def roofline(book: Book, panels: Sequence[Panel]) -> list[Block]:
    """Achieved FLOP/s over FLOP per byte, a chart for each machine, under the ceilings that it measured."""
    charts: list[Block] = []
    for machine in book.machines.values():
        series: list[Series] = []
        ceilings: list[tuple[float, float]] = []
        for panel in panels:
            names = book.names(panel)
            for place, entry in enumerate(panel.entries):
                flops, bytes_ = entry.middle("roofline", "flop_per_s"), entry.middle("roofline", "bytes_per_s")
                if entry.machine == machine.slug and entry.ok and flops and bytes_:
                    name = f"{panel.title} · {names[place].removeprefix(machine.label + ' · ')}"
                    series.append(
                        Series(name=name, at=[flops / bytes_], value=[flops], colour=len(series), style=len(series))
                    )
                    compute = entry.middle("roofline", "ceiling_flop_per_s")
                    traffic = entry.middle("roofline", "ceiling_bytes_per_s")
                    if compute and traffic:
                        ceilings.append((compute, traffic))
        if not series:
            continue
        notes = []
        if ceilings:
            compute, traffic = max(ceiling for ceiling, _ in ceilings), max(ceiling for _, ceiling in ceilings)
            ridge = compute / traffic
            reach = [one.at[0] for one in series if isinstance(one.at[0], (int, float))]
            span = [min([ridge, *reach]) / 4, ridge, max([ridge, *reach]) * 4]
            roof = [min(compute, traffic * intensity) for intensity in span]
            series.insert(0, Series(name="what this machine sustains", at=span, value=roof, colour=-1))
        else:
            notes = ["The records do not hold the ceilings of this machine."]
        charts.append(
            Chart(
                kind="points",
                title=f"Roofline of {machine.label}",
                at_label="FLOP per byte",
                value_label="FLOP/s",
                series=series,
                series_label="run",
                logarithmic=True,
                at_logarithmic=True,
                notes=notes,
            )
        )
    return charts
