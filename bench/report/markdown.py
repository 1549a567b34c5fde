"""The report as Markdown, for a README or an issue: tables as text, charts as PNG files beside it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from ..record import write_atomically
from ..table import escape
from .blocks import Block, Cell, Chart, Page, Pictures, Table, Text
from .draw import to_png

MOST_ROWS = 200  # of one table


def write_markdown(page: Page, out: Path) -> None:
    """Writes `out` and its pictures into the folder `<out's stem>_files` beside it."""
    pictures = out.with_name(f"{out.stem}_files")
    lines = [f"# {escape(page.title)}", escape(page.summary)]
    if page.problems:
        lines += ["Not shown:", "\n".join(f"- {escape(problem)}" for problem in page.problems)]
    for tab in page.tabs:
        lines.append(f"## {escape(tab.title)}")
        views = [view for view in tab.views if view.base in (None, page.bases[0])]
        if not views:
            lines.append(escape(f"Nothing to show: it takes {tab.needs}."))
        number = 0
        for view in views:
            if view.scope is not None and len(page.scopes) > 1:
                lines.append(f"### {escape(view.scope)}")
            for block in view.blocks:
                number += 1
                lines += _block(block, pictures, f"{tab.id}-{number}")
    write_atomically(out, ("\n\n".join(line for line in lines if line) + "\n").encode())


def _block(block: Block, pictures: Path, name: str) -> list[str]:
    """The paragraphs of a block; its pictures are written as `<name>….png` or `.webp`."""
    if isinstance(block, Text):
        return [escape(block.text)]
    if isinstance(block, Table):
        return [f"**{escape(block.title)}**", *_table(block), *_notes(block)]
    if isinstance(block, Chart):
        write_atomically(pictures / f"{name}.png", to_png(block))
        data = ["<details><summary>Data as a table</summary>", *_table(block.table()), "</details>"]
        image = f"![{escape(block.title)}]({_link(pictures, f'{name}.png')})"
        return [f"**{escape(block.title)}**", image, *_notes(block), *data]
    assert isinstance(block, Pictures)
    images = []
    for place, one in enumerate(block.pictures, 1):
        write_atomically(pictures / f"{name}-{place}.webp", one.webp)
        images.append(f"{escape(one.label)}: ![{escape(one.label)}]({_link(pictures, f'{name}-{place}.webp')})")
    return [f"**{escape(block.title)}**", *images, *_notes(block)]


def _link(pictures: Path, name: str) -> str:
    """A relative address, in which no letter of the folder's name can end the link."""
    return f"{quote(pictures.name, safe='')}/{name}"


def _notes(block: Table | Chart | Pictures) -> list[str]:
    return ["\n".join(f"- {escape(note)}" for note in block.notes)] if block.notes else []


def _table(table: Table) -> list[str]:
    numeric = [any(isinstance(row[column], tuple) for row in table.rows) for column in range(len(table.columns))]
    lines = [
        [escape(column) for column in table.columns],
        ["---:" if number else "---" for number in numeric],
        *([_cell(cell) for cell in row] for row in table.rows[:MOST_ROWS]),
    ]
    more = len(table.rows) - MOST_ROWS
    rest = [f"{more:,} more rows: see the HTML report, or --format csv."] if more > 0 else []
    return ["\n".join(f"| {' | '.join(line)} |" for line in lines), *rest]


def _cell(cell: Cell) -> str:
    return escape(cell[0] if isinstance(cell, tuple) else cell).replace("\n", "<br>")
