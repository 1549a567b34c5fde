"""The gate: new records against a machine's baseline. What the baseline file holds, and the exit codes.

`results/<machine>/baseline.json` names the records that are the baseline, each with its SHA-256, keeps the medians of
every earlier baseline, and ends with a SHA-256 over all of that. The numbers stay in the records: nothing is copied
that could come to differ. An edited or incomplete baseline is never compared with. Whoever edits it together with its
checksum shows in the diff of a review: take it from the target branch, never from the change that is being judged.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .errors import UserError
from .record import Record, parse, path_of, write_atomically
from .regress import NOISE_RUNS, Comparison, Verdict, compare, sides

SCHEMA = 1
NAME = "baseline.json"
NO_RECORDS = {NAME, "machine.json"}
PASSED, FAILED, UNDECIDED = 0, 1, 3  # 2 is wrong usage
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class BaselineError(UserError):
    """A baseline that cannot be compared with."""


def exit_code(comparison: Comparison) -> int:
    """0 same or improved, 1 a regression or something missing, 3 ambiguous, not comparable, or nothing compared."""
    if comparison.called("REGRESSION") or comparison.called("MISSING"):
        return FAILED
    if comparison.called("AMBIGUOUS") or not any(verdict.decides for verdict in comparison.verdicts):
        return UNDECIDED
    return PASSED


# Records: from a file, a folder or a commit


def read_records(source: str, results: Path) -> list[Record]:
    """The records of a file, of a folder and all below it, or of the folder `results` in a git commit."""
    path = Path(source)
    if path.is_dir():
        gc.disable()  # nothing here is garbage yet: 10,000 records in 0.35 instead of 0.54 s
        try:
            return [parse(content, file) for file, content in _below(path)]
        finally:
            gc.enable()
            gc.freeze()
    if path.is_file():
        return [parse(path.read_bytes(), path)]
    commit = resolve(source)
    if commit is None:
        raise UserError(f"{source} is neither a record nor a folder nor a git commit here")
    archived = subprocess.run(
        ["git", "archive", "--format=tar", commit, "--", str(results)], capture_output=True, check=False
    )
    if archived.returncode:
        raise UserError(f"there is no folder {results} in commit {source}")
    with tarfile.open(fileobj=io.BytesIO(archived.stdout)) as archive:
        files = [(Path(member.name), archive.extractfile(member)) for member in archive if _is_record(member.name)]
        return [parse(file.read(), Path(f"{source}:{path}")) for path, file in files if file is not None]


def resolve(ref: str, repository: Path = Path()) -> str | None:
    """The commit that a git ref names; None where there is no such thing."""
    command = [
        "git",
        "-C",
        str(repository),
        "rev-parse",
        "--quiet",
        "--verify",
        "--end-of-options",
        f"{ref}^{{commit}}",
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _is_record(name: str) -> bool:
    base = os.path.basename(name)
    return base.endswith(".json") and not base.startswith(".") and base not in NO_RECORDS


def _below(folder: Path) -> Iterable[tuple[str, bytes]]:
    for parent, _, names in os.walk(folder):
        for name in filter(_is_record, names):
            path = os.path.join(parent, name)  # pathlib's parts would take as long as reading
            with open(path, "rb") as file:
                yield path, file.read()


# The baseline


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far one quantity of one case has come since an earlier baseline."""

    case: str
    quantity: str
    unit: str
    since: str  # when that baseline was made
    old: float
    new: float
    change: float  # as a share, or with `difference` in the unit
    difference: bool
    worse: bool  # beyond the margin of the new runs


def gate(new: Iterable[Record], results: Path) -> Comparison:
    """`new` against the baselines of their machines, which lie in `results`."""
    by_machine: dict[str, list[Record]] = {}
    for record in new:
        by_machine.setdefault(str(record["machine"].get("slug")), []).append(record)
    if not by_machine:
        return _refused("–", "there are no records to judge")
    found = []
    for machine, own in by_machine.items():
        if not PLAIN_NAME.fullmatch(machine):  # it becomes a folder, and must not lead to a baseline elsewhere
            return _refused("–", "a record's machine has no plain name")
        try:
            found.append(compare(baseline_records(results, machine), own))
        except BaselineError as error:
            found.append(_refused(machine, str(error)))
    return Comparison(
        verdicts=tuple(verdict for comparison in found for verdict in comparison.verdicts),
        notes=tuple(note for comparison in found for note in comparison.notes),
    )


def _refused(machine: str, reason: str) -> Comparison:
    why = f"not comparable: {reason}"
    return Comparison(
        verdicts=(Verdict(machine=machine, case="all cases", quantity="baseline", verdict="AMBIGUOUS", reason=why),)
    )


def baseline_records(results: Path, machine: str) -> list[Record]:
    """The records of a machine's baseline. BaselineError where it or one of them is missing or was changed."""
    baseline = read_baseline(results, machine)
    records = []
    for case in baseline["cases"].values():
        for entry in case["records"]:
            path = results / machine / entry["path"]
            try:
                content = path.read_bytes()
            except OSError as error:
                raise BaselineError(f"{path}, a record of the baseline, is missing") from error
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise BaselineError(f"{path}, a record of the baseline, was changed after the baseline was made")
            records.append(parse(content, path))
    return records


