"""Tables of records as Markdown, CSV, JSON or for a terminal; `bench/summary.py` makes their rows.

`python -m netdyno.bench.table` writes results/TABLES.md and the README's table anew. Needs no torch and no GPU.
What a record lacks shows as "–". Each format escapes what it would take for markup.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .record import load_all
from .summary import Record, Row, order, rank, show_entry, summarise

if TYPE_CHECKING:
    import pandas as pd

MISSING = "–"
EMPTY = "No records yet: `netdyno run --suite quick` makes the first."
SPREAD = "± is half the interval of the median: 95 % from six records on, the range of three to five, none of fewer."
MAX_EPOCHS_SHOWN = 5
KINDS = {False: "real data", True: "synthetic data", None: "data not known"}


def rows(records: Iterable[Record]) -> pd.DataFrame:
    """A row a group, a column a field of `Row`: numbers unrounded, NaN where there is none."""
    import pandas as pd  # here, because it takes longer to import than all else that prints a table

    frame = pd.DataFrame([asdict(row) for row in summarise(records)], columns=[column.name for column in fields(Row)])
    return frame.astype({column.name: float for column in fields(Row) if column.type == "float | None"})


# Cells


class Notes:
    """Footnotes of one table, numbered in the order of their first mark."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, cell: str, text: str) -> str:
        """`cell` with the mark of `text` behind it; without text, the cell as it is."""
        if not text:
            return cell
        if text not in self.texts:
            self.texts.append(text)
        gap = "" if cell[-1:].isalpha() else " "  # no exponent behind a digit
        return f"{cell}{gap}{_superscript(self.texts.index(text) + 1)}"

    def lines(self) -> list[str]:
        return [f"{_superscript(number)} {text}" for number, text in enumerate(self.texts, 1)]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table; `cell` makes its plain text, unescaped."""

    header: str
    cell: Callable[[Row], str]
    right: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows that may stand in one table: one machine, one suite, one kind of data."""

    machine: str | None
    suite: str | None
    synthetic: bool | None
    rows: tuple[Row, ...]
    newest: float | None  # timing version of all rows that are shown, here or in another table

    @property
    def on_gpu(self) -> bool:
        return any(row.gpu for row in self.rows)

    @property
    def title(self) -> str:
        return f"suite {self.suite or MISSING}, {KINDS[self.synthetic]}"


def _sections(all_rows: Iterable[Row]) -> list[Section]:
    """Tables in their order: GPUs before CPUs, the full suite before the quick one, real data first."""
    all_rows = list(all_rows)
    newest = max((row.timing_version for row in all_rows if row.timing_version is not None), default=None)
    tables: dict[tuple, list[Row]] = {}
    for row in all_rows:
        tables.setdefault((row.machine, row.suite, row.synthetic), []).append(row)
    gpu_machines = {row.machine for found in tables.values() for row in found if row.gpu}

    def place(key: tuple) -> tuple:
        machine, suite, synthetic = key
        kind = list(KINDS).index(synthetic)
        return machine not in gpu_machines, machine or "", rank(suite, ("full", "quick")), suite or "", kind

    return [
        Section(machine=key[0], suite=key[1], synthetic=key[2], rows=tuple(tables[key]), newest=newest)
        for key in sorted(tables, key=place)
    ]


