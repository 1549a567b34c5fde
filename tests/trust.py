"""Shows on this machine that its measurements can be trusted, and writes docs/trust.md: python tests/trust.py [PART …]

The parts, all of them by default, are the functions below; most need a GPU. Records are kept in --folder; what it holds
already is not measured again, so that an interrupted series goes on.
"""

import argparse
import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from planted import HOARD, ROOT, SPIN, copy, fill, unit_s

from netdyno.bench import machine
from netdyno.bench.ab import Checkout, Contest, parse_case
from netdyno.bench.gate import read_records
from netdyno.bench.record import Record
from netdyno.bench.stats import median, quantiles
from netdyno.bench.summary import caveats, summarise
from netdyno.bench.table import aligned, replace_section

PAGE = ROOT / "docs" / "trust.md"
PAIRS = {
    "mnist-cnn tuned compute full": 20,
    "cifar10-cnn tuned compute full": 5,
    "cifar100-cnn tuned compute full": 5,
    "conv-autoencoder tuned compute full": 5,
    "dcgan tuned compute full": 5,
    "resnet50-transfer tuned compute full": 5,
}
SHORT = "mnist-cnn tuned compute full"
LONG_KERNELS = "cifar100-cnn tuned compute full"  # a profiler delays the launch of each kernel by about a microsecond
LONG = "dcgan tuned compute full"  # more than ten seconds without a pause
BUSY = "import torch\na = torch.ones(4096, 4096, device='cuda')\nwhile True: torch.mm(a, a); torch.cuda.synchronize()"

Row = tuple[str, str, str, bool]  # what was done, what should show, what showed, whether that is so


class Series:
    """Records of cases, by this tree's code or a planted copy of it, made where they are missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def records(self, case: str, runs: int, plant: str | None = None, name: str = "calm") -> list[Record]:
        """The first `runs` records of `case` by the copy called `name`, oldest first."""
        place = self.folder / name / case.replace(" ", "-")
        workload, tuning, mode, suite = parse_case(case)
        contest = Contest(
            workload=workload, tuning=tuning, mode=mode, suite=suite, repeats=0, budget_s=0, results=place, data=None
        )
        fill(self.checkout(name, plant), contest, place, runs)
        return sorted(read_records(str(place), place), key=lambda record: record["id"])[:runs]

    def checkout(self, name: str, plant: str | None) -> Checkout:
        return copy(self.folder / f"copy-{name}", self.folder / f"cache-{name}", plant)


def speed(record: Record) -> float:
    return record["throughput"]["images_per_s"]


def pairs(series: Series) -> Iterator[Row]:
    """Two fresh processes of the same case, again and again."""
    for case, count in PAIRS.items():
        made = series.records(case, 2 * count)
        ratios = [speed(b) / speed(a) for a, b in zip(made[::2], made[1::2], strict=True)]
        middle = median(ratios)
        low, high = quantiles(ratios, (0.05, 0.95))
        found = f"{middle:.4f}, 5 to 95 %: {low:.4f} to {high:.4f}"
        yield f"{case}: {count} A/A pairs", "ratio 1 ± 0.005", found, abs(middle - 1) <= 0.005


def spin(series: Series) -> Iterator[Row]:
    """A kernel that spins for 2 % of the step, inside the captured step."""
    calm = series.records(SHORT, 5)
    step_s = median([record["timing"]["train_s"] / record["timing"]["steps"] for record in calm])
    units = round(0.02 * step_s / unit_s())
    slow = series.records(SHORT, 5, SPIN.format(units=units), "spin")
    percent = 100 * (median([speed(record) for record in calm]) / median([speed(record) for record in slow]) - 1)
    yield f"{SHORT}: 2 % more work a step", "2 ± 0.3 % slower", f"{percent:.2f} %", abs(percent - 2) <= 0.3


def allocation(series: Series) -> Iterator[Row]:
    """100 MiB more, held while the step runs."""
    peaks = [
        median([record["memory"]["peak_allocated_mib"] for record in made])
        for made in (series.records(SHORT, 5), series.records(SHORT, 1, HOARD.format(units=100), "hoard"))
    ]
    more = peaks[1] - peaks[0]
    yield f"{SHORT}: 100 MiB more", "100 ± 2 MiB", f"{more:.1f} MiB", abs(more - 100) <= 2


def busy(series: Series) -> Iterator[Row]:
    """Another process at work on the card."""
    with other_process():
        (record,) = series.records(SHORT, 1, name="beside")
    (row,) = summarise([record])
    said = "; ".join(caveats(row))
    yield f"{SHORT}: beside a busy process", "flagged", said or "nothing", "other process" in said


@contextmanager
def other_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def trace(series: Series) -> Iterator[Row]:
    """The throughput of a case by its profiler's trace: from the first kernel to the end of the last."""
    place = series.folder / "traced"
    if not place.exists():
        workload, tuning, mode, suite = parse_case(LONG_KERNELS)
        options = ["--tuning", tuning, "--mode", mode, "--suite", suite, "--results", str(place), "--trace"]
        done = series.checkout("calm", None).run("run", workload, *options)
        assert done.returncode == 0, done.stderr
    (record,) = read_records(str(place), place)
    (path,) = place.glob("*/*/*.trace.json.gz")
    by_trace = traced_images_per_s(json.loads(gzip.decompress(path.read_bytes())), record)
    percent = 100 * (by_trace / speed(record) - 1)
    found = f"{by_trace:,.0f} against {speed(record):,.0f} images/s: {percent:+.2f} %"
    yield f"{LONG_KERNELS}: recomputed from a trace", "within 1 %", found, abs(percent) <= 1


