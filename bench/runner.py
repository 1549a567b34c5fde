"""Runs one case in a fresh child process and makes its record, whatever the end of the child.

`run(case)` is the main path: it starts the child (`bench/start.py`, then `bench/child.py`), passes its progress on,
watches it by NVML and the clock, and returns the record. A case that compiles runs in two children the first time: one
with an empty compiler cache, for the cold start alone, then the measured one, whose start is warm. Both times are in
the record.
"""

import fcntl
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .gpu import Gpu, Sampler, together
from .inflight import in_flight
from .order import Order
from .record import SECTIONS, Record, load_ceilings, new_record, path_of, save, write_atomically
from .roofline import achieved
from .tuning import TUNINGS
from .workloads import Case, describe, resolve

STALL_S = 1_200.0  # without a word from the child; the longest silence of a healthy one is a cold compilation
POLL_S = 0.5  # between two looks at whether a silent child is still there
DUMP_S = 5.0  # for a child that stalls to say where
CHILD = (sys.executable, "-X", "faulthandler", "-m", "netdyno.bench.start")
# Loader workers hand their batches over through sockets, `pymp-abcdefgh/listener-abcdefgh` in $TMPDIR; where the path
# is too long for one, 107 bytes, they wait for ever.
LONGEST_TMPDIR = 107 - len("/pymp-abcdefgh/listener-abcdefgh")
TRACE = "trace.json.gz"
COLD = "cold.json"  # in a compiler cache: the start that filled it, and the code
STDERR = "stderr.txt"  # of a child that failed, stalled or was killed: its traceback
STDERR_KEPT = 20_000  # characters
# What a child sees unless the user's own environment says otherwise.
CHILD_ENVIRONMENT = {
    # OpenMP's threads wait by spinning unless told not to. Where the loader's threads need those cores too, on two of
    # them, a step of mnist-cnn at batch 128 took 0.06 to 1 s instead of 0.05.
    "OMP_WAIT_POLICY": "passive",
    # Every compilation for a CPU begins with a small program for each vector extension that /proc/cpuinfo names, and a
    # process that imports torch to load it: 17 s on two cores, also where everything else comes from the cache.
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
    # Graphs with an autograd.Function in them come from the cache, too: mnist-cnn's first step in 2.5 s instead of 4.5
    # (H200). By itself torch leaves them out, though what it traced of them is in its key. What it does not trace of
    # them, shapes of custom operators, is code of ours, with which a cache is emptied.
    "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD": "1",
}
# And one that trains on a CPU: what a step frees stays with the process, as torch keeps it on a GPU. Else it is chance
# how much of the heap goes back to the system after each step: on two cores twelve processes of conv-autoencoder had
# 94,000 to 324,000 page faults in 4 s instead of 100 to 3,600, a step took 7 % longer, and steps of one process spread
# by 1.7 instead of 0.7 %.
CPU_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"}
# And one that trains on a GPU: more queues to it than CUDA's 8. A loader has streams of its own, and two streams in one
# queue wait for each other: resnet50-transfer trained on 15,900 images/s with 8 and on 17,500 with 32, one run each.
GPU_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}

Event = dict[str, Any]
Listen = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class Post:
    """Where a case runs while others run on other cards of the machine."""

    number: int  # of the card, among those that are visible
    card: str  # as CUDA_VISIBLE_DEVICES names it
    beside: list[str]  # each case that runs meanwhile, and on which card; grows until this one ends
    stop: threading.Event  # ends the case as Ctrl-C does, of which only the main thread hears


def run(
    case: Case,
    *,
    data: Path,
    results: Path,
    machine: dict[str, Any],
    listen: Listen,
    trace: bool = False,
    post: Post | None = None,
    restarts: int = 0,
) -> Record:
    """Runs `case` and writes its record, and its pictures and trace beside it, below `results`.

    Args:
        data: the folder of the prepared data sets.
        machine: the record's `machine`, from `machine.describe()`.
        listen: is called with each event of the child (see `bench/child.py`).
        trace: writes a profiler trace of a few steps after the measured ones.
        post: the card, where others run cases meanwhile; None: the first that is visible.
        restarts: how often the ranks of a case on several GPUs start again, at most, when one of them fails.

    Raises:
        UserError: the record cannot be written; where the disk had room for its mark, the next start makes one of that.
        KeyboardInterrupt: after the child has been ended and its record written as `killed`.
    """
    record = new_record(describe(case, resolve(case)), machine)
    cache = compile_cache(case, machine)
    with in_flight(record, results) as scratch:
        order = Order(
            case=case,
            data=data,
            pictures=scratch,
            started=time.time(),
            gpu=machine["gpu"],
            trace=scratch / TRACE if trace else None,
            restarts=restarts,
        )
        interrupted = False
        try:
            if cache is not None and case.mode != "loader" and read_cold_start(cache, record["code"]) is None:
                with locked(cache, fcntl.LOCK_EX):
                    if read_cold_start(cache, record["code"]) is None:  # still, after others have been waited for
                        measure_cold_start(order, cache, record["code"], listen, post)
            with locked(cache, fcntl.LOCK_SH):  # nobody empties it meanwhile
                watch(order, record, cache, listen, post)
        except KeyboardInterrupt:
            interrupted = True
            record |= {"status": "killed", "reason": "interrupted"}
        if cache is not None and record["compile"] is not None:
            record["compile"] = (read_cold_start(cache, record["code"]) or {}) | record["compile"]
        if post is not None:
            record["gpu"] = (record["gpu"] or {}) | {"card": post.number, "beside": list(dict.fromkeys(post.beside))}
        record["roofline"] = achieved(record, load_ceilings(machine, results))
        keep_files(record, results, scratch)
        save(record, results)
    if interrupted:
        raise KeyboardInterrupt
    return record