def _columns(section: Section, notes: Notes) -> dict[str, Column]:
    """All columns of a section's table by name; each output picks its own."""
    siblings: dict[tuple, list[Row]] = {}
    for row in section.rows:
        siblings.setdefault(_visible(row), []).append(row)

    def workload(row: Row) -> str:
        apart = [_distinction(row, siblings[_visible(row)])]
        if row.ok and row.timing_version not in (None, section.newest):
            own, newest = (figure(version, count=True) for version in (row.timing_version, section.newest))
            apart.append(f"timing version {own}, newest {newest}")
        return notes.mark(_workload(row), ", ".join(part for part in apart if part))

    memory = {
        "allocated": Column(
            header="peak memory, torch allocated, MiB", right=True, cell=lambda row: figure(row.peak_allocated_mib)
        ),
        "process": Column(
            header="peak memory, process by NVML, MiB", right=True, cell=lambda row: figure(row.nvml_process_peak_mib)
        ),
    }
    energy = {"energy": Column(header="energy, J/1,000 images", right=True, cell=lambda row: _energy(row, notes))}
    share = {"share": Column(header="share of ceilings", right=True, cell=lambda row: _percent(row.share_of_card))}
    waits = {
        "waits": Column(
            header="of compute-only",
            right=True,
            cell=lambda row: _share(row.share_of_compute, row, "compute-only", notes),
        )
    }
    scaling = {
        "scaling": Column(
            header="scaling efficiency",
            right=True,
            cell=lambda row: _share(row.scaling_efficiency, row, "one GPU", notes),
        )
    }
    host = {
        "host": Column(header="peak memory, host RSS, MiB", right=True, cell=lambda row: figure(row.host_rss_peak_mib))
    }
    return {
        "workload": Column(header="workload", cell=workload),
        "data": Column(header="data", cell=lambda row: row.data_label or MISSING),
        "tuning": Column(header="tuning", cell=lambda row: row.tuning or MISSING),
        "mode": Column(header="mode", cell=lambda row: row.mode or MISSING),
        "batch": Column(header="batch", right=True, cell=lambda row: figure(row.batch_size, count=True)),
        "images": Column(header="images/s", right=True, cell=lambda row: _images(row, notes)),
        "speedup": Column(header="speed-up over eager", right=True, cell=lambda row: _speedup(row, notes)),
        **(waits if any(row.share_of_compute is not None for row in section.rows) else {}),
        **(scaling if any(row.scaling_efficiency is not None for row in section.rows) else {}),
        **(share if any(row.share_of_card is not None for row in section.rows) else {}),
        **(memory if section.on_gpu else host),
        **(energy if any(row.energy_j_per_1000_images is not None for row in section.rows) else {}),
        "metric": Column(header="metric by epoch", cell=lambda row: _metric(row, notes)),
        "target": Column(header="target", cell=_target),
        "time": Column(header="time to target, s", right=True, cell=lambda row: figure(row.train_s_to_target)),
        "compile": Column(header="compile cold / warm, s", right=True, cell=_compile),
        "n": Column(header="n", right=True, cell=lambda row: str(row.n)),
    }


def _visible(row: Row) -> tuple:
    return row.workload, row.division, row.gpus, row.scaling, row.tuning, row.mode, row.ok


def _workload(row: Row) -> str:
    division = f", {row.division}" if row.division not in ("closed", None) else ""
    gpus = f", {row.gpus:,.0f} GPUs {row.scaling or ''}".rstrip() if row.gpus is not None and row.gpus > 1 else ""
    return (row.workload or MISSING) + division + gpus


def _distinction(row: Row, siblings: Sequence[Row]) -> str:
    """What sets a row apart from others that would read the same."""

    def properties(other: Row) -> dict[str, Any]:
        digests = {f"{split} data": str(digest)[:12] for split, digest in other.data_sha256.items()}
        return {**other.recipe, "data": other.data_label, **digests}

    if not row.ok:
        return ""
    own, others = properties(row), [properties(other) for other in siblings]
    return ", ".join(f"{name} {show_entry(own[name])}" for name in own if any(own[name] != o.get(name) for o in others))


def _images(row: Row, notes: Notes, *, spread: bool = True) -> str:
    if not row.ok:
        return notes.mark(row.status, f"{row.status}: {row.reason}" if row.reason else "")
    cell = figure(row.images_per_s)
    if spread and row.images_per_s and row.images_per_s_low is not None and row.images_per_s_high is not None:
        cell += f" ± {50 * (row.images_per_s_high - row.images_per_s_low) / row.images_per_s:.1f} %"
    return notes.mark(cell, "; ".join(row.doubts))