def read_baseline(results: Path, machine: str) -> dict[str, Any]:
    """A machine's baseline. BaselineError where there is none, or it is not as `update` wrote it."""
    path = results / machine / NAME
    try:
        baseline = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BaselineError(f"{machine} has no baseline in {results}; netdyno baseline update NEW makes one") from error
    except (OSError, ValueError) as error:
        raise BaselineError(f"{path} cannot be read: {error}") from error
    if not isinstance(baseline, dict) or baseline.get("sha256") != _digest(baseline):
        raise BaselineError(f"{path} was edited: its SHA-256 is another; git restore brings the right one back")
    if baseline.get("schema") != SCHEMA or baseline.get("machine") != machine:
        raise BaselineError(f"{path} is of another schema or of another machine")
    return baseline


def _digest(baseline: dict[str, Any]) -> str:
    content = {name: value for name, value in baseline.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def update(new: Iterable[Record], results: Path, *, drop: bool = False) -> tuple[list[Path], list[Drift]]:
    """Makes the newest runs of each case in `new` the baseline of their machine, and keeps those records in `results`.

    Cases of the old baseline that `new` lacks stay as they are, or go with `drop`.

    Returns:
        The baseline files written, and the drift against every earlier baseline, newest first.

    Raises:
        UserError: nothing to make a baseline of, a case with fewer than 10 runs or one that failed, or an old baseline
            that was edited.
    """
    chosen = sides(new)
    if not chosen:
        raise UserError("there are no records to make a baseline of; netdyno run makes some")
    for side in chosen.values():
        if side.failed:
            raise UserError(f"{side.case}: {len(side.failed)} of its runs failed; a baseline is made of whole runs")
        if side.mixed:
            raise UserError(f"{side.case}: its runs have more than one {' and more than one '.join(side.mixed)}")
        if len(side.runs) < NOISE_RUNS:
            raise UserError(
                f"{side.case}: a baseline needs at least {NOISE_RUNS} runs, to know their spread, and has"
                f" {len(side.runs)}; netdyno run --repeats {NOISE_RUNS - len(side.runs)} adds the others"
            )
    paths, drifts = [], []
    for machine in dict.fromkeys(side.machine for side in chosen.values()):
        now = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
        cases: dict[str, Any] = {}
        history: list[dict[str, Any]] = []
        if (results / machine / NAME).exists():
            old = read_baseline(results, machine)
            history = old["history"]
            cases = {} if drop else old["cases"]
        summary = {}
        for side in (side for side in chosen.values() if side.machine == machine):
            cases[side.case] = {"records": [_keep(dict(run), results) for run in side.runs]}
            medians = _medians(side.runs)
            conditions = hashlib.sha256(json.dumps(side.conditions, sort_keys=True).encode()).hexdigest()
            summary[side.case] = {
                "code": side.runs[-1].get("code"),
                "conditions": conditions,
                "medians": {name: {"median": row.new, "unit": row.unit} for name, row in medians.items()},
            }
            drifts += _drifts(side.case, conditions, medians, history)
        baseline = {
            "schema": SCHEMA,
            "machine": machine,
            "created_utc": now,
            "cases": cases,
            "history": [*history, {"created_utc": now, "cases": summary}],
        }
        paths.append(results / machine / NAME)
        write_atomically(paths[-1], json.dumps(baseline | {"sha256": _digest(baseline)}, indent=1).encode() + b"\n")
    return paths, drifts


def _keep(record: Record, results: Path) -> dict[str, str]:
    """Writes a record of the baseline to where it belongs, unless it is there, and returns what names it."""
    path = path_of(record, results)
    if not path.resolve().is_relative_to(results.resolve()):
        raise UserError(f"record {record['id']} would lie outside {results}")
    if not path.exists():
        write_atomically(path, json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    content = path.read_bytes()
    if parse(content, path) != record:
        raise UserError(f"{path} holds another record of that name")
    relative = path.relative_to(results / record["machine"]["slug"]).as_posix()
    return {"path": relative, "id": record["id"], "sha256": hashlib.sha256(content).hexdigest()}


def _medians(runs: Iterable[Any]) -> dict[str, Verdict]:
    """Medians and margins of each quantity: what a comparison of the runs with themselves says."""
    own = list(runs)
    return {verdict.quantity: verdict for verdict in compare(own, own).verdicts if verdict.decides}


def _drifts(case: str, conditions: str, medians: dict[str, Verdict], history: list[dict[str, Any]]) -> list[Drift]:
    drifts = []
    for name, row in medians.items():
        for earlier in reversed(history):
            entry = earlier["cases"].get(case, {})
            then = entry.get("medians", {}).get(name)
            if entry.get("conditions") != conditions or then is None or then["unit"] != row.unit or row.new is None:
                continue
            change = row.new - then["median"] if row.difference else row.new / then["median"] - 1
            loss = -change if row.higher_is_better else change
            drifts.append(
                Drift(
                    case=case,
                    quantity=name,
                    unit=row.unit,
                    since=earlier["created_utc"],
                    old=then["median"],
                    new=row.new,
                    change=change,
                    difference=row.difference,
                    worse=row.margin is not None and loss > row.margin,
                )
            )
    return drifts
