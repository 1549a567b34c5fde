"""Tabs on what a run takes and what the machine could give: memory, energy and cost, roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..summary import at
from ..table import figure
from .blocks import Block, Chart, Series, Text
from .book import Book, Entry, Panel
from .draw import COLOURS
from .load import Prices
from .points import Point, by_machine, left_out

# Memory
OWNERS_FROM = 3  # the colours of memory's owners begin behind those of the first machines


def memory(book: Book, panels: Sequence[Panel]) -> list[Block]:
    """Peaks by owner on the GPU, and the host's."""
    blocks: list[Block] = []
    for panel in panels:
        names = book.names(panel)
        named = [(names[place], entry) for place, entry in enumerate(panel.entries) if entry.ok]
        remarks = book.remarks(panel)
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
                    notes=["Parts are differences of peaks, which need not fall on the same moment.", *remarks],
                )
            )
        points = [Point(entry=entry, category=name, value=entry.row.host_rss_peak_mib) for name, entry in named]
        title = f"{panel.title}: peak host memory, resident"
        blocks += by_machine(book, points, title=title, value_label="MiB", notes=remarks)
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
GPU_ALONE = "Energy of the GPU alone, with that of whatever else ran on it."


def cost(book: Book, panels: Sequence[Panel], prices: Prices | None) -> list[Block]:
    blocks: list[Block] = []
    without: list[str] = []
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
                if whole is None and entry.row.target is not None:
                    said = "missed its target"
                to_target.append(Point(entry=entry, category=names[place], value=whole, said=said))
        remarks = book.remarks(panel)
        title = f"{panel.title}: energy for 1,000 images"
        chart = by_machine(book, energy, title=title, value_label="J/1,000 images", notes=[GPU_ALONE, *remarks])
        blocks += chart
        if not chart:
            without.append(panel.title)
        if prices is not None:
            source = [f"Prices: {prices.source}.", *remarks]
            blocks += by_machine(
                book, dollars, title=f"{panel.title}: images per dollar", value_label="images/$", notes=source
            )
            blocks += by_machine(
                book, to_target, title=f"{panel.title}: price of reaching the target", value_label="$", notes=source
            )
    if blocks and prices is None:
        blocks.insert(0, Text(text="No prices were given: netdyno report --prices FILE adds images per dollar."))
    return [*blocks, *left_out(without, "recorded no energy")] if blocks else []


# Roofline
COUNTED = (
    "Work is counted, not measured: operations of products and convolutions, bytes layer by layer. Ceilings are what "
    "netdyno doctor measured: matrix products and copies."
)


def roofline(book: Book, panels: Sequence[Panel]) -> list[Block]:
    """FLOP/s over FLOP per byte, a chart for each machine, under the ceilings that it measured for each precision."""
    charts: list[Block] = []
    counted: set[str] = set()
    for machine in book.machines.values():
        series: list[Series] = []
        measured: dict[str, list[tuple[str, float, float]]] = {}  # by precision: when, FLOP/s, bytes/s
        for panel in panels:
            names = book.names(panel)
            for place, entry in enumerate(panel.entries):
                flops, bytes_ = entry.middle("roofline", "flop_per_s"), entry.middle("roofline", "bytes_per_s")
                if entry.machine != machine.slug or not entry.ok or not flops or not bytes_:
                    continue
                counted.add(panel.title)
                name = f"{panel.title} · {names[place].removeprefix(machine.label + ' · ')}"
                share = entry.row.share_of_card
                said = [f"{100 * share:.1f} % of the images/s that the ceilings allow"] if share is not None else []
                number = len(series)
                series.append(
                    Series(
                        name=name,
                        at=[flops / bytes_],
                        value=[flops],
                        said=["; ".join([*said, *entry.caveats])],
                        colour=number,
                        style=number + number // len(COLOURS),  # no two of them share colour and marker
                    )
                )
                for record in (one.record for one in entry.found):
                    compute, traffic = (at(record, "roofline", f"ceiling_{what}_per_s") for what in ("flop", "bytes"))
                    if compute and traffic:
                        own = measured.setdefault(entry.precision or "precision not recorded", [])
                        own.append((record["created_utc"], compute, traffic))
        if not series:
            continue
        notes = [COUNTED]
        if any(len({ceilings[1:] for ceilings in own}) > 1 for own in measured.values()):
            notes.append("The ceilings were measured more than once; the newest are drawn.")
        if not measured:
            notes = [COUNTED, "These records hold none: run netdyno doctor, then measure again."]
        reach = [one.at[0] for one in series if isinstance(one.at[0], (int, float))]
        charts.append(
            Chart(
                kind="points",
                title=f"Roofline of {machine.label}",
                at_label="FLOP per byte",
                value_label="FLOP/s",
                series=[*_roofs({precision: max(own)[1:] for precision, own in measured.items()}, reach), *series],
                series_label="run",
                logarithmic=True,
                at_logarithmic=True,
                notes=notes,
            )
        )
    without = [panel.title for panel in panels if panel.title not in counted]
    return [*charts, *left_out(without, "recorded no roofline")] if charts else []


def _roofs(ceilings: Mapping[str, tuple[float, float]], reach: Sequence[float]) -> list[Series]:
    """A line for each precision, over all points and ridges."""
    ridges = [compute / traffic for compute, traffic in ceilings.values()]
    first, last = min([*ridges, *reach]) / 4, max([*ridges, *reach]) * 4
    return [
        Series(
            name=f"ceilings, {precision}",
            at=[first, ridge, last],
            value=[min(compute, traffic * intensity) for intensity in (first, ridge, last)],
            colour=-1,
            style=style,
        )
        for style, (ridge, (precision, (compute, traffic))) in enumerate(zip(ridges, ceilings.items(), strict=True))
    ]
