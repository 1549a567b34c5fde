"""The command that checks the machine: doctor. `cli.py` registers it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .doctor import Finding

STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(doctor)


def doctor(
    results: Annotated[Path, typer.Option("--results", metavar="FOLDER", help="Where the ceilings go.")] = Path(
        "results"
    ),
) -> None:
    """Check this machine and measure its ceilings.

    Says of everything that runs need whether it works, and what to do where it does not. What matrix products and
    copies reach is kept in the machine's machine.json. Exit code 1 if a check fails.
    """
    from . import doctor as checkup
    from . import machine
    from .data import prepared

    console = Console(markup=False, highlight=False)
    place = checkup.Place(machine=machine.describe(), results=results, data=prepared.default_root())
    states = set()
    for check in checkup.CHECKS:
        with console.status(check.__name__):
            finding = checkup.examine(check, place)
        show(finding, console)
        states.add(finding.state)
    if "fail" in states:
        raise typer.Exit(1)


def show(finding: "Finding", console: Console) -> None:
    """One line, never broken, in a pipe; in a terminal its text is broken under itself, and the advice has its own."""
    if not console.is_terminal:
        advice = f" → {finding.advice}" if finding.advice else ""
        line = f"{finding.state:4}  {finding.name:9}  {finding.found}{advice}"
        console.print(line, soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=4, style=STYLES[finding.state])
    grid.add_column(width=9)
    grid.add_column(overflow="fold")
    advice = f"\n→ {finding.advice}" if finding.advice else ""
    grid.add_row(finding.state, finding.name, finding.found + advice)
    console.print(grid)
