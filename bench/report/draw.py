"""Charts drawn: as a figure for plotly.js, and as a PNG by matplotlib. Both take their colours from here.

The colours are those of Okabe and Ito, which people with any colour vision can tell apart, less those too pale for
white paper; beyond them patterns, dashes and markers differ. Strings of records are never markup: the few tags that
plotly knows are escaped.
"""

from __future__ import annotations

import html
import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from ..table import figure
from .blocks import Chart, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#888888"  # of what is no machine's
PATTERNS = ("", "/", "x", ".", "\\", "+")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
LINE_HEIGHT = 16  # pixels of a line of a category's name
WIDEST = 26  # letters of a category's name in one line
MARGIN = {"l": 8, "r": 16, "t": 28, "b": 8}  # pixels; above there is room for plotly's buttons
DECADES = 2  # of a logarithmic axis from which only powers of ten are marked
MARKED = 30  # points up to which a line shows each of them
PNG_DPI = 110


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)] if number >= 0 else GREY


def _cycle(number: int, of: Sequence[str]) -> str:
    return of[max(0, number) % len(of)]


def wrapped(name: str) -> list[str]:
    """The lines of a category's name: a part each, folded where it is long."""
    return [line for part in name.split(" · ") for line in textwrap.wrap(part, WIDEST) or [""]]


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    """Six significant digits: no screen shows more, and the file is smaller."""
    return [None if value is None else float(f"{value:.6g}") for value in values]


# plotly


def to_plotly(chart: Chart) -> dict[str, Any]:
    """A plotly figure: `data` and `layout`, without the colours of a theme, which the page adds."""
    sideways = chart.kind in ("bars", "stack", "dots")
    data = [_bars(chart, one) if chart.kind in ("bars", "stack") else _scatter(chart, one) for one in chart.series]
    values: dict[str, Any] = {"title": {"text": _plain(chart.value_label)}, "automargin": True}
    largest = max((abs(value) for one in chart.series for value in one.value if value), default=0)
    values["exponentformat"] = "SI" if largest >= 1 else "none"  # k, M, G, but no m of a dollar
    positions: dict[str, Any] = {"automargin": True}
    layout: dict[str, Any] = {"showlegend": False, "hovermode": "closest", "annotations": [], "shapes": []}
    if chart.logarithmic:
        ends = [value for one in chart.series for value in (*one.value, *one.low, *one.high) if value]
        values |= _log_axis([*ends, *([chart.level[0]] if chart.level else [])])
    if sideways:
        names = [_category(name) for name in chart.categories]
        positions |= {"type": "category", "categoryarray": names, "categoryorder": "array"}
        positions["range"] = [len(names) - 0.5, -0.5]  # from above
        layout["barmode"] = "stack" if chart.kind == "stack" else "overlay"
        layout["uniformtext"] = {"minsize": 10, "mode": "hide"} if chart.kind == "stack" else {}
        layout["annotations"] = [_remark(one, index) for one in chart.series for index in _missing(one)]
        lines = sum(max(1, len(wrapped(name))) * LINE_HEIGHT + 14 for name in chart.categories)
        layout |= {"height": 90 + lines, "margin": MARGIN}
        if chart.kind == "dots":
            values["range"] = _log_range(chart)
        if any(one.start for one in chart.series):
            values["range"] = [0, 1.3 * largest]  # room for the words of a last step that is too short for them
    else:
        positions["title"] = {"text": _plain(chart.at_label)}
        positions |= _position_axis(chart)
        layout |= {"height": 340, "margin": MARGIN}
    if chart.level is not None:
        level, name = chart.level
        across, along = ("y", "x") if sideways else ("x", "y")
        at = math.log10(level) if chart.logarithmic else level  # annotations on a logarithmic axis take the exponent
        layout["shapes"].append(
            {
                **{"type": "line", f"{across}ref": "paper", f"{across}0": 0, f"{across}1": 1},
                **{f"{along}0": level, f"{along}1": level, "line": {"color": GREY, "width": 1.5, "dash": "dot"}},
            }
        )
        if not sideways:
            mark = {"text": _plain(name), "xref": "paper", "x": 0, "xanchor": "left", "y": at, "yanchor": "bottom"}
            layout["annotations"].append(mark | {"showarrow": False})
    layout["xaxis"], layout["yaxis"] = (values, positions) if sideways else (positions, values)
    return {"data": data, "layout": layout}


