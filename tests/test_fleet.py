"""A fleet's files: what they ask for, and, by stand-ins for `sky`, `scp` and `sbatch`, that records come back.

SkyPilot and submitit are no part of Netdyno; where they are installed their own loaders read the files too.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_up_fleet import T4, fleet, write

from netdyno.bench import collect
from netdyno.bench.errors import UserError
from netdyno.bench.fleet import ACCELERATORS, plan
from netdyno.bench.tuning import TUNINGS

WORKLOADS = ("mnist-cnn", "dcgan")


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the top of the sources, and a `bin` that is looked into first."""
    program(tmp_path / ".venv/bin/netdyno", f'exec {sys.executable} -m netdyno.bench "$@"')
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/fleet.py").touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path


def written(folder: Path, *accelerators: str) -> Path:
    folder.mkdir()
    for name, content in plan(accelerators, WORKLOADS).items():
        (folder / name).write_text(content)
    return folder


def calls(sources: Path) -> list[str]:
    return (sources / "calls").read_text().splitlines()


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_a_task_rents_one_card_for_as_long_as_it_is_used(accelerator: str) -> None:
    card = accelerator.lower()
    task = yaml.safe_load(plan([accelerator], WORKLOADS)[f"{card}.sky.yaml"])
    assert (task["name"], task["workdir"]) == (f"netdyno-{card}", ".")
    assert task["resources"] == {
        "accelerators": f"{accelerator}:1",
        "any_of": [{"use_spot": True}, {"use_spot": False}],
        "autostop": {"idle_minutes": 30, "down": True},
    }
    assert "make setup" in task["setup"].splitlines()
    assert task["run"].splitlines() == [
        ".venv/bin/netdyno doctor --results results/local/fleet",
        ".venv/bin/netdyno run --suite full --tuning tuned --resume --results results/local/fleet",
        ".venv/bin/netdyno run --suite full --tuning eager --resume --results results/local/fleet",
        f".venv/bin/netdyno pack --results results/local/fleet -o ~/{card}.netdyno.zip",
    ]


def test_tuned_is_the_policy_of_a_t4_on_a_t4() -> None:
    t4 = TUNINGS["t4"](None)
    assert replace(t4, name="tuned", needs_gpu=False, memory_limit_mib=None) == TUNINGS["tuned"]((7, 5))
    assert (t4.precision, t4.memory_limit_mib) == ("fp16", 14 * 1024)


def test_only_what_was_asked_for_is_planned() -> None:
    assert [*plan(["t4", " H100", "T4"], WORKLOADS)] == ["t4.sky.yaml", "h100.sky.yaml", "sky.sh", "slurm.py"]
    for wrong in ("K80", "", "T4:8", "../T4"):
        with pytest.raises(UserError, match=r"known are T4, L4, A10G, A100, H100, H200"):
            plan(["T4", wrong], WORKLOADS)


def test_every_shell_can_be_parsed() -> None:
    files = plan(ACCELERATORS, WORKLOADS)
    tasks = [yaml.safe_load(text) for name, text in files.items() if name.endswith(".yaml")]
    assert len(tasks) == len(ACCELERATORS)
    for script in (files["sky.sh"], *(task[part] for task in tasks for part in ("setup", "run"))):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


# what comes back, by stand-ins


def test_rented_machines_come_back_as_records(sources: Path) -> None:
    (sources / "there").mkdir()
    collect.pack(write(fleet(1), sources / "their-results"), T4["slug"], sources / "there/t4.netdyno.zip")
    program(sources / "bin/sky", 'echo "sky $*" >> "$CALLS"')
    program(sources / "bin/scp", 'echo "scp $*" >> "$CALLS"; cp "there/${1#*:}" "$2"')
    written(sources / "my fleet", "T4", "L4")
    done = subprocess.run(["bash", "my fleet/sky.sh"], cwd=sources, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "l4: no pack, or not ended: see my fleet/l4.log\n")
    assert "12 records of tesla-t4-xeon-2c added" in done.stdout
    assert len([*(sources / "results").glob("*/*/*.json")]) == 12
    assert sorted(calls(sources)) == [
        "scp netdyno-l4:l4.netdyno.zip my fleet/l4.part",
        "scp netdyno-t4:t4.netdyno.zip my fleet/t4.part",
        "sky down --yes netdyno-t4",  # l4, whose pack did not come, stays for a while
        "sky launch --yes --cluster netdyno-l4 my fleet/l4.sky.yaml",
        "sky launch --yes --cluster netdyno-t4 my fleet/t4.sky.yaml",
    ]
    (sources / "calls").unlink()
    subprocess.run(["bash", "my fleet/sky.sh"], cwd=sources, capture_output=True, check=True)
    assert [call for call in calls(sources) if "t4" in call] == []  # it is here already
    assert len(calls(sources)) == 2


