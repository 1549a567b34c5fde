"""Changes of level in a case's history, and the commits that made them."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_records import GPU, make

from netdyno.bench import cli
from netdyno.bench.errors import UserError
from netdyno.bench.history import Step, cause, commits_of, plot, save, series_of, steps
from netdyno.bench.record import save as save_record

HASHES = """
from pathlib import Path

def code_hash():
    return "hash of " + (Path(__file__).parent / "speed").read_text()
"""


def run(number: int, value: float, **changes: Any) -> dict[str, Any]:
    record = make(1, images_per_s=value, block_s=[128 / value], **changes)
    return record | {"id": f"{number:06}", "created_utc": f"2026-{1 + number // 28:02}-{1 + number % 28:02}T00:00:00Z"}


def found(records: Sequence[dict[str, Any]], quantity: str = "throughput") -> list[Step]:
    series = series_of(records, "mnist-cnn")
    assert len(series) == 1
    return [step for step in steps(series[0]) if step.quantity.name == quantity]


def noisy(levels: Sequence[tuple[int, float, str]], *, spread: float = 0.003, seed: int = 0) -> list[dict[str, Any]]:
    """Runs of each (count, level, code) in turn."""
    random = np.random.default_rng(seed)
    made: list[dict[str, Any]] = []
    for count, level, code in levels:
        for _ in range(count):
            made.append(run(len(made), float(level * np.exp(spread * random.standard_normal())), code=code))
    return made


def test_a_step_is_found_where_the_code_changed() -> None:
    (step,) = found(noisy([(15, 1000, "a"), (12, 950, "b")]))
    assert step.position == 15
    assert (step.last["code"], step.first["code"]) == ("a", "b")
    assert step.change == pytest.approx(-0.05, abs=0.004)


def test_several_steps_come_in_their_order() -> None:
    levels = [(10, 1000, "a"), (10, 1000, "b"), (12, 900, "c"), (12, 1200, "d")]
    assert [step.position for step in found(noisy(levels))] == [20, 32]


def test_a_single_run_of_each_code_is_enough() -> None:
    """A run a night: each by another code."""
    made = noisy([(1, 1000 if night < 16 else 960, f"code {night}") for night in range(28)])
    (step,) = found(made)
    assert (step.position, step.first["code"]) == (16, "code 16")


def test_a_step_goes_to_the_change_of_code_nearby() -> None:
    """The last run of the old code met a neighbour and looks like the new level."""
    made = noisy([(15, 1000, "a"), (15, 950, "b")])
    made[14] = run(14, 951.0, code="a")
    (step,) = found(made)
    assert step.position == 15


@pytest.mark.parametrize("seed", range(20))
def test_noise_has_no_steps(seed: int) -> None:
    assert found(noisy([(10, 1000, "a"), (10, 1000, "b"), (10, 1000, "c")], seed=seed, spread=0.02)) == []


def test_a_change_below_the_floor_is_no_step() -> None:
    assert found(noisy([(15, 1000, "a"), (15, 994, "b")], spread=1e-4)) == []


def test_an_outlier_is_no_step() -> None:
    made = noisy([(15, 1000, "a"), (15, 1000, "b")])
    made[15] = run(15, 500.0, code="b")
    assert found(made) == []


def test_too_few_runs_have_no_step() -> None:
    assert found(noisy([(3, 1000, "a"), (3, 500, "b")])) == []


def test_steps_of_other_quantities_are_found_too() -> None:
    made = [run(number, 1000.0 + number % 3, nvml_process_mib=1500.0 + (number > 12) * 100) for number in range(24)]
    (step,) = found(made, "peak memory")
    assert (step.position, step.before, step.after) == (13, 1500.0, 1600.0)
    assert found(made) == []


def test_a_series_is_one_case_under_one_set_of_conditions() -> None:
    made = noisy([(5, 1000, "a")])
    made += [run(10, 10.0, recipe={"batch_size": 1}), run(11, 1.0, tuning="eager"), run(12, 7.0, status="oom")]
    made += noisy([(6, 1000, "a")], seed=1)
    for number, record in enumerate(made):
        record["created_utc"] = f"{number:04}"
    tuned, eager = series_of(made, "mnist-cnn")
    assert (len(tuned.runs), tuned.left_out, len(eager.runs)) == (11, 1, 1)
    assert [series.case for series in series_of(made, "mnist-cnn eager")] == ["mnist-cnn eager e2e full"]
    assert series_of(made, "dcgan") == series_of(made, "") == []


# Commits


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Commits whose code hash is the content of a file."""
    folder = tmp_path / "repository"
    (folder / "bench").mkdir(parents=True)
    monkeypatch.chdir(folder)

    def git(*arguments: str) -> str:
        own = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *own, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    def commit(code: str, *, measured: bool = True) -> str:
        if measured:
            Path("bench", "speed").write_text(code)
        Path("notes").write_text(f"{code} {measured}")
        git("add", "-A")
        git("commit", "-m", f"now {code}")
        return git("rev-parse", "HEAD")

    git("init", "--initial-branch", "main")
    Path("bench", "__init__.py").touch()
    Path("bench", "record.py").write_text(HASHES)
    return commit


