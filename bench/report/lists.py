"""Tabs that list: pictures, environment, failures, records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ..record import Record
from ..summary import at, clean
from ..table import MISSING
from .blocks import Block, Cell, Picture, Pictures, Table, Text, number
from .book import Book
from .load import Found, picture

MOST_PICTURES = 16 * 2**20  # bytes of all pictures together


# Pictures


def pictures(book: Book) -> list[Block]:
    """Of each entry the pictures of its newest record that has any, by epoch."""
    blocks: list[Block] = []
    budget, left_out = MOST_PICTURES, 0
    for panel in book.panels:
        names = book.names(panel)
        for place, entry in enumerate(panel.entries):
            drawn = [one for one in entry.found if at(one.record, "accuracy", "pictures")]
            if not drawn:
                continue
            shown, notes = [], []
            for listed in sorted(at(drawn[-1].record, "accuracy", "pictures"), key=lambda listed: listed["epoch"]):
                content = picture(drawn[-1], listed["file"], listed["sha256"])
                if isinstance(content, str):
                    notes.append(f"Epoch {listed['epoch']:.0f} is not shown: {content}.")
                elif len(content) > budget:
                    left_out += 1
                else:
                    budget -= len(content)
                    shown.append(Picture(label=f"epoch {listed['epoch']:.0f}", webp=content))
            if shown or notes:
                title = f"{panel.title} · {names[place]} · {panel.scope}"
                blocks.append(Pictures(title=title, pictures=shown, notes=notes))
    if left_out:
        text = f"{left_out} pictures are left out: all together may take {MOST_PICTURES // 2**20} MiB of this file."
        blocks.insert(0, Text(text=text))
    return blocks


# Environment, failures, records


def environment(book: Book) -> list[Block]:
    """What the machines are and run; rows in which they differ are marked, and said in words."""
    held: dict[str, dict[str, Counter[str]]] = {}
    for one in book.found:
        slug = one.record["machine"]["slug"]
        for name, value in _environment(one.record):
            held.setdefault(name, {}).setdefault(slug, Counter())[value] += 1
    rows: list[list[Cell]] = []
    flags, words = {}, []
    for name, by_machine in held.items():
        values = {slug: tuple(sorted(by_machine.get(slug, Counter()))) for slug in book.machines}
        told = [own for own in values.values() if own not in ((), (MISSING,))]
        compared = values.values() if name in HARDWARE else told  # a version that a machine does not tell is none
        differs = len(set(compared)) > 1 or any(len(own) > 1 for own in told)
        if differs:
            flags[len(rows)] = "differs"
        if differs and name not in HARDWARE:
            machines: dict[str, list[str]] = {}
            for slug, own in values.items():
                if own in told:
                    machines.setdefault(" and ".join(own), []).append(book.machines[slug].label)
            words.append(f"{name}: " + " against ".join(f"{value} ({', '.join(on)})" for value, on in machines.items()))
        cells = [_counted(by_machine.get(slug, Counter())) for slug in book.machines]
        verdict = "differs" if differs else "same" if len(told) > 1 else MISSING
        rows.append([name, *([verdict] if len(book.machines) > 1 else []), *cells])
    labels = [machine.label for machine in book.machines.values()]
    columns = ["", *(["among machines"] if len(labels) > 1 else []), *labels]
    notes = [f"Differs – {line}." for line in words]
    return [Table(title="Environment", columns=columns, rows=rows, notes=notes, flags=flags)]


HARDWARE = ("machine", "GPU", "CPU", "cores", "memory, GiB")  # differs of course


def _environment(record: Record) -> Iterator[tuple[str, str]]:
    machine = record["machine"]
    for name, key in zip(HARDWARE, ("slug", "gpu", "cpu", "cores", "memory_gib"), strict=True):
        yield name, _word(machine.get(key))
    yield "system", _word(machine.get("os"))
    for name, version in (machine.get("versions") or {}).items():
        yield clean(name), _word(version)
    if at(record, "timing", "timing_version") is not None:
        yield "timing version", _word(at(record, "timing", "timing_version"))
    yield "Netdyno's code", _word(record.get("code"))[:8]
    data = at(record, "data", "name")
    if data is not None:
        digests = (at(record, "data", "sha256") or {}).values()
        digest = " and ".join(str(value)[:8] for value in digests)
        label = at(record, "data", "label")
        yield f"data {clean(data)}", clean(" ".join(part for part in (label, digest) if part))


def _word(value: object) -> str:
    if value is None or value == "":
        return MISSING
    return clean(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _counted(values: Counter[str]) -> str:
    """ "2.11.0" or, where records differ, "2.11.0 (12), 2.15.0 (3)"."""
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({count:,})" for value, count in sorted(values.items())) or MISSING


def failures(book: Book) -> list[Block]:
    standing = {path for entry in book.entries if not entry.ok for path in entry.row.paths}
    rows: list[list[Cell]] = [
        [
            *_case_cells(book, one),
            one.record["status"],
            clean(one.record.get("reason") or MISSING),
            "no" if one.name in standing else "yes",
            one.record["created_utc"],
            one.record["id"],
        ]
        for one in reversed(book.found)
        if one.record["status"] != "ok"
    ]
    columns = [*CASE, "status", "reason", "later ok", "time, UTC", "record"]
    title = "Runs that did not end well"
    flags = dict.fromkeys(range(len(rows)), "failed")
    return [Table(title=title, columns=columns, rows=rows, flags=flags)] if rows else []


CASE = ("machine", "workload", "suite", "tuning", "mode", "seed")


def _case_cells(book: Book, one: Found) -> list[Cell]:
    case = one.record["case"]
    seed = case.get("seed")
    return [
        book.machines[one.record["machine"]["slug"]].label,
        *(case.get(name) or MISSING for name in ("workload", "suite", "tuning", "mode")),
        (MISSING if seed is None else f"{seed:.0f}", seed),
    ]


def records(book: Book) -> list[Block]:
    """One row a record, the newest first."""
    rows: list[list[Cell]] = []
    flags: dict[int, str] = {}
    for one in reversed(book.found):
        record = one.record
        if record["status"] != "ok":
            flags[len(rows)] = "failed"
        rows.append(
            [
                *_case_cells(book, one),
                at(record, "case", "precision") or MISSING,
                clean(at(record, "data", "label") or MISSING),
                number(at(record, "timing", "timing_version"), count=True),
                record["status"],
                number(at(record, "throughput", "images_per_s")),
                number(at(record, "memory", "peak_allocated_mib")),
                number(at(record, "memory", "nvml_process_peak_mib")),
                number(at(record, "memory", "host_rss_peak_mib")),
                number(at(record, "accuracy", "final"), clean(at(record, "accuracy", "unit") or "")),
                number(at(record, "accuracy", "target")),
                number(at(record, "accuracy", "train_s_to_target")),
                record["created_utc"],
                record["id"],
            ]
        )
    columns = [
        *(
            *CASE,
            "precision",
            "data",
            "timing version",
            "status",
            "images/s",
            "torch allocated, MiB",
            "process by NVML, MiB",
            "host RSS, MiB",
        ),
        *("final metric", "target", "s to target", "time, UTC", "record"),
    ]
    return [Table(title="Records", columns=columns, rows=rows, flags=flags)]
