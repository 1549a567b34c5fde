"""The command line. It chooses cases and outputs; every setting of a case is in `workloads.py` and `tuning.py`."""

import io
import os
import signal
import sys
from collections import Counter
from contextlib import closing
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import cli_doctor, cli_fleet, cli_project, cli_regress, cli_report
from . import table as tables
from .errors import UserError
from .progress import bars, outcome, show
from .record import Record, check_writable, code_hash, path_of, save_machine
from .schema import read_all
from .tuning import LADDER

plain: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "rich_markup_mode": None}
app = typer.Typer(**plain)
data_app = typer.Typer(help="List, fetch and verify the image sets.", **plain)
app.add_typer(data_app, name="data")
console = Console()


class Suite(str, Enum):
    quick = "quick"
    full = "full"
    source = "source"
    ladder = "ladder"
    open = "open"


class TuningName(str, Enum):
    tuned = "tuned"
    captured = "captured"
    dali = "dali"
    compiled = "compiled"
    channels_last = "channels-last"
    amp = "amp"
    eager = "eager"
    fp32 = "fp32"
    deterministic = "deterministic"
    t4 = "t4"


class Mode(str, Enum):
    e2e = "e2e"
    compute = "compute"
    loader = "loader"


class Scaling(str, Enum):
    weak = "weak"
    strong = "strong"


class Format(str, Enum):
    md = "md"
    csv = "csv"
    json = "json"


SUITE_TUNINGS = {
    Suite.quick: [TuningName.tuned],
    Suite.full: [TuningName.tuned, TuningName.eager],
    Suite.source: [TuningName.fp32],
    Suite.ladder: [TuningName(name) for name in LADDER],
    Suite.open: [TuningName.tuned],
}

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="FOLDER", help="Where the image sets are.  [default: $NETDYNO_DATA, else the user's cache]"
    ),
]
ResultsOption = Annotated[Path, typer.Option("--results", metavar="FOLDER", help="Where the records are.")]
SetNames = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="[default: all sets]")]


@app.command(name="list")
def list_workloads() -> None:
    """List the workloads, their data sets and targets."""
    from rich.table import Table

    from .workloads import OPEN, VARIANTS, WORKLOADS

    grid = Table("workload", "data set", "metric and target", "batch", "epochs", box=None, header_style="bold")
    for function in WORKLOADS + OPEN + VARIANTS:
        workload = function()
        recipe, metric = workload.recipe, workload.metric
        goal = metric.name
        if workload.target is not None:
            goal += f" {'≥' if metric.higher_is_better else '≤'} {workload.target:g} {metric.unit}"
        if workload.target_share is not None:
            goal += f" ≤ {100 * workload.target_share:g} % of untrained"
        goal += "".join(f", {name.upper()} ≥ {least:g}" for name, least in (workload.also_at_least or {}).items())
        grid.add_row(workload.name, workload.dataset, goal, str(recipe.batch_size), str(recipe.epochs))
    console.print(grid)