def test_nothing_is_rented_from_elsewhere(sources: Path) -> None:
    program(sources / "bin/sky", 'echo "sky $*" >> "$CALLS"')
    folder = written(sources / "fleet", "T4")
    (sources / "bench/fleet.py").unlink()
    done = subprocess.run(["bash", folder / "sky.sh"], cwd=sources, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "run this from the top of Netdyno's sources\n")
    assert not (sources / "calls").exists()


# A Slurm of one node: an array's tasks run one after the other as soon as submitit has put their orders in place.
SBATCH = r"""
script=$1
number=$(( $(ls "$CALLS".sbatch.* 2>/dev/null | wc -l) + 1 ))
cp "$script" "$CALLS.sbatch.$number"
echo "Submitted batch job $number"
last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$script")
copy=$CALLS.sbatch.$number
(
  export SLURM_ARRAY_JOB_ID=$number SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
  for task in $(seq 0 "$last"); do
    until ls "$(dirname "$script")/${number}_${task}_submitted.pkl" 2>/dev/null; do sleep 0.05; done
    SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=$number bash "$copy"
  done
) >/dev/null 2>&1 &
"""
SRUN = r"""
while [[ $1 == --* ]]; do
  [[ $1 == --output || $1 == --error ]] && shift
  shift
done
exec "$@"
"""
NETDYNO = r"""
echo "netdyno $*" >> "$CALLS"
[ "$1" != pack ] || touch "${@: -1}"
"""


def test_submitit_submits_an_array_a_card_and_its_packs_are_merged(sources: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed: pip install submitit")
    program(sources / "bin/sbatch", SBATCH)
    program(sources / "bin/srun", SRUN)
    program(sources / "bin/sacct", "echo 'JobID|State'")
    program(sources / "bin/make", 'echo "make $*" >> "$CALLS"')
    program(sources / ".venv/bin/netdyno", NETDYNO)
    folder = written(sources / "my fleet", "T4", "A100")
    done = subprocess.run(
        [sys.executable, folder / "slurm.py"], cwd=sources, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for number, card in enumerate(("t4", "a100"), 1):
        asked = re.findall(r"^#SBATCH --(\S+)=(.*)$", (sources / f"calls.sbatch.{number}").read_text(), re.MULTILINE)
        wanted = {"array": "0-1%2", "gres": f"gpu:{card}:1", "job-name": f"netdyno-{card}", "time": "240"}
        assert {name: value for name, value in asked if name in wanted} == wanted
    lines = calls(sources)
    assert lines[:2] == ["make setup", "netdyno data fetch"]
    packs = []
    for card in ("t4", "a100"):
        for workload in WORKLOADS:
            place = f"{folder}/{card}-{workload}"
            packs.append(f"{place}.netdyno.zip")
            measured = lines.index(f"netdyno run {workload} --suite full --tuning tuned --resume --results {place}")
            assert measured < lines.index(f"netdyno pack --results {place} -o {packs[-1]}")
    assert lines[-1] == f"netdyno merge {' '.join(sorted(packs))}"


# by SkyPilot's own loader


@pytest.mark.filterwarnings("ignore")  # of what SkyPilot imports
@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_skypilot_reads_a_task_as_it_is_meant(
    accelerator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sky: Any = pytest.importorskip("sky", reason="SkyPilot is not installed: pip install skypilot")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "task.yaml"
    path.write_text(plan([accelerator], WORKLOADS)[f"{accelerator.lower()}.sky.yaml"])
    task = sky.Task.from_yaml(str(path))
    found = [*task.resources]
    assert [one.accelerators for one in found] == [{accelerator: 1}] * 2
    assert {one.use_spot for one in found} == {True, False}
    assert {(one.autostop_config.idle_minutes, one.autostop_config.down) for one in found} == {(30, True)}
    path.write_text(path.read_text().replace("use_spot", "use_sport"))
    with pytest.raises(ValueError, match="use_sport"):
        sky.Task.from_yaml(str(path))
