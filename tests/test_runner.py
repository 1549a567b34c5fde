"""The parent of a run, with small scripts for its children: what they say, how they end, what becomes of it."""

import _thread
import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from netdyno.bench import runner
from netdyno.bench.errors import UserError
from netdyno.bench.order import Order
from netdyno.bench.record import load, load_all, path_of
from netdyno.bench.runner import Post, run
from netdyno.bench.schema import problems
from netdyno.bench.workloads import Case

MACHINE = {"slug": "some-machine", "gpu": None, "versions": {"torch": "2.11.0"}}
EAGER = Case(workload="mnist-cnn", suite="quick", tuning="eager", seed=3)
TUNED = Case(workload="mnist-cnn", suite="quick", tuning="tuned")
T4 = Case(workload="mnist-cnn", suite="quick", tuning="t4")

PREAMBLE = """
import json, os, signal, subprocess, sys, time
order = json.loads(sys.stdin.readline())

def emit(**event):
    print(json.dumps(event), flush=True)

def measure(images_per_s=1000.0):
    emit(stage="train", epochs=1, steps=2)
    emit(timed=True)
    emit(section="timing", value={"block_s": [0.1, 0.2], "blocks_thinned_by": 1})
    emit(section="throughput", value={"images_per_s": images_per_s})

def forever():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
"""


class Events(list[dict[str, Any]]):
    def __call__(self, event: dict[str, Any]) -> None:
        self.append(event)


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a case whose children are `script`; returns the record as it lies on the disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def go(script: str, case: Case = EAGER, listen: Any = None, **options: Any) -> dict[str, Any]:
        monkeypatch.setattr(runner, "CHILD", (sys.executable, "-I", "-S", "-c", PREAMBLE + script))
        record = run(
            case,
            data=tmp_path / "data",
            results=tmp_path / "results",
            machine=MACHINE,
            listen=Events() if listen is None else listen,
            **options,
        )
        stored = load(path_of(record, tmp_path / "results"))
        assert stored == json.loads(json.dumps(record))
        return stored

    return go


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    """Whether a process that was killed is gone; the kernel may take a moment."""
    end = time.monotonic() + 5
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


def test_the_sections_of_a_run_are_merged(go: Any) -> None:
    events = Events()
    record = go(
        """
emit(section="data", value={"name": "mnist"})
measure()
emit(section="throughput", value={"images_per_s": 2000.0})
emit(section="throughput", value={"eval_images_per_s": 5.0})
emit(section="memory", value={"host_rss_peak_mib": 10.0, "limit_mib": None})
""",
        listen=events,
    )
    assert (record["status"], record["reason"]) == ("ok", None)
    assert record["throughput"] == {"images_per_s": 2000.0, "eval_images_per_s": 5.0}
    assert record["timing"]["block_s"] == [0.1, 0.2]
    assert record["memory"] == {"host_rss_peak_mib": 10.0, "limit_mib": None, "nvml_process_peak_mib": None}
    assert record["case"]["workload"] == "mnist-cnn"
    assert record["case"]["seed"] == 3
    assert record["case"]["recipe"]["batch_size"] == 128
    assert record["machine"] == MACHINE
    assert record["compile"] is record["gpu"] is None
    assert [*events[0]] == ["section", "value"]
    assert len(events) == 8


def test_the_child_keeps_bytecode_in_the_cache_where_it_must_not_lie_beside_the_sources(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    say = f"measure(); emit(section='data', value={{name: os.environ.get(name) for name in {names}}})"
    for write_none, prefix, found in (
        ("1", None, str(tmp_path / "cache" / "netdyno" / "bytecode")),
        ("1", "own", "own"),
        (None, None, None),
    ):
        for name, value in zip(names, (write_none, prefix), strict=True):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert go(say)["data"] == {names[0]: None, names[1]: found}


def test_the_child_gets_its_order(go: Any, tmp_path: Path) -> None:
    before = time.time()
    record = go("measure(); emit(section='data', value=order)")
    order = Order.from_json(json.dumps(record["data"]))
    assert order.case == EAGER
    assert order.data == tmp_path / "data"
    assert before <= order.started <= time.time()
    assert (order.compile_only, order.trace) == (False, None)


@pytest.mark.fault("a child that fails, is killed or says nonsense")
@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed", "the child was ended by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed", "the child was ended by SIGSEGV"),
        ("print('{\"stage', end='', flush=True); os.kill(os.getpid(), 9)", "killed", "the child was ended by SIGKILL"),
        ("print('one\\ntwo\\n\\n', file=sys.stderr); sys.exit(3)", "failed", "the child ended with exit code 3: two"),
        ("sys.exit(3)", "failed", "the child ended with exit code 3: it said nothing"),
        ("raise ValueError('no good')", "failed", "the child ended with exit code 1: ValueError: no good"),
        ("emit(status='diverged', reason='nan'); sys.exit(1)", "diverged", "nan"),
        ("emit(status='oom', reason='full')", "oom", "full"),
        ("print('hello', flush=True)", "failed", "the child said what is no event: 'hello'"),
        ("print('[1]', flush=True)", "failed", "the child said what is no event: '[1]'"),
        ("sys.stdout.buffer.write(b'\\xff\\xfe\\n')", "failed", "the child said what is no event: '\ufffd\ufffd'"),
    ],
)
def test_every_end_is_told_and_keeps_what_was_measured(go: Any, script: str, status: str, reason: str) -> None:
    record = go(f"measure()\n{script}")
    assert (record["status"], record["reason"]) == (status, reason)
    assert record["throughput"] == {"images_per_s": 1000.0}
    assert record["timing"]["block_s"] == [0.1, 0.2]


