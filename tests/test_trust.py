"""What tests/trust.py says of records: by made-up ones, since it takes a GPU and half an hour."""

import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trust
from made_up_records import make

from netdyno.bench.record import code_hash
from netdyno.bench.runner import COLD

KERNEL = "void at::native::nll_loss_forward_reduce_cuda_kernel_2d<float>"


class Made(trust.Series):
    """Records that are given, by the name of the copy that would have made them."""

    def __init__(self, **given: list[dict[str, Any]]) -> None:
        super().__init__(Path())
        self.given = given

    def records(
        self, case: str, runs: int, name: str = "calm", planted: trust.Planted | None = None
    ) -> list[dict[str, Any]]:
        return (self.given[name] * runs)[:runs]


@pytest.mark.parametrize(("second", "holds"), [(1003.0, True), (997.0, True), (1006.0, False), (994.0, False)])
def test_pairs(second: float, holds: bool) -> None:
    made = Made(calm=[make(1, images_per_s=1000.0), make(2, images_per_s=second)])
    ((_, _, found, shown),) = trust.pairs(made, trust.SHORT)
    assert f"{second / 1000:.4f}" in found
    assert shown == holds


def test_the_page_holds_the_parts_of_all_runs_and_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "trust.md"
    page.write_text("<!-- trust:begin -->\n<!-- trust:end -->\n")
    monkeypatch.setattr(trust, "PAGE", page)
    (tmp_path / "spin.json").write_text(json.dumps({"on": "one card", "rows": [["spun", "2", "2.1", True]]}))
    assert trust.write_page(tmp_path) == 0
    assert "On one card.\n" in page.read_text()
    (tmp_path / "pairs-dcgan.json").write_text(json.dumps({"on": "another", "rows": [["paired", "1", "1.1", False]]}))
    assert trust.write_page(tmp_path) == 1
    assert page.read_text().index("spun") < page.read_text().index("paired")
    assert "On one card and another.\n" in page.read_text()


@pytest.mark.parametrize(("slower", "holds"), [(1.02, True), (1.0225, True), (1.016, False), (1.03, False)])
def test_spin(monkeypatch: pytest.MonkeyPatch, slower: float, holds: bool) -> None:
    monkeypatch.setattr(trust, "units_for", lambda seconds: 1)
    calm = make(1, images_per_s=1020.0, train_s=2.0, steps=10)
    (row,) = trust.spin(Made(calm=[calm], spin=[make(2, images_per_s=1020.0 / slower)]))
    assert (row[2], row[3]) == (f"{100 * (slower - 1):.2f} %", holds)


@pytest.mark.parametrize(("peak", "holds"), [(300.0, True), (302.1, False), (297.9, False)])
def test_allocation(peak: float, holds: bool) -> None:
    made = Made(calm=[make(1, peak_allocated_mib=200.0)], hoard=[make(2, peak_allocated_mib=peak)])
    (row,) = trust.allocation(made)
    assert row[3] == holds


@pytest.mark.parametrize(("counted", "holds"), [(1370.0, True), (1304.0, False), (1443.0, False)])
def test_memory(monkeypatch: pytest.MonkeyPatch, counted: float, holds: bool) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, "518.0\n" if command[-1] == "context_mib" else "228.0\n")

    monkeypatch.setattr(trust.subprocess, "run", run)
    held = make(1)
    held["memory"] |= {"libraries_mib": 150.0, "peak_reserved_mib": 474.0, "nvml_process_mib": counted}
    rows = list(trust.memory(Made(calm=[held])))
    assert len(rows) == len(trust.PAIRS)
    assert rows[0][2].startswith("context 518 + loaders 228 + libraries 150 + torch 474 = 1,370 against")
    assert {row[3] for row in rows} == {holds}


@pytest.mark.parametrize(("unsampled", "holds"), [(1004.0, True), (996.0, True), (1006.0, False), (994.0, False)])
def test_sampling(unsampled: float, holds: bool) -> None:
    made = Made(calm=[make(1, images_per_s=1000.0)], deaf=[make(2, images_per_s=unsampled)])
    (row,) = trust.sampling(made)
    assert row[3] == holds


@pytest.mark.parametrize(("harnessed", "holds"), [(1.004, True), (0.996, True), (1.006, False), (0.994, False)])
def test_harness(tmp_path: Path, harnessed: float, holds: bool) -> None:
    made = Made(bare=[make(1)])
    made.folder = tmp_path
    (tmp_path / "bare.json").write_text(json.dumps([[2 * harnessed, 2.0], [harnessed, 1.0], [9.0, 1.0]]))
    (row,) = trust.harness(made)
    assert (row[2], row[3]) == (f"{100 * (harnessed - 1):+.2f} %", holds)


@pytest.mark.parametrize(("end", "holds"), [(985.0, True), (1019.0, True), (979.0, False), (1021.0, False)])
def test_sustained(tmp_path: Path, end: float, holds: bool) -> None:
    made = Made(sustained=[make(1)])
    made.folder = tmp_path
    runs = [(5.0, 1000.0), (10.0, 1000.0), (100.0, 1.0), (300.0 - trust.EDGE_S / 2, end), (300.0, end)]
    (tmp_path / "sustained.json").write_text(json.dumps(runs))
    (row,) = trust.sustained(made)
    assert f"1,000, then {end:,.0f} images/s" in row[2]
    assert row[3] == holds