def _speedup(row: Row, notes: Notes) -> str:
    if row.speedup_over_eager is None:
        return MISSING
    differs = ", ".join(row.differs_from_eager)
    said = [f"recipe differs from eager's: {differs}"] if differs else []
    return notes.mark(f"{figure(row.speedup_over_eager)} ×", "; ".join([*said, *row.on_another_card("eager")]))


def _share(share: float | None, row: Row, what: str, notes: Notes) -> str:
    return notes.mark(_percent(share), "; ".join(row.on_another_card(what)))


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f} %"


def _energy(row: Row, notes: Notes) -> str:
    source = "from sampled power instead of a counter" if row.energy_source == "sampled" else ""
    return notes.mark(figure(row.energy_j_per_1000_images), source)


def _metric(row: Row, notes: Notes) -> str:
    further = ", ".join(f"{name} {figure(value)}" for name, value in row.final_metrics.items())
    cell = _epochs(row, spread=True) + (f" ({further})" if further else "")
    return notes.mark(cell, _weights(row))


def _weights(row: Row) -> str:
    return "random weights" if row.metric_final is not None and row.recipe.get("weights") == "random" else ""


def _epochs(row: Row, *, spread: bool) -> str:
    """ "97.10 → 98.30 % test accuracy"; `spread` is of the last number."""
    epochs = row.metric_by_epoch or (row.metric_final,)
    if row.metric_final is None and set(epochs) == {None}:
        return MISSING
    shown = [MISSING if value is None else fixed(value) for value in epochs]
    if len(shown) > MAX_EPOCHS_SHOWN:
        shown = [shown[0], "…", shown[-1]]
    low, high = row.metric_final_low, row.metric_final_high
    if spread and low is not None and high is not None and high > low:  # runs of one seed may be alike
        shown[-1] += f" ± {fixed((high - low) / 2)}"
    return " ".join(part for part in (" → ".join(shown), row.metric_unit, row.metric) if part)


def _target(row: Row) -> str:
    if row.target is None or not row.ok:
        return MISSING
    reached = {0: "missed", row.n: "reached"}.get(row.reached_n or 0, f"{row.reached_n} of {row.n} reached")
    return " ".join(part for part in (_goal(row), row.metric_unit, reached) if part)


def _goal(row: Row) -> str:
    if row.target is None:
        return MISSING
    return {True: "≥ ", False: "≤ ", None: ""}[row.higher_is_better] + fixed(row.target)


def _compile(row: Row) -> str:
    if row.compile_cold_s is None and row.compile_warm_s is None:
        return MISSING
    return f"{figure(row.compile_cold_s)} / {figure(row.compile_warm_s)}"


def figure(value: float | None, *, count: bool = False) -> str:
    """At least three significant digits, thousands apart: 1,234 and 82.3 and 0.0123."""
    if value is None:
        return MISSING
    size = abs(value)
    if size >= 1e12:
        return f"{value:.3g}"
    if size >= 99.95 or count or value == 0:
        return f"{value:,.0f}"
    if size < 0.9995:
        return f"{value:.3g}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"


def fixed(value: float) -> str:
    """Two decimals, so that the epochs of one metric line up: 98.10."""
    return f"{value:,.2f}" if abs(value) < 1e12 else f"{value:.3g}"


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


# Markdown


def to_markdown(records: Iterable[Record]) -> str:
    """A section a machine, in it a table for each suite and kind of data."""
    sections = _sections(summarise(records))
    if not sections:
        return EMPTY + "\n"
    blocks: list[str] = []
    for number, section in enumerate(sections):
        if number == 0 or section.machine != sections[number - 1].machine:
            own = [row for other in sections if other.machine == section.machine for row in other.rows]
            blocks += [f"## {escape(section.machine or MISSING)}", escape(_machine(own))]
        blocks += [f"### {escape(section.title.capitalize())}", _markdown_table(section)]
    return "\n\n".join(blocks) + "\n"