@app.command()
def run(
    workloads: Annotated[
        list[str] | None, typer.Argument(metavar="WORKLOAD", help="[default: all six; open: its three]")
    ] = None,
    suite: Annotated[
        Suite,
        typer.Option(
            "--suite",
            metavar="SUITE",
            help="quick: two short epochs; full: to the target; source: as published; ladder: two"
            " epochs of each tuning from eager to tuned; open: the open division, to its targets.",
        ),
    ] = Suite.quick,
    tuning: Annotated[
        list[TuningName] | None,
        typer.Option(
            "--tuning",
            metavar="TUNING",
            help="eager: what people write first; amp: and in mixed precision; channels-last: and in that layout;"
            " compiled: and by torch.compile; dali: and fed by DALI; captured: and as one CUDA graph; tuned: and with"
            " kernels of our own, all that is known to make it fast; fp32: captured without mixed precision;"
            " deterministic: tuned with the same bits each time; t4: as on a T4."
            " May be given more than once.  [default: tuned; full: tuned and eager; source: fp32; ladder: all seven]",
        ),
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(
            "--mode",
            metavar="MODE",
            help="e2e: loader and training; compute: training on one resident batch; loader: it alone.",
        ),
    ] = Mode.e2e,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            metavar="N",
            min=1,
            max=1_024,
            help="Trains on so many GPUs of this machine at once; without any, in so many processes on its CPU."
            "  [default: 1; under torchrun: its processes]",
        ),
    ] = None,
    scaling: Annotated[
        Scaling,
        typer.Option(
            "--scaling",
            metavar="SCALING",
            help="Of several GPUs. weak: the recipe's work on each of them; strong: shared out to them.",
        ),
    ] = Scaling.weak,
    restarts: Annotated[
        int,
        typer.Option(
            "--restarts",
            metavar="N",
            min=0,
            help="Of several GPUs: starts a case's processes again when one fails, so often.",
        ),
    ] = 0,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, max=2**31 - 1, help="Of weights, order and augmentation.")
    ] = 0,
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds",
            metavar="N",
            min=1,
            max=1_000,
            help="Open division: so many, from --seed on, in one process.  [default: 30; quick: 2]",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Fresh processes for each case.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip cases that the results folder holds already, from the same code.")
    ] = False,
    parallel: Annotated[
        bool, typer.Option("--parallel", help="One case on each visible GPU at a time; records say what ran beside.")
    ] = False,
    results: ResultsOption = Path("results"),
    data: DataOption = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Write a profiler trace of a few steps beside each record.")
    ] = False,
    find_batch_size: Annotated[
        bool,
        typer.Option(
            "--find-batch-size",
            help="Record nothing, but find the largest batch that each case trains with on this GPU.",
        ),
    ] = False,
) -> None:
    """Train workloads and record what was measured."""
    from . import inflight, machine, runner
    from .data.dali import import_dali
    from .gpu import Gpu
    from .side_by_side import spread
    from .tuning import TUNINGS
    from .workloads import Case, find, names, resolve

    ranks = ranks_of_torchrun(gpus)
    for option, given in {"--scaling strong": scaling is Scaling.strong, "--restarts": restarts > 0}.items():
        if given and ranks == 1:
            raise UserError(f"{option} is for cases on several GPUs: say how many with --gpus")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's "stop" ends a run as Ctrl-C does
    chosen = [find(name) for name in workloads or names(suite.value)]
    tunings = [name.value for name in tuning or SUITE_TUNINGS[suite]]
    if seeds is not None and any(workload.division == "closed" for workload in chosen):
        raise UserError("--seeds is for the open division; elsewhere each seed is a run of its own: --seed")
    cases = [
        Case(
            workload=workload.name,
            suite=suite.value,
            tuning=name,
            mode=mode.value,
            seed=seed,
            seeds=1 if workload.division == "closed" else seeds or (30 if suite is Suite.open else 2),
            gpus=ranks,
            scaling=scaling.value if ranks > 1 else "weak",
        )
        for workload in chosen
        for name in tunings
        for _ in range(repeats)
    ]
    for case in cases:
        resolve(case)  # a suite of another division ends the command here
    if any(workload.division == "open" for workload in chosen):
        if mode is not Mode.e2e or trace or find_batch_size:
            raise UserError("the open division is timed end to end: leave --mode, --trace and --find-batch-size out")
        if others := [name for name in tunings if TUNINGS[name](None).loader != "dali"]:
            raise UserError(f"the open division is fed by DALI: --tuning {others[0]} is not")
    check_writable(results)
    here = machine.describe()
    if here["gpu"] is None and any(TUNINGS[name](None).needs_gpu for name in tunings):
        raise UserError("--tuning t4 needs a CUDA GPU, and no NVIDIA driver with one was found here")
    visible = Gpu.cards() if parallel or ranks > 1 else {}
    if here["gpu"] is not None and ranks > 1 and ranks > len(visible):
        raise UserError(f"--gpus {ranks}: this machine does not have so many, or CUDA_VISIBLE_DEVICES hides them")
    if ranks > 1 and find_batch_size:
        raise UserError("--find-batch-size searches on one GPU: leave --gpus out")
    if mode is Mode.loader and find_batch_size:
        raise UserError("--find-batch-size trains, and --mode loader does not: leave one of them out")
    if here["gpu"] is None and find_batch_size:
        raise UserError(
            "--find-batch-size needs a CUDA GPU: nothing ends a CPU's memory before the machine stands still"
        )
    if parallel and ranks > 1:
        raise UserError("--parallel runs a case on each card, and --gpus one on several: leave one of them out")
    if parallel and find_batch_size:
        raise UserError("--find-batch-size looks at one card: leave --parallel out")
    used = [*visible.values()][: None if parallel else ranks]
    if len(kinds := sorted({*used})) > 1:
        option = "--parallel" if parallel else f"--gpus {ranks}"
        raise UserError(f"{option} needs cards of one kind; choose with CUDA_VISIBLE_DEVICES: {', '.join(kinds)}")
    if any(TUNINGS[name](None).loader == "dali" for name in tunings):
        import_dali()  # a missing DALI ends the command here, not case by case
    save_machine(here, results)
    say(f"machine  {here['slug']}")
    if parallel:
        say(f"cards    {len(visible)}: " + ("a case on each" if len(visible) > 1 else "one case after the other"))
    for cut_off in inflight.sweep(results / here["slug"]):
        say(f"         an earlier run was cut off: {path_of(cut_off, results)} says killed")
    root = root_of(data)
    hashes = announce_data(sorted({workload.dataset for workload in chosen}), root)

    if find_batch_size:
        return say_batch_sizes(cases, root, here)
    done: Counter[Case] = Counter()
    if resume:
        found, problems = read_all(results)
        complain("\n".join(f"not counted: {problem}" for problem in problems))
        done = held(found, here, hashes)
    records: list[Record] = []
    user_errors = False
    waiting = []
    for number, case in enumerate(cases, 1):
        if done[case] > 0:
            done[case] -= 1
            say(f"[{number}/{len(cases)}] {case}: already recorded")
        else:
            waiting.append((number, case))

    def measure(number: int, case: Case, post: runner.Post | None = None) -> None:
        nonlocal user_errors
        name = f"[{number}/{len(cases)}] {case}"
        card = f"card {post.number}" if post else ""
        say(f"{name}: {card}" if post else name)
        options: Any = {"trace": trace, "post": post, "restarts": restarts}
        with closing(listener(card)) as listen:
            record = runner.run(case, data=root, results=results, machine=here, listen=listen, **options)
        end = f"{name}: {outcome(record)}" if post else f"  {outcome(record)}"
        say(end, style=None if record["status"] == "ok" else "red")
        user_errors |= listen.user_error
        records.append(record)

    with bars(console) as listener:
        if parallel and len(visible) > 1:
            spread(waiting, [*visible], measure)
        else:
            for number, case in waiting:
                measure(number, case)
    if records:
        console.print(*tables.to_rich(records), sep="\n")
        say(f"{len(records)} {'record' if len(records) == 1 else 'records'} written to {results / here['slug']}")
    if any(record["status"] != "ok" for record in records):
        raise typer.Exit(2 if user_errors else 1)