def traced_images_per_s(traced: dict[str, Any], record: Record) -> float:
    """By the kernels of the trace and the losses that it counts: each step runs the optimizer once for each player."""
    kernels = [event for event in traced["traceEvents"] if event.get("cat") == "kernel"]
    begin = min(event["ts"] for event in kernels)
    end = max(event["ts"] + event["dur"] for event in kernels)
    steps = sum("multi_tensor_apply_kernel" in event["name"] and "Optimizer" in event["name"] for event in kernels)
    assert steps, "a trace without an update"
    return steps * record["case"]["recipe"]["batch_size"] / (1e-6 * (end - begin))


def energy(series: Series) -> Iterator[Row]:
    """By the card's counter and by sampled power, over more than ten seconds."""
    (record,) = series.records(LONG, 1)
    gpu = record["gpu"]
    counted = gpu["energy_j"] if gpu["energy_source"] == "counter" else None
    percent = 100 * (gpu["energy_sampled_j"] / counted - 1) if counted else float("nan")
    found = f"{counted} J counted, {gpu['energy_sampled_j']} J sampled: {percent:+.1f} %"
    long_enough = record["timing"]["train_s"] >= 10
    yield f"{LONG}: energy", "within 5 %, 10 s or longer", found, abs(percent) <= 5 and long_enough


PARTS: dict[str, Callable[[Series], Iterator[Row]]] = {
    "spin": spin,
    "allocation": allocation,
    "busy": busy,
    "trace": trace,
    "energy": energy,
    "pairs": pairs,
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=list(PARTS))
    parser.add_argument("--folder", type=Path, default=Path("results/local/trust"))
    options = parser.parse_args()
    series = Series(options.folder.absolute())
    rows: list[Row] = []
    for part in options.parts:
        for row in PARTS[part](series):
            print(*row, sep="  ", flush=True)
            rows.append(row)
    lines = [(done, expected, found, "yes" if holds else "no") for done, expected, found, holds in rows]
    here = machine.describe()
    table = aligned(("what was done", "what should show", "what showed", "holds"), [False] * 4, lines)
    section = f"On {here['gpu'] or here['cpu']}, torch {here['versions']['torch']}.\n\n{table}"
    PAGE.write_text(replace_section(PAGE.read_text(encoding="utf-8"), "trust", section), encoding="utf-8")
    return 0 if all(holds for *_, holds in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
