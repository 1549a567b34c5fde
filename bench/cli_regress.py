"""The commands that judge records: compare, gate, baseline update, ab, bisect and history. `cli.py` registers them.

None of them imports torch: what is run for `ab` and `bisect` runs in processes of its own.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import ab as contests
from . import gate as gates
from . import regress, verdicts
from .errors import UserError
from .record import check_writable, write_atomically

Results = Annotated[Path, typer.Option("--results", metavar="FOLDER", help="Where records and baselines are.")]
New = Annotated[str, typer.Argument(metavar="NEW", help="A record, a folder of records, or a git commit.")]
Pairs = Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Pairs of runs at most.")]
Minutes = Annotated[float, typer.Option("--budget", metavar="MINUTES", min=0, help="After which no new pair starts.")]
Kept = Annotated[Path, typer.Option("--results", metavar="FOLDER", help="Where the records go.")]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="FOLDER", help="Where the image sets are.  [default: $NETDYNO_DATA, else the user's cache]"
    ),
]
Case = Annotated[str, typer.Argument(metavar="CASE", help="Such as mnist-cnn, or 'mnist-cnn tuned e2e quick'.")]

baseline_app = typer.Typer(
    help="Make records the baseline.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (compare, gate, ab, bisect, history):
        app.command()(command)
    app.add_typer(baseline_app, name="baseline")


def compare(
    old: Annotated[str, typer.Argument(metavar="OLD", help="A record, a folder of records, or a git commit.")],
    new: New,
    results: Results = Path("results"),
) -> None:
    """Say what changed between two sets of records.

    Exit code 0 whatever it finds; netdyno gate is for scripts.
    """
    comparison = regress.compare(gates.read_records(old, results), gates.read_records(new, results))
    sys.stdout.write(verdicts.to_text(comparison))


def gate(
    new: New,
    results: Results = Path("results"),
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="All verdicts, unrounded.")] = None,
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="A test case for each verdict.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="A table for a comment.")] = None,
) -> None:
    """Judge new records by the baseline, by exit code.

    0: same or improved. 1: a regression, or a case is missing. 2: wrong usage. 3: ambiguous, or not comparable.
    """
    comparison = gates.gate(gates.read_records(new, results), results)
    writers = ((json, verdicts.to_json), (junit, verdicts.to_junit), (markdown, verdicts.to_markdown))
    for path, write in writers:
        if path is not None:
            write_atomically(path, write(comparison).encode())
    sys.stdout.write(verdicts.to_text(comparison))
    raise typer.Exit(gates.exit_code(comparison))


@baseline_app.callback()
def baseline() -> None:
    """Make records the baseline."""


@baseline_app.command()
def update(
    new: New,
    results: Results = Path("results"),
    drop: Annotated[bool, typer.Option("--drop", help="Drop cases that NEW lacks from the baseline.")] = False,
) -> None:
    """Make the newest runs of each case in NEW the baseline.

    Shows how far each quantity has come since every earlier baseline; what got worse than its margin is marked "!".
    """
    paths, drifts = gates.update(gates.read_records(new, results), results, drop=drop)
    if drifts:
        say(verdicts.drift_text(drifts))
    for path in paths:
        say(f"baseline written to {path}")


def ab(
    ref_a: Annotated[str, typer.Argument(metavar="REF_A", help="The old commit.")],
    ref_b: Annotated[str, typer.Argument(metavar="REF_B", help="The new commit.")],
    case: Case,
    repeats: Pairs = 24,
    budget: Minutes = 60.0,
    results: Kept = Path("results/local/ab"),
    data: Data = None,
) -> None:
    """Run two commits in turn until the better one is clear.

    Exit codes are those of the gate.
    """
    comparison = contests.ab(ref_a, ref_b, contest(case, repeats, budget, results, data), say)
    sys.stdout.write(verdicts.to_text(comparison))
    raise typer.Exit(gates.exit_code(comparison))


def bisect(
    good: Annotated[str, typer.Argument(metavar="GOOD", help="A commit before the regression.")],
    bad: Annotated[str, typer.Argument(metavar="BAD", help="A commit that has it.")],
    case: Case,
    repeats: Pairs = 24,
    budget: Annotated[
        float,
        typer.Option("--budget", metavar="MINUTES", min=0, help="For each commit, after which no new pair starts."),
    ] = 60.0,
    results: Kept = Path("results/local/ab"),
    data: Data = None,
) -> None:
    """Find the commit that made a case worse, by bisection."""
    found = contests.bisect(good, bad, contest(case, repeats, budget, results, data), say)
    if found.commit is None:
        say(f"not found: the commits that are left can't be measured\n{found.log.rstrip()}")
        raise typer.Exit(gates.UNDECIDED)
    say(f"first bad commit  {found.commit}")


def contest(case: str, repeats: int, budget: float, results: Path, data: Path | None) -> contests.Contest:
    workload, tuning, mode, suite = contests.parse_case(case)
    check_writable(results)
    return contests.Contest(
        workload=workload,
        tuning=tuning,
        mode=mode,
        suite=suite,
        repeats=repeats,
        budget_s=60 * budget,
        results=results,
        data=data,
    )


def history(
    case: Case,
    results: Results = Path("results"),
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw it, as SVG, PNG or PDF by its name.")
    ] = None,
) -> None:
    """Show where the level of a case changed, by commit."""
    from . import history as histories

    found = histories.series_of(gates.read_records(str(results), results), case)
    if not found:
        raise UserError(f"no record in {results} is of case {case!r}; netdyno table shows what is there")
    steps = [histories.steps(series) for series in found]
    codes = {str(record.get("code")) for own in steps for step in own for record in (step.last, step.first)}
    commits = histories.commits_of(codes, Path()) if codes else {}
    for number, (series, own) in enumerate(zip(found, steps, strict=True)):
        causes = [histories.cause(step, commits, Path()) for step in own]
        sys.stdout.write(verdicts.history_text(series, own, causes))
        if plot is not None:
            path = plot if len(found) == 1 else plot.with_stem(f"{plot.stem}-{number + 1}")
            histories.save(histories.plot(series, own, causes), path)
            say(f"plot written to {path}")


def say(line: str) -> None:
    print(line, flush=True)
