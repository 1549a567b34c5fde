"""Shows on this machine that its measurements can be trusted, and writes docs/trust.md: python tests/trust.py [PART …]

The parts, all of them by default, are the functions below; most need a GPU. Records and what they show are kept in
--folder; records that it holds already are not made again, so that an interrupted series goes on.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from planted import HOARD, ROOT, SPIN, Planted, copy, fill, in_each_step, records_in, units_for

from netdyno.bench import machine
from netdyno.bench.ab import Checkout, Contest, parse_case
from netdyno.bench.record import Record
from netdyno.bench.stats import median, quantiles
from netdyno.bench.summary import summarise
from netdyno.bench.table import aligned, replace_section

PAGE = ROOT / "docs" / "trust.md"
PAIRS = {  # how many of each case
    "mnist-cnn tuned compute full": 20,
    "cifar10-cnn tuned compute full": 5,
    "cifar100-cnn tuned compute full": 5,
    "conv-autoencoder tuned compute full": 5,
    "dcgan tuned compute ladder": 5,  # two epochs: 70 take a minute
    "resnet50-transfer tuned compute full": 20,  # a process has one of two speeds, 1.5 % apart
}
SHORT = "mnist-cnn tuned compute full"
# More than ten seconds, below the card's power cap.
LONG = "cifar100-cnn eager compute full"
# Few seconds, at the card's power cap.
HOT = "cifar100-cnn tuned compute full"
MINUTES = 5
EDGE_S = 20  # of them, whose speed counts
BUSY = "import torch\na = torch.ones(4096, 4096, device='cuda')\nwhile True: torch.mm(a, a); torch.cuda.synchronize()"

# What a process holds of the card outside of torch: it runs a case until one part of its memory is taken, and ends.
PART_OF_MEMORY = """
import os, sys, time
from pathlib import Path
from netdyno.bench import child
from netdyno.bench.ab import parse_case
from netdyno.bench.data.prepared import default_root
from netdyno.bench.measure import MemoryParts
from netdyno.bench.order import Order
from netdyno.bench.workloads import Case

def take_and_end(parts, name, take=MemoryParts.take):
    take(parts, name)
    if name == sys.argv[2]:
        print(parts.parts[name], flush=True)
        os._exit(0)

MemoryParts.take = take_and_end
workload, tuning, mode, suite = parse_case(sys.argv[1])
case = Case(workload=workload, suite=suite, tuning=tuning, mode=mode)
child.run(Order(case=case, data=default_root(), pictures=Path(), started=time.time()), lambda **event: None)
"""

# The timed region, all of it, in the profiler's trace.
TRACED = """

_untraced = time_batches


def time_batches(*arguments):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        memory = _untraced(*arguments)
    profiler.export_chrome_trace("{path}")
    return memory
"""
# The timed region once: of what it says one number, and nothing goes into the record.
ONCE = """

_once = time_batches


def _heard(section, name, *given):
    said = {{}}
    _once(*given, lambda **event: said.update({{event.get("section"): event}}))
    return said[section]["value"][name]
"""
# … several times over, by turns with a bare loop of the same steps.
BARE = (
    ONCE
    + """

def time_batches(workload, step, loader, device, begin, emit):
    def harnessed_s():
        return _heard("timing", "train_s", workload, step, loader, device, begin)

    def bare_s():
        batches = list(loader.epoch()) * workload.recipe.epochs
        start = time.perf_counter()
        for batch in batches:
            loss = step(batch.images, batch.labels)
        loss.item()  # waits for the device, which had nothing to do at the start
        return time.perf_counter() - start

    pairs = []
    for turn in range({turns}):
        first, second = (harnessed_s, bare_s)[:: 1 - turn % 2 * 2]
        pairs.append((first(), second())[:: 1 - turn % 2 * 2])
    Path("{path}").write_text(json.dumps(pairs))
    return _once(workload, step, loader, device, begin, emit)
"""
)
# … again and again, for so many seconds: the throughput of each.
SUSTAINED = (
    ONCE
    + """

def time_batches(workload, step, loader, device, begin, emit):
    start, found = time.perf_counter(), []
    while not found or found[-1][0] < {seconds}:
        speed = _heard("throughput", "images_per_s", workload, step, loader, device, begin)
        found.append((time.perf_counter() - start, speed))
    Path("{path}").write_text(json.dumps(found))
    return _once(workload, step, loader, device, begin, emit)
