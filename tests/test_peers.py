"""docs/peers.md: its figures are those of the records and of what the peers printed."""

import csv
import json
from pathlib import Path
from statistics import fmean, median

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
PEERS = {"cifar10-94": "hiverge cifar10-speedrun", "cifar100-70": "crisostomi cifar100-speedrun"}


def seeds(workload: str) -> tuple[list[float], list[float]]:
    """Accuracies in % and seconds of our record."""
    (path,) = (ROOT / "results").glob(f"nvidia-h200-*/{workload}/tuned-e2e-*.json")
    accuracy = json.loads(path.read_text())["accuracy"]
    assert accuracy["surely"]
    assert f"{accuracy['lower_bound']:.2f}" in PAGE
    return [row["metric"] for row in accuracy["seeds"]], [row["train_s"] for row in accuracy["seeds"]]


def runs(peer: str) -> tuple[list[float], list[float]]:
    """The same of a peer."""
    with (ROOT / "docs" / "peers.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["peer"] == peer]
    return [100 * float(row["accuracy"]) for row in rows], [float(row["seconds"]) for row in rows]


def cells(accuracies: list[float], seconds: list[float], scale: float, digits: int, unit: str) -> str:
    """Those of a row of the page."""
    mean, middle, least, most = (
        f"{scale * value:.{digits}f}" for value in (fmean(seconds), median(seconds), min(seconds), max(seconds))
    )
    return f"| {fmean(accuracies):.2f} % | {mean} {unit} | {middle} {unit} | {least} to {most} {unit} |"


@pytest.mark.parametrize("workload", ["mnist-99", "cifar10-94", "cifar100-70"])
def test_our_rows_are_those_of_the_records(workload: str) -> None:
    accuracies, seconds = seeds(workload)
    assert len(seconds) == 30
    ours = cells(accuracies, seconds, *((1e3, 1, "ms") if workload == "mnist-99" else (1, 3, "s")))
    assert f"| `{workload}` {ours}" in PAGE


@pytest.mark.parametrize("workload", PEERS)
def test_rows_of_peers_are_what_they_printed(workload: str) -> None:
    accuracies, seconds = runs(PEERS[workload])
    assert len(seconds) == 30
    assert cells(accuracies, seconds, 1, 3, "s") in PAGE
    times = fmean(seconds) / fmean(seeds(workload)[1])
    (row,) = [line for line in PAGE.splitlines() if f"| `{workload}` |" in line]
    assert row.endswith(f"| {times:.{2 if times < 2 else 1}f} |")
