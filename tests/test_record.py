import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_up_records import make

from netdyno.bench import record as records
from netdyno.bench.errors import UserError
from netdyno.bench.record import (
    LARGEST_BYTES,
    check_writable,
    load,
    load_all,
    new_record,
    path_of,
    save,
    save_ceilings,
    save_machine,
)

ROOT = Path(__file__).parents[1]


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    made = make(1, reason="too hot: 90 °C × 2")
    path = save(made, tmp_path)
    assert path == path_of(made, tmp_path)
    assert load(path) == made
    assert files(tmp_path) == ["nvidia-h200/mnist-cnn/tuned-e2e-20261123T120001Z-000001.json"]


def test_a_new_record_has_every_key_and_no_measurement() -> None:
    case, machine = {"workload": "mnist-cnn"}, {"slug": "a"}
    made = new_record(case, machine)
    sections = "timing throughput memory accuracy compile gpu communication roofline data"
    assert " ".join(made) == f"schema id created_utc case status reason {sections} machine code"
    assert (made["schema"], made["case"], made["machine"]) == (1, case, machine)
    assert made["status"] != "ok"  # a run that says nothing more has failed
    assert made["timing"] is made["accuracy"] is made["data"] is None
    assert made["id"][:8] == made["created_utc"][:10].replace("-", "")
    assert new_record(case, machine)["id"] != made["id"]


@pytest.mark.fault("a write that fails half-way")
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "no space left on the disk"), (errno.EROFS, "Read-only file system")]
)
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, says: str
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError, match=f"tuned-e2e-.*json cannot be written: {says}"):
        save(make(1), tmp_path)
    assert files(tmp_path) == []


