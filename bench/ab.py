"""Two commits against each other, in interleaved fresh processes, and the search for the commit that changed something.

Each commit is checked out into a git worktree and runs its own code there, with a compiler cache of its own. Pairs
alternate, A B, B A, A B …, so that a drift of the machine falls on both sides alike. Pair k has seed k on both sides:
speed does not depend on it, and accuracy is judged over seeds. `regress.compare` looks at most `LOOKS` times, each time
at its share of the error rate: to stop as soon as something looks significant would call a change far too often.
Where runs spread, that nothing became slower is AMBIGUOUS until there are enough of them to see 5 %.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from .errors import UserError
from .gate import FAILED, UNDECIDED, exit_code, read_records, resolve
from .regress import SPEED, Comparison, Record, Verdict, compare, repeats_needed

LOOKS = 4
# The margin of a speed that a change of 5 % is hardly ever within: an effect found has a standard deviation of 0.4
# margins, and few runs know their margin roughly.
SHARP = 0.025
MODES = ("e2e", "compute", "loader")
SUITES = ("quick", "full", "source", "ladder", "open")
MEASURED = ("bench", "kernels", "models")  # folders whose changes can change a measurement
BISECT_SKIP, BISECT_ABORT = 125, 128  # what `git bisect run` takes its command's exit code for

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What is run on both sides, and for how long."""

    workload: str
    tuning: str
    mode: str
    suite: str
    repeats: int  # pairs at most
    budget_s: float
    results: Path  # each contest makes a folder of its own in it
    data: Path | None


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """A commit in a worktree, and the environment in which `python -m netdyno.bench` is that commit's."""

    commit: str
    tree: Path
    environment: dict[str, str]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`netdyno` of that commit."""
        return self.python("-m", "netdyno.bench", *arguments)

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=self.tree, env=self.environment, capture_output=True, text=True, errors="replace", check=False
        )


def parse_case(text: str) -> tuple[str, str, str, str]:
    """Workload, tuning, mode and suite of "mnist-cnn", "mnist-cnn eager" or "mnist-cnn tuned e2e quick"."""
    workload, *others = text.split() or [""]
    words = {"tuning": "tuned", "mode": "e2e", "suite": "quick"}
    for word in others:
        words["mode" if word in MODES else "suite" if word in SUITES else "tuning"] = word
    if not workload or len(others) > 3 or workload.startswith("-") or words["tuning"].startswith("-"):
        raise UserError(f"{text!r} is no case; one is named like this: 'mnist-cnn tuned e2e quick'")
    return workload, words["tuning"], words["mode"], words["suite"]


@contextmanager
def checkout(ref: str, repository: Path) -> Iterator[Checkout]:
    """The commit of `ref` in a worktree of its own, which goes when the block ends."""
    commit = resolve(ref, repository)
    if commit is None:
        raise UserError(f"{ref} is no commit in {repository}")
    with tempfile.TemporaryDirectory(prefix="netdyno-") as scratch:
        tree, packages = Path(scratch, "tree"), Path(scratch, "packages")
        git(repository, "worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            packages.mkdir()
            (packages / "netdyno").symlink_to(tree)  # the package `netdyno` is the folders of the checkout
            yield Checkout(commit=commit, tree=tree, environment=environment(packages, Path(scratch, "cache")))
        finally:
            git(repository, "worktree", "remove", "--force", str(tree))


def environment(packages: Path, cache: Path) -> dict[str, str]:
    """With the commit's package first and its own cache, but the image sets and weights of the user's."""
    shared = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    stay = {"NETDYNO_DATA": str(shared / "netdyno" / "data"), "TORCH_HOME": str(shared / "torch")}
    path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    return stay | os.environ | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(cache), "PYTHONSAFEPATH": "1"}


def git(repository: Path, *arguments: str) -> str:
    """What git says; UserError with its own words where it fails."""
    done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"git {arguments[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def ab(ref_a: str, ref_b: str, contest: Contest, report: Report, repository: Path = Path()) -> Comparison:
    """Runs pairs until every verdict is clear, or the repeats or the time are used up.

    Records are kept in `contest.results`, in a folder of this contest. UserError where a commit can't run the case.
    """
    folder = contest.results.absolute() / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    folders = (folder / "a", folder / "b")
    end = time.monotonic() + contest.budget_s
    with checkout(ref_a, repository) as a, checkout(ref_b, repository) as b:
        for pair in range(contest.repeats):
            sides = [(a, folders[0]), (b, folders[1])]
            for side, results in sides if pair % 2 == 0 else reversed(sides):
                run_side(side, contest, seed=pair, results=results)
            comparison = judge(*(read_records(str(path), path) for path in folders))
            report(progress(comparison, pair + 1, contest.repeats))
            over = pair + 1 == contest.repeats or time.monotonic() > end
            if over or hopeless(comparison) or (pair + 1 in looks_at(comparison) and decided(comparison)):
                break
    report(f"records  {folder}")
    return comparison


def run_side(side: Checkout, contest: Contest, *, seed: int, results: Path, repeats: int = 1) -> None:
    """Fresh processes of one side, one after the other; a run that fails leaves a record that says so."""
    options = {"suite": contest.suite, "tuning": contest.tuning, "mode": contest.mode, "results": results}
    options |= {"seed": seed, "repeats": repeats}
    if contest.data is not None:
        options["data"] = contest.data.absolute()
    done = side.run(
        "run", contest.workload, *(part for name, value in options.items() for part in (f"--{name}", str(value)))
    )
    if done.returncode not in (0, 1) or not results.is_dir():
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"commit {side.commit[:12]} cannot run {contest.workload}: {last.removeprefix('netdyno: ')}")


def judge(a: Iterable[Record], b: Iterable[Record]) -> Comparison:
    """`compare` for one of `LOOKS` looks at runs that take turns, and what might be missed besides.

    That a speed is the same is AMBIGUOUS where 5 % might not have been seen, unless something became worse anyway.
    """
    comparison = compare(a, b, by_turns=True, looks=LOOKS)
    if comparison.called("REGRESSION"):
        return comparison
    return replace(comparison, verdicts=tuple(_unless_blunt(row) for row in comparison.verdicts))


def _unless_blunt(row: Verdict) -> Verdict:
    if row.verdict != "SAME" or row.quantity not in SPEED or row.margin is None or row.margin <= SHARP:
        return row
    pairs = math.ceil(row.new_runs * (row.margin / SHARP) ** 2)
    reason = f"{row.reason}, but 5 % might not have been seen: that takes about {pairs} pairs"
    return replace(row, verdict="AMBIGUOUS", reason=reason)


def looks_at(comparison: Comparison) -> list[int]:
    """After how many pairs the verdicts are looked at, the last look apart: it is where repeats or time end."""
    levels = [verdict.level for verdict in comparison.verdicts if verdict.level is not None]
    first = repeats_needed(min(levels, default=1.0))
    return [first, first + first // 2, 2 * first][: LOOKS - 1]


def decided(comparison: Comparison) -> bool:
    return not comparison.called("AMBIGUOUS")


def hopeless(comparison: Comparison) -> bool:
    """Whether no further run can change the outcome: nothing to compare, or runs that fail."""
    return any(verdict.quantity == "case" for verdict in comparison.verdicts)


def progress(comparison: Comparison, pair: int, pairs: int) -> str:
    rows = {verdict.quantity: verdict for verdict in comparison.verdicts}
    row = rows.get("throughput")
    if row is None or row.old is None or row.new is None:
        return f"[{pair}/{pairs}] no throughput on both sides"
    return f"[{pair}/{pairs}] A {row.old:,.0f}  B {row.new:,.0f} images/s"


# Bisection


@dataclass(frozen=True, kw_only=True)
class Found:
    """The first commit that differs from the good one; None where skipped commits hide it, and what git said."""

    commit: str | None
    log: str


def bisect(good: str, bad: str, contest: Contest, report: Report, repository: Path = Path()) -> Found:
    """`git bisect run` over the commits that touch measured code, each against `good` by `ab`.

    UserError where `bad` itself shows no regression against `good`: then there is nothing to look for.
    """
    first = ab(good, bad, contest, report, repository)
    if not first.called("REGRESSION"):
        raise UserError(f"{bad} shows no regression against {good}: there is no commit to look for")
    commits = [resolve(ref, repository) for ref in (good, bad)]
    with checkout(bad, repository) as place:
        git(place.tree, "bisect", "start", str(commits[1]), str(commits[0]), "--", *MEASURED)  # ends with the worktree
        there = replace(contest, results=contest.results.absolute(), data=contest.data and contest.data.absolute())
        order = json.dumps({"good": commits[0], "contest": asdict(there)}, default=str)
        command = ["git", "bisect", "run", sys.executable, "-m", "netdyno.bench.ab", order]
        with subprocess.Popen(
            command, cwd=place.tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as run:
            assert run.stdout is not None
            lines = []
            for line in run.stdout:
                lines.append(line)
                report(line.rstrip())
        log = git(place.tree, "bisect", "log")
    named = re.search(r"^([0-9a-f]{40}) is the first bad commit", "".join(lines), re.MULTILINE)
    return Found(commit=named.group(1) if named else None, log=log)


def bisect_step(order: str) -> int:
    """What `git bisect run` asks of the commit that is checked out here: 0 good, 1 bad, 125 can't say, 128 stop."""
    values = json.loads(order)
    fields = values["contest"]
    paths = {"results": Path(fields["results"]), "data": Path(fields["data"]) if fields["data"] else None}
    try:
        comparison = ab(values["good"], "HEAD", Contest(**(fields | paths)), lambda line: print(line, flush=True))
    except UserError as error:
        print(error, flush=True)
        return BISECT_SKIP
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return BISECT_ABORT
    if comparison.called("REGRESSION"):
        return FAILED
    return BISECT_SKIP if exit_code(comparison) in (FAILED, UNDECIDED) else 0


if __name__ == "__main__":
    sys.exit(bisect_step(sys.argv[1]))