def ranks_of_torchrun(asked: int | None) -> int:
    """How many GPUs each case is to have: as asked for, else as many as torchrun started processes of this command.

    Under torchrun one of these, rank 0, goes on and starts the ranks of each case; the others end here. A case has
    fresh processes, whoever started the command.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return asked or 1
    if os.environ["RANK"] != "0":
        raise typer.Exit
    count = int(os.environ["WORLD_SIZE"])
    if count != int(os.environ["LOCAL_WORLD_SIZE"]):
        raise UserError("torchrun on several machines: a case runs on the GPUs of one; run the command on each of them")
    if asked not in (None, count):
        raise UserError(f"--gpus {asked}, but torchrun started {count} processes: leave one of them out")
    return count


def say_batch_sizes(cases: list[Any], root: Path, here: dict[str, Any]) -> None:
    """Searches and prints the largest batch of each case."""
    from .batch_size import find_batch_size
    from .data import prepared
    from .workloads import resolve

    for case in dict.fromkeys(cases):
        workload = resolve(case)
        images = min(len(prepared.load(workload.dataset, "train", root)), workload.recipe.train_images or sys.maxsize)
        with show(console) as listen:
            found = find_batch_size(case, images=images, data=root, machine=here, listen=listen)
        trains = "no batch trains" if found.trains is None else f"{found.trains:,} images train"
        end = f"{found.fails:,} do not" if found.fails else "more than the training set has are not tried"
        say(f"{case.workload} {case.tuning}: {trains}, {end}")


def root_of(data: Path | None) -> Path:
    """Where the image sets are: `data`, else $NETDYNO_DATA, else the user's cache. Says so of a named one not there."""
    from .data import prepared

    root = data or prepared.default_root()
    if (data or os.environ.get("NETDYNO_DATA")) and not root.is_dir():
        complain(f"the data folder {root} does not exist yet")
    return root


