"""How often the gate is wrong, and what it sees: from runs without a change among them, by slowing them in numbers.

`python -m netdyno.bench.calibration RECORDS` takes the runs of each case in RECORDS (at least 40, by one code on one
machine), splits them by turns into two halves, takes the margins from one half, and draws gates of 7 against 7 runs
from the other. It writes the rate of wrong verdicts and the curve of detection against effect between the markers of
docs/regression.md, and a plot beside it. Needs no torch and no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError
from .gate import read_records
from .history import save
from .regress import Record, Side, compare, sides
from .table import replace_section

RUNS = 40
REPEATS = 7  # a side of a resampled gate
GATES = 2000  # without a change
PLANTED_GATES = 500  # for each effect
EFFECTS = tuple(percent / 100 for percent in range(1, 11))
SLOWED = ("throughput", "step time")  # where a slowdown must show
PAGE = Path("docs/regression.md")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What became of `gates` resampled gates, as shares."""

    gates: int
    wrong: float  # called a change of any quantity
    undecided: float  # called none, and would not have passed either
    detected: float  # called a regression of throughput or step time


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One case: its margins from one half of the runs, and the rates from the other."""

    machine: str
    case: str
    runs: int
    margins: dict[str, float]
    calm: Rates
    planted: dict[float, Rates]


def calibrate(side: Side, *, gates: int = GATES, planted_gates: int = PLANTED_GATES) -> Calibration:
    """Margins and rates of one case. UserError with fewer than 40 runs."""
    if len(side.runs) < RUNS:
        raise UserError(f"{side.case} on {side.machine}: {len(side.runs)} runs; a calibration takes {RUNS} or more")
    calm, drawn = side.runs[::2], side.runs[1::2]
    margins = {
        row.quantity: row.margin for row in compare(calm, calm).verdicts if row.margin is not None and row.decides
    }
    return Calibration(
        machine=side.machine,
        case=side.case,
        runs=len(side.runs),
        margins=margins,
        calm=rates(drawn, calm, gates=gates),
        planted={effect: rates(drawn, calm, effect=effect, gates=planted_gates) for effect in EFFECTS},
    )


def rates(
    runs: Sequence[Record],
    noise: Sequence[Record],
    *,
    gates: int,
    effect: float = 0.0,
    repeats: int = REPEATS,
    seed: int = 0,
) -> Rates:
    """Gates of `repeats` against `repeats` runs, drawn without replacement; the new side is slower by `effect`."""
    random = np.random.default_rng(seed)
    wrong = undecided = detected = 0
    for _ in range(gates):
        picked = [runs[place] for place in random.permutation(len(runs))[: 2 * repeats]]
        new = [slowed(run, effect) for run in picked[repeats:]]
        comparison = compare(picked[:repeats], new, noise=noise)
        changes = [*comparison.called("REGRESSION"), *comparison.called("IMPROVEMENT")]
        wrong += bool(changes)
        undecided += not changes and bool(comparison.called("AMBIGUOUS") or comparison.called("MISSING"))
        detected += any(row.verdict == "REGRESSION" and row.quantity in SLOWED for row in changes)
    return Rates(gates=gates, wrong=wrong / gates, undecided=undecided / gates, detected=detected / gates)


def slowed(record: Record, effect: float) -> dict[str, Any]:
    """`record` as if every training step had taken `effect` longer: a share, 0.05 for 5 %."""
    timing, throughput = record["timing"], record["throughput"]
    return {
        **record,
        "timing": {
            **timing,
            "block_s": [block * (1 + effect) for block in timing["block_s"]],
            "train_s": timing["train_s"] * (1 + effect),
        },
        "throughput": {**throughput, "images_per_s": throughput["images_per_s"] / (1 + effect)},
    }


def to_markdown(found: Sequence[Calibration]) -> str:
    """A table a case: margins and rates, then detection against effect."""
    blocks = []
    for one in found:
        margins = ", ".join(
            f"{name} {margin:.2g}" if name == "final metric" else f"{name} {margin:.1%}"
            for name, margin in one.margins.items()
        )
        blocks.append(
            f"**{one.case}** on {one.machine}: {one.runs} runs in fresh processes. Margins from one half: {margins}."
            f" Of {one.calm.gates:,} gates without a change, {REPEATS} against {REPEATS} runs from the other half,"
            f" {one.calm.wrong:.2%} called one and {one.calm.undecided:.2%} were undecided."
        )
        header = " | ".join(f"{effect:.0%}" for effect in one.planted)
        detected = " | ".join(f"{rate.detected:.1%}" for rate in one.planted.values())
        rule = " | ".join("---:" for _ in one.planted)
        blocks.append(f"| slower by | {header} |\n| --- | {rule} |\n| detected | {detected} |")
    return "\n\n".join(blocks)


def plot(found: Sequence[Calibration], path: Path) -> None:
    """Detection against effect, a line a case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for one in found:
        axes.plot(
            [100 * effect for effect in one.planted],
            [100 * rate.detected for rate in one.planted.values()],
            marker="o",
            markersize=4,
            label=f"{one.case}\n{one.machine}",
        )
    axes.axhline(95, color="0.7", linewidth=1, linestyle=":")
    axes.set_xlabel("planted slowdown, %")
    axes.set_ylabel(f"detected, % of gates,\n{REPEATS} against {REPEATS} runs")
    axes.set_ylim(-3, 103)
    axes.legend(fontsize=7)
    save(figure, path)


def main(source: str, page: Path = PAGE) -> None:
    """Writes the section `detection` of the page, and the plot beside it."""
    found = [calibrate(side) for side in sides(read_records(source, Path(source))).values()]
    if not found:
        raise UserError(f"there are no records in {source}")
    picture = page.with_name("detection.svg")
    plot(found, picture)
    body = f"{to_markdown(found)}\n\n![Detection against effect]({picture.name})"
    page.write_text(replace_section(page.read_text(encoding="utf-8"), "detection", body), encoding="utf-8")


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise UserError("name the folder of the records")
        main(sys.argv[1])
    except UserError as error:
        sys.exit(f"netdyno: {error}")
