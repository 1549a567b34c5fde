"""The command that plans measurements on other machines: fleet plan. `cli.py` registers it."""

from pathlib import Path
from typing import Annotated

import typer

from . import fleet
from .record import write_atomically

fleet_app = typer.Typer(
    help="Measure machines that are elsewhere.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.add_typer(fleet_app, name="fleet")


@fleet_app.callback()
def fleets() -> None:
    """Measure machines that are elsewhere."""


@fleet_app.command()
def plan(
    accelerators: Annotated[
        str, typer.Option("--accelerators", metavar="LIST", help=f"Of {', '.join(fleet.ACCELERATORS)}, by commas.")
    ] = ",".join(fleet.ACCELERATORS),
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the files go.")] = Path("fleet"),
) -> None:
    """Write what SkyPilot and Slurm need to measure a fleet of GPUs.

    A SkyPilot task for each kind of GPU, with a script that runs them all, and a script that submits a Slurm array by
    submitit. Nothing is rented or submitted.
    """
    from .workloads import names

    files = fleet.plan(accelerators.split(","), names())
    for name, content in files.items():
        write_atomically(out / name, content.encode())
    typer.echo(f"{len(files)} files in {out}. Next, from the top of Netdyno's sources:")
    typer.echo(f"  bash {out}/sky.sh                  on rented machines, by SkyPilot")
    typer.echo(f"  .venv/bin/python {out}/slurm.py    on a cluster, by Slurm and submitit")