def test_what_follows_a_strange_line_counts(go: Any) -> None:
    record = go("print('some library says hello', flush=True); measure(7.0)")
    assert record["status"] == "failed"
    assert record["throughput"]["images_per_s"] == 7.0


def test_a_child_that_measures_nothing_has_failed(go: Any) -> None:
    record = go("emit(stage='data')")
    assert (record["status"], record["reason"]) == ("failed", "the child ended without a measurement")


def test_a_child_that_never_reads_its_order(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = runner.subprocess.Popen

    def slow(*arguments: Any, **options: Any) -> Any:
        child = popen(*arguments, **options)
        child.wait()  # so that its end of the pipe is closed when the order is written
        return child

    monkeypatch.setattr(runner.subprocess, "Popen", slow)
    monkeypatch.setattr(
        sys.modules[__name__], "PREAMBLE", "import sys; print('no torch', file=sys.stderr); sys.exit(1)"
    )
    record = go("")
    assert (record["status"], record["reason"]) == ("failed", "the child ended with exit code 1: no torch")


def test_a_failure_leaves_its_traceback_beside_the_record(go: Any, tmp_path: Path) -> None:
    record = go("print('x' * 50_000, file=sys.stderr); print('trace', file=sys.stderr); sys.exit(1)")
    path = path_of(record, tmp_path / "results").with_name(f"{record['id']}.stderr.txt")
    assert path.read_text().endswith("xxx\ntrace\n")
    assert path.stat().st_size == runner.STDERR_KEPT
    record = go("print('a warning', file=sys.stderr); measure()")
    assert not path_of(record, tmp_path / "results").with_name(f"{record['id']}.stderr.txt").exists()
    assert len(load_all(tmp_path / "results")) == 2


SILENT_WITH_A_WORKER = """
measure()
emit(section="data", value={"pids": [os.getpid(), forever().pid]})
time.sleep(600)
"""


@pytest.mark.fault("a step that stalls")
def test_silence_ends_the_child_and_its_workers(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "STALL_S", 1.0)
    monkeypatch.setattr(runner, "POLL_S", 0.05)
    threads = threading.active_count()
    record = go(SILENT_WITH_A_WORKER)
    assert (record["status"], record["reason"]) == ("timeout", "no word from the child for 1 s")
    assert record["throughput"] == {"images_per_s": 1000.0}
    assert all(gone(pid) for pid in record["data"]["pids"])
    end = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == threads


SILENT_RANK = """
rank = subprocess.Popen([sys.executable, "-X", "faulthandler", "-c", "import time; time.sleep(600)"])
emit(pids=[rank.pid], restarts=0)
measure()
rank.wait()
time.sleep(600)
"""


def test_what_a_silent_rank_was_at_stands_beside_its_record(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "STALL_S", 2.0)
    monkeypatch.setattr(runner, "DUMP_S", 1.0)
    record = go(SILENT_RANK)
    assert record["status"] == "timeout"
    said = path_of(record, tmp_path / "results").with_name(f"{record['id']}.stderr.txt").read_text()
    assert "Fatal Python error: Aborted" in said
    assert 'File "<string>", line 1' in said


@pytest.mark.fault("a step that stalls")
def test_a_child_that_closes_its_output_but_stays_is_ended(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "STALL_S", 0.5)
    record = go("measure(); emit(section='data', value={'pid': os.getpid()}); os.close(1); time.sleep(600)")
    assert record["status"] == "timeout"
    assert gone(record["data"]["pid"])


@pytest.mark.parametrize(("end", "status"), [("", "ok"), ("os.kill(os.getpid(), signal.SIGKILL)", "killed")])
def test_a_worker_that_outlives_the_child_holds_nobody_up(go: Any, end: str, status: str) -> None:
    start = time.monotonic()
    record = go(f"measure(); emit(section='data', value={{'pid': forever().pid}})\n{end}")
    assert record["status"] == status
    assert time.monotonic() - start < 20
    assert gone(record["data"]["pid"])


@pytest.mark.usefixtures("_heeds_ctrl_c")
def test_ctrl_c_ends_the_child_and_leaves_a_record(go: Any, tmp_path: Path) -> None:
    pids: list[int] = []

    def listen(event: dict[str, Any]) -> None:
        if event.get("section") == "data":
            pids.extend(event["value"]["pids"])
            threading.Timer(0.2, _thread.interrupt_main).start()

    with pytest.raises(KeyboardInterrupt):
        go(SILENT_WITH_A_WORKER, listen=listen)
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)
    [record] = load_all(tmp_path / "results")
    assert (record["status"], record["reason"]) == ("killed", "interrupted")
    assert record["throughput"] == {"images_per_s": 1000.0}