def test_what_is_planted_around_the_timed_region_does_what_it_says(tmp_path: Path) -> None:
    def timed(workload: Any, step: Any, loader: Any, device: Any, begin: Any, emit: Any) -> str:
        emit(timed=True)
        for _ in range(workload.recipe.epochs):
            for batch in loader.epoch():
                step(batch.images, batch.labels)
        emit(section="timing", value={"train_s": 7.0})
        emit(section="throughput", value={"images_per_s": 3.0})
        return "memory"

    steps: list[str] = []

    def step(images: str, labels: str) -> torch.Tensor:
        steps.append(images + labels)
        return torch.zeros(())

    told: list[dict[str, Any]] = []
    workload = SimpleNamespace(recipe=SimpleNamespace(epochs=2))
    loader = SimpleNamespace(epoch=lambda: [SimpleNamespace(images="a", labels="b")] * 3)
    path = tmp_path / "found"
    for planted, runs in (
        (trust.BARE.format(turns=2, path=path), 5),
        (trust.SUSTAINED.format(seconds=0, path=path), 2),
    ):
        code: dict[str, Any] = {"time_batches": timed, "time": time, "json": json, "Path": Path}
        exec(planted, code)
        assert code["time_batches"](workload, step, loader, "cpu", None, lambda **event: told.append(event)) == "memory"
        assert steps == ["ab"] * 6 * runs
        assert len(json.loads(path.read_text())) == runs // 2
        steps.clear()
    assert [event.get("section") for event in told] == [None, "timing", "throughput"] * 2  # of the last run alone


def test_a_planted_copy_starts_from_the_compiled_code_of_the_calm_one(tmp_path: Path) -> None:
    series = trust.Series(tmp_path)
    series.checkout("calm", None)
    compiled = tmp_path / "cache-calm" / "netdyno" / "compile" / "case"
    compiled.mkdir(parents=True)
    (compiled / "code.py").write_text("x")
    (compiled / COLD).write_text(json.dumps({"code": "calm", "compile": {"cold_s": 1.0}}))
    slow = series.checkout("spin", trust.in_each_step(trust.SPIN.format(units=3)))
    taken = Path(slow.environment["XDG_CACHE_HOME"]) / "netdyno" / "compile" / "case"
    assert (taken / "code.py").read_text() == "x"
    kept = json.loads((taken / COLD).read_text())
    assert kept["compile"] == {"cold_s": 1.0}
    assert kept["code"] not in ("calm", code_hash())  # its own, by which it knows that nothing is to be compiled anew
    assert "spin(3, device)" in (slow.tree / "bench" / "step.py").read_text()


def test_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "BUSY", "import time; time.sleep(60)")
    seen = make(1, gpu={"other_processes": 1, "readings": 9})
    assert next(trust.busy(Made(beside=[seen])))[3]
    assert next(trust.busy(Made(beside=[make(1, gpu={"other_processes": 0, "readings": 9})])))[2:] == ("nothing", False)


def test_a_trace_by_hand() -> None:
    """Three losses of 128 images, 20 µs apart; what is no kernel does not count, nor what comes before and after."""
    events = [
        {"cat": "cpu_op", "name": KERNEL, "ts": 0, "dur": 100},
        {"cat": "kernel", "name": "gemm", "ts": 1, "dur": 5},
        *({"cat": "kernel", "name": KERNEL, "ts": start, "dur": 2} for start in (10, 30, 50)),
        {"cat": "kernel", "name": "gemm", "ts": 53, "dur": 30},
    ]
    found = trust.traced_images_per_s({"traceEvents": events}, make(1, steps=3))
    assert found == pytest.approx(128 / 20e-6)
    with pytest.raises(AssertionError, match="3 losses of 4 steps"):
        trust.traced_images_per_s({"traceEvents": events}, make(1, steps=4))


def test_what_is_planted_stands_at_the_end_of_files_that_are_there(tmp_path: Path) -> None:
    planted = {"child.py": trust.TRACED.format(path="there"), **trust.DEAF, **trust.in_each_step("pass")}
    tree = trust.copy(tmp_path / "copy", tmp_path / "cache", planted).tree
    for name, text in planted.items():
        code = (tree / "bench" / name).read_text()
        assert code == (trust.ROOT / "bench" / name).read_text() + text
        compile(code, name, "exec")


@pytest.mark.parametrize(
    ("sampled", "source", "train_s", "holds"),
    [
        (1040.0, "counter", 15.0, True),
        (1060.0, "counter", 15.0, False),
        (1000.0, "counter", 9.0, False),
        (1000.0, "sampled", 15.0, False),
    ],
)
def test_energy(sampled: float, source: str, train_s: float, holds: bool) -> None:
    gpu = {"energy_j": 1000.0, "energy_source": source, "energy_sampled_j": sampled}
    (row,) = trust.energy(Made(calm=[make(1, gpu=gpu, train_s=train_s)]))
    assert row[3] == holds
