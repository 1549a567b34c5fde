"""Gates against slowdowns that are really there: extra work in every training step, not edited numbers.

    python tests/planted.py "mnist-cnn eager compute quick" --percent 5 --gates 10

makes one baseline of this tree's code, then gates by turns new runs of the same code, which must pass (exit code 0),
and runs of a copy whose step does PERCENT more work on the device (matrix products on a CPU, a spin kernel on a GPU),
which must fail (exit code 1). Exit code 0 when all of them do. Started again, it goes on where it was stopped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from netdyno.bench import gate, machine
from netdyno.bench.ab import Checkout, Contest, environment, parse_case, run_side
from netdyno.bench.record import Record
from netdyno.bench.regress import sides, step_s
from netdyno.bench.runner import COLD, child_environment
from netdyno.bench.stats import median

ROOT = Path(__file__).parents[1]
# What is appended to bench/step.py, so that the work is part of each step of one batch, captured with it.
EXTRA = """

from .spin import spin


def _planted(make):
    def make_planted(workload, network, tuning, device, steps):
        step, players = make(workload, network, tuning, device, steps)

        def planted(images, labels):
            {plant}
            return step(images, labels)

        return planted, players

    return make_planted


_plain_step, _adversarial_step = _planted(_plain_step), _planted(_adversarial_step)
"""
SPIN = "spin({units}, device)"
HOARD = "hoard = torch.empty({units} << 20, dtype=torch.uint8, device=device)"
Planted = Mapping[str, str]  # by the name of a file of bench/, what is appended to it


def in_each_step(work: str) -> Planted:
    """`SPIN` or `HOARD`, filled in, in each step."""
    return {"step.py": EXTRA.replace("{plant}", work)}


def copy(folder: Path, cache: Path, planted: Planted | None = None, *, compiled_like: Path | None = None) -> Checkout:
    """This tree's code in a folder of its own, with what is planted into it.

    compiled_like: the cache of the copy whose compiled code it starts from: the compiler tries configurations out and
    picks by the clock, so that two compilations of the same code may differ by a percent, which is no effect of what
    was planted. What is there already stays: an interrupted experiment goes on with the same code.
    """
    tree, packages = folder / "tree", folder / "packages"
    if not packages.exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)
        for name in ("bench", "kernels", "models"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "tests" / "spin.py", tree / "bench")  # for what is planted into steps
        for name, text in (planted or {}).items():
            with (tree / "bench" / name).open("a") as file:
                file.write(text)
        unfinished = folder / "unfinished"
        unfinished.mkdir()
        (unfinished / "netdyno").symlink_to(tree)
        if compiled_like is not None and compiled_like.exists():
            shutil.copytree(compiled_like, cache)
            say = [sys.executable, "-c", "from netdyno.bench.record import code_hash; print(code_hash())"]
            code = subprocess.run(say, env=environment(unfinished, cache), capture_output=True, text=True, check=True)
            for kept in cache.rglob(COLD):
                kept.write_text(json.dumps(json.loads(kept.read_text()) | {"code": code.stdout.strip()}))
        unfinished.rename(packages)
    return Checkout(commit="this tree", tree=tree, environment=environment(packages, cache))


def units_for(seconds: float, *, on_cpu: bool) -> int:
    """How many units of `SPIN` take so long on this machine, found in a process like those that are measured."""
    command = [sys.executable, str(ROOT / "tests" / "spin.py"), str(seconds)]
    environment = child_environment(on_cpu=on_cpu)
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def fill(side: Checkout, contest: Contest, folder: Path, runs: int) -> None:
    """Fresh processes until the folder holds so many records; a run that was cut off with the experiment is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*/*/*.json"):
        if json.loads(path.read_text())["status"] == "killed":
            path.unlink()
    missing = runs - len(records_in(folder))
    if missing > 0:
        print(f"{folder}: {missing} of {runs} runs", flush=True)
        run_side(side, contest, seed=0, results=folder, repeats=missing)


def records_in(folder: Path) -> list[Record]:
    return gate.read_records(str(folder), folder)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("--percent", type=float, default=5.0)
    parser.add_argument("--gates", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--baseline", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("results/local/planted"))
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    workload, tuning, mode, suite = parse_case(options.case)
    contest = Contest(
        workload=workload, tuning=tuning, mode=mode, suite=suite, repeats=0, budget_s=0, results=folder, data=None
    )

    calm = copy(folder / "copy-calm", folder / "cache-calm")
    fill(calm, contest, folder / "baseline", options.baseline)
    here = machine.describe()
    slug = here["slug"]
    if not (folder / "results" / slug / gate.NAME).exists():
        gate.update(records_in(folder / "baseline"), folder / "results")
    (side,) = sides(gate.baseline_records(folder / "results", slug)).values()
    step = median([time for run in side.runs if (time := step_s(run)) is not None])

    units = folder / f"units-{options.percent}"  # kept, as the copies are
    if not units.exists():
        units.write_text(str(units_for(step * options.percent / 100, on_cpu=here["gpu"] is None)))
    print(f"step {step:.6f} s, {units.read_text()} units of extra work for {options.percent} %", flush=True)
    slow = copy(
        folder / f"copy-slow-{options.percent}",
        folder / f"cache-slow-{options.percent}",
        in_each_step(SPIN.format(units=units.read_text())),
        compiled_like=folder / "cache-calm",
    )

    right = 0
    for number in range(options.gates):
        for name, place, expected in (("calm", calm, 0), (f"slow-{options.percent}", slow, 1)):
            new = folder / f"{name}-{number + 1}"
            fill(place, contest, new, options.repeats)
            command = [sys.executable, "-m", "netdyno.bench", "gate", str(new), "--results", str(folder / "results")]
            judged = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
            right += judged.returncode == expected
            print(f"{new.name}: exit code {judged.returncode}, expected {expected}\n{judged.stdout}", flush=True)
    print(f"{right} of {2 * options.gates} gates as expected")
    return 0 if right == 2 * options.gates else 1


if __name__ == "__main__":
    sys.exit(main())