def test_an_error_of_the_listener_ends_the_child(go: Any) -> None:
    pids: list[int] = []

    def listen(event: dict[str, Any]) -> None:
        if event.get("section") == "data":
            pids.extend(event["value"]["pids"])
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        go(SILENT_WITH_A_WORKER, listen=listen)
    assert all(gone(pid) for pid in pids)
    assert len(pids) == 2


def test_a_record_that_cannot_be_written_is_the_users_error(go: Any, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        go("measure()")


# NVML


class FakeGpu:
    """Sees `used_mib` of every process, and a card that draws 100 W."""

    def __init__(self, used_mib: float | None) -> None:
        self.used_mib = used_mib
        self.card: str | None = "none was opened"
        self.fingerprint = "0123456789ab"

    def process_memory_mib(self, pid: int) -> float | None:
        assert os.getpgid(pid) == pid  # the child leads its own session
        return self.used_mib

    def other_processes(self, pid: int) -> int:
        return 0

    def reading(self) -> dict[str, float]:
        return {"power_w": 100.0}

    def reasons(self) -> None:
        return None

    def energy_j(self) -> None:
        return None


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu(None)

    @contextmanager
    def opened(card: str | None) -> Iterator[FakeGpu]:
        fake.card = card
        yield fake

    monkeypatch.setattr(runner.Gpu, "open", opened)
    monkeypatch.setattr("netdyno.bench.gpu.SAMPLE_S", 0.005)
    return fake


LIMITED = "measure(); time.sleep(0.3); emit(section='memory', value={'limit_mib': 14336})"


@pytest.mark.parametrize(
    ("used_mib", "status", "reason"),
    [
        (14_336.0, "ok", None),
        (14_336.5, "oom", "the process peak of 14,336 MiB is above the limit of 14,336 MiB"),
        (20_000.0, "oom", "the process peak of 20,000 MiB is above the limit of 14,336 MiB"),
        (None, "failed", "NVML tells no memory of the process: no check of its 14,336 MiB"),
    ],
)
def test_the_memory_limit_is_checked(
    go: Any, used: FakeGpu, used_mib: float | None, status: str, reason: str | None
) -> None:
    used.used_mib = used_mib
    record = go(LIMITED, case=T4 if status != "ok" else EAGER)
    assert (record["status"], record["reason"]) == (status, reason)
    assert record["memory"] == {"limit_mib": 14_336, "nvml_process_peak_mib": used_mib}
    assert record["gpu"]["power_w_mean"] == 100.0
    assert record["throughput"] == {"images_per_s": 1000.0}


def test_a_failed_run_keeps_what_nvml_saw(go: Any, used: FakeGpu) -> None:
    used.used_mib = 20_000.0
    record = go("measure(); time.sleep(0.3); emit(status='oom', reason='CUDA out of memory')")
    assert (record["status"], record["reason"]) == ("oom", "CUDA out of memory")
    assert record["memory"] == {"nvml_process_peak_mib": 20_000.0}
    assert record["gpu"]["readings"] > 0


def test_the_card_is_read_during_training_alone(go: Any, used: FakeGpu) -> None:
    used.used_mib = 1.0
    record = go("emit(stage='compile'); time.sleep(0.2); measure(); emit(timed=False); time.sleep(0.2)")
    assert record["gpu"].get("readings", 0) < 10
    assert record["memory"]["nvml_process_peak_mib"] == 1.0


# cold and warm start


COMPILES = """
cache = os.environ["TORCHINDUCTOR_CACHE_DIR"]
warm = os.path.exists(cache + "/kernel")
os.makedirs(cache, exist_ok=True)
open(cache + "/kernel", "w").close()
if order["compile_only"]:
    assert not warm
    emit(section="compile", value={"cold_s": 30.0, "cold_start_s": 40.0})
else:
    assert warm
    emit(section="compile", value={"warm_s": 5.0})
    measure()
    emit(section="compile", value={"recompiles": 0})
"""


def test_the_cold_start_is_measured_once(go: Any, tmp_path: Path) -> None:
    stale = runner.compile_cache(TUNED, MACHINE)
    assert stale is not None
    stale.mkdir(parents=True)
    (stale / "kernel").write_text("from a run that was interrupted")
    record = go(COMPILES, case=TUNED)
    assert (record["status"], record["reason"]) == ("ok", None)
    assert record["compile"] == {"cold_s": 30.0, "cold_start_s": 40.0, "warm_s": 5.0, "recompiles": 0}
    # what is known is not measured again, for no seed and no mode
    once = COMPILES.replace('if order["compile_only"]:', "if order['compile_only']: sys.exit('again')\nif False:")
    for case in (TUNED, Case(workload="mnist-cnn", suite="quick", tuning="tuned", mode="compute", seed=5)):
        record = go(once, case=case)
        assert (record["status"], record["compile"]["cold_s"]) == ("ok", 30.0)


def test_what_compiles_alike_shares_a_cache_and_nothing_else_does() -> None:
    def cache(machine: dict[str, Any] = MACHINE, **case: Any) -> Path | None:
        return runner.compile_cache(
            Case(**({"workload": "mnist-cnn", "suite": "quick", "tuning": "tuned"} | case)), machine
        )

    assert cache() == cache(seed=7) == cache(mode="compute")
    newer = MACHINE | {"versions": {"torch": "2.12.0"}}
    others = [cache(suite="full"), cache(tuning="t4"), cache(workload="dcgan"), cache(newer)]
    assert len({cache(), *others}) == 5
    assert cache(tuning="eager") is None


def test_a_failed_cold_start_is_tried_again_and_told(go: Any, tmp_path: Path) -> None:
    events = Events()
    record = go("emit(status='failed', reason='no compiler'); emit(stage='x')", case=TUNED, listen=events)
    assert (record["status"], record["reason"], record["compile"]) == ("failed", "no compiler", None)
    assert [event["reason"] for event in events if "status" in event] == ["no compiler"] * 2
    assert go(COMPILES, case=TUNED)["compile"]["cold_s"] == 30.0


def test_the_loader_alone_compiles_nothing(go: Any, tmp_path: Path) -> None:
    case = Case(workload="mnist-cnn", suite="quick", tuning="tuned", mode="loader")
    record = go("assert not order['compile_only']; measure()", case=case)
    assert (record["status"], record["compile"]) == ("ok", None)


# beside other cards


def post(**changes: Any) -> Post:
    return Post(**{"number": 1, "card": "GPU-b", "beside": [], "stop": threading.Event()} | changes)


def test_a_case_runs_on_its_own_card_and_its_record_says_beside_what(go: Any, used: FakeGpu) -> None:
    others = ["dcgan tuned e2e seed 0 on card 0", "mnist-cnn eager e2e seed 0 on card 0"]
    here = post(beside=[others[0]])

    def listen(event: dict[str, Any]) -> None:
        here.beside.extend([others[1], others[0]])  # what began meanwhile

    script = "measure(); emit(section='data', value={'name': os.environ['CUDA_VISIBLE_DEVICES']})"
    record = go(script, listen=listen, post=here)
    assert record["data"]["name"] == used.card == "GPU-b"
    assert (record["gpu"]["card"], record["gpu"]["beside"]) == (1, others)
    assert record["gpu"]["fingerprints"] == [used.fingerprint]
    assert [*problems(record)] == []
    assert "beside" not in (go("measure()")["gpu"] or {})
    assert used.card is None


def test_a_case_is_told_to_stop(go: Any, tmp_path: Path) -> None:
    here = post()
    pids: list[int] = []

    def listen(event: dict[str, Any]) -> None:
        if event.get("section") == "data":
            pids.extend(event["value"]["pids"])
            here.stop.set()

    with pytest.raises(KeyboardInterrupt):
        go(SILENT_WITH_A_WORKER, listen=listen, post=here)
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)
    [record] = load_all(tmp_path / "results")
    assert (record["status"], record["reason"]) == ("killed", "interrupted")
    assert record["gpu"] == {"card": 1, "beside": []}


