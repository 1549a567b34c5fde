"""The command line. It chooses cases and outputs; every setting of a case is in `workloads.py` and `tuning.py`."""

import importlib.util
import json
import sys
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import table as tables
from .errors import UserError
from .progress import show
from .record import Record, check_writable, code_hash, load_all, save_machine

app = typer.Typer(help="Netdyno, a dynamometer for GPUs.", no_args_is_help=True, add_completion=False)
data_app = typer.Typer(help="The image sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
console = Console()


class Suite(str, Enum):
    quick = "quick"
    full = "full"
    source = "source"


class TuningName(str, Enum):
    tuned = "tuned"
    eager = "eager"
    t4 = "t4"


class Mode(str, Enum):
    e2e = "e2e"
    compute = "compute"
    loader = "loader"


class Format(str, Enum):
    md = "md"
    csv = "csv"
    json = "json"


SUITE_TUNINGS = {
    Suite.quick: [TuningName.tuned],
    Suite.full: [TuningName.tuned, TuningName.eager],
    Suite.source: [TuningName.eager],
}

DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of the image sets [default: $NETDYNO_DATA, else the user's cache]."),
]
ResultsOption = Annotated[Path, typer.Option("--results", help="Folder of the records.")]
SetNames = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Image sets [default: all].")]


@app.command(name="list")
def list_workloads() -> None:
    """List the workloads, their data sets and targets."""
    from rich.table import Table

    from .workloads import WORKLOADS

    grid = Table("workload", "data set", "metric", "target", "batch", "epochs", box=None, header_style="bold")
    for function in WORKLOADS:
        workload = function()
        recipe, metric = workload.recipe, workload.metric
        sign = "≥" if metric.higher_is_better else "≤"
        target = f"{sign} {workload.target:g} {metric.unit}" if workload.target is not None else "–"
        grid.add_row(workload.name, workload.dataset, metric.name, target, str(recipe.batch_size), str(recipe.epochs))
    console.print(grid)


@app.command()
def run(
    workloads: Annotated[list[str] | None, typer.Argument(metavar="[WORKLOAD]...", help="[default: all six]")] = None,
    suite: Annotated[
        Suite, typer.Option(help="quick: two short epochs; full: to the target; source: as published.")
    ] = Suite.quick,
    tuning: Annotated[
        list[TuningName] | None, typer.Option(help="May be given more than once.  [default: the suite's]")
    ] = None,
    mode: Annotated[
        Mode, typer.Option(help="Loader and training, training on a resident batch, or the loader alone.")
    ] = Mode.e2e,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of weights, order and augmentation.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Fresh processes for each case.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip what these results hold already, from the same code.")
    ] = False,
    results: ResultsOption = Path("results"),
    data: DataOption = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Write a profiler trace of a few steps beside each record.")
    ] = False,
) -> None:
    """Train workloads, one fresh process each, and record what was measured."""
    from . import machine, runner
    from .data import prepared
    from .tuning import TUNINGS
    from .workloads import Case, find, names

    chosen = [find(name) for name in workloads or names()]
    tunings = [name.value for name in tuning or SUITE_TUNINGS[suite]]
    check_writable(results)
    here = machine.describe()
    if here["gpu"] is None and any(TUNINGS[name](None).needs_gpu for name in tunings):
        raise UserError("--tuning t4 needs a CUDA GPU, and no NVIDIA driver with one was found here")
    if (
        any(TUNINGS[name](None).loader == "dali" for name in tunings)
        and importlib.util.find_spec("nvidia.dali") is None
    ):
        raise UserError("NVIDIA DALI is not installed: pip install nvidia-dali-cuda120 (or nvidia-dali-cuda130)")
    save_machine(here, results)
    console.print(f"machine  {here['slug']}")
    root = data or prepared.default_root()
    announce_data(sorted({workload.dataset for workload in chosen}), root)

    cases = [
        Case(workload=workload.name, suite=suite.value, tuning=name, mode=mode.value, seed=seed)
        for workload in chosen
        for name in tunings
        for _ in range(repeats)
    ]
    done = held(load_all(results), here["slug"]) if resume else Counter()
    records: list[Record] = []
    user_errors = False
    for number, case in enumerate(cases, 1):
        if done[case] > 0:
            done[case] -= 1
            console.print(f"[{number}/{len(cases)}] {case}: already recorded", markup=False)
            continue
        with show(console, f"[{number}/{len(cases)}] {case}") as listen:
            record = runner.run(case, data=root, results=results, machine=here, listen=listen, trace=trace)
        user_errors |= listen.user_error
        records.append(record)
    if records:
        console.print(*tables.to_rich(records), sep="\n")
        console.print(f"{len(records)} records in {results / here['slug']}", markup=False)
    if any(record["status"] != "ok" for record in records):
        raise typer.Exit(2 if user_errors else 1)


