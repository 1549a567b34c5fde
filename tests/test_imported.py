"""Reports of pytest-benchmark as records: real ones, and what is none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_up_records import make

from netdyno.bench import table
from netdyno.bench.errors import UserError
from netdyno.bench.imported import import_benchmarks
from netdyno.bench.schema import read_all

BENCHMARKS = Path(__file__).parent / "benchmarks"


def report() -> dict[str, Any]:
    return {
        "machine_info": {"netdyno": {"machine": make(1)["machine"], "code": "abc"}},
        "datetime": "2026-11-24T12:00:00.123456+01:00",
        "benchmarks": [
            {
                "group": "patches, both ways",
                "name": "test_patches[kernel-gpu]",
                "fullname": "tests/benchmarks/test_x.py::test_patches[kernel-gpu]",
                "extra_info": {"images_per_s": 2000.0, "images": 512, "device": "gpu", "share_of_limit": 0.25},
                "stats": {"median": 0.256, "rounds": 2, "data": [0.256, 0.257]},
            },
            {"group": None, "name": "test_other", "fullname": "other", "extra_info": {}, "stats": {}},
        ],
    }


def write(content: Any, folder: Path) -> Path:
    file = folder / "report.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_a_report_by_hand(tmp_path: Path) -> None:
    file = write(report(), tmp_path)
    (path,) = import_benchmarks(file, tmp_path / "results")
    assert import_benchmarks(file, tmp_path / "results") == [path]  # the same again, not twice
    ((record,), problems) = read_all(tmp_path / "results")
    assert problems == []
    case = record["case"]
    assert (case["workload"], case["tuning"], case["mode"], case["suite"]) == (
        "patches",
        "kernel-gpu",
        "benchmark",
        "benchmark",
    )
    assert record["created_utc"] == "2026-11-24T11:00:00Z"
    assert (record["throughput"]["images_per_s"], record["roofline"]["share"], record["code"]) == (2000.0, 0.25, "abc")
    assert record["timing"]["block_s"] == [0.256, 0.257]
    text = table.to_markdown([record])
    assert "Suite benchmark, synthetic data" in text
    assert "|    2,000 |" in text
    assert "25.0 %" in text
    assert "timing version" not in table.to_markdown([record, make(2)])  # it follows none


def change(path: str, value: Any) -> dict[str, Any]:
    content = report()
    *way, last = path.split(".")
    where: Any = content
    for key in way:
        where = where[int(key) if key.isdigit() else key]
    where[last] = value
    return content


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "report.json"),
        ([], "no report of Netdyno's benchmarks"),
        (change("machine_info", {}), "no report of Netdyno's benchmarks"),
        (change("datetime", "yesterday"), "no report of Netdyno's benchmarks"),
        (change("benchmarks", []), "no benchmark that tells its images/s"),
        (change("benchmarks.0.extra_info", {"images_per_s": "fast", "images": 1}), "images_per_s"),
        (change("machine_info.netdyno.machine.slug", "../../up"), "slug"),
    ],
)
def test_what_is_no_report_is_refused(content: Any, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report\.json") as refused:
        import_benchmarks(write(content, tmp_path), tmp_path / "results")
    assert complaint in str(refused.value)
    assert not (tmp_path / "results").exists()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        import_benchmarks(tmp_path / "gone.json", tmp_path)


def test_a_real_report(tmp_path: Path) -> None:
    """The benchmarks of this project, those of kernels that a CPU takes."""
    file = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(BENCHMARKS),
        "-k",
        "augment or first_layer",
    ]
    done = subprocess.run(
        [*command, "--benchmark-only", f"--benchmark-json={file}"],
        cwd=BENCHMARKS.parents[1],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    import_benchmarks(file, tmp_path / "results")
    records, problems = read_all(tmp_path / "results")
    assert problems == []
    names = {(record["case"]["workload"], record["case"]["tuning"]) for record in records}
    assert {("reference_on_the_cpu", "plain"), ("first_layer", "kernel-cpu"), ("first_layer", "reference-cpu")} <= names
    assert all(record["throughput"]["images_per_s"] > 0 for record in records)