def compile_cache(case: Case, machine: dict[str, Any]) -> Path | None:
    """The compiler cache of everything that compiles as this case does; None for a tuning that does not compile."""
    if not TUNINGS[case.tuning](None).compile:
        return None
    what = describe(case, resolve(case)) | {"seed": None, "seeds": None, "mode": None}
    key = hashlib.sha256(json.dumps([what, machine["slug"], machine["versions"]]).encode()).hexdigest()[:12]
    return cache_home() / "compile" / f"{case.workload}-{case.tuning}-{key}"


def cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "netdyno"


def child_environment(*, on_cpu: bool = False) -> dict[str, str]:
    """The user's own environment, and where it says nothing else what a child on a GPU has, or one `on_cpu`.

    Where Python is not to keep its bytecode beside the sources, as in many containers, a child keeps it in the cache:
    torch and its compiler are three thousand modules, whose compilation took 8 of the 12 s of each start on two cores.
    """
    environment = CHILD_ENVIRONMENT | (CPU_ENVIRONMENT if on_cpu else GPU_ENVIRONMENT) | os.environ
    if environment.pop("PYTHONDONTWRITEBYTECODE", ""):
        environment.setdefault("PYTHONPYCACHEPREFIX", str(cache_home() / "bytecode"))
    return environment


def read_cold_start(cache: Path, code: str) -> dict[str, float] | None:
    """The times of the cold start that filled `cache`, if it was this very code that did."""
    try:
        kept = json.loads((cache / COLD).read_text())
    except (OSError, ValueError):
        return None
    return kept["compile"] if kept.get("code") == code else None


