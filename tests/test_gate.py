"""The gate by its exit code, the baseline file, and every form of output."""

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from made_up_records import CPU, GPU, accuracy, make

from netdyno.bench import calibration, cli, gate, regress, verdicts
from netdyno.bench.errors import UserError
from netdyno.bench.record import path_of, save
from netdyno.bench.regress import compare

ROOT = Path(__file__).parents[1]
SLUG = GPU["slug"]


class Ended(NamedTuple):
    code: Any
    out: str
    err: str


@pytest.fixture
def netdyno(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def netdyno(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["netdyno", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(ended.value.code or 0, *capsys.readouterr())

    return netdyno


def session(count: int, level: float = 1000.0, *, first: int = 0, **changes: Any) -> list[dict[str, Any]]:
    random = np.random.default_rng(first)
    made = []
    for number in range(first, first + count):
        value = float(level * math.exp(0.003 * random.standard_normal()))
        record = make(1, images_per_s=round(value, 3), block_s=[round(1280 / value, 6)] * 3, **changes)
        made.append(record | {"id": f"20261123T{number:06}Z-{number:06x}", "created_utc": f"{number:06}"})
    return made


def keep(records: list[dict[str, Any]], folder: Path) -> Path:
    """Writes records as they are, NaN too, which `save` would refuse."""
    for record in records:
        path = path_of(record, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results folder with a baseline of 20 runs of one case."""
    gate.update(session(20), tmp_path / "results")
    return tmp_path / "results"


def new(tmp_path: Path, records: list[dict[str, Any]]) -> Path:
    return keep(records, tmp_path / "new")


# Exit codes


def test_the_same_passes(netdyno: Any, results: Path, tmp_path: Path) -> None:
    ended = netdyno("gate", new(tmp_path, session(7, first=30)))
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.endswith("passed: 7 SAME\n")


def test_an_improvement_passes_and_is_reported(netdyno: Any, results: Path, tmp_path: Path) -> None:
    ended = netdyno("gate", new(tmp_path, session(7, 1100, first=30)))
    assert ended.code == 0
    assert ended.out.endswith("passed: 2 IMPROVEMENT, 5 SAME\n")


def test_a_regression_fails(netdyno: Any, results: Path, tmp_path: Path) -> None:
    ended = netdyno("gate", new(tmp_path, session(7, 950, first=30)))
    assert ended.code == 1
    assert re.search(
        r"throughput +REGRESSION +(?:999.\d|1,000) → 9\d\d\.?\d? images/s, n 20 and 7 +−[45]\.\d % \(", ended.out
    )


def test_a_missing_case_fails(netdyno: Any, results: Path, tmp_path: Path) -> None:
    gate.update(session(20) + session(20, workload="dcgan"), results)
    ended = netdyno("gate", new(tmp_path, session(7, first=30)))
    assert ended.code == 1
    assert re.search(r"dcgan .*\n  case +MISSING\n +no record of it", ended.out)


def test_a_run_that_failed_fails(netdyno: Any, results: Path, tmp_path: Path) -> None:
    records = session(8, first=30)
    records[0] |= {"status": "oom", "reason": "2 GiB"}
    assert netdyno("gate", new(tmp_path, records)).code == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_nan_fails(netdyno: Any, results: Path, tmp_path: Path, value: float | None) -> None:
    records = session(7, first=30)
    records[3]["throughput"]["images_per_s"] = value
    ended = netdyno("gate", new(tmp_path, records), "--json", "verdicts.json")
    assert ended.code == 1
    assert "1 of 7 runs have no such number" in ended.out
    assert json.loads((tmp_path / "verdicts.json").read_text())["exit_code"] == 1


def test_too_few_repeats_are_undecided(netdyno: Any, results: Path, tmp_path: Path) -> None:
    ended = netdyno("gate", new(tmp_path, session(2, first=30)))
    assert ended.code == 3
    assert "needs at least 7 repeats a side" in ended.out


def test_an_empty_folder_does_not_pass(netdyno: Any, results: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    ended = netdyno("gate", "new")
    assert ended.code == 3
    assert "there are no records to judge" in ended.out


def test_a_comparison_without_a_verdict_that_decides_does_not_pass() -> None:
    assert gate.exit_code(compare([], [])) == 3
    everything = compare(session(20), session(7, first=30))
    undecided = [row for row in everything.verdicts if not row.decides]
    assert gate.exit_code(everything) == 0
    assert [row.quantity for row in undecided] == ["compile, cold"]
    assert gate.exit_code(regress.Comparison(verdicts=tuple(undecided))) == 3


def test_records_of_another_machine_do_not_pass(netdyno: Any, results: Path, tmp_path: Path) -> None:
    ended = netdyno("gate", new(tmp_path, session(7, first=30, machine=CPU)))
    assert ended.code == 3
    assert "cpu-amd-epyc-2c has no baseline in results; netdyno baseline update NEW makes one" in ended.out


@pytest.mark.parametrize(
    "changes",
    [
        {"timing_version": 2},
        {"data": {"name": "mnist", "label": "official", "sha256": {"train": "ff"}, "loader": "dali"}},
        {"accuracy": accuracy([97.0, 99.1], 98.0)},
    ],
)
def test_what_is_not_comparable_does_not_pass(netdyno: Any, results: Path, tmp_path: Path, changes: Any) -> None:
    ended = netdyno("gate", new(tmp_path, session(7, first=30, **changes)))
    assert (ended.code, "not comparable" in ended.out) == (3, True)


def test_a_machine_name_that_leads_elsewhere_does_not_pass(netdyno: Any, results: Path, tmp_path: Path) -> None:
    """A record that brings its own baseline: valid, and with a checksum, but not in the results folder."""
    forged = {**GPU, "slug": f"../own/{SLUG}"}
    gate.update(session(20, 500), tmp_path / "own")
    path = tmp_path / "own" / SLUG / "baseline.json"
    content = json.loads(path.read_text()) | {"machine": forged["slug"]}
    path.write_text(json.dumps(content | {"sha256": gate._digest(content)}))
    (tmp_path / "new").mkdir()
    for record in session(7, 500, first=30, machine=forged):
        (tmp_path / "new" / f"{record['id']}.json").write_text(json.dumps(record))
    ended = netdyno("gate", "new")
    assert (ended.code, "no plain name" in ended.out) == (3, True)


@pytest.mark.parametrize("arguments", [["nowhere"], [], ["new", "--unknown"]])
def test_wrong_use_is_2(netdyno: Any, results: Path, arguments: list[str]) -> None:
    assert netdyno("gate", *arguments).code == 2


def test_what_is_no_record_is_2(netdyno: Any, results: Path, tmp_path: Path) -> None:
    (new(tmp_path, session(7, first=30)) / "other.json").write_text("{}")
    ended = netdyno("gate", "new")
    assert (ended.code, "new/other.json is no record of Netdyno" in ended.err) == (2, True)


# The baseline file


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a case dropped": lambda baseline: baseline["cases"].clear(),
    "another machine": lambda baseline: baseline.update(machine="other"),
    "a record dropped": lambda baseline: next(iter(baseline["cases"].values()))["records"].pop(),
    "the drift hidden": lambda baseline: baseline["history"].clear(),
    "the checksum gone": lambda baseline: baseline.pop("sha256"),
    "a digit changed": lambda baseline: baseline.update(sha256="0" + baseline["sha256"][1:]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_baseline_does_not_pass(netdyno: Any, results: Path, tmp_path: Path, edit: str) -> None:
    path = results / SLUG / "baseline.json"
    baseline = json.loads(path.read_text())
    before = json.dumps(baseline)
    EDITS[edit](baseline)
    if json.dumps(baseline) == before:
        pytest.skip("the first digit was a 0 already")
    path.write_text(json.dumps(baseline))
    ended = netdyno("gate", new(tmp_path, session(7, first=30)))
    assert (ended.code, "was edited" in ended.out) == (3, True)
    ended = netdyno("baseline", "update", keep(session(20, first=50), tmp_path / "more"))
    assert (ended.code, "was edited" in ended.err) == (2, True)  # an update launders nothing


def test_a_record_of_the_baseline_that_was_edited_or_removed_does_not_pass(
    netdyno: Any, results: Path, tmp_path: Path
) -> None:
    path = next(path for path in (results / SLUG / "mnist-cnn").iterdir())
    new(tmp_path, session(7, first=30))
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"images_per_s":', b'"images_per_s": '))
    ended = netdyno("gate", "new")
    assert (ended.code, "was changed after the baseline was made" in ended.out) == (3, True)
    path.unlink()
    ended = netdyno("gate", "new")
    assert (ended.code, "is missing" in ended.out) == (3, True)
    path.write_bytes(content)
    assert netdyno("gate", "new").code == 0


def test_an_update_shows_the_drift_against_all_earlier_baselines(netdyno: Any, tmp_path: Path) -> None:
    """1 % slower each time: below the margin from one to the next, and plain to see from the first to the last."""
    for month in range(5):
        records = session(20, 1000 * 0.99**month, first=100 * month)
        ended = netdyno("baseline", "update", keep(records, tmp_path / f"month-{month}"))
        assert (ended.code, ended.err) == (0, "")
    line = next(line for line in ended.out.splitlines() if "throughput" in line)
    changes = re.findall(r"([−+]\d\.\d) % since \d{4}-\d\d-\d\d", line)
    assert [float(change.replace("−", "-")) for change in changes] == pytest.approx([-1, -2, -3, -3.9], abs=0.3)
    assert line.startswith("! throughput")
    memory = next(line for line in ended.out.splitlines() if "peak memory" in line)
    assert memory.startswith("  peak memory")
    first = netdyno("baseline", "update", tmp_path / "month-1", "--results", "fresh")
    assert first.out == f"baseline written to fresh/{SLUG}/baseline.json\n"


def test_drift_is_not_shown_across_other_conditions(results: Path) -> None:
    _, drifts = gate.update(session(20, first=50, recipe={"batch_size": 64}), results)
    assert drifts == []
    _, drifts = gate.update(session(20, first=80, recipe={"batch_size": 64}), results)
    assert {drift.quantity for drift in drifts} >= {"throughput", "peak memory"}
    assert len([drift for drift in drifts if drift.quantity == "throughput"]) == 1


def test_an_update_keeps_other_cases_unless_told_to_drop_them(results: Path) -> None:
    def cases() -> set[str]:
        return set(gate.read_baseline(results, SLUG)["cases"])

    gate.update(session(20, first=50, workload="dcgan"), results)
    assert cases() == {"mnist-cnn tuned e2e full", "dcgan tuned e2e full"}
    gate.update(session(20, first=80, workload="dcgan"), results, drop=True)
    assert cases() == {"dcgan tuned e2e full"}
    assert len(gate.baseline_records(results, SLUG)) == 20


def test_a_baseline_takes_ten_whole_runs(results: Path) -> None:
    with pytest.raises(UserError, match=r"needs at least 10 runs, .* has 9; netdyno run --repeats 1 adds"):
        gate.update(session(9, first=50), results)
    failed = session(20, first=50)
    failed[4]["status"] = "failed"
    with pytest.raises(UserError, match="1 of its runs failed"):
        gate.update(failed, results)
    mixed = session(10, first=50) + session(10, first=60, timing_version=2)
    with pytest.raises(UserError, match="its runs have more than one timing version"):
        gate.update(mixed, results)
    with pytest.raises(UserError, match="no records"):
        gate.update([], results)


def test_the_records_of_a_baseline_are_kept_beside_it(results: Path) -> None:
    entries = next(iter(gate.read_baseline(results, SLUG)["cases"].values()))["records"]
    assert len(entries) == 20
    assert {entry["id"] for entry in entries} == {record["id"] for record in session(20)}
    assert all((results / SLUG / entry["path"]).is_file() for entry in entries)
    other = session(20)
    other[0]["throughput"]["images_per_s"] = 1.0
    with pytest.raises(UserError, match="holds another record"):
        gate.update(other, results)


# Sources of records


def test_records_come_from_files_folders_and_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def git(*arguments: str) -> None:
        own = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *own, *arguments], check=True, capture_output=True)

    git("init", "--initial-branch", "main")
    records = session(3)
    paths = [save(record, Path("results")) for record in records]
    Path("results", SLUG, "machine.json").write_text("{}")
    Path("results", SLUG, "baseline.json").write_text("{}")
    git("add", "-A")
    git("commit", "-m", "first")
    paths[0].unlink()
    git("add", "-A")
    git("commit", "-m", "second")

    def ids(source: str) -> list[str]:
        return sorted(record["id"] for record in gate.read_records(source, Path("results")))

    everything = sorted(record["id"] for record in records)
    assert ids("HEAD~1") == everything
    assert ids("main") == ids("results") == ids(f"results/{SLUG}") == everything[1:]
    assert ids(str(paths[1])) == [everything[1]]
    for nothing in ("unknown", "--output=stolen", "HEAD~9"):
        with pytest.raises(UserError, match="neither a record nor a folder nor a git commit"):
            gate.read_records(nothing, Path("results"))
    with pytest.raises(UserError, match="there is no folder other in commit HEAD"):
        gate.read_records("HEAD", Path("other"))


# Outputs


def regressed() -> Any:
    new = session(7, 900, first=30)
    new[0]["case"]["gpus"] = 1
    return compare(session(20) + session(20, workload="dcgan"), new)


def test_json_holds_everything_unrounded() -> None:
    comparison = regressed()
    found = json.loads(verdicts.to_json(comparison))
    assert found["exit_code"] == 1
    assert len(found["verdicts"]) == len(comparison.verdicts)
    throughput = next(row for row in found["verdicts"] if row["quantity"] == "throughput")
    assert throughput["verdict"] == "REGRESSION"
    assert throughput["effect"] == next(row for row in comparison.verdicts if row.quantity == "throughput").effect


def test_junit_counts_what_it_lists() -> None:
    suite = ElementTree.fromstring(verdicts.to_junit(regressed()))
    kinds = [child.tag for case in suite for child in case]
    assert suite.get("tests") == str(len(kinds))
    assert suite.get("failures") == str(kinds.count("failure")) == "3"  # throughput, step time, and dcgan is missing
    assert suite.get("errors") == str(kinds.count("error")) == "0"
    assert suite.get("skipped") == str(kinds.count("skipped")) == "1"  # the cold start
    failure = suite.find("testcase[@name='throughput']/failure")
    assert failure is not None
    assert "REGRESSION" in (failure.get("message") or "")


def test_markdown_shows_what_matters_and_folds_the_rest() -> None:
    text = verdicts.to_markdown(regressed())
    assert text.startswith(verdicts.MARK + "\n\n**netdyno gate failed: 2 REGRESSION, 1 MISSING, 5 SAME**")
    loud, folded = text.split("<details>")
    assert loud.count("\n| ") == 2 + 3
    assert folded.count("\n| ") == 2 + 9


def test_markup_in_records_stays_text() -> None:
    evil = "</td>|<script>@all [x](http://y)\x00\u202e`\n# h"
    old, new = session(20, workload=evil), session(7, first=30, workload=evil)
    new[0] |= {"status": "oom", "reason": evil}
    comparison = compare(old, new)
    markdown = verdicts.to_markdown(comparison)
    assert not re.search(
        r"<(?!!-- netdyno gate -->|/?details>|/?summary>)|(?<!\\)[`*\[]|@\w|://", markdown.replace("**", "")
    )
    for line in markdown.splitlines():
        assert not line.startswith("| ") or len(re.findall(r"(?<!\\)\|", line)) == 8
    ElementTree.fromstring(verdicts.to_junit(comparison))
    assert "\x00" not in verdicts.to_text(comparison)
    assert "\u202e" not in verdicts.to_text(comparison)


def test_outputs_are_written_whatever_the_outcome(netdyno: Any, results: Path, tmp_path: Path) -> None:
    new(tmp_path, session(2, first=30))
    names = ("--json", "a.json", "--junit", "a.xml", "--markdown", "out/a.md")
    assert netdyno("gate", "new", *names).code == 3
    assert json.loads((tmp_path / "a.json").read_text())["exit_code"] == 3
    assert ElementTree.parse(tmp_path / "a.xml").getroot().get("errors") != "0"
    assert "undecided" in (tmp_path / "out" / "a.md").read_text()


def test_compare_prints_and_does_not_judge(netdyno: Any, tmp_path: Path) -> None:
    keep(session(7), tmp_path / "old")
    ended = netdyno("compare", "old", new(tmp_path, session(7, 900, first=30)))
    assert (ended.code, ended.err) == (0, "")
    assert "failed: 2 REGRESSION, 5 SAME" in ended.out


def test_an_accuracy_gate_over_seeds_fails_a_fast_but_worse_change(netdyno: Any, tmp_path: Path) -> None:
    def seeds(level: float, speed: float, first: int) -> list[dict[str, Any]]:
        made = session(12, speed, first=first)
        for seed, record in enumerate(made):
            record["case"]["seed"] = seed
            record["accuracy"] = accuracy([97.0, round(level + 0.03 * (seed % 5), 2)])
        return made

    gate.update(seeds(99.2, 1000, 0), tmp_path / "results")
    ended = netdyno("gate", new(tmp_path, seeds(98.9, 1200, 40)))
    assert ended.code == 1
    assert re.search(r"throughput +IMPROVEMENT", ended.out)
    assert re.search(r"final metric +REGRESSION", ended.out)


# The workflow


RIGHTS = {
    "netdyno": {
        "measure": {"contents": "read"},
        "gate": {"contents": "read"},
        "comment": {"pull-requests": "write"},
    },
    "checks": {"check": {"contents": "read"}, "audit": {"contents": "read"}},
}


def test_all_workflows_are_known() -> None:
    assert {path.stem for path in (ROOT / ".github" / "workflows").iterdir()} == {*RIGHTS}


@pytest.mark.parametrize("name", RIGHTS)
def test_a_workflow_has_the_least_permissions_and_pins_its_actions(name: str) -> None:
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {}
    jobs = workflow["jobs"]
    assert {name: job["permissions"] for name, job in jobs.items()} == RIGHTS[name]
    used = re.findall(r"uses: (\S+)", text)
    assert used
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action) for action in used)
    assert "pull_request_target" not in text
    for job in jobs.values():
        for step in job["steps"]:
            assert "${{" not in step.get("run", "")  # values reach a shell through its environment only
            if str(step.get("uses")).startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False


def test_the_gate_runs_the_code_of_the_target_branch() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "netdyno.yml").read_text())["jobs"]
    checkout = next(step for step in jobs["gate"]["steps"] if str(step.get("uses")).startswith("actions/checkout"))
    assert "base.sha" in checkout["with"]["ref"]  # gate and baseline are the target branch's


def test_a_calibration_tells_margins_rates_and_detection(tmp_path: Path) -> None:
    (side,) = calibration.sides(session(40)).values()
    found = calibration.calibrate(side, gates=20, planted_gates=10)
    for rates in (found.gates, found.contests):
        assert (found.runs, rates[0.0].wrong, rates[0.1].detected) == (40, 0.0, 1.0)
    assert found.margins["throughput"] == pytest.approx(0.01, abs=0.003)
    text = calibration.to_markdown([found])
    assert "| slower by | 1% | 2% |" in text
    calibration.plot([found], tmp_path / "detection.svg")
    assert (tmp_path / "detection.svg").stat().st_size > 5_000
    with pytest.raises(UserError, match="39 runs; a calibration takes 40 or more"):
        calibration.calibrate(next(iter(calibration.sides(session(39)).values())))


def test_a_calibration_writes_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "regression.md"
    page.write_text((ROOT / "docs" / "regression.md").read_text())
    monkeypatch.setattr(calibration, "EFFECTS", (0.05,))
    monkeypatch.setattr(calibration.calibrate, "__kwdefaults__", {"gates": 5, "planted_gates": 5})
    calibration.main(str(keep(session(40), tmp_path / "noise")), page)
    text = page.read_text()
    assert "40 runs in fresh processes" in text
    assert "![Detection against effect](detection.svg)" in text
    assert (tmp_path / "detection.svg").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there are no 40 runs of one case"):
        calibration.main(str(tmp_path / "empty"), page)
