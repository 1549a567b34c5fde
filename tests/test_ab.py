"""A/B runs and bisection over a repository whose commits play a `netdyno run` of a speed that is written in a file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_up_records import make

from netdyno.bench import ab, cli
from netdyno.bench.ab import Contest, bisect, checkout, parse_case
from netdyno.bench.errors import UserError
from netdyno.bench.gate import exit_code, read_records

# What stands in for bench/ in every commit: it writes one record with the speed of that commit and a little noise.
PLAYED = """
import json, os, random, sys
from pathlib import Path
here = Path(__file__).parent
arguments = sys.argv[1:]
assert arguments[0] == "run", arguments
options = dict(zip(arguments[2::2], arguments[3::2]))
speed, order = json.loads((here / "speed.json").read_text()), Path(os.environ["PLAYED_ORDER"])
with order.open("a") as file:
    file.write(json.dumps([speed, options["--seed"], os.environ["XDG_CACHE_HOME"]]) + "\\n")
if speed is None:
    print("netdyno: this commit is broken", file=sys.stderr)
    sys.exit(2)
record = json.loads((here / "record.json").read_text())
noise = random.Random(f"{speed} {options['--seed']} {order.stat().st_size}").gauss(0, 0.003)
record["throughput"]["images_per_s"] = speed * (1 + noise)
record["timing"]["block_s"] = [1 / record["throughput"]["images_per_s"]]
record["case"]["workload"], record["case"]["seed"] = arguments[1], int(options["--seed"])
record["case"]["suite"], record["case"]["tuning"] = options["--suite"], options["--tuning"]
record["code"] = str(speed)
record["id"] = record["created_utc"] = f"{order.stat().st_size:09}"
if speed < 100:
    record["status"], record["reason"] = "oom", "too slow to be true"
path = Path(options["--results"]) / "machine" / arguments[1] / f"{record['id']}.json"
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps(record))
sys.exit(0 if record["status"] == "ok" else 1)
"""


class Played:
    """A repository of played commits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "repository"
        (self.folder / "bench").mkdir(parents=True)
        self.order = folder / "order.jsonl"
        self.git("init", "--initial-branch", "main")
        (self.folder / "bench" / "__init__.py").touch()
        (self.folder / "bench" / "__main__.py").write_text(PLAYED)
        (self.folder / "bench" / "record.json").write_text(json.dumps(make(1, accuracy=None)))

    def git(self, *arguments: str) -> str:
        own = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(self.folder), *own, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, speed: float | None) -> str:
        (self.folder / "bench" / "speed.json").write_text(json.dumps(speed))
        self.git("add", "-A")
        self.git("commit", "--allow-empty", "-m", f"speed {speed}")
        return self.git("rev-parse", "HEAD")

    def played(self) -> list[Any]:
        return [json.loads(line) for line in self.order.read_text().splitlines()] if self.order.exists() else []


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played(tmp_path)
    monkeypatch.setenv("PLAYED_ORDER", str(played.order))
    monkeypatch.chdir(played.folder)
    return played


def contest(tmp_path: Path, **changes: Any) -> Contest:
    fields = {"workload": "mnist-cnn", "tuning": "tuned", "mode": "e2e", "suite": "quick", "repeats": 12}
    return Contest(**(fields | {"budget_s": 600.0, "results": tmp_path / "ab", "data": None} | changes))


def silent(line: str) -> None:
    pass


def test_pairs_alternate_share_seeds_and_end_when_it_is_clear(repository: Played, tmp_path: Path) -> None:
    fast, slow = repository.commit(1000), repository.commit(940)
    lines: list[str] = []
    comparison = ab.ab(fast, slow, contest(tmp_path), lines.append)
    assert exit_code(comparison) == 1
    runs = repository.played()
    assert [speed for speed, _, _ in runs[:6]] == [1000, 940, 940, 1000, 1000, 940]
    assert [seed for _, seed, _ in runs[:6]] == ["0", "0", "1", "1", "2", "2"]
    assert len({cache for _, _, cache in runs}) == 2  # neither side fills the other's compiler cache
    # four tests in four looks: p ≤ 0.01 ÷ 16 takes 7 repeats a side
    assert len(runs) == 14
    assert lines[0].startswith("[1/12] A 1,00")
    assert len(list((tmp_path / "ab").rglob("a/machine/mnist-cnn/*.json"))) == 7


def test_one_commit_against_itself_is_the_same(repository: Played, tmp_path: Path) -> None:
    same = repository.commit(1000)
    comparison = ab.ab(same, "HEAD", contest(tmp_path), silent)
    assert exit_code(comparison) == 0
    assert len(repository.played()) == 14


def test_unclear_verdicts_go_on_to_the_end_of_the_budget(repository: Played, tmp_path: Path) -> None:
    fast, slow = repository.commit(1000), repository.commit(940)
    comparison = ab.ab(fast, slow, contest(tmp_path, repeats=3), silent)
    assert (exit_code(comparison), len(repository.played())) == (3, 6)
    comparison = ab.ab(fast, slow, contest(tmp_path, budget_s=0.0), silent)
    assert (exit_code(comparison), len(repository.played())) == (3, 8)


def test_the_error_rate_is_shared_among_the_looks(repository: Played, tmp_path: Path) -> None:
    same = repository.commit(1000)
    comparison = ab.ab(same, same, contest(tmp_path), silent)
    deciding = [row for row in comparison.verdicts if row.decides]
    assert {row.level for row in deciding} == {0.01 / 4 / len(deciding)}
    assert len(ab.looks_at(comparison)) + 1 == ab.LOOKS  # and the one where repeats or time end