def test_cases_that_compile_alike_wait_for_one_cold_start(go: Any, tmp_path: Path) -> None:
    ledger = tmp_path / "cold starts"
    script = COMPILES.replace(
        "    assert not warm\n", f"    assert not warm\n    open({str(ledger)!r}, 'a').write('one'); time.sleep(0.5)\n"
    )
    with ThreadPoolExecutor(3) as pool:
        ran = [pool.submit(go, script, TUNED, post=post()) for _ in range(3)]
    assert [one.result()["status"] for one in ran] == ["ok"] * 3
    assert {one.result()["compile"]["cold_s"] for one in ran} == {30.0}
    assert ledger.read_text() == "one"


def test_a_cache_in_use_is_not_emptied(go: Any) -> None:
    """Whose cold start failed, so that the next case that compiles alike tries one again."""
    script = """
kernel = os.environ["TORCHINDUCTOR_CACHE_DIR"] + f"/kernel {os.getpid()}"
if order["compile_only"]:
    emit(status="failed", reason="no compiler")
else:
    os.makedirs(os.path.dirname(kernel), exist_ok=True)
    open(kernel, "w").close()
    time.sleep(1.0)
    assert os.path.exists(kernel)
    measure()
"""
    cache = runner.compile_cache(TUNED, MACHINE)
    assert cache is not None
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(go, script, TUNED, post=post())
        while not [*cache.glob("kernel *")] and not first.done():
            time.sleep(0.01)
        second = pool.submit(go, script, TUNED, post=post())
    assert [(one.result()["status"], one.result()["reason"]) for one in (first, second)] == [("ok", None)] * 2


