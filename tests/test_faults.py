"""Runs that are cut off, stall or find no room: nothing that was written is lost, and nothing is left behind.

Suites run by the command line itself, in processes of their own, which are killed at random moments. Most of them have
a stand-in for the child, so that a kill takes a second; the last ones train.
"""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from faults import Tell, times
from made_up_records import make
from test_prepared import write_mnist

from netdyno.bench import gpu, inflight, runner, schema
from netdyno.bench.errors import UserError
from netdyno.bench.record import load_all, paths_in, save, write_locked
from netdyno.bench.workloads import Case

MACHINE = {"slug": "some-machine", "gpu": None, "versions": {}}
EAGER = Case(workload="mnist-cnn", suite="quick", tuning="eager")
MARK = "NETDYNO_TEST_OF_FAULTS"  # in the environment of every process that a test starts
LEDGER = "NETDYNO_TEST_LEDGER"

# Like a child it has a worker, which looks for its parent as torch's do, and ends with its own parent.
STAND_IN = """
import json, os, signal, sys, threading, time
order = json.loads(sys.stdin.readline())
with open(os.environ["NETDYNO_TEST_LEDGER"], "a") as ledger:
    ledger.write("started\\n")
child = os.getpid()
if not os.fork():
    os.close(1)
    while os.getppid() == child:
        time.sleep(0.1)
    os._exit(0)
threading.Thread(target=lambda: (os.read(0, 1), os.killpg(0, signal.SIGKILL)), daemon=True).start()
def emit(**event):
    print(json.dumps(event), flush=True)
hashes = HASHES
emit(section="data", value={"name": "mnist", "sha256": hashes, "synthetic": False, "label": "official"})
emit(stage="train", epochs=1, steps=2)
with open(order["pictures"] + "/1.webp", "wb") as file:
    file.write(b"picture")
time.sleep(0.05)
emit(section="timing", value={"timing_version": 1, "block_s": [0.1, 0.2], "blocks_thinned_by": 1})
emit(section="throughput", value={"images_per_s": 1000.0})
emit(section="accuracy", value={"metric": "test accuracy", "unit": "%", "final": 99.0, "best": 99.0, "target": None,
    "curve": [{"epoch": 1, "metric": 99.0}]})
os._exit(0)
"""


def play(arguments: list[str], environment: dict[str, str], child: tuple[str, ...] | None, log: Path) -> None:
    """One `netdyno` command, in a process that was forked for it."""
    from netdyno.bench import cli

    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in the background ignore it
    if child is not None:
        runner.CHILD = child
    if "--parallel" in arguments:
        gpu.Gpu.cards = staticmethod(lambda: dict.fromkeys(("GPU-a", "GPU-b"), "a card"))  # type: ignore[method-assign]
    sys.argv = ["netdyno", *arguments]
    cli.main()