@pytest.mark.fault("a write that fails half-way")
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(make(1), tmp_path)

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(make(1, reason="newer"), tmp_path)
    assert load(path)["reason"] is None
    assert len(files(tmp_path)) == 1


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"results folder {folder} cannot be written: "):
            check_writable(folder)
        with pytest.raises(UserError, match=r"json cannot be written: "):
            save(make(1), folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_writable_folder_is_made_and_stays_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_nan_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save(make(1, images_per_s=float("nan")), tmp_path)
    assert files(tmp_path) == []


def test_raw_blocks_are_thinned_until_the_record_fits(tmp_path: Path) -> None:
    made = make(1, block_s=[0.001 * number for number in range(9_000)])
    path = save(made, tmp_path)
    assert path.stat().st_size <= LARGEST_BYTES
    timing = load(path)["timing"]
    factor = timing["blocks_thinned_by"]
    assert factor in (8, 16)
    assert timing["block_s"] == made["timing"]["block_s"][::factor]  # in their order, evenly
    assert len(made["timing"]["block_s"]) == 9_000  # the caller's record is left alone
    assert made["timing"]["blocks_thinned_by"] == 1


def test_a_record_of_just_the_largest_size_stays_whole(tmp_path: Path) -> None:
    made = make(1, block_s=[0.1] * 64)
    made["reason"] = "x" * (LARGEST_BYTES - save(made, tmp_path).stat().st_size + len("null") - len('""'))
    assert save(made, tmp_path).stat().st_size == LARGEST_BYTES
    assert load(path_of(made, tmp_path))["timing"]["blocks_thinned_by"] == 1
    made["reason"] += "x"
    save(made, tmp_path)
    assert load(path_of(made, tmp_path))["timing"]["blocks_thinned_by"] == 2


@pytest.mark.fault("a file among the records that is none")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"schema": 1', "not a readable record"),
        (b"\xff\xfe", "not a readable record"),
        (b"", "not a readable record"),
        (b"[1, 2]", "no record of Netdyno"),
        (b'{"status": "ok"}', "no record of Netdyno"),
        (b'{"schema": 2}', "has schema 2; this version reads 1"),
        (b'{"schema": 1}', "id, case, status, machine"),
        (json.dumps(make(1, status="fine")).encode(), "status"),
        (json.dumps(make(1) | {"case": "mnist-cnn"}).encode(), "case"),
        (json.dumps(make(1) | {"machine": None}).encode(), "machine"),
    ],
)
def test_load_refuses_what_is_no_record_and_names_it(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json"):
        load(tmp_path / "none.json")


def test_load_all_is_oldest_first_over_machines_and_workloads(tmp_path: Path) -> None:
    made = [make(3, workload="dcgan"), make(1), make(4, tuning="eager"), make(2, slug="another", tuning="t4")]
    for one in made:
        save(one, tmp_path)
    save(make(9), tmp_path / "local")  # `make bench` writes there
    save_machine(made[0]["machine"], tmp_path)
    save_machine(made[0]["machine"], tmp_path / "local")
    (tmp_path / "TABLES.md").write_text("")
    (path_of(made[0], tmp_path).parent / f"{made[0]['id']}.1.webp").write_bytes(b"")
    assert [record["id"][13:15] for record in load_all(tmp_path)] == ["01", "02", "03", "04"]
    assert load_all(tmp_path / "nowhere") == []


def test_machine_json_holds_the_hardware_and_is_written_once(tmp_path: Path) -> None:
    machine = make(1)["machine"]
    save_machine(machine, tmp_path)
    path = tmp_path / machine["slug"] / "machine.json"
    assert json.loads(path.read_text()) == {name: value for name, value in machine.items() if name != "versions"}
    path.write_text("kept")
    save_machine(machine, tmp_path)
    assert path.read_text() == "kept"


def test_ceilings_replace_earlier_ones_and_outlast_runs(tmp_path: Path) -> None:
    machine = make(1)["machine"]
    path = save_ceilings({"copy_gb_per_s": 1.0, "matmul_fp16_tflops": 2.0}, machine, tmp_path)
    assert path == tmp_path / machine["slug"] / "machine.json"
    save_ceilings({"copy_gb_per_s": 3.0}, machine, tmp_path)
    save_machine(machine, tmp_path)
    hardware = {name: value for name, value in machine.items() if name != "versions"}
    assert json.loads(path.read_text()) == hardware | {"ceilings": {"copy_gb_per_s": 3.0}}


def test_ceilings_keep_what_is_in_the_file(tmp_path: Path) -> None:
    machine = make(1)["machine"]
    save_machine(machine, tmp_path)
    path = tmp_path / machine["slug"] / "machine.json"
    path.write_text(json.dumps({"slug": machine["slug"], "note": "mine"}))
    save_ceilings({"copy_gb_per_s": 3.0}, machine, tmp_path)
    assert json.loads(path.read_text())["note"] == "mine"


@pytest.mark.parametrize("content", ["{", "[]"])
def test_ceilings_do_not_overwrite_a_file_that_is_no_machine(tmp_path: Path, content: str) -> None:
    machine = make(1)["machine"]
    save_machine(machine, tmp_path)
    path = tmp_path / machine["slug"] / "machine.json"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        save_ceilings({"copy_gb_per_s": 3.0}, machine, tmp_path)
    assert path.read_text() == content


def test_the_code_hash_follows_what_decides_a_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("bench", "kernels", "models"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(records, "__file__", str(tmp_path / "bench" / "record.py"))
    seen = {records.code_hash()}

    for name in ("bench/cli.py", "bench/table.py", "bench/progress.py", "bench/stats.py"):
        (tmp_path / name).write_text("# another\n")
    assert records.code_hash() in seen

    imported = re.findall(r"^from \.([a-z_]+) import", (ROOT / "bench" / "child.py").read_text(), re.MULTILINE)
    assert {"fuse", "step", "measure"} < set(imported)
    for name in (
        "bench/child.py",
        *(f"bench/{name}.py" for name in imported if name not in ("data", "errors", "stats")),
        "bench/data/dali.py",
        "kernels/augment.py",
        "models/mnist_cnn.py",
    ):
        source = tmp_path / name
        source.write_text(source.read_text() + "# another\n")
        assert records.code_hash() not in seen, name
        seen.add(records.code_hash())
    (tmp_path / "models" / "new.py").write_text("")
    assert records.code_hash() not in seen
    seen.add(records.code_hash())
    (tmp_path / "models" / "new.py").rename(tmp_path / "models" / "newer.py")
    assert records.code_hash() not in seen


def test_settings_that_came_later_are_as_they_were() -> None:
    record = new_record({"recipe": {"schedule": "constant", "epochs": 2}}, {"slug": "here"})
    content = json.dumps(record).encode()
    assert records.parse(content, Path("a"))["case"]["recipe"] == {
        "schedule": "constant",
        "epochs": 2,
        "basis": "taps",
        "evaluate_every": 1,
    }
    for curve, every in (([{"epoch": 2}], 2), ([{"epoch": math.inf}], 1), ([{}], 1), ([], 1), (None, 1)):
        record["accuracy"] = {"curve": curve}
        assert records.parse(json.dumps(record).encode(), Path("a"))["case"]["recipe"]["evaluate_every"] == every
    record["case"]["recipe"]["basis"] = "frequencies"
    assert records.parse(json.dumps(record).encode(), Path("a"))["case"]["recipe"]["basis"] == "frequencies"


def test_every_source_that_a_run_imports_counts_or_is_known_not_to() -> None:
    script = "import sys, netdyno.bench.child, netdyno.bench.start, netdyno.bench.runner; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    paths = {name.removeprefix("netdyno.").replace(".", "/") for name in loaded if name.startswith("netdyno.")}
    files = {f"{path}.py" for path in paths if (ROOT / f"{path}.py").is_file()}
    assert len(files) > 20
    idle = {  # messages, files, and what is derived from what was measured
        *("bench/errors.py", "bench/inflight.py", "bench/record.py", "bench/stats.py"),
        *("bench/cards.py", "bench/layers.py", "bench/roofline.py"),
    }
    counted = {file for file in files if any(file == name or file.startswith(f"{name}/") for name in records.MEASURES)}
    assert files - counted <= idle
    assert [name for name in records.MEASURES if not (ROOT / name).exists()] == []