def test_a_run_that_fails_ends_it(repository: Played, tmp_path: Path) -> None:
    good, failing = repository.commit(1000), repository.commit(50)
    comparison = ab.ab(good, failing, contest(tmp_path), silent)
    assert exit_code(comparison) == 1
    assert comparison.verdicts[0].reason == "1 of 1 runs ended oom: too slow to be true"
    assert len(repository.played()) == 2


def test_a_commit_that_cannot_run_is_named(repository: Played, tmp_path: Path) -> None:
    good, broken = repository.commit(1000), repository.commit(None)
    with pytest.raises(UserError, match=f"commit {broken[:12]} cannot run mnist-cnn: this commit is broken"):
        ab.ab(good, broken, contest(tmp_path), silent)
    with pytest.raises(UserError, match="nothing is no commit"):
        ab.ab(good, "nothing", contest(tmp_path), silent)


def test_nothing_is_left_of_a_checkout_and_the_work_tree_is_untouched(repository: Played) -> None:
    first, _ = repository.commit(1000), repository.commit(940)
    (repository.folder / "bench" / "speed.json").write_text("1")
    with checkout(first, repository.folder) as place:
        assert json.loads((place.tree / "bench" / "speed.json").read_text()) == 1000
        code = "import netdyno; print(list(netdyno.__path__)[0])"
        assert place.python("-c", code).stdout.strip().endswith("packages/netdyno")
    assert not place.tree.exists()
    assert len(repository.git("worktree", "list").splitlines()) == 1
    assert repository.git("status", "--porcelain") == "M bench/speed.json"


def test_data_and_weights_stay_the_user_s(repository: Played, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = repository.commit(1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETDYNO_DATA", raising=False)
    monkeypatch.delenv("TORCH_HOME", raising=False)
    with checkout(commit, repository.folder) as place:
        assert place.environment["NETDYNO_DATA"] == str(tmp_path / "home" / "netdyno" / "data")
        assert place.environment["TORCH_HOME"] == str(tmp_path / "home" / "torch")
        assert place.environment["XDG_CACHE_HOME"] != str(tmp_path / "home")
    monkeypatch.setenv("NETDYNO_DATA", "elsewhere")
    with checkout(commit, repository.folder) as place:
        assert place.environment["NETDYNO_DATA"] == "elsewhere"


def test_a_checkout_runs_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package, installed from one folder, and a commit of it in another."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    with checkout("HEAD", root) as place:
        shown = place.python("-c", "import netdyno.bench.record as r; print(r.__file__)")
        assert os.path.realpath(shown.stdout.strip()) == os.path.realpath(place.tree / "bench" / "record.py")


@pytest.mark.parametrize(
    ("text", "case"),
    [
        ("mnist-cnn", ("mnist-cnn", "tuned", "e2e", "quick")),
        ("dcgan eager", ("dcgan", "eager", "e2e", "quick")),
        ("dcgan full compute t4", ("dcgan", "t4", "compute", "full")),
    ],
)
def test_a_case_is_named_by_its_words(text: str, case: tuple[str, ...]) -> None:
    assert parse_case(text) == case


@pytest.mark.parametrize("text", ["", "--data", "a b c d e", "a --tuning"])
def test_what_is_no_case_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no case"):
        parse_case(text)


# Bisection


def test_bisect_names_the_commit(repository: Played, tmp_path: Path) -> None:
    good = repository.commit(1000)
    repository.commit(1001)
    (repository.folder / "README").write_text("no measured code\n")
    repository.commit(1001)
    slower = repository.commit(930)
    repository.commit(931)
    bad = repository.commit(932)
    found = bisect(good, bad, contest(tmp_path), silent)
    assert found.commit == slower
    assert repository.git("worktree", "list").count("\n") == 0
    assert repository.git("status", "--porcelain") == ""
    assert repository.git("rev-parse", "--abbrev-ref", "HEAD") == "main"  # and no bisection is under way here
    assert not (repository.folder / ".git" / "BISECT_LOG").exists()


@pytest.mark.parametrize("speed", [None, 50])
def test_bisect_skips_a_commit_that_cannot_be_measured(repository: Played, tmp_path: Path, speed: int | None) -> None:
    """One that does not run, or runs out of memory, is not the one that made things slower."""
    good = repository.commit(1000)
    repository.commit(speed)
    bad = repository.commit(930)
    found = bisect(good, bad, contest(tmp_path), silent)
    assert found.commit is None
    assert "git bisect skip" in found.log


def test_without_a_regression_there_is_nothing_to_bisect(repository: Played, tmp_path: Path) -> None:
    good, better = repository.commit(1000), repository.commit(1100)
    with pytest.raises(UserError, match="shows no regression"):
        bisect(good, better, contest(tmp_path), silent)


def test_the_commands_end_with_the_gate_s_codes(
    repository: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = repository.commit(1000), repository.commit(930)

    def netdyno(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["netdyno", *arguments, "--results", str(tmp_path / "kept")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0

    assert netdyno("ab", good, bad, "mnist-cnn") == 1
    assert "failed: 2 REGRESSION" in capsys.readouterr().out
    assert netdyno("ab", good, bad, "mnist-cnn", "--repeats", "2") == 3
    assert netdyno("ab", good, "nothing", "mnist-cnn") == 2
    assert netdyno("bisect", good, bad, "mnist-cnn eager") == 0
    assert f"first bad commit  {bad}" in capsys.readouterr().out
    assert {record["case"]["tuning"] for record in read_records(str(tmp_path / "kept"), tmp_path)} == {"tuned", "eager"}
