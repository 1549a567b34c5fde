"""What other machines are told to do: SkyPilot tasks for rented ones, and a submitit script for a Slurm cluster.

Both install the project, measure the same suite, pack the records and bring the packs back to `netdyno merge`. The
files are text to be read, and changed, before they are run: nothing is rented here. No torch in here.

Sources: SkyPilot's page "SkyPilot YAML" for the fields of a task; submitit's README for its executors.
"""

from collections.abc import Sequence

from .errors import UserError

ACCELERATORS = ("T4", "L4", "A10G", "A100", "H100", "H200")  # as SkyPilot calls them; its A100 is the one of 40 GB
IDLE_MINUTES = 30  # after which a rented machine ends itself: time to fetch its pack where `sky.sh` was cut off
SLURM_MINUTES = 240  # for one workload, tuned and eager; a T4 takes the longest

TASK = """\
# Written by netdyno fleet plan. Run by sky.sh, or alone, from the top of Netdyno's sources:
#   sky launch --cluster netdyno-{card} {card}.sky.yaml
name: netdyno-{card}
workdir: .
resources:
  accelerators: {accelerator}:1
  any_of:  # the cheapest that is to be had
    - use_spot: true
    - use_spot: false
  autostop:
    idle_minutes: {idle_minutes}
    down: true
setup: |
  set -e
  nvidia-smi
  if ! command -v make || ! python3 -c 'import ensurepip, venv'; then
    sudo apt-get update
    sudo apt-get install -y make python3-venv
  fi
  make setup
  .venv/bin/netdyno data fetch || echo "drawn stand-ins take the place of what is missing"
run: |
  {suite}
"""

SKY = """\
#!/usr/bin/env bash
# Written by netdyno fleet plan. Needs SkyPilot; run it from the top of Netdyno's sources, which go to the machines.
# Rents a machine for each card that has no pack here yet, side by side, measures it, fetches its pack and ends it; then
# merges all packs into results/.
set -uo pipefail
here=$(dirname "$0")
[ -f bench/fleet.py ] || {{ echo "run this from the top of Netdyno's sources" >&2; exit 2; }}

measure() {{
  sky launch --yes --cluster "netdyno-$1" "$here/$1.sky.yaml"
  # under another name until it is whole, since a pack that is there is not made again
  scp "netdyno-$1:$1.netdyno.zip" "$here/$1.part" && mv "$here/$1.part" "$here/$1.netdyno.zip" || return
  sky down --yes "netdyno-$1"
}}

for card in {cards}; do
  [ -e "$here/$card.netdyno.zip" ] && continue
  {{ measure "$card" > "$here/$card.log" 2>&1 || echo "$card: no pack, or not ended: see $here/$card.log" >&2; }} &
done
wait
.venv/bin/netdyno merge "$here"/*.netdyno.zip
"""

SLURM = '''\
"""Written by netdyno fleet plan. Run it on a login node, at the top of Netdyno's sources, with their .venv/bin/python.

Needs submitit, and a file system that the nodes share. Submits an array for each kind of GPU, with a task for each
workload, waits for all of them, and merges their packs into results/. What else your cluster asks for it takes from
sbatch's own variables, such as SBATCH_PARTITION and SBATCH_ACCOUNT.
"""

import subprocess
import sys
from pathlib import Path

import submitit

HERE = Path(__file__).resolve().parent
CARDS = {cards}  # as the cluster calls them: sinfo -o %G
WORKLOADS = {workloads}
SUITE = """
{suite}
"""

subprocess.run(["make", "setup"], check=True)
subprocess.run([".venv/bin/netdyno", "data", "fetch"])  # drawn stand-ins take the place of what is missing

jobs = []
for card in CARDS:
    executor = submitit.AutoExecutor(folder=HERE / "slurm", cluster="slurm")
    executor.update_parameters(
        name=f"netdyno-{{card}}", timeout_min={minutes}, cpus_per_task=8, slurm_gres=f"gpu:{{card}}:1"
    )
    with executor.batch():
        for workload in WORKLOADS:
            place = HERE / f"{{card}}-{{workload}}"
            words = ["bash", "-c", SUITE, "netdyno", workload, str(place), f"{{place}}.netdyno.zip"]
            jobs.append(executor.submit(submitit.helpers.CommandFunction(words)))
for job in jobs:
    if error := job.exception():
        print(f"{{job.job_id}}: {{error}}", file=sys.stderr)
packs = sorted(HERE.glob("*.netdyno.zip"))
sys.exit(subprocess.run([".venv/bin/netdyno", "merge", *packs]).returncode)
'''


def plan(accelerators: Sequence[str], workloads: Sequence[str]) -> dict[str, str]:
    """The files of a fleet, by their names: a `<card>.sky.yaml` each, `sky.sh` and `slurm.py`.

    UserError for an accelerator that is none of `ACCELERATORS`.
    """
    chosen = [name.strip().upper() for name in accelerators]
    if unknown := [name for name in chosen if name not in ACCELERATORS]:
        raise UserError(f"unknown accelerator {unknown[0]!r}; known are {', '.join(ACCELERATORS)}")
    cards = {name.lower(): name for name in chosen}
    files = {
        f"{card}.sky.yaml": TASK.format(
            card=card,
            accelerator=name,
            idle_minutes=IDLE_MINUTES,
            suite="\n  ".join(suite("", "results/local/fleet", f"~/{card}.netdyno.zip")),
        )
        for card, name in cards.items()
    }
    files["sky.sh"] = SKY.format(cards=" ".join(cards))
    files["slurm.py"] = SLURM.format(
        cards=repr((*cards,)),
        workloads=repr((*workloads,)),
        suite="\n".join(suite('"$1"', '"$2"', '"$3"')),
        minutes=SLURM_MINUTES,
    )
    return files


def suite(workload: str, results: str, pack: str) -> list[str]:
    """The lines of a shell that measure a machine: its ceilings, then tuned before eager, for that takes the longest.

    A case that fails leaves a record that says so, and the pack is made all the same.
    """
    run = " ".join(["run", *([workload] if workload else []), "--suite full --tuning {} --resume --results", results])
    commands = [f"doctor --results {results}", run.format("tuned"), run.format("eager")]
    return [f".venv/bin/netdyno {command}" for command in [*commands, f"pack --results {results} -o {pack}"]]