def announce_data(names: list[str], root: Path) -> dict[str, dict[str, str]]:
    """Makes stand-ins for sets that are not there, checks every set, and says which is which.

    Returns, for each set, the SHA-256 of its splits as a record has it. UserError names a file that is not as its
    manifest says: arrays are hashed here, and JPEGs whenever they are loaded.
    """
    from .data import prepared

    stand_ins = False
    hashes = {}
    for name in names:
        real = prepared.ensure(name, root)
        train, test = (prepared.load(name, split, root) for split in ("train", "test"))
        if train.images is not None and (problems := prepared.verify(name, root)):
            raise UserError(problems[0])
        hashes[name] = {"train": train.sha256, "test": test.sha256}
        kind = f"real, {train.label}" if real else "synthetic stand-in"
        stand_ins |= not real
        say(f"data     {name}: {len(train):,} + {len(test):,} images, {kind}")
    if stand_ins:
        say("         accuracies on stand-ins say nothing about the real sets")
    return hashes


def held(records: list[Record], here: dict[str, Any], hashes: dict[str, dict[str, str]]) -> "Counter[Any]":
    """How many whole records of each case these results hold, from this machine, versions, data and very code."""
    from .data import weights
    from .workloads import Case

    fields = Case.__dataclass_fields__
    missing_weights = "imagenet" if not weights.path().exists() else "random"
    code = code_hash()

    def counts(record: Record) -> bool:
        data, machine = record.get("data") or {}, record["machine"]
        return (
            record["status"] == "ok"
            and record.get("code") == code
            and all(machine.get(name) == here[name] for name in ("slug", "versions"))
            and hashes.get(str(data.get("name"))) == data.get("sha256")
            and (record["case"].get("recipe") or {}).get("weights") != missing_weights
        )

    def case_of(described: Record) -> Case:
        known: dict[str, Any] = {name: described.get(name) for name in fields if name != "seeds"}
        known["scaling"] = known["scaling"] or "weak"  # of one GPU a record says nothing
        return Case(**known, seeds=len(described.get("seeds") or [0]))

    return Counter(case_of(record["case"]) for record in records if counts(record))


@app.command()
def table(
    results: ResultsOption = Path("results"),
    format: Annotated[
        Format | None, typer.Option("--format", metavar="FORMAT", help="md, csv or json.  [default: for the terminal]")
    ] = None,
) -> None:
    """Show the records as tables, tuned beside eager.

    Exit code 1 if a file among them is no valid record and so is not shown.
    """
    if not results.is_dir():
        raise UserError(f"there is no results folder {results}; make records with: netdyno run")
    records, problems = read_all(results)
    if format is None:
        console.print(*tables.to_rich(records), sep="\n")
    else:
        writers = {Format.md: tables.to_markdown, Format.csv: tables.to_csv, Format.json: tables.to_json}
        sys.stdout.write(writers[format](records).rstrip("\n") + "\n")
    complain("\n".join(f"not shown: {problem}" for problem in problems))
    if problems:
        raise typer.Exit(1)


