"""The commands that show and collect records: report, pack, merge and import-benchmarks. `cli.py` registers them."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import collect
from .record import write_atomically

ResultsOption = Annotated[Path, typer.Option("--results", metavar="FOLDER", help="Where the records are.")]


class ReportFormat(str, Enum):
    html = "html"
    md = "md"
    csv = "csv"
    parquet = "parquet"


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (report, pack, merge, import_benchmarks):
        app.command()(command)


def report(
    results: Annotated[
        list[Path] | None, typer.Argument(metavar="RESULTS", help="Folders of records.  [default: results]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="[default: report, with the format's ending]")
    ] = None,
    format: Annotated[
        ReportFormat, typer.Option("--format", metavar="FORMAT", help="html, md, csv or parquet.")
    ] = ReportFormat.html,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MACHINE", help="What others are compared with.  [default: the GPU of most cases]"
        ),
    ] = None,
    prices: Annotated[
        Path | None, typer.Option("--prices", metavar="FILE", help="A CSV file with the columns machine,usd_per_hour.")
    ] = None,
) -> None:
    """Compare machines in one page, from their records.

    Exit code 1 if a file among them is not shown, which the page says too.
    """
    from .report import export, html, load, markdown, sections

    found, problems = load.find(results or [Path("results")])
    out = output or Path(f"report.{format.value}")
    if format in (ReportFormat.html, ReportFormat.md):
        page = sections.page(found, problems, load.read_prices(prices) if prices else None, base)
        if format is ReportFormat.html:
            write_atomically(out, html.to_html(page).encode())
        else:
            markdown.write_markdown(page, out)
    else:
        write_atomically(out, export.to_csv(found) if format is ReportFormat.csv else export.to_parquet(found))
    for problem in problems:
        typer.echo(f"netdyno: not shown: {problem}", err=True)
    typer.echo(f"{len(found):,} records in {out}")
    if problems:
        raise typer.Exit(1)


def pack(
    machine: Annotated[
        str | None, typer.Option("--machine", metavar="NAME", help="Whose records.  [default: the only machine there]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="[default: named after the machine]")
    ] = None,
    results: ResultsOption = Path("results"),
) -> None:
    """Put the records of a machine into one file."""
    packed = collect.pack(results, machine, output)
    for line in packed.left_out:
        typer.echo(f"left out: {line}", err=True)
    typer.echo(f"{packed.records:,} records and {packed.pictures:,} pictures in {packed.file}")


def merge(
    packs: Annotated[list[Path], typer.Argument(metavar="PACK", help="Files made by netdyno pack.")],
    results: ResultsOption = Path("results"),
) -> None:
    """Check packs from elsewhere and add their records."""
    for merged in collect.merge(packs, results):
        names = ", ".join(merged.machines)
        typer.echo(f"{merged.pack}: {merged.added:,} records of {names} added, {merged.known:,} were there already")


def import_benchmarks(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What pytest --benchmark-json=FILE wrote.")],
    results: ResultsOption = Path("results"),
) -> None:
    """Make records of a report of pytest-benchmark."""
    from . import imported

    typer.echo(f"{len(imported.import_benchmarks(file, results)):,} records written to {results}")