"""
)
DEAF = {"gpu.py": "\n\nSampler._run = lambda self: None\n"}  # the card's state is not sampled
LOSS = "nll_loss_forward"
CAPTURED: dict[str, Any] = {"capture_output": True, "text": True, "check": True}

Row = tuple[str, str, str, bool]  # what was done, what should show, what showed, whether that is so


class Series:
    """Records of cases, by this tree's code or a planted copy of it, made where they are missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def records(self, case: str, runs: int, name: str = "calm", planted: Planted | None = None) -> list[Record]:
        """The first `runs` records of `case` by the copy called `name`, oldest first."""
        place = self.folder / name / case.replace(" ", "-")
        workload, tuning, mode, suite = parse_case(case)
        contest = Contest(
            workload=workload, tuning=tuning, mode=mode, suite=suite, repeats=0, budget_s=0, results=place, data=None
        )
        fill(self.checkout(name, planted), contest, place, runs)
        return sorted(records_in(place), key=lambda record: record["id"])[:runs]

    def checkout(self, name: str, planted: Planted | None) -> Checkout:
        """The copy called `name`. It starts from the compiled code of the calm one, which has run before."""
        place, cache, like = self.folder / f"copy-{name}", self.folder / f"cache-{name}", self.folder / "cache-calm"
        return copy(place, cache, planted, compiled_like=None if name == "calm" else like)


def speed(record: Record) -> float:
    return record["throughput"]["images_per_s"]


def pairs(series: Series, case: str) -> Iterator[Row]:
    """Two fresh processes of the same case, again and again."""
    count = PAIRS[case]
    made = series.records(case, 2 * count)
    ratios = [speed(b) / speed(a) for a, b in zip(made[::2], made[1::2], strict=True)]
    middle = median(ratios)
    low, high = quantiles(ratios, (0.05, 0.95))
    found = f"{middle:.4f}, 5 to 95 %: {low:.4f} to {high:.4f}"
    yield f"{case}: {count} A/A pairs", "ratio 1 ± 0.005", found, abs(middle - 1) <= 0.005


def spin(series: Series) -> Iterator[Row]:
    """A kernel that spins for 2 % of the step, inside the captured step."""
    runs = 10
    calm = series.records(SHORT, runs)
    step_s = median([record["timing"]["train_s"] / record["timing"]["steps"] for record in calm])
    slow = series.records(SHORT, runs, "spin", in_each_step(SPIN.format(units=units_for(0.02 * step_s))))
    percent = 100 * (median([speed(record) for record in calm]) / median([speed(record) for record in slow]) - 1)
    yield f"{SHORT}: 2 % more work a step", "2 ± 0.3 % slower", f"{percent:.2f} %", abs(percent - 2) <= 0.3


def allocation(series: Series) -> Iterator[Row]:
    """100 MiB more, held while the step runs."""
    peaks = [
        median([record["memory"]["peak_allocated_mib"] for record in made])
        for made in (series.records(SHORT, 1), series.records(SHORT, 1, "hoard", in_each_step(HOARD.format(units=100))))
    ]
    more = peaks[1] - peaks[0]
    yield f"{SHORT}: 100 MiB more", "100 ± 2 MiB", f"{more:.1f} MiB", abs(more - 100) <= 2


def memory(series: Series) -> Iterator[Row]:
    """The parts of the memory, context and loaders each measured in a process of its own, against NVML's count."""
    for case in PAIRS:
        (record,) = series.records(case, 1)
        found = record["memory"]
        context, loaders = (
            float(subprocess.run([sys.executable, "-c", PART_OF_MEMORY, case, part], **CAPTURED).stdout)
            for part in ("context_mib", "loaders_mib")
        )
        torch_mib = found["peak_reserved_mib"]
        parts = {"context": context, "loaders": loaders, "libraries": found["libraries_mib"], "torch": torch_mib}
        counted = found["nvml_process_mib"]
        percent = 100 * (sum(parts.values()) / counted - 1)
        told = " + ".join(f"{name} {size:,.0f}" for name, size in parts.items())
        shown = f"{told} = {sum(parts.values()):,.0f} against {counted:,.0f} MiB: {percent:+.1f} %"
        yield f"{case}: the parts of its memory", "within 5 %", shown, abs(percent) <= 5


def sampling(series: Series) -> Iterator[Row]:
    """The card's state, sampled as always, and not at all."""
    runs = 10
    heard, deaf = (
        median([speed(record) for record in series.records(SHORT, runs, name, planted)])
        for name, planted in (("calm", None), ("deaf", DEAF))
    )
    percent = 100 * (deaf / heard - 1)
    yield f"{SHORT}: {runs} runs sampled, {runs} not", "within 0.5 %", f"{percent:+.2f} %", abs(percent) <= 0.5