def _position_axis(chart: Chart) -> dict[str, Any]:
    """Logarithmic, of dates, or with a whole number at every tick where all positions are whole."""
    at = [position for one in chart.series for position in one.at]
    if chart.at_logarithmic:
        return _log_axis([position for position in at if isinstance(position, (int, float)) and position > 0])
    if _texts(at):
        return {"type": "date", "automargin": "height"}  # its last label beside the axis made plotly move that for ever
    whole = [position for position in at if isinstance(position, (int, float)) and position == int(position)]
    if not at or len(whole) < len(at):
        return {}
    return {"tick0": min(whole), "dtick": max(1, math.ceil((max(whole) - min(whole)) / 8))}


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"type": "log"}
    ticks = log_ticks(min(values), max(values))
    return {"type": "log", "tickvals": ticks, "ticktext": [tick(value) for value in ticks]}


def _bars(chart: Chart, one: Series) -> dict[str, Any]:
    begin = list(one.start) or [0.0] * len(one.value)
    lengths = [None if value is None else value - start for value, start in zip(one.value, begin, strict=True)]
    trace = {
        "type": "bar",
        "orientation": "h",
        "name": _plain(one.name),
        "y": [_category(str(at)) for at in one.at],
        "x": _rounded(lengths),
        "text": [_plain(_value_text(one, index)) for index in range(len(one.value))],
        "textposition": "auto" if chart.kind == "bars" else "inside",
        "insidetextanchor": "start",
        "cliponaxis": False,
        "textangle": 0,
        "marker": {
            "color": colour(one.colour),
            "pattern": {"shape": _cycle(one.colour // len(COLOURS), PATTERNS), "fgopacity": 0.5},
        },
        "hovertemplate": _hover(chart, "%{y}", "%{customdata[0]}"),
        "customdata": [[figure(value), _plain(_said(one, index))] for index, value in enumerate(one.value)],
        **_errors(one),
    }
    return trace | ({"base": _rounded(begin)} if one.start else {})


def _scatter(chart: Chart, one: Series) -> dict[str, Any]:
    dots = chart.kind == "dots"
    labelled = dots and not _crowded(chart)
    at = [_category(value) if dots else value for value in one.at] if _texts(one.at) else _rounded(one.at)  # type: ignore[arg-type]
    lined = chart.kind == "lines" or one.colour < 0
    marked = len(one.at) <= MARKED and one.colour >= 0
    return {
        "type": "scatter",
        "mode": "+".join(
            part for part, wanted in (("lines", lined), ("markers", marked), ("text", labelled)) if wanted
        ),
        "name": _plain(one.name),
        "x": _rounded(one.value) if dots else at,
        "y": at if dots else _rounded(one.value),
        "visible": "legendonly" if one.hidden else True,
        "line": {"color": colour(one.colour), "width": 2, "dash": _cycle(one.style, DASHES)},
        "marker": {
            "color": colour(one.colour),
            "size": 10 if not lined else 7,
            "symbol": _cycle(one.style if not dots else one.colour // len(COLOURS), SYMBOLS),
        },
        "hovertemplate": _hover(chart, "%{y}" if dots else "%{x}", "%{x:,.4g}" if dots else "%{y:,.5g}"),
        **({"text": [_value_text(one, index) for index in range(len(one.value))]} if labelled else {}),
        **({"textposition": "middle right", "cliponaxis": False} if labelled else {}),
        "customdata": [["", _plain(_said(one, index))] for index in range(len(one.value))] if any(one.said) else [],
        **(_errors(one) if dots else {}),
    }


def _crowded(chart: Chart) -> bool:
    """Whether several points share a category, so that numbers beside them would collide."""
    return sum(len(one.at) for one in chart.series) > len(chart.categories)


def _texts(values: Sequence[object]) -> bool:
    return any(isinstance(value, str) for value in values)


def _hover(chart: Chart, at: str, value: str) -> str:
    remark = (
        "<br>%{customdata[1]}" if any(any(one.said) for one in chart.series) or chart.kind in ("bars", "stack") else ""
    )
    where = at if chart.kind in ("bars", "stack", "dots") else f"{_plain(chart.at_label)} {at}"
    return f"%{{fullData.name}}<br>{where}<br>{value} {_plain(chart.value_label)}{remark}<extra></extra>"


def _errors(one: Series) -> dict[str, Any]:
    ends = list(zip(one.value, one.low, one.high, strict=False))
    if not any(low is not None for _, low, _ in ends):
        return {}
    up, down = [], []
    for value, low, high in ends:
        known = value is not None and low is not None and high is not None
        up.append(high - value if known else 0)  # type: ignore[operator]
        down.append(value - low if known else 0)  # type: ignore[operator]
    bars = {"type": "data", "symmetric": False, "array": _rounded(up), "arrayminus": _rounded(down)}
    return {"error_x": bars | {"color": GREY, "thickness": 1.5}}


def _missing(one: Series) -> list[int]:
    return [index for index, value in enumerate(one.value) if value is None]


def _remark(one: Series, index: int) -> dict[str, Any]:
    """Words in the place of a bar that is not there."""
    text = _plain(_said(one, index) or "not measured")
    where = {"xref": "x domain", "x": 0.01, "xanchor": "left", "y": _category(str(one.at[index]))}
    return where | {"text": text, "showarrow": False}


def _said(one: Series, index: int) -> str:
    return one.said[index] if one.said else ""


def _value_text(one: Series, index: int) -> str:
    """What stands beside a bar: its value and, on a ladder, the step."""
    value = one.value[index]
    if value is None:
        return ""
    return f"{figure(value)} ({one.said[index]})" if one.start and one.said[index] else figure(value)


def _log_range(chart: Chart) -> list[float]:
    """Exponents of the ends, with room for the numbers to the right of the dots."""
    ends = [*(value for one in chart.series for value in (*one.value, *one.low, *one.high) if value)]
    ends += [chart.level[0]] if chart.level else []
    low, high = math.log10(min(ends)), math.log10(max(ends))
    return [low - 0.05 * (high - low), high + 0.4 * (high - low)]


def _plain(text: str) -> str:
    """Text that plotly shows as it is: it knows a few tags and entities."""
    return html.escape(text, quote=False)


def _category(name: str) -> str:
    return "<br>".join(_plain(line) for line in wrapped(name))


# matplotlib


def to_png(chart: Chart) -> bytes:
    """The chart as a picture for Markdown, on white."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    sideways = chart.kind in ("bars", "stack", "dots")
    lines = sum(len(wrapped(name)) for name in chart.categories)
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that this machine has no font for
        drawing = Figure(figsize=(7.5, 1.0 + 0.2 * lines + 0.12 * len(chart.categories) if sideways else 3.6))
        FigureCanvasAgg(drawing)
        axes = drawing.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="x" if sideways else "both", color="#dddddd", linewidth=0.6)
        (_draw_sideways if sideways else _draw_lines)(axes, chart)
        if len(chart.series) > 1:
            handles = [Patch(color=colour(one.colour), label=one.name) for one in chart.series] if sideways else None
            axes.legend(handles=handles, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        out = io.BytesIO()
        drawing.savefig(out, format="png", dpi=PNG_DPI, bbox_inches="tight", metadata={"Software": None})
    return out.getvalue()


def _draw_sideways(axes: Axes, chart: Chart) -> None:
    place = {name: index for index, name in enumerate(chart.categories)}
    ends = [0.0] * len(place)
    for one in chart.series:
        for index, (at, value) in enumerate(zip(one.at, one.value, strict=True)):
            y = place[str(at)]
            if value is None:
                axes.text(
                    0.01, y, _said(one, index) or "not measured", transform=axes.get_yaxis_transform(), va="center"
                )
                continue
            if chart.kind == "dots":
                axes.plot(value, y, "o", color=colour(one.colour))
            else:
                start = ends[y] if chart.kind == "stack" else one.start[index] if one.start else 0.0
                width = value if chart.kind == "stack" else value - start
                axes.barh(y, width, left=start, color=colour(one.colour), height=0.7)
                ends[y] += value
            low, high = (one.low[index], one.high[index]) if one.low else (None, None)
            if low is not None and high is not None:
                axes.hlines(y, low, high, color="#444444", linewidth=1.2)
            if chart.kind != "stack" and not _crowded(chart):
                axes.annotate(
                    _value_text(one, index),
                    (max(value, high or value), y),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                )
    axes.set_yticks(range(len(place)), ["\n".join(wrapped(name)) for name in chart.categories])
    axes.set_ylim(len(place) - 0.5, -0.5)
    axes.set_xlabel(chart.value_label)
    if chart.logarithmic:
        _logarithmic(axes, "x")
    axes.margins(x=0.12)
    if chart.level is not None:
        axes.axvline(chart.level[0], color=GREY, linestyle=":", linewidth=1.2)


def _draw_lines(axes: Axes, chart: Chart) -> None:
    for one in chart.series:
        if one.hidden:
            continue
        at = [datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ") if isinstance(value, str) else value for value in one.at]
        values = [math.nan if value is None else value for value in one.value]
        lined = chart.kind == "lines" or one.colour < 0
        axes.plot(
            at,  # type: ignore[arg-type]  # matplotlib takes datetimes
            values,
            color=colour(one.colour),
            linestyle=("-", "--", ":", "-.")[one.style % 4] if lined else "none",
            marker=("o", "s", "D", "^")[one.style % 4] if len(at) <= MARKED and one.colour >= 0 else "",
            markersize=4,
            label=one.name,
        )
    axes.set_xlabel(chart.at_label)
    axes.set_ylabel(chart.value_label)
    if chart.logarithmic:
        _logarithmic(axes, "y")
    if chart.at_logarithmic:
        _logarithmic(axes, "x")
    if chart.level is not None:
        axes.axhline(chart.level[0], color=GREY, linestyle=":", linewidth=1.2)
    if _texts([at for one in chart.series for at in one.at]):
        axes.tick_params(axis="x", rotation=30)


def _logarithmic(axes: Axes, side: Literal["x", "y"]) -> None:
    (axes.set_xscale if side == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if side == "x" else axes.yaxis
    low, high = axes.get_xlim() if side == "x" else axes.get_ylim()
    ticks = [value for value in log_ticks(low, high) if low <= value <= high]
    axis.set_ticks(ticks, [tick(value) for value in ticks])
    axis.set_minor_formatter(lambda value, _: "")


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, … around a logarithmic axis, or powers of ten alone where these would be too many.

    Those of plotly leave out the power, those of matplotlib are formulas.
    """
    first, last = max(-300, math.floor(math.log10(low)) - 1), min(300, math.ceil(math.log10(high)) + 1)
    few = math.log10(high) - math.log10(low) < DECADES
    powers = range(first, last + 1, 1 if few else math.ceil((last - first) / 12))
    return [mantissa * 10.0**power for power in powers for mantissa in ((1, 2, 5) if few else (1,))]


def tick(value: float) -> str:
    """0.001, 10, 10 k, 1 M, …"""
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= max(factor, 1e4):
            return f"{value / factor:g} {letter}"
    return f"{value:g}"