# files beside the record


def test_pictures_and_trace_lie_beside_the_record(go: Any, tmp_path: Path) -> None:
    record = go(
        """
measure()
for epoch in (10, 2):
    with open(f"{order['pictures']}/{epoch}.webp", "wb") as file:
        file.write(b"picture %d" % epoch)
with open(order["trace"], "wb") as file:
    file.write(b"trace")
emit(section="accuracy", value={"final": 1.0})
""",
        trace=True,
    )
    folder = path_of(record, tmp_path / "results").parent
    identity = record["id"]
    assert record["accuracy"]["pictures"] == [
        {"epoch": epoch, "file": f"{identity}.{epoch}.webp", "sha256": hashlib.sha256(content).hexdigest()}
        for epoch, content in ((2, b"picture 2"), (10, b"picture 10"))
    ]
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"} == {
        f"{identity}.2.webp": b"picture 2",
        f"{identity}.10.webp": b"picture 10",
        f"{identity}.trace.json.gz": b"trace",
    }


def test_nothing_is_left_in_the_temporary_folder(go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(runner.tempfile, "tempdir", str(tmp_path / "scratch"))
    go("measure(); open(order['pictures'] + '/1.webp', 'w').close(); sys.exit(1)")
    assert list((tmp_path / "scratch").iterdir()) == []


def page_faults_of_buffers(environment: dict[str, str]) -> int:
    """Of a process that makes and frees ten buffers of 64 MiB, after a first one; a page is 4 KiB."""
    code = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: small pages alone
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(64 << 20)
before = faults()
for _ in range(10):
    bytearray(64 << 20)
print(faults() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_children_on_a_gpu_have_more_queues_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    assert runner.child_environment()["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in runner.child_environment(on_cpu=True)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert runner.child_environment()["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"  # the user's own counts


@pytest.mark.slow
def test_a_warm_start_takes_graphs_with_an_autograd_function_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", raising=False)
    environment = runner.child_environment(on_cpu=True) | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    code = """
import torch
from torch._dynamo.utils import counters
class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x
    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient
x = torch.ones(3, requires_grad=True)
torch.compile(lambda x: Double.apply(x).sum(), fullgraph=True)(x).backward()
assert x.grad.tolist() == [2, 2, 2]
print(counters["aot_autograd"]["autograd_cache_hit"])
"""
    script = tmp_path / "double.py"  # whose source the compiler can read
    script.write_text(code)
    start = [sys.executable, str(script)]
    hits = [subprocess.run(start, env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert hits == ["0\n", "1\n"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_freed_on_a_cpu_stays_with_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert page_faults_of_buffers(runner.child_environment(on_cpu=True)) < 100
    assert page_faults_of_buffers(runner.child_environment()) > 10_000
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    assert page_faults_of_buffers(runner.child_environment(on_cpu=True)) > 10_000  # the user's own counts