def _markdown_table(section: Section) -> str:
    notes = Notes()
    columns = list(_columns(section, notes).values())
    table = _aligned(columns, [[column.cell(row) for column in columns] for row in section.rows])
    return "\n".join([table, *_markdown_notes(notes, section)])


def _markdown_notes(notes: Notes, section: Section) -> list[str]:
    lines = [*notes.lines(), *([SPREAD] if _has_spread(section.rows) else [])]
    return ["", *(f"- {escape(line)}" for line in lines)] if lines else []


def _aligned(columns: Sequence[Column], body: Iterable[Sequence[str]]) -> str:
    return aligned([column.header for column in columns], [column.right for column in columns], body)


def aligned(headers: Sequence[str], right: Sequence[bool], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose source lines up too; columns are set flush right where `right` says so."""
    lines = [list(headers), *([escape(cell) for cell in line] for line in body)]
    widths = [max(3, *(cell_len(cell) for cell in cells)) for cells in zip(*lines, strict=True)]
    rule = ["-" * (width - 1) + ":" if flush else "-" * width for flush, width in zip(right, widths, strict=True)]

    def padded(cell: str, flush: bool, width: int) -> str:
        space = " " * (width - cell_len(cell))
        return space + cell if flush else cell + space

    lines.insert(1, rule)
    return "\n".join("| " + " | ".join(map(padded, line, right, widths)) + " |" for line in lines)


def escape(text: str) -> str:
    """Text that Markdown shows as it is: no cell ends, no markup, no HTML, no comment."""
    for letter in "\\`*_[]|~":
        text = text.replace(letter, "\\" + letter)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _machine(own: Sequence[Row]) -> str:
    """What one machine is, from its rows: its newest words for itself, and every version that was measured."""
    described = max(own, key=lambda row: row.ids[-1])
    parts = [described.gpu, described.cpu]
    parts.append(f"{described.cores:,.0f} cores" if described.cores is not None else None)
    parts.append(f"{figure(described.memory_gib)} GiB" if described.memory_gib is not None else None)
    hardware = ", ".join(part for part in parts if part)
    versions = ", ".join(sorted({version for row in own for version in row.versions}))
    return "; ".join(part for part in (hardware, versions) if part) or MISSING


def _has_spread(some: Iterable[Row]) -> bool:
    return any(row.images_per_s_low is not None or row.metric_final_low is not None for row in some)


# CSV and JSON


def to_json(records: Iterable[Record]) -> str:
    """A list with an object a row: numbers unrounded, null where there is none."""
    return json.dumps([asdict(row) for row in summarise(records)], indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(records: Iterable[Record]) -> str:
    """A line a row: numbers unrounded, empty where there is none; lists and recipes as JSON in one cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.name for column in fields(Row))
    for row in summarise(records):
        writer.writerow(
            json.dumps(value, ensure_ascii=False) if isinstance(value, (tuple, dict)) else value
            for value in asdict(row).values()
        )
    return text.getvalue()


# Terminal


@dataclass(frozen=True, kw_only=True)
class Screen:
    """A section for a terminal: fits 120 columns. Long names fold.

    In fewer columns all names do, and compile time, target and spread go.
    """

    section: Section

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        notes = Notes()
        wide = options.max_width >= WIDE
        yield Text(f"{self.section.machine or MISSING}: {self.section.title}", style="bold")
        table = Table(box=SIMPLE_HEAD, padding=(0, 1 if wide else 0, 0, 0), pad_edge=False)
        columns = _terminal_columns(self.section, notes, wide)
        cells = [[column.cell(row) for column in columns] for row in self.section.rows]
        for column, *texts in zip(columns, *cells, strict=True):
            long = not wide or max(map(cell_len, texts)) > LONGEST_NAME
            names = column.header == "workload" and long  # which fold between words
            longest_word = max(cell_len(word) for text in [column.header, *texts] for word in text.split())
            folds = names or column.header in FOLDING
            table.add_column(
                column.header,
                justify="right" if column.right else "left",
                no_wrap=not folds,
                overflow="fold" if folds else "ellipsis",
                width=min(longest_word, 20) if names else None,
                max_width=None if folds else 32,  # so that one long name leaves the other columns their room
            )
        above = ""
        for row, (name, *others) in zip(self.section.rows, cells, strict=True):
            table.add_row(*map(Text, ["" if name == above else name, *others]), style="" if row.ok else "red")
            above = name
        yield table
        spread = [SPREAD] if wide and _has_spread(self.section.rows) else []
        for line in [*notes.lines(), *spread]:
            yield Padding(Text(line, style="dim"), (0, 0, 0, 1))


