"""Shows that nothing grows in a long run, and writes it into docs/reliability.md.

    python tests/long_runs.py "mnist-cnn tuned loader quick" --cases 300    # one after the other
    python tests/long_runs.py "mnist-99 tuned e2e open" --seeds 200         # in one process

After each case the process that starts them is looked at, after each seed the process that trains. Compared are the
medians of the second tenth and of the last: the first holds what is taken once. What one run showed is kept in
--folder, so that runs on several machines stand in one table.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from netdyno.bench import machine, runner
from netdyno.bench.ab import parse_case
from netdyno.bench.data.prepared import default_root
from netdyno.bench.gpu import Gpu
from netdyno.bench.table import aligned, replace_section
from netdyno.bench.workloads import Case

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
GROWTH = 0.02  # of memory, that may be chance


@dataclass(frozen=True, kw_only=True)
class State:
    """What a process holds."""

    host_mib: float
    gpu_mib: float  # 0 without a GPU
    files: int
    processes: int  # its children's children too


def state_of(process: psutil.Process) -> State:
    with Gpu.open() as gpu:
        gpu_mib = 0.0 if gpu is None else gpu.process_memory_mib(process.pid) or 0.0
    return State(
        host_mib=process.memory_info().rss / 2**20,
        gpu_mib=gpu_mib,
        files=process.num_fds(),
        processes=len(process.children(recursive=True)),
    )


def watch_cases(case: Case, count: int) -> list[State]:
    """The state of this process after each of `count` cases."""
    here, me = machine.describe(), psutil.Process()
    states = []
    with tempfile.TemporaryDirectory() as results:
        for number in range(count):
            done = runner.run(case, data=default_root(), results=Path(results), machine=here, listen=lambda event: None)
            assert done["status"] == "ok", done["reason"]
            states.append(state_of(me))
            print(f"{number + 1}/{count} {states[-1]}", flush=True)
    return states


def watch_seeds(case: Case) -> list[State]:
    """The state of the process that trains, after each of its seeds."""
    here, me = machine.describe(), psutil.Process()
    states: list[State] = []

    def hear(event: dict[str, Any]) -> None:
        if "metric" in event.get("progress", {}):
            (child,) = me.children()
            states.append(state_of(child))
            print(f"{len(states)}/{case.seeds} {states[-1]}", flush=True)

    with tempfile.TemporaryDirectory() as results:
        done = runner.run(case, data=default_root(), results=Path(results), machine=here, listen=hear)
    assert done["status"] == "ok", done["reason"]
    return states


def row_of(what: str, states: list[State]) -> dict[str, Any]:
    """The medians of the second tenth and of the last, and whether anything grew. ValueError for fewer than 20."""
    if len(states) < 20:
        raise ValueError(f"{len(states)} states, of which no tenth tells anything")
    tenth = len(states) // 10
    early, late = states[tenth : 2 * tenth], states[-tenth:]
    values = {
        name: [statistics.median(getattr(one, name) for one in part) for part in (early, late)]
        for name in asdict(states[0])
    }
    grew = [
        name
        for name, (before, after) in values.items()
        if after > before * (1 + GROWTH if name.endswith("_mib") else 1)
    ]
    here = machine.describe()
    return {"machine": here["gpu"] or here["cpu"], "what": what, "count": len(states), "grew": grew, **values}


def write_page(folder: Path, page: Path = PAGE) -> int:
    """The table of all that the folder holds; 0 where nothing grew."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]

    def cell(row: dict[str, Any], name: str) -> str:
        return " → ".join(f"{value:,.0f}" for value in row[name])

    names = ("host_mib", "gpu_mib", "files", "processes")
    lines = [
        (row["machine"], row["what"], *(cell(row, name) for name in names), ", ".join(row["grew"]) or "nothing")
        for row in rows
    ]
    headers = ("machine", "run", "host, MiB", "GPU, MiB", "open files", "child processes", "grew")
    table = aligned(headers, [False, False, True, True, True, True, False], lines)
    page.write_text(replace_section(page.read_text(encoding="utf-8"), "long", table), encoding="utf-8")
    return 1 if any(row["grew"] for row in rows) else 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("--cases", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("results/local/long"))
    options = parser.parse_args()
    workload, tuning, mode, suite = parse_case(options.case)
    case = Case(workload=workload, suite=suite, tuning=tuning, mode=mode, seeds=options.seeds)  # type: ignore[arg-type]
    if options.seeds > 1:
        what, states = f"{options.case}: {options.seeds} seeds in one process", watch_seeds(case)
    else:
        what, states = f"{options.case}: {options.cases} cases in a row", watch_cases(case, options.cases)
    row = row_of(what, states)
    options.folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", f"{row['machine']} {what}".lower())
    (options.folder / f"{name}.json").write_text(json.dumps(row))
    return write_page(options.folder)


if __name__ == "__main__":
    sys.exit(main())