def announce_data(names: list[str], root: Path) -> None:
    """Makes stand-ins for sets that are not there, checks every set's files, and says which is which."""
    from .data import prepared

    for name in names:
        real = prepared.ensure(name, root)
        train, test = (prepared.load(name, split, root) for split in ("train", "test"))
        kind = f"real, {train.label}" if real else "synthetic stand-in: its accuracies mean nothing outside this table"
        console.print(f"data     {name}: {kind}, {len(train):,} + {len(test):,} images", markup=False)


def held(records: list[Record], slug: str) -> "Counter[Any]":
    """How many whole records of each case these results hold from this machine and this very code."""
    from .workloads import Case

    code = code_hash()
    fields = Case.__dataclass_fields__
    return Counter(
        Case(**{name: record["case"][name] for name in fields})
        for record in records
        if record["status"] == "ok" and record["machine"]["slug"] == slug and record["code"] == code
    )


@app.command()
def table(
    results: ResultsOption = Path("results"),
    format: Annotated[Format | None, typer.Option("--format", help="[default: a table for the terminal]")] = None,
) -> None:
    """Show the records as tables, tuned beside eager."""
    if not results.is_dir():
        raise UserError(f"there is no results folder {results}; make records with: netdyno run")
    records = load_all(results)
    if format is None:
        console.print(*tables.to_rich(records), sep="\n")
    else:
        writers = {Format.md: tables.to_markdown, Format.csv: tables.to_csv, Format.json: tables.to_json}
        sys.stdout.write(writers[format](records).rstrip("\n") + "\n")


@data_app.command(name="list")
def list_data(data: DataOption = None) -> None:
    """Show which image sets are there."""
    from .data import prepared

    root = data or prepared.default_root()
    console.print(f"{root}", markup=False)
    for name in prepared.FORMS:
        folder = prepared.locate(name, root)
        if folder is None:
            state = "missing; a run would use a stand-in (netdyno data fetch gets the real one)"
        else:
            manifest = json.loads((folder / "manifest.json").read_text())
            state = "synthetic stand-in" if manifest.get("synthetic") else f"real, {manifest['split']}"
        console.print(f"  {name:12} {state}", markup=False)


@data_app.command()
def fetch(names: SetNames = None, data: DataOption = None) -> None:
    """Download image sets that are missing, and ResNet-50's ImageNet weights, and convert them."""
    from .data import fetch as fetching
    from .data import prepared, weights

    root = data or prepared.default_root()
    jobs = [(lambda report, name=name: fetching.fetch(name, root, report)) for name in names or prepared.FORMS]
    failures = []
    for job in jobs if names else [*jobs, weights.fetch]:
        try:
            job(lambda line: console.print(line, markup=False))
        except UserError as error:
            failures.append(error)
            console.print(f"{error}", markup=False)
    if failures:
        raise typer.Exit(1)


@data_app.command()
def verify(names: SetNames = None, data: DataOption = None) -> None:
    """Check image sets against the SHA-256 values of their manifests."""
    from .data import prepared

    root = data or prepared.default_root()
    problems = []
    for name in names or prepared.FORMS:
        if prepared.locate(name, root) is None:
            found = [f"{name}: not in {root}"] if names else []
            console.print(f"{name}: not there", markup=False)
        else:
            found = prepared.verify(name, root)
            console.print(f"{name}: {'as its manifest says' if not found else f'{len(found)} problems'}", markup=False)
        problems += found
    if problems:
        raise UserError("\n".join(problems))


def main() -> None:
    """Runs the command line; exit code 2 for what the user can mend, 1 for a run that failed."""
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(f"netdyno: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
