"""How often the gate is wrong, and what it sees: from runs without a change among them, by slowing them in numbers.

`python -m netdyno.bench.calibration RECORDS` takes the runs of each case in RECORDS (at least 40, by one code on one
machine), splits them by turns into two halves, takes the margins from one half, and draws gates of 7 against 7 runs
from the other. Contests of `ab` are played too, of the pairs of runs that followed one another, in any order and with
either run as A: their rates are those of this one recording. It writes the rates of wrong verdicts and the curves of
detection against effect between the markers of docs/regression.md, and a plot beside it. Cases of fewer runs are passed
over. Needs no torch and no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import ab
from .errors import UserError
from .gate import read_records
from .history import save
from .regress import SPEED, Comparison, Record, Side, compare, sides
from .table import replace_section

RUNS = 40
REPEATS = 7  # a side of a resampled gate
PAIRS = RUNS // 2  # of a resampled contest, at most
GATES = 2000  # without a change; as many contests
PLANTED_GATES = 500  # for each effect; as many contests
EFFECTS = tuple(percent / 100 for percent in range(1, 11))
PAGE = Path("docs/regression.md")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What became of so many comparisons, as shares."""

    count: int
    wrong: float  # called a change of any quantity
    undecided: float  # called none, and would not have passed either
    detected: float  # called a regression of throughput or step time


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One case: its margins from one half of the runs, the rates of gates from the other, those of contests from all.

    Rates are by how much slower the new side was: 0 for not at all.
    """

    machine: str
    case: str
    runs: int
    margins: dict[str, float]
    gates: dict[float, Rates]
    contests: dict[float, Rates]


def calibrate(side: Side, *, gates: int = GATES, planted_gates: int = PLANTED_GATES) -> Calibration:
    """Margins and rates of one case. UserError with fewer than 40 runs."""
    if len(side.runs) < RUNS:
        raise UserError(f"{side.case} on {side.machine}: {len(side.runs)} runs; a calibration takes {RUNS} or more")
    calm, drawn = side.runs[::2], side.runs[1::2]
    margins = {
        row.quantity: row.margin for row in compare(calm, calm).verdicts if row.margin is not None and row.decides
    }
    counts = {0.0: gates, **dict.fromkeys(EFFECTS, planted_gates)}
    return Calibration(
        machine=side.machine,
        case=side.case,
        runs=len(side.runs),
        margins=margins,
        gates={effect: gate_rates(drawn, calm, effect=effect, gates=count) for effect, count in counts.items()},
        contests={effect: contest_rates(side.runs, effect=effect, contests=count) for effect, count in counts.items()},
    )


def gate_rates(runs: Sequence[Record], noise: Sequence[Record], *, gates: int, effect: float = 0.0) -> Rates:
    """Gates of 7 against 7 runs, drawn without replacement; the new side is slower by `effect`."""

    def drawn(random: np.random.Generator) -> Comparison:
        picked = [runs[place] for place in random.permutation(len(runs))[: 2 * REPEATS]]
        return compare(picked[:REPEATS], [slowed(run, effect) for run in picked[REPEATS:]], noise=noise)

    return _rates(drawn, gates)


def contest_rates(runs: Sequence[Record], *, contests: int, effect: float = 0.0) -> Rates:
    """Contests of `ab` over the pairs of `runs`, oldest first, that followed one another; B is slower by `effect`.

    Drawn are the order of the pairs and which run of each is A.
    """
    pairs = list(zip(runs[::2], runs[1::2], strict=False))

    def drawn(random: np.random.Generator) -> Comparison:
        a, b = [], []
        for seed in random.permutation(len(pairs)).tolist():
            first, second = pairs[seed] if random.random() < 0.5 else pairs[seed][::-1]
            a.append(of_seed(first, seed))
            b.append(slowed(of_seed(second, seed), effect))
        return contest(a, b)

    return _rates(drawn, contests)


def contest(a: Sequence[Record], b: Sequence[Record]) -> Comparison:
    """What `ab` says of these runs, of so many of them as it makes."""
    for pairs in ab.looks_at(ab.judge(a, b)):
        comparison = ab.judge(a[:pairs], b[:pairs])
        if ab.decided(comparison):
            return comparison
    return ab.judge(a, b)


def _rates(drawn: Callable[[np.random.Generator], Comparison], count: int) -> Rates:
    random = np.random.default_rng(0)
    wrong = undecided = detected = 0
    for _ in range(count):
        comparison = drawn(random)
        changes = [*comparison.called("REGRESSION"), *comparison.called("IMPROVEMENT")]
        wrong += bool(changes)
        undecided += not changes and bool(comparison.called("AMBIGUOUS") or comparison.called("MISSING"))
        detected += any(row.verdict == "REGRESSION" and row.quantity in SPEED for row in changes)
    return Rates(count=count, wrong=wrong / count, undecided=undecided / count, detected=detected / count)


def of_seed(record: Record, seed: int) -> dict[str, Any]:
    """`record` as if it were of that seed, on which speed does not depend: what pairs are told by."""
    return {**record, "case": {**record["case"], "seed": seed}}


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
        gates, contests = one.gates[0.0], one.contests[0.0]
        blocks.append(
            f"**{one.case}** on {one.machine}: {one.runs} runs in fresh processes. Margins from one half: {margins}."
            f" Of {gates.count:,} gates without a change, {REPEATS} against {REPEATS} runs from the other half,"
            f" {gates.wrong:.2%} called one and {gates.undecided:.2%} were undecided; of {contests.count:,} contests of"
            f" `ab`, {contests.wrong:.2%} and {contests.undecided:.2%}."
        )
        effects = [effect for effect in one.gates if effect]
        header = " | ".join(f"{effect:.0%}" for effect in effects)
        rule = " | ".join("---:" for _ in effects)
        rows = [f"| slower by | {header} |", f"| --- | {rule} |"]
        for name, rates in (
            (f"seen by gates, {REPEATS} runs a side", one.gates),
            (f"by `ab`, at most {PAIRS} pairs", one.contests),
        ):
            rows.append(f"| {name} | {' | '.join(f'{rates[effect].detected:.1%}' for effect in effects)} |")
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def plot(found: Sequence[Calibration], path: Path) -> None:
    """Detection against effect: a colour a case, gates solid and contests dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for number, one in enumerate(found):
        for rates, style, name in ((one.gates, "-", "gates"), (one.contests, "--", "ab")):
            effects = [effect for effect in rates if effect]
            axes.plot(
                [100 * effect for effect in effects],
                [100 * rates[effect].detected for effect in effects],
                color=f"C{number}",
                linestyle=style,
                marker="o",
                markersize=4,
                label=f"{one.case}, {name}\n{one.machine}",
            )
    axes.axhline(95, color="0.7", linewidth=1, linestyle=":")
    axes.set_xlabel("planted slowdown, %")
    axes.set_ylabel(f"detected, %: gates of {REPEATS} runs a side,\nab with {PAIRS} at most")
    axes.set_ylim(-3, 103)
    figure.legend(loc="outside right upper", fontsize=6, handlelength=4)
    save(figure, path)


def main(source: str, page: Path = PAGE) -> None:
    """Writes the section `detection` of the page, and the plot beside it."""
    enough = [side for side in sides(read_records(source, Path(source))).values() if len(side.runs) >= RUNS]
    if not enough:
        raise UserError(f"there are no {RUNS} runs of one case in {source}")
    found = [calibrate(side) for side in enough]
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