@contextmanager
def locked(cache: Path | None, how: int) -> Iterator[None]:
    """`cache` for one case that empties and fills it (LOCK_EX), or for all that use it (LOCK_SH)."""
    if cache is None:
        yield
        return
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.with_name(f"{cache.name}.lock").open("w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, how)
        yield


def measure_cold_start(order: Order, cache: Path, code: str, listen: Listen, post: Post | None) -> None:
    """Compiles with an empty cache in a child of its own and keeps the times beside the cache that it filled.

    A failure is not kept: the measured child meets it again and its record tells of it.
    """
    shutil.rmtree(cache, ignore_errors=True)
    cold: Record = {"compile": {}}
    watch(replace(order, compile_only=True, trace=None), cold, cache, listen, post)
    if cold.get("status") == "ok":
        write_atomically(cache / COLD, json.dumps({"code": code, "compile": cold["compile"]}).encode())


def watch(order: Order, record: Record, cache: Path | None, listen: Listen, post: Post | None = None) -> None:
    """Starts a child, follows it to its end and puts what it says, and how it ended, into `record`."""
    environment = child_environment(on_cpu=order.gpu is None)
    if len(os.fsencode(order.pictures)) <= LONGEST_TMPDIR:
        environment["TMPDIR"] = str(order.pictures)  # what its workers leave goes with it
    if cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    card = post.card if post else None
    if card is not None:
        environment["CUDA_VISIBLE_DEVICES"] = card
    cards = [card]
    if order.case.gpus > 1:
        found = [*Gpu.cards()][: order.case.gpus]
        if found:  # by UUID, since CUDA may count them in another order
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(found)
        cards = [*found] or [None] * order.case.gpus
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors, ExitStack() as opened:
        gpus = [opened.enter_context(Gpu.open(card)) for card in cards]
        child = subprocess.Popen(
            CHILD,
            stdin=subprocess.PIPE,  # open until the end: it closes with this process, and then the child ends itself
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
            env=environment,
            start_new_session=True,  # so that its workers end with it
        )
        record |= {"status": "ok", "reason": None}
        strange = None
        try:
            with suppress(BrokenPipeError):  # it may be gone already; how it ended says why
                print(replace(order, started=time.time()).to_json(), file=child.stdin, flush=True)
            samplers = [Sampler(gpu, child.pid) for gpu in gpus]
            with ExitStack() as running:
                for sampler in samplers:
                    running.enter_context(sampler)
                try:
                    strange = follow(child, record, samplers, listen, post)
                except TimeoutError:
                    record |= {"status": "timeout", "reason": f"no word from the child for {STALL_S:.0f} s"}
                    for sampler in samplers:  # faulthandler writes where each thread of the child, or of each rank, is
                        with suppress(ProcessLookupError):
                            os.kill(sampler.pid, signal.SIGABRT)
                    with suppress(subprocess.TimeoutExpired):
                        child.wait(DUMP_S)
        finally:
            end(child)
        errors.seek(0)
        said = errors.read()
        if record["status"] == "ok":
            measured = order.compile_only or record["timing"] is not None
            record |= judge(child.returncode, said, strange, measured=measured)
        if record["status"] in ("failed", "timeout", "killed") and said.strip() and not order.compile_only:
            (order.pictures / STDERR).write_text(said[-STDERR_KEPT:], encoding="utf-8")
        add_memory(record, samplers)
        if fingerprints := [gpu.fingerprint for gpu in gpus if gpu is not None and gpu.fingerprint]:
            record["gpu"] = (record["gpu"] or {}) | {"fingerprints": fingerprints}


def judge(code: int, said: str, strange: str | None, *, measured: bool) -> Record:
    """Status and reason of a child that gave none itself: from its exit code, standard error and unreadable line."""
    if code < 0:
        return {"status": "killed", "reason": f"the child was ended by {signal.Signals(-code).name}"}
    if code:
        last = ([line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"])[-1]
        return {"status": "failed", "reason": f"the child ended with exit code {code}: {last}"[:500]}
    if strange is not None:
        return {"status": "failed", "reason": f"the child said what is no event: {strange.strip()!r}"[:500]}
    if not measured:
        return {"status": "failed", "reason": "the child ended without a measurement"}
    return {"status": "ok", "reason": None}


def follow(
    child: subprocess.Popen[str], record: Record, samplers: list[Sampler], listen: Listen, post: Post | None
) -> str | None:
    """Merges the child's events into `record` until it ends; TimeoutError when it falls silent.

    Returns the first line that is no event, if there was one: the others count all the same. KeyboardInterrupt where
    the post says stop.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert child.stdout
        with child.stdout:
            for line in child.stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    strange = None
    heard = time.monotonic()
    while True:
        gone = child.poll() is not None
        if post is not None and post.stop.is_set():
            raise KeyboardInterrupt
        try:
            line = lines.get(timeout=POLL_S)
        except queue.Empty:
            if gone:  # a worker that outlives it holds its output open
                return strange
            if time.monotonic() - heard > STALL_S:
                raise TimeoutError from None
            continue
        if line is None:
            try:
                child.wait(timeout=STALL_S)
            except subprocess.TimeoutExpired:
                raise TimeoutError from None
            return strange
        heard = time.monotonic()
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            strange = strange or line
            continue
        if "section" in event:
            record[event["section"]] = (record.get(event["section"]) or {}) | event["value"]
        if "status" in event:
            record |= {"status": event["status"], "reason": event["reason"]}
        if "pids" in event:
            for sampler, pid in zip(samplers, event["pids"], strict=True):
                sampler.begin(pid)
            record |= dict.fromkeys(SECTIONS)
            record |= {"communication": {"restarts": event["restarts"]}, "status": "ok", "reason": None}
            strange = None  # a rank may have been ended within a line
        if "timed" in event:
            for sampler in samplers:
                sampler.mark(event["timed"])
        listen(event)


def add_memory(record: Record, samplers: list[Sampler]) -> None:
    """What NVML saw of the child, however it ended; above the tuning's limit the run counts as out of memory.

    Of several ranks, what it saw of the largest.
    """
    peak = max((sampler.process_peak_mib for sampler in samplers if sampler.process_peak_mib is not None), default=None)
    record["gpu"] = together([sampler.summary() for sampler in samplers])
    if peak is not None or record.get("memory"):
        record["memory"] = (record.get("memory") or {}) | {"nvml_process_peak_mib": peak}
    limit = (record.get("memory") or {}).get("limit_mib")
    if limit is None or record["status"] != "ok":
        return
    if peak is None:
        record |= {"status": "failed", "reason": f"NVML tells no memory of the process: no check of its {limit:,} MiB"}
    elif peak > limit:
        record |= {
            "status": "oom",
            "reason": f"the process peak of {peak:,.0f} MiB is above the limit of {limit:,} MiB",
        }


def end(child: subprocess.Popen[str]) -> None:
    """Ends what is left of the child and its workers; ranks lead sessions of their own and end with its pipe."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin is not None:
        with suppress(BrokenPipeError):
            child.stdin.close()


def keep_files(record: Record, results: Path, scratch: Path) -> None:
    """Puts pictures, trace and a failed child's last words beside the record, named after it.

    Pictures are listed in it with their hashes; without an accuracy they are of an epoch that was cut off.
    """
    base = path_of(record, results)
    kept = []
    pictures = scratch.glob("*.webp") if record["accuracy"] else ()
    for picture in sorted(pictures, key=lambda path: int(path.stem)):
        content = picture.read_bytes()
        name = f"{record['id']}.{picture.name}"
        write_atomically(base.with_name(name), content)
        kept.append({"epoch": int(picture.stem), "file": name, "sha256": hashlib.sha256(content).hexdigest()})
    if kept:
        record["accuracy"]["pictures"] = kept
    for name in (TRACE, STDERR):
        if (scratch / name).exists():
            write_atomically(base.with_name(f"{record['id']}.{name}"), (scratch / name).read_bytes())
