"""The report as one HTML file that needs no network.

Strings of records cannot become markup, three times over: they are escaped here, the script puts them in as text only,
and the file's own policy lets no script run but those whose hashes it names, and nothing load from anywhere.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from importlib import resources
from string import Template
from typing import Any

from .blocks import Block, Chart, Page, Pictures, Tab, Table, Text
from .draw import to_plotly


def to_html(page: Page) -> str:
    """The whole file."""
    from plotly.offline import get_plotlyjs  # here, because Markdown and CSV do without it

    plotly, script = get_plotlyjs(), _resource("page.js")
    policy = {
        "default-src": "'none'",
        "img-src": "data: blob:",
        "style-src": "'unsafe-inline'",  # plotly makes a style sheet of its own
        "script-src": f"{hash_source(plotly)} {hash_source(script)}",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    data: dict[str, Any] = {"page": {"scopes": page.scopes, "bases": page.bases}}
    data |= {f"tab-{tab.id}": _tab(tab) for tab in page.tabs}
    return Template(_resource("page.html")).substitute(
        policy="; ".join(f"{name} {value}" for name, value in policy.items()),
        title=html.escape(page.title),
        summary=html.escape(page.summary),
        style=_resource("page.css"),
        controls="\n".join(
            [
                _select("scope", "Shown", page.scopes),
                _select("base", "Relative to", page.bases),
            ]
        ),
        problems=_problems(page),
        tabs="\n".join(map(_tab_button, page.tabs)),
        panels="\n".join(map(_tab_panel, page.tabs)),
        data="\n".join(
            f'<script type="application/json" id="{id}">{to_json(value)}</script>' for id, value in data.items()
        ),
        plotly=base64.b64encode(gzip.compress(plotly.encode(), mtime=0)).decode(),
        script=script,
    )


def to_json(value: Any) -> str:
    """JSON that can stand inside a script element: no string in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def hash_source(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _select(id: str, label: str, options: Any) -> str:
    """A choice, or nothing where there is none."""
    if len(options) < 2:
        return ""
    choices = "".join(f"<option>{html.escape(option)}</option>" for option in options)
    return f'<label>{label}<select id="{id}">{choices}</select></label>'


def _problems(page: Page) -> str:
    if not page.problems:
        return ""
    count = len(page.problems)
    lines = "".join(f"<li>{html.escape(problem)}</li>" for problem in page.problems)
    title = f"{count:,} file{' is' if count == 1 else 's are'} not shown"
    return f'<details class="problems"><summary>{title}</summary><ul>{lines}</ul></details>'


def _tab_button(tab: Tab) -> str:
    attributes = f'id="button-{tab.id}" data-tab="{tab.id}" data-needs="{html.escape(tab.needs)}"'
    attributes += f' aria-controls="panel-{tab.id}" aria-selected="false"'
    return f'<button type="button" role="tab" {attributes}>{html.escape(tab.title)}</button>'


def _tab_panel(tab: Tab) -> str:
    return f'<div role="tabpanel" id="panel-{tab.id}" aria-labelledby="button-{tab.id}" hidden></div>'


def _tab(tab: Tab) -> list[dict[str, Any]]:
    return [
        {"scope": view.scope, "base": view.base, "blocks": [_block(block) for block in view.blocks]}
        for view in tab.views
    ]


def _block(block: Block) -> dict[str, Any]:
    if isinstance(block, Text):
        return {"kind": "text", "text": block.text}
    if isinstance(block, Table):
        return {"kind": "table", **_table(block)}
    if isinstance(block, Chart):
        return {
            "kind": "chart",
            "title": block.title,
            "notes": block.notes,
            "names": [one.name for one in block.series],
            "figure": to_plotly(block),
            "table": _table(block.table()),
        }
    assert isinstance(block, Pictures)
    shown = [{"label": one.label, "webp": base64.b64encode(one.webp).decode()} for one in block.pictures]
    return {"kind": "pictures", "title": block.title, "notes": block.notes, "pictures": shown}


def _table(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "columns": table.columns,
        "rows": table.rows,
        "notes": table.notes,
        "flags": {str(row): flag for row, flag in table.flags.items()},
    }