FOLDING = ("metric by epoch", "target")
WIDE = 120
LONGEST_NAME = 24  # of a workload that a wide terminal shows on one line


def _terminal_columns(section: Section, notes: Notes, wide: bool) -> list[Column]:
    full = _columns(section, notes)
    names = ["workload", "tuning"]
    if len({row.mode for row in section.rows}) > 1:
        names.append("mode")
    columns = [full[name] for name in names]
    columns.append(Column(header="images/s", right=True, cell=lambda row: _images(row, notes, spread=wide)))
    if "scaling" not in full or any(row.speedup_over_eager is not None for row in section.rows):
        columns.append(replace(full["speedup"], header="over\neager"))
    if "scaling" in full:
        columns.append(replace(full["scaling"], header="scaling"))
    if not section.on_gpu:
        columns.append(replace(full["host"], header="MiB\nRSS"))
    elif any(row.nvml_process_peak_mib is not None for row in section.rows):
        columns.append(replace(full["process"], header="MiB\nNVML"))
    else:
        columns.append(replace(full["allocated"], header="MiB\ntorch"))
    columns.append(Column(header="metric by epoch", cell=lambda row: _terminal_metric(row, notes)))
    if wide:
        columns.append(Column(header="target", cell=_terminal_target))
        columns.append(replace(full["compile"], header="compile s\ncold / warm"))
    return columns


def _terminal_metric(row: Row, notes: Notes) -> str:
    data = f"{row.data_label} data" if row.data_label not in ("official", "synthetic", None) else ""
    return notes.mark(_epochs(row, spread=False), ", ".join(part for part in (_weights(row), data) if part and row.ok))


def _terminal_target(row: Row) -> str:
    if row.target is None or not row.ok:
        return MISSING
    return f"{_goal(row)} {({0: '✗', row.n: '✓'}).get(row.reached_n or 0, f'{row.reached_n}/{row.n}')}"


def to_rich(records: Iterable[Record]) -> list[RenderableType]:
    """A renderable a table, to be printed one after the other."""
    sections = _sections(summarise(records))
    return [Screen(section=section) for section in sections] or [Text(EMPTY)]


# The committed tables


def tables_page(records: Iterable[Record]) -> str:
    """results/TABLES.md."""
    head = "Generated from the records in this folder by `make tables` (`python -m netdyno.bench.table`); do not edit."
    return f"{head}\n\n# Results\n\n{to_markdown(records)}"


def readme_table(records: Iterable[Record]) -> str:
    """The README's table: for each machine its full suite, else the quick one; tuned beside eager, end to end.

    Of several recipes of a workload it shows the one that was measured last. Of machines that have the same GPU it
    tells the names.
    """
    all_rows = summarise(records)
    blocks: list[str] = []
    end_to_end = [row for row in all_rows if row.mode == "e2e" and row.tuning in ("tuned", "eager")]
    sections = _sections(_newest_recipes(end_to_end))
    devices = {section.machine: _device(section) for section in sections}
    for section in sections:
        suites = {row.suite for row in all_rows if row.machine == section.machine}
        if section.suite != ("full" if "full" in suites else "quick"):
            continue
        name = devices[section.machine]
        if [*devices.values()].count(name) > 1:
            name += f" ({section.machine})"
        blocks += [f"**{escape(f'{name}: {section.title}')}**", _readme_section(section)]
    return "\n\n".join(blocks) or EMPTY


