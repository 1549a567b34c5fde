"""Projections as Markdown tables, each line marked as what it is.

`python -m netdyno.bench.projected` writes the tables of docs/projection.md anew.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .cards import CARDS, Card
from .project import CONTEXT_MIB, PUBLISHED, TRIALS_MIB, interval_factor, predict, project
from .roofline import STEPS, work
from .table import MISSING, aligned, figure

if TYPE_CHECKING:
    from .workloads import Workload

MARK = "projected"
ROOT = Path(__file__).resolve().parents[1]


def about(value: float) -> str:
    """Three significant digits: more would claim too much."""
    return figure(float(f"{value:.3g}"))


def speeds(card: Card, workloads: Iterable["Workload"]) -> str:
    """What `captured` would do with each workload's recipe on `card`, beside the most that its rates allow."""
    headers = (
        "workload",
        "",
        "batch",
        "images/s",
        "90 % interval",
        "bound by",
        "memory, MiB",
        "at most, layer by layer",
        "at most, fused",
    )
    lines = []
    for workload in workloads:
        recipe, step = workload.recipe, STEPS.get(workload.name)
        if step is None:
            lines.append((workload.name, MARK, str(recipe.batch_size), "not counted", *[MISSING] * 5))
            continue
        found = project(step, recipe.batch_size, recipe.optimizer, card)
        counted = work(step, recipe.optimizer)
        limits = [about(counted.images_per_s(card, recipe.batch_size, fused=fused)) for fused in (False, True)]
        if found.fits(card):
            speed = (about(found.images_per_s), f"{about(found.low)} to {about(found.high)}", found.bound)
        else:
            speed = (f"does not fit {card.memory_mib:,} MiB", MISSING, MISSING)
        memory = about(found.memory_mib)
        lines.append((workload.name, MARK, str(recipe.batch_size), *speed, memory, *limits))
    half, copies = card.half_tflops, card.gb_per_s
    return "\n".join(
        [
            f"{card.name}, {MARK}: {half.rate:g} of {half.peak:g} TFLOP/s and {copies.rate:,g} of {copies.peak:,g} GB/s"
            f" sustained, {card.memory_mib:,} MiB. Training alone, by the tuning `captured`, on data that are on the"
            " device. At most: what those rates alone would allow.",
            "",
            aligned(headers, [False, False, True, True, True, False, True, True, True], lines),
            "",
            f"Memory is the process's, with {CONTEXT_MIB:,} MiB of libraries; while cuDNN tries its algorithms it may"
            f" be up to {TRIALS_MIB:,} MiB more.",
        ]
    )


def errors() -> str:
    """The projection of each published figure beside it."""
    headers = (
        "published",
        "GPU",
        "batch",
        "images/s",
        "",
        "images/s",
        "90 % interval",
        "bound by",
        "error",
        "inside",
        "source",
    )
    lines = []
    for one in PUBLISHED:
        found = predict(one)
        lines.append(
            (
                one.name,
                one.gpu,
                str(one.batch),
                figure(one.images_per_s),
                MARK,
                about(found.images_per_s),
                f"{about(found.low)} to {about(found.high)}",
                found.bound,
                f"{100 * (found.images_per_s / one.images_per_s - 1):+.0f} %",
                "yes" if found.low <= one.images_per_s <= found.high else "no",
                one.source,
            )
        )
    right = [False, False, True, True, False, True, True, False, True, False, False]
    return "\n".join(
        [
            "The same method on published figures, to which nothing in it was fitted. Its 90 % interval is the"
            f" projection × and ÷ {interval_factor():.2f}.",
            "",
            aligned(headers, right, lines),
        ]
    )


def page_tables() -> dict[str, str]:
    """The tables of docs/projection.md by the names of their marks."""
    from .workloads import WORKLOADS

    workloads = [function() for function in WORKLOADS]
    return {
        "h200": speeds(CARDS["h200"], workloads),
        "t4": speeds(CARDS["t4"], workloads),
        "errors": errors(),
    }


def fill(page: str) -> str:
    """`page` with each table between its marks."""
    for name, text in page_tables().items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    return page


if __name__ == "__main__":
    path = ROOT / "docs" / "projection.md"
    path.write_text(fill(path.read_text()))
