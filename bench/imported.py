"""Reports of pytest-benchmark as records, so that tables, history and gates take them too. No torch in here.

A benchmark becomes a case of suite and mode "benchmark": its workload is the test's name without "test_", its tuning
the parameters of the test, its seconds those of the rounds. What tests/benchmarks/conftest.py puts into a report, the
machine and the code, must be there.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .errors import UserError
from .record import SECTIONS, Record, new_record, save, save_machine
from .schema import parse_json, problems

KIND = "benchmark"


def import_benchmarks(file: Path, results: Path) -> list[Path]:
    """Writes a record for each benchmark of a report that tells its images/s; returns their paths.

    The same report makes the same records again. UserError names a file that is no such report.
    """
    try:
        report = parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    try:
        records = list(records_of(report))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is no report of Netdyno's benchmarks: {error!r}"[:300]) from error
    if not records:
        raise UserError(f"{file} holds no benchmark that tells its images/s")
    for record in records:
        for problem in problems(record):
            raise UserError(f"{file}: {problem}")
    save_machine(records[0]["machine"], results)
    return [save(record, results) for record in records]


def records_of(report: Any) -> Iterator[Record]:
    """A record for each benchmark with `images_per_s`; KeyError, TypeError or ValueError for what is no such report."""
    about = report["machine_info"]["netdyno"]
    made = datetime.fromisoformat(report["datetime"]).astimezone(timezone.utc)
    for benchmark in report["benchmarks"]:
        extra, stats = benchmark["extra_info"], benchmark["stats"]
        if "images_per_s" not in extra:
            continue
        function, _, parameters = benchmark["name"].removeprefix("test_").partition("[")
        seconds = [float(second) for second in stats.get("data") or [stats["median"]] * stats["rounds"]]
        case = {
            "workload": _name(function),
            "tuning": _name(parameters.rstrip("]") or "plain"),
            "mode": KIND,
            "suite": KIND,
            "division": None,
            "seed": None,
            "gpus": 1 if extra.get("device") == "gpu" else 0,
            "recipe": {"batch_size": extra["images"], "group": benchmark["group"]},
        }
        digest = hashlib.sha256(json.dumps([benchmark["fullname"], report["datetime"]]).encode()).hexdigest()
        yield {
            **new_record(case, about["machine"]),
            **dict.fromkeys(SECTIONS),
            "id": f"{made:%Y%m%dT%H%M%SZ}-{digest[:6]}",
            "created_utc": f"{made:%Y-%m-%dT%H:%M:%SZ}",
            "status": "ok",
            "reason": None,
            "timing": {"block_steps": 1, "block_s": seconds, "train_s": sum(seconds), "steps": len(seconds)},
            "throughput": {"images_per_s": extra["images_per_s"]},
            "roofline": {"share": extra["share_of_limit"]} if "share_of_limit" in extra else None,
            "data": {"name": "noise", "label": "synthetic", "synthetic": True, "sha256": {}},
            "code": about["code"],
        }


def _name(text: str) -> str:
    """With nothing in it that a name may not have."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text)[:100]