def harness(series: Series) -> Iterator[Row]:
    """The time of the timed region against that of a bare loop of the same steps, by turns in one process."""
    path = series.folder / "bare.json"
    series.records(SHORT, 1, "bare", {"child.py": BARE.format(turns=20, path=path)})
    percent = 100 * (median([harnessed / bare for harnessed, bare in json.loads(path.read_text())]) - 1)
    yield f"{SHORT}: beside a bare loop of the same steps", "within 0.5 %", f"{percent:+.2f} %", abs(percent) <= 0.5


def sustained(series: Series) -> Iterator[Row]:
    """The speed after five minutes against that of the first seconds, of a case that meets the card's power cap."""
    path = series.folder / "sustained.json"
    series.records(HOT, 1, "sustained", {"child.py": SUSTAINED.format(seconds=MINUTES * 60, path=path)})
    found = json.loads(path.read_text())
    (first, _), (last, _) = found[0], found[-1]
    begin = median([speed for second, speed in found if second <= max(first, EDGE_S)])
    end = median([speed for second, speed in found if second >= last - EDGE_S])
    percent = 100 * (end / begin - 1)
    shown = f"{begin:,.0f}, then {end:,.0f} images/s: {percent:+.1f} %"
    yield f"{HOT}: after {MINUTES} minutes", "within 2 %", shown, abs(percent) <= 2


def busy(series: Series) -> Iterator[Row]:
    """Another process at work on the card."""
    with other_process():
        (record,) = series.records(SHORT, 1, "beside")
    (row,) = summarise([record])
    said = "; ".join(row.doubts)
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
    """The throughput of a case by a trace of the very steps that were timed."""
    path = series.folder / "timed.trace.json"
    (record,) = series.records(LONG, 1, "traced", {"child.py": TRACED.format(path=path)})
    by_trace = traced_images_per_s(json.loads(path.read_text()), record)
    percent = 100 * (by_trace / speed(record) - 1)
    found = f"{by_trace:,.0f} against {speed(record):,.0f} images/s: {percent:+.2f} %"
    yield f"{LONG}: recomputed from a trace of it", "within 1 %", found, abs(percent) <= 1


def traced_images_per_s(traced: dict[str, Any], record: Record) -> float:
    """By the first and the last loss: of each step one kernel makes it, where nothing is compiled.

    AssertionError where the trace does not hold every step.
    """
    losses = [event["ts"] for event in traced["traceEvents"] if event.get("cat") == "kernel" and LOSS in event["name"]]
    assert len(losses) == record["timing"]["steps"], f"{len(losses)} losses of {record['timing']['steps']} steps"
    return (len(losses) - 1) * record["case"]["recipe"]["batch_size"] / (1e-6 * (max(losses) - min(losses)))


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
    "memory": memory,
    "sampling": sampling,
    "harness": harness,
    "sustained": sustained,
    "busy": busy,
    "trace": trace,
    "energy": energy,
} | {f"pairs-{case.split()[0]}": partial(pairs, case=case) for case in PAIRS}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=list(PARTS))
    parser.add_argument("--folder", type=Path, default=Path("results/local/trust"))
    options = parser.parse_args()
    here = machine.describe()
    series = Series(options.folder.absolute() / here["slug"])  # records of one machine alone
    for part in options.parts:
        rows = []
        for row in PARTS[part](series):
            print(*row, sep="  ", flush=True)
            rows.append(row)
        on = f"{here['gpu'] or here['cpu']}, torch {here['versions']['torch']}"
        (options.folder / f"{part}.json").write_text(json.dumps({"on": on, "rows": rows}))
    return write_page(options.folder)


def write_page(folder: Path) -> int:
    """What the folder's parts show, as the page's table; 0 where all of it holds."""
    parts = [json.loads(path.read_text()) for part in PARTS if (path := folder / f"{part}.json").exists()]
    rows: list[Row] = list(chain.from_iterable(part["rows"] for part in parts))
    lines = [(done, expected, found, "yes" if holds else "no") for done, expected, found, holds in rows]
    table = aligned(("what was done", "what should show", "what showed", "holds"), [False] * 4, lines)
    places = " and ".join(dict.fromkeys(part["on"] for part in parts))  # they may have been shown on several
    section = f"On {places}.\n\n{table}"
    PAGE.write_text(replace_section(PAGE.read_text(encoding="utf-8"), "trust", section), encoding="utf-8")
    return 0 if all(holds for *_, holds in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
