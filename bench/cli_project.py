"""The command that speaks of cards that are not here: project. `cli.py` registers it."""

from enum import Enum
from typing import Annotated

import typer

from .cards import CARDS

Gpu = Enum("Gpu", {name: name for name in CARDS}, type=str)  # type: ignore[misc]  # mypy wants the names spelled out

T4 = Gpu("t4")


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(project)


def project(
    workloads: Annotated[list[str] | None, typer.Argument(metavar="WORKLOAD", help="[default: all six]")] = None,
    gpu: Annotated[Gpu, typer.Option("--gpu", metavar="GPU", help=f"{', '.join(CARDS)}.")] = T4,
) -> None:
    """Project speed and memory on a GPU that is not here.

    Counted from the networks and from what such a card sustains. A second table shows how far off the same method is
    where others have published a figure.
    """
    from . import projected
    from .workloads import find, names

    chosen = [find(name) for name in workloads or names()]
    typer.echo(f"{projected.speeds(CARDS[gpu.value], chosen)}\n\n{projected.errors()}")