def step_between(old: str, new: str, versions: dict[str, str] | None = None) -> Step:
    machine = {**GPU, "versions": versions or GPU["versions"]}
    made = noisy([(12, 1000, f"hash of {old}")])
    made += [record | {"id": f"b{record['id']}", "machine": machine} for record in noisy([(12, 900, f"hash of {new}")])]
    for number, record in enumerate(made):
        record["created_utc"] = f"{number:04}"
    (step,) = found(made)
    return step


def test_a_step_names_its_commit(repository: Any) -> None:
    for code in ("a", "b"):
        repository(code)
    commit = repository("c")
    repository("c", measured=False)
    commits = commits_of({"hash of b", "hash of c"}, Path())
    assert commits["hash of c"] == [commit]
    assert "hash of a" not in commits  # it looked no further back than it had to
    assert cause(step_between("b", "c"), commits, Path()) == f"commit {commit[:7]} now c"


def test_a_step_over_several_commits_says_how_to_find_it(repository: Any) -> None:
    a = repository("a")
    for code in ("b", "c"):
        repository(code)
    d = repository("d")
    commits = commits_of({"hash of a", "hash of d"}, Path())
    expected = f"one of 3 commits: netdyno bisect {a[:12]} {d[:12]} finds it"
    assert cause(step_between("a", "d"), commits, Path()) == expected


def test_other_causes_are_named_too(repository: Any) -> None:
    repository("a")
    commits = commits_of({"hash of a"}, Path())
    torch = {**GPU["versions"], "torch": "2.12.0"}
    assert cause(step_between("a", "a", torch), commits, Path()) == "torch 2.11.0 → 2.12.0"
    assert cause(step_between("a", "a"), commits, Path()) == "no change of code or versions: the machine"
    assert cause(step_between("a", "lost"), commits, Path()) == "code that is in no commit here: hash of lost"


# Plot and command


@pytest.mark.parametrize(("name", "begins"), [("a.svg", b"<?xml"), ("b/c.png", b"\x89PNG")])
def test_a_plot_is_written(tmp_path: Path, name: str, begins: bytes) -> None:
    (series,) = series_of(noisy([(15, 1000, "a"), (12, 950, "b")]), "mnist-cnn")
    own = steps(series)
    save(
        plot(series, own, ["a commit with a very long name, longer than there is room for"] * len(own)), tmp_path / name
    )
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_a_plot_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (series,) = series_of(noisy([(4, 1000, "a")]), "mnist-cnn")
    with pytest.raises(UserError, match=r"a\.xyz: a plot is written as"):
        save(plot(series, [], []), tmp_path / "a.xyz")


def test_the_command_names_the_commit_and_draws(
    repository: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repository("a")
    commit = repository("b")
    for record in noisy([(14, 1000, "hash of a"), (14, 940, "hash of b")]):
        save_record(record, Path("results"))
    Path("results", GPU["slug"], "machine.json").write_text(json.dumps({}))

    def netdyno(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["netdyno", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capsys.readouterr()

    code, shown = netdyno("history", "mnist-cnn", "--plot", "history.svg")
    assert code == 0
    assert re.search(rf"2026-01-15  throughput .*, −6\.\d %: commit {commit[:7]} now b\n", shown.out)
    assert Path("history.svg").stat().st_size > 5_000
    code, shown = netdyno("history", "dcgan")
    assert (code, "no record in results is of case 'dcgan'" in shown.err) == (2, True)