def _device(section: Section) -> str:
    return section.rows[0].gpu or section.rows[0].cpu or section.machine or MISSING


def _newest_recipes(rows: Sequence[Row]) -> list[Row]:
    """Of each workload the tuned row that was measured last, with the eager row beside it, else the last eager one."""
    names = ("machine", "suite", "data_label", "workload", "division", "gpus", "scaling")
    newest: dict[tuple, Row] = {}
    for row in sorted((row for row in rows if row.ok), key=lambda row: (row.tuning == "tuned", row.ids[-1])):
        newest[tuple(getattr(row, name) for name in names)] = row
    kept = {row.ids for row in newest.values()} | {row.eager_ids for row in newest.values()}
    return [row for row in rows if not row.ok or row.ids in kept]


def _readme_section(section: Section) -> str:
    notes = Notes()
    columns = _columns(section, notes)
    shape = {  # columns, and of which row they tell
        columns["workload"]: "shown",
        columns["data"]: "shown",
        Column(header="tuned, images/s", cell=columns["images"].cell, right=True): "tuned",
        Column(header="eager, images/s", cell=columns["images"].cell, right=True): "eager",
        Column(header="speed-up", cell=columns["speedup"].cell, right=True): "tuned",
        **({columns["scaling"]: "shown"} if "scaling" in columns else {}),
        Column(header="metric", cell=lambda row: _outcome(row, notes)): "shown",
    }
    body = []
    for tuned, eager in _pairs(section.rows):
        rows_of = {"shown": tuned or eager, "tuned": tuned, "eager": eager}
        body.append([column.cell(row) if (row := rows_of[which]) else MISSING for column, which in shape.items()])
    return "\n".join([_aligned([*shape], body), *_markdown_notes(notes, section)])


def _pairs(section_rows: Sequence[Row]) -> list[tuple[Row | None, Row | None]]:
    """Each tuned row with the eager row it is compared with; where either failed, with one of the same workload."""
    eager = [row for row in section_rows if row.tuning == "eager"]
    pairs: list[tuple[Row | None, Row | None]] = []
    for row in section_rows:
        if row.tuning == "tuned":
            pairs.append((row, next((other for other in eager if _paired(row, other)), None)))
    partners = [partner for _, partner in pairs]
    pairs += [(None, row) for row in eager if row not in partners]
    return sorted(pairs, key=lambda pair: next(order(row) for row in pair if row))


def _paired(tuned: Row, eager: Row) -> bool:
    if tuned.ok and eager.ok:
        return tuned.eager_ids == eager.ids
    names = ("workload", "division", "gpus", "scaling")
    return not tuned.eager_ids and all(getattr(tuned, name) == getattr(eager, name) for name in names)


def _outcome(row: Row, notes: Notes) -> str:
    """The final metric, what became of the target, and the training time until then."""
    cell = _metric(replace(row, metric_by_epoch=()), notes)
    target = _target(row)
    if MISSING in (cell, target):
        return cell
    after = "" if row.train_s_to_target is None else f" in {figure(row.train_s_to_target)} s"
    return f"{cell}, target {target}{after}"


def replace_section(text: str, name: str, body: str) -> str:
    """`text` with `body` between its lines `<!-- name:begin -->` and `<!-- name:end -->`, once each in it."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one {begin} and, after it, one {end}")
    return text[: text.index(begin) + len(begin)] + f"\n\n{body.strip()}\n\n" + text[text.index(end) :]


def write_tables(results: Path, readme: Path) -> None:
    """Write `results`/TABLES.md and the section `table` of `readme` from the records in `results`."""
    records = load_all(results)
    (results / "TABLES.md").write_text(tables_page(records), encoding="utf-8")
    page = replace_section(readme.read_text(encoding="utf-8"), "table", readme_table(records))
    readme.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write_tables(Path("results"), Path("README.md"))