def show_version(wanted: bool) -> None:
    if wanted:
        say(version("netdyno"))
        raise typer.Exit


@app.callback()
def netdyno(
    show_the_version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Netdyno, a dynamometer for GPUs."""


@data_app.command(name="list")
def list_data(data: DataOption = None) -> None:
    """Show which image sets are there."""
    from .data import prepared

    root = root_of(data)
    say(f"{root}")
    problems = []
    for name in prepared.FORMS:
        try:
            folder = prepared.locate(name, root)
            manifest = prepared.read_manifest(folder, name) if folder else None
        except UserError as error:
            problems.append(str(error))
            state = "damaged"
        else:
            if manifest is None:
                state = "missing: a run would draw a stand-in; netdyno data fetch gets the real one"
            else:
                state = "synthetic stand-in" if manifest.get("synthetic") else f"real, {manifest['split']}"
        say(f"  {name:12} {state}")
    if problems:
        raise UserError("\n".join(problems))


@data_app.command()
def fetch(names: SetNames = None, data: DataOption = None) -> None:
    """Download what is missing: image sets and ImageNet weights.

    Without a NAME all sets, and ResNet-50's ImageNet weights.
    """
    from .data import fetch as fetching
    from .data import prepared, weights

    root = data or prepared.default_root()
    jobs = [(lambda report, name=name: fetching.fetch(name, root, report)) for name in names or prepared.FORMS]
    failures = []
    for job in jobs if names else [*jobs, weights.fetch]:
        try:
            job(say)
        except UserError as error:
            failures.append(str(error))
    if failures:
        raise UserError("\n".join(failures))


@data_app.command()
def verify(names: SetNames = None, data: DataOption = None) -> None:
    """Check image sets against the SHA-256 values of their manifests."""
    from .data import prepared

    root = root_of(data)
    problems = []
    for name in names or prepared.FORMS:
        folder = prepared.locate(name, root)
        if folder is None:
            found = [f"{name}: not in {root}"] if names else []
            say(f"{name}: not there")
        else:
            found = prepared.verify(name, root)
            kind = "a synthetic stand-in, " if folder.parent != root else ""
            say(f"{name}: {kind}{'damaged' if found else 'as its manifest says'}")
        problems += found
    if problems:
        raise UserError("\n".join(problems))


cli_regress.register(app)  # compare, gate, baseline update, ab, bisect, history
cli_report.register(app)  # report, pack, merge, import-benchmarks
cli_doctor.register(app)  # doctor
cli_project.register(app)  # project
cli_fleet.register(app)  # fleet plan


def say(line: str, style: str | None = None) -> None:
    """One line on standard output, never broken into two."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def complain(lines: str) -> None:
    for line in lines.splitlines():
        print(f"netdyno: {line}", file=sys.stderr)


def main() -> None:
    """Runs the command line; exit code 2 for what the user can mend, 1 for a run that failed, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may hold bytes that are no text
    try:
        code = app(prog_name="netdyno", standalone_mode=False)
    except UserError as error:
        complain(str(error))
        code = 2
    except OSError as error:  # of a file where nobody expects it: a name too long, no right to look, a broken disk
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        code = 2
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # wrong use, by an error of typer whose class no version exports
            raise
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        if "\n" in message:  # the help, for want of a command
            print(message, file=sys.stderr)
        else:
            context = getattr(error, "ctx", None)
            complain(message + (f" ({context.command_path} --help lists what there is)" if context else ""))
        code = 2
    if code == 130:
        complain("interrupted")
    sys.exit(code)