@pytest.fixture(scope="module")
def forks() -> Any:
    """A server that has imported everything, so that a suite starts in tenths of a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [f"netdyno.bench.{name}" for name in ("cli", "runner", "machine", "data.dali", "data.weights", "table")]
    )
    warm_up = context.Process()
    warm_up.start()
    warm_up.join()
    return context


@dataclass(kw_only=True)
class Suite:
    """A suite of `repeats` runs of one case, and all that is known about it."""

    forks: Any
    folder: Path
    child: tuple[str, ...] | None  # None: the real one
    repeats: int
    cards: int = 1
    lost: list[str] = field(default_factory=list)
    kills: int = 0
    seen: dict[Path, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.ledger.touch()
        self.temporary = Path(tempfile.mkdtemp(prefix="netdyno-test-"))  # a short path: sockets lie in it

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger"

    def start(self, *options: str) -> Any:
        arguments = ["run", "mnist-cnn", "--tuning", "eager", "--repeats", str(self.repeats), *options]
        arguments += ["--results", str(self.results), "--data", str(self.folder.parent / "data")]
        arguments += ["--parallel"] if self.cards > 1 else []
        environment = {
            "TMPDIR": str(self.temporary),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            MARK: str(self.folder),
            LEDGER: str(self.ledger),
        }
        process = self.forks.Process(target=play, args=(arguments, environment, self.child, self.folder / "log"))
        process.start()
        return process

    def kill(self, process: Any, number: signal.Signals) -> None:
        """Kills the suite and looks at what it left: what was there before is there as it was, and all is whole."""
        os.kill(process.pid, number)
        self.kills += 1
        process.join(30)
        if process.is_alive():
            self.lost.append(f"{number.name} does not end it")
            process.kill()
            process.join()
        if left := survivors(self.folder):
            self.lost.append(f"processes that outlive it: {left}")
        for path, content in self.seen.items():
            if not path.exists() or path.read_bytes() != content:
                self.lost.append(f"{path} after {number.name}")
        records, problems = schema.read_all(self.results)
        self.lost += problems
        if sum(record["status"] == "ok" for record in records) > self.repeats:
            self.lost.append("a case ran again though it was recorded")
        self.seen = {path: path.read_bytes() for path in paths_in(self.results)}

    def end(self) -> None:
        """What must be there after a start that came to its end."""
        records, problems = schema.read_all(self.results)
        self.lost += problems
        ended = [record["status"] for record in records]
        started = self.ledger.read_text().count("started")
        if ended.count("ok") != self.repeats or set(ended) - {"ok", "killed"}:
            self.lost.append(f"records: {ended}")
        if self.child is not None and not started <= len(records) <= started + self.kills * self.cards:
            self.lost.append(f"{len(records)} records of {started} children after {self.kills} kills")
        files = {path for path in self.results.rglob("*") if path.is_file()}
        listed = {
            path.with_name(picture["file"])
            for path, record in zip(paths_in(self.results), records, strict=True)
            for picture in (record["accuracy"] or {}).get("pictures", [])
        }
        left = files - listed - {*paths_in(self.results)} - {*self.results.glob("*/machine.json")}
        left = {path for path in left if not path.name.endswith(".stderr.txt")}  # of a child that was interrupted
        for path in self.temporary.iterdir():
            if path.is_dir() or path.read_bytes() != b"blat":  # Python's own trial of its temporary folder
                left.add(path)
        shutil.rmtree(self.temporary)
        if left:
            self.lost.append(f"left behind: {sorted(left)}")


def survivors(folder: Path, patience_s: float = 10.0) -> list[str]:
    """The processes of a suite that are still there after a while, killed then."""
    end = time.monotonic() + patience_s
    while (found := processes_of(folder)) and time.monotonic() < end:
        time.sleep(0.01)
    names = []
    for pid in found:
        try:
            names.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:100])
            os.kill(pid, signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue
    return names


def processes_of(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if f"{MARK}={folder}\0".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


def kill_suites(make_suite: Callable[[int], Suite], kills: int, number: signal.Signals) -> list[str]:
    """Starts suites, kills them at random moments and resumes them, until there were so many kills; what was lost."""
    chance = random.Random(number)
    whole = make_suite(0)
    begun = time.monotonic()
    whole.start().join()
    lasts_s = time.monotonic() - begun
    whole.end()
    lost = whole.lost
    killed = round_ = 0
    while killed < kills:
        round_ += 1
        suite = make_suite(round_)
        while True:
            process = suite.start("--resume")
            process.join(chance.uniform(0, lasts_s) if killed < kills else None)
            if not process.is_alive():
                break
            try:
                suite.kill(process, number)
            except ProcessLookupError:  # it came to its end after all
                break
            killed += 1
        suite.end()
        lost += suite.lost
    return lost


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    from netdyno.bench.data import prepared

    write_mnist(tmp_path / "data", train=600, test=100)
    return {split: prepared.load("mnist", split, tmp_path / "data").sha256 for split in ("train", "test")}


@pytest.fixture
def stand_in(data: dict[str, str]) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", STAND_IN.replace("HASHES", repr(data)))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.fault("the suite killed at a random moment")
def test_killed_suites(
    forks: Any, tmp_path: Path, stand_in: tuple[str, ...], number: signal.Signals, record_property: Tell
) -> None:
    kills = times(5, {signal.SIGKILL: 200}.get(number, 50))

    def suite(round_: int) -> Suite:
        return Suite(forks=forks, folder=tmp_path / str(round_), child=stand_in, repeats=6)

    lost = kill_suites(suite, kills, number)
    record_property("tried", kills)
    record_property("lost", len(lost))
    assert not lost


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.fault("a suite on two cards killed at a random moment")
def test_killed_suites_on_two_cards(
    forks: Any, tmp_path: Path, stand_in: tuple[str, ...], number: signal.Signals, record_property: Tell
) -> None:
    """The cards are two names; what runs on them are stand-ins as in the test above, two at a time."""
    kills = times(5, 50)

    def suite(round_: int) -> Suite:
        return Suite(forks=forks, folder=tmp_path / str(round_), child=stand_in, repeats=6, cards=2)

    lost = kill_suites(suite, kills, number)
    record_property("tried", kills)
    record_property("lost", len(lost))
    assert not lost


@pytest.mark.slow
@pytest.mark.fault("the suite killed by SIGKILL at a random moment, with real training")
def test_killed_training(forks: Any, tmp_path: Path, data: dict[str, str], record_property: Tell) -> None:
    kills = times(1, 20)

    def suite(round_: int) -> Suite:
        return Suite(forks=forks, folder=tmp_path / str(round_), child=None, repeats=1)

    lost = kill_suites(suite, kills, signal.SIGKILL)
    record_property("tried", kills)
    record_property("lost", len(lost))
    assert not lost


@pytest.mark.slow
@pytest.mark.fault("ten runs at once that write to one results folder")
def test_ten_writers(forks: Any, tmp_path: Path, stand_in: tuple[str, ...], record_property: Tell) -> None:
    suite = Suite(forks=forks, folder=tmp_path / "shared", child=stand_in, repeats=3)
    rounds = times(1, 10)
    for _ in range(rounds):
        writers = [suite.start("--seed", str(seed)) for seed in range(10)]
        for writer in writers:
            writer.join()
    records = load_all(suite.results)
    of_seed = {seed: sum(record["case"]["seed"] == seed for record in records) for seed in range(10)}
    record_property("tried", 10 * rounds)
    record_property("lost", 30 * rounds - len(records))
    assert of_seed == dict.fromkeys(range(10), 3 * rounds)
    assert {record["status"] for record in records} == {"ok"}  # nobody took another's case for one that was cut off
    suite.repeats = len(records)
    suite.end()
    assert suite.lost == []


def rank_of(folder: Path, rank: int) -> int | None:
    """The process of one rank of a run; None before there is one."""
    for pid in processes_of(folder):
        with suppress(OSError):
            what = Path(f"/proc/{pid}/cmdline").read_bytes(), Path(f"/proc/{pid}/environ").read_bytes()
            if b"netdyno.bench.start\0{" in what[0] and f"\0RANK={rank}\0".encode() in what[1]:
                return pid
    return None


@pytest.mark.slow
@pytest.mark.fault("a rank killed at a random moment")
def test_killed_ranks(
    tmp_path: Path, data: dict[str, str], monkeypatch: pytest.MonkeyPatch, record_property: Tell
) -> None:
    """One of two, that train on the CPU: the other one ends too, and the record says whose fault it was."""
    monkeypatch.setenv(MARK, str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    results, case = tmp_path / "results", replace(EAGER, gpus=2)
    chance, kills, killed = random.Random(8), times(1, 10), 0
    lost: list[str] = []
    ended = threading.Event()
    moments: list[float] = []  # of the start of a rank, and of its end or its kill

    def kill(rank: int, after_s: float) -> None:
        while (pid := rank_of(tmp_path, rank)) is None and not ended.wait(0.01):
            continue
        moments.append(time.monotonic())
        if pid is not None and not ended.wait(after_s):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        moments.append(time.monotonic())

    def run(rank: int, after_s: float) -> dict[str, Any]:
        ended.clear()
        moments.clear()
        killer = threading.Thread(target=kill, args=(rank, after_s))
        killer.start()
        record = runner.run(case, data=tmp_path / "data", results=results, machine=MACHINE, listen=lambda event: None)
        ended.set()
        killer.join()
        return record

    whole = run(0, 600.0)
    assert whole["status"] == "ok", whole["reason"]
    lasts_s = moments[1] - moments[0]
    while killed < kills:
        rank = chance.randrange(2)
        record = run(rank, chance.uniform(0, lasts_s))
        took_s = time.monotonic() - moments[1]
        if record["status"] == "ok":  # it was faster this time
            continue
        killed += 1
        if (record["status"], record["reason"]) != ("failed", f"rank {rank} was ended by SIGKILL"):
            lost.append(f"{record['status']}: {record['reason']}")
        if took_s > 60:
            lost.append(f"the other rank lived on for {took_s:.0f} s")
        lost += [f"processes that outlive it: {left}" for left in survivors(tmp_path)]
    records, problems = schema.read_all(results)
    lost += problems
    assert len([record for record in records if record["status"] == "failed"]) == kills
    assert [path for path in results.rglob(".*") if path.is_file()] == []
    record_property("tried", kills)
    record_property("lost", len(lost))
    assert not lost


# one case, in this process


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a case whose child is `script`, or the real one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def go(script: str | None, results: Path = tmp_path / "results") -> dict[str, Any]:
        if script is not None:
            command = (
                sys.executable,
                "-X",
                "faulthandler",
                "-I",
                "-S",
                "-c",
                "import sys; sys.stdin.readline()\n" + script,
            )
            monkeypatch.setattr(runner, "CHILD", command)
        return runner.run(EAGER, data=tmp_path / "data", results=results, machine=MACHINE, listen=lambda event: None)

    return go


def said(results: Path) -> str:
    [path] = results.glob("*/*/*.stderr.txt")
    return path.read_text()


@pytest.mark.slow
@pytest.mark.fault("a step that stalls")
def test_a_real_child_that_stalls_says_where(
    go: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_mnist(tmp_path / "data") / "train.images.npy"
    images.unlink()
    os.mkfifo(images)  # whoever opens it waits for ever
    monkeypatch.setattr(runner, "STALL_S", 40.0)  # more than its imports take
    record = go(None)
    assert (record["status"], record["reason"]) == ("timeout", "no word from the child for 40 s")
    assert "in _open_array" in said(tmp_path / "results")


@pytest.mark.fault("a step that stalls")
def test_a_stalled_child_that_does_not_answer_is_ended(
    go: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "STALL_S", 0.5)
    monkeypatch.setattr(runner, "POLL_S", 0.05)
    monkeypatch.setattr(runner, "DUMP_S", 0.5)
    record = go("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
    assert record["status"] == "timeout"


DEATHS = {
    "a child killed by the kernel": ("import os; os.kill(os.getpid(), 9)", "killed", "SIGKILL"),
    "a child that crashes": ("import ctypes; ctypes.string_at(0)", "killed", "SIGSEGV"),
    "a card that fails: a CUDA error": (
        'print(\'{"status": "failed", "reason": "AcceleratorError: CUDA error: unspecified launch failure"}\')',
        "failed",
        "CUDA error",
    ),
}


@pytest.mark.parametrize("fault", [pytest.param(name, marks=pytest.mark.fault(name)) for name in DEATHS])
def test_the_next_case_has_a_fresh_process(go: Callable[..., dict[str, Any]], tmp_path: Path, fault: str) -> None:
    script, status, reason = DEATHS[fault]
    record = go(script)
    assert record["status"] == status
    assert reason in record["reason"]
    if "crashes" in fault:
        assert "Segmentation fault" in said(tmp_path / "results")
    assert go('print(\'{"section": "timing", "value": {"block_s": [], "blocks_thinned_by": 1}}\')')["status"] == "ok"
    assert len(load_all(tmp_path / "results")) == 2


# disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.fault("a full disk")
def test_records_on_a_disk_that_fills(small_disk: Path) -> None:
    saved: list[dict[str, Any]] = []

    def save_one_more() -> None:
        made = make(len(saved) % 60, id=f"20261123T120000Z-{len(saved):06x}")
        save(made, small_disk)
        saved.append(made)

    def save_many() -> None:
        while len(saved) < 1_000:
            save_one_more()

    with pytest.raises(UserError, match="no space left on the disk"):
        save_many()
    assert 20 < len(saved) < 100
    assert load_all(small_disk) == saved
    assert [*small_disk.rglob(".*")] == []


@pytest.mark.fault("a full disk")
def test_a_disk_that_is_full_before_a_case(go: Callable[..., dict[str, Any]], small_disk: Path, tmp_path: Path) -> None:
    fill(small_disk)
    with pytest.raises(UserError, match="no space left on the disk"):
        go("open('/nowhere/else')", small_disk / "results")
    assert load_all(small_disk / "results") == []


@pytest.mark.fault("a full disk")
def test_a_disk_that_fills_during_a_case(go: Callable[..., dict[str, Any]], small_disk: Path) -> None:
    script = f"""
