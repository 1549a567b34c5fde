"""A comparison as text for a terminal, Markdown, JSON and JUnit's XML. Each escapes what it would take for markup."""

from __future__ import annotations

import html
import json
import xml.etree.ElementTree as ElementTree  # it writes, and reads nothing  # nosec B405
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby

from .gate import Drift, exit_code
from .history import Series, Step
from .regress import ALPHA, Comparison, Quantity, Verdict

OUTCOMES = {0: "passed", 1: "failed", 3: "undecided"}
MARK = "<!-- netdyno gate -->"  # by which a workflow finds its own comment


def headline(comparison: Comparison) -> str:
    """ "failed: 1 REGRESSION, 5 SAME"; what does not decide is not counted."""
    calls = ("REGRESSION", "MISSING", "AMBIGUOUS", "IMPROVEMENT", "SAME")
    counts = [f"{len(called)} {call}" for call in calls if (called := comparison.called(call))]  # type: ignore[arg-type]
    return f"{OUTCOMES[exit_code(comparison)]}: {', '.join(counts) or 'nothing was compared'}"


def to_text(comparison: Comparison) -> str:
    """A paragraph a case; SAME on one line, everything else with its reason below."""
    lines = []
    for place, rows in groupby(comparison.verdicts, key=lambda row: (row.case, row.machine)):
        lines.append(f"{place[0]}  ({place[1]})")
        for row in rows:
            cells = [f"{row.quantity:17}", f"{call(row):12}", f"{medians(row):38}", f"{effect(row):28}", margin(row)]
            lines.append("  " + " ".join(cells).rstrip())
            if row.verdict != "SAME":
                lines.append(f"  {'':17} {row.reason}")
    lines += [f"note: {note}" for note in comparison.notes]
    return "\n".join([*lines, headline(comparison)]) + "\n"


def to_json(comparison: Comparison) -> str:
    """`exit_code`, `alpha`, `verdicts` (an object each, numbers unrounded) and `notes`."""
    content = {
        "schema": 1,
        "exit_code": exit_code(comparison),
        "alpha": ALPHA,
        "verdicts": [asdict(verdict) for verdict in comparison.verdicts],
        "notes": comparison.notes,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_junit(comparison: Comparison) -> str:
    """A test case a verdict: REGRESSION and MISSING fail, AMBIGUOUS is an error, what does not decide is skipped."""
    suite = ElementTree.Element("testsuite", name="netdyno gate")
    kinds = {"REGRESSION": "failure", "MISSING": "failure", "AMBIGUOUS": "error"}
    for row in comparison.verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname=f"{row.machine}.{row.case}", name=row.quantity)
        kind = "skipped" if not row.decides else kinds.get(row.verdict)
        what = ", ".join(part for part in (row.verdict, medians(row), effect(row), margin(row), row.reason) if part)
        if kind:
            ElementTree.SubElement(case, kind, message=what)
        else:
            ElementTree.SubElement(case, "system-out").text = what
    suite.set("tests", str(len(comparison.verdicts)))
    for kind in ("failure", "error", "skipped"):
        plural = kind if kind == "skipped" else f"{kind}s"
        suite.set(plural, str(len(suite.findall(f"testcase/{kind}"))))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def to_markdown(comparison: Comparison) -> str:
    """The headline, a table of all that is not SAME, and the whole table folded away."""
    loud = [row for row in comparison.verdicts if row.verdict != "SAME" and row.decides]
    parts = [MARK, f"**netdyno gate {headline(comparison)}**"]
    if loud:
        parts.append(_markdown_table(loud))
    if comparison.verdicts:
        table = _markdown_table(comparison.verdicts)
        parts += ["<details><summary>All quantities</summary>", table, "</details>"]
    parts += [f"- {_escape(note)}" for note in comparison.notes]
    return "\n\n".join(parts) + "\n"


def _markdown_table(rows: Iterable[Verdict]) -> str:
    lines = [
        "| case | quantity | verdict | old → new | change (95 % interval) | margin | reason |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        cells = (row.case, row.quantity, call(row), medians(row), effect(row), margin(row), row.reason)
        lines.append("| " + " | ".join(_escape(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is: no cell ends, no markup, no HTML, no link and nobody called by name."""
    text = html.escape(text, quote=False)
    for letter in "\\`*_[]|~#":
        text = text.replace(letter, "\\" + letter)
    return text.replace("@", "@\u200b").replace("://", ":\u200b//")


def drift_text(drifts: Iterable[Drift]) -> str:
    """A line a quantity, with the change against each earlier baseline, newest first; "!" marks what got worse."""
    lines = []
    for case, own in groupby(drifts, key=lambda drift: drift.case):
        lines.append(case)
        for quantity, changes in groupby(own, key=lambda drift: drift.quantity):
            rows = list(changes)
            shown = ", ".join(f"{_change(row.change, row)} since {row.since[:10]}" for row in rows)
            mark = "!" if any(row.worse for row in rows) else " "
            lines.append(f"{mark} {quantity:17} {_number(rows[0].new)} {rows[0].unit}: {shown}")
    return "\n".join(lines)


# Cells


def call(row: Verdict) -> str:
    """The verdict, in lower case where no gate stands or falls by it."""
    return row.verdict if row.decides else row.verdict.lower()


def medians(row: Verdict) -> str:
    if row.old is None and row.new is None:
        return ""
    runs = f"{row.old_runs} and {row.new_runs}" if row.old_runs != row.new_runs else f"{row.old_runs}"
    return f"{_number(row.old)} → {_number(row.new)} {row.unit}, n {runs}"


def effect(row: Verdict) -> str:
    if row.effect is None:
        return ""
    if row.low is None or row.high is None:
        return _change(row.effect, row)
    return f"{_change(row.effect, row)} ({_change(row.low, row)} to {_change(row.high, row)})"


def margin(row: Verdict) -> str:
    return "" if row.margin is None else f"margin {_change(row.margin, row).lstrip('+')}"


def _change(change: float, row: Verdict | Drift | Quantity) -> str:
    text = f"{change:+.2f}" if row.difference else f"{100 * change:+.1f} %"
    return text.replace("-", "−")


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def history_text(series: Series, steps: Sequence[Step], causes: Sequence[str]) -> str:
    """A line a change of level, with what changed it."""
    lines = [f"{series.case}  ({series.machine}): {len(series.runs)} runs"]
    if series.left_out:
        lines.append(f"  {series.left_out} records of another recipe, data or timing version left out")
    for step, cause in zip(steps, causes, strict=True):
        quantity, levels = step.quantity, f"{_number(step.before)} → {_number(step.after)} {step.quantity.unit}"
        day = str(step.first.get("created_utc"))[:10]
        lines.append(f"  {day}  {quantity.name:17} {levels}, {_change(step.change, quantity)}: {cause}")
    if not steps:
        lines.append("  no change of level")
    return "\n".join(lines) + "\n"