print('{{"section": "timing", "value": {{"block_s": [0.1], "blocks_thinned_by": 1}}}}')
with open({str(small_disk / "filler")!r}, "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
"""
    with pytest.raises(UserError, match="no space left on the disk"):
        go(script, small_disk)
    assert load_all(small_disk) == []
    (small_disk / "filler").unlink()
    [record] = inflight.sweep(small_disk / MACHINE["slug"])  # its mark had found room
    assert load_all(small_disk) == [record]
    assert (record["status"], record["reason"]) == ("killed", inflight.CUT_OFF)


@pytest.mark.fault("a results folder that is read-only")
def test_a_read_only_folder(small_disk: Path, forks: Any) -> None:
    made = make(1)
    save(made, small_disk / "results")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match="Read-only file system"):
        save(make(2), small_disk / "results")
    command = [sys.executable, "-m", "netdyno.bench", "run", "mnist-cnn", "--results", small_disk / "results"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "cannot be written: Read-only file system" in ended.stderr
    assert load_all(small_disk / "results") == [made]


# what is left, and whose it is


def test_sweep_leaves_alone_what_somebody_holds(tmp_path: Path) -> None:
    folder = tmp_path / MACHINE["slug"]
    with (
        inflight.in_flight(make(1) | {"machine": MACHINE}, tmp_path) as scratch,
        write_locked(folder / "mnist-cnn" / ".some.json.0123abcd.tmp", b"half"),
    ):
        before = {*folder.rglob("*")}
        assert inflight.sweep(folder) == []
        assert {*folder.rglob("*")} == before
        assert scratch.is_dir()
    assert not scratch.exists()
    [record] = inflight.sweep(folder)  # nobody wrote it
    assert {path for path in folder.rglob("*") if path.is_file()} == {*paths_in(tmp_path)}
    assert record == make(1) | {"machine": MACHINE, "status": "killed", "reason": inflight.CUT_OFF}
    assert inflight.sweep(folder) == []


def test_sweep_removes_what_belongs_to_nobody(tmp_path: Path) -> None:
    with inflight.in_flight(make(1), tmp_path):
        path = save(make(1), tmp_path)
        mark = path.with_name(f".{path.name}{inflight.MARK}")
        kept = mark.read_bytes()
    mark.write_bytes(kept)  # cut off between the record and the end of its mark
    (path.parent / ".x.json.0123abcd.tmp").write_bytes(b"half")
    theirs = [".editor.json.tmp", ".theirs.json.running", f".x-{make(3)['id']}.json.running"]
    for name in theirs:
        (path.parent / name).write_bytes(b"nothing of ours")
    assert inflight.sweep(path.parent.parent) == []
    assert sorted(entry.name for entry in path.parent.iterdir()) == [*theirs, path.name]
    assert load_all(tmp_path) == [make(1)]


def test_a_picture_without_its_record_is_removed(tmp_path: Path) -> None:
    with inflight.in_flight(make(1), tmp_path):
        [mark] = tmp_path.glob("*/*/.*")
        (mark.parent / f"{make(1)['id']}.1.webp").write_bytes(b"half of what the record would have listed")
    inflight.sweep(tmp_path / make(1)["machine"]["slug"])
    assert [path.suffix for path in mark.parent.iterdir()] == [".json"]
