"""The record of one run: its form, and how it is written, once, whole or not at all. No torch in here.

A record is a JSON object in `<results>/<machine>/<workload>/<tuning>-<mode>-<id>.json`. Names carry their units.

    schema, id, created_utc
    case        workload, suite, tuning, mode, seed, division, gpus, scaling (of several: weak or strong),
                precision, tf32_convolutions, captured, uncaptured_because, recipe (every setting that decides the work)
    status      ok · oom · diverged · timeout · failed · killed · skipped; all but ok have a `reason`
    timing      timing_version, block_steps, block_s (raw), blocks_thinned_by, train_s, wall_s, steps, steady
    throughput  images_per_s, eval_images_per_s
    memory      peak_allocated_mib, peak_reserved_mib (both in training), eval_peak_allocated_mib,
                nvml_process_peak_mib, host_rss_peak_mib, limit_mib, context_mib, loaders_mib, libraries_mib (the last
                three by NVML, on top of what torch holds, and by difference, so estimates: DALI is in the second, code
                and handles of cuDNN, cuBLAS and compiled kernels in the third), nvml_process_mib (after training; the
                peak is sampled and so misses what is short), warm_up_reserved_mib (trials of algorithms are in it)
    accuracy    metric, unit, higher_is_better, curve (a row an evaluation), final, best, target, also_at_least,
                reached, train_s_to_target, references (for generated images), pictures (with their hashes, where there
                are any)
    compile     cold_s, warm_s, cold_start_s, warm_start_s, recompiles
    data        name, label, synthetic, sha256, images, loader, resident
    machine     slug, gpu, cpu, cores, memory_gib, os, versions
    gpu         sm_clock_mhz_mean, sm_clock_mhz_min, sm_clock_mhz_max (both while it was busy), mem_clock_mhz_mean,
                power_w_mean, temperature_c_mean, temperature_c_max, utilisation_pct_mean, throttle_share (of the
                readings, by reason), energy_j, energy_source (counter or sampled), energy_sampled_j,
                other_processes (the most at once), readings, failed_readings (all in the timed region, without what
                the card does not tell; when energy can be told stands in bench/gpu.py), cards (of several, each
                one's own; the rest is then of all together), card (its number, where cases ran on several at once),
                beside (each case that ran meanwhile, and on which card), fingerprints (hashes of the cards' UUIDs)
    communication  restarts, rank_train_s (of each rank), step_s, apart_step_s, exposed_s, add_up_s, add_up_mib,
                shared_mib (what they are stands in bench/child.py; None on one GPU)
    roofline    flop_per_s, bytes_per_s, ceiling_flop_per_s, ceiling_bytes_per_s, share (of the images/s that the
                ceilings allow; counted in bench/roofline.py, the ceilings measured by netdyno doctor)
    code

A record of the open division holds many seeds: they stand in `case.seeds`, and for the curve `accuracy.seeds` (seed,
train_s and metric of each; `final` is their mean), `standard_deviation`, `lower_bound` (of the mean, at 95 %) and
`surely` (whether that reaches the target too).
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import tempfile
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError

SCHEMA = 1
LATER_SETTINGS = {"basis": "taps", "evaluate_every": 1}
LARGEST_BYTES = 16 * 1024
FEWEST_BLOCKS = 20  # enough for a median and its interval
STATUSES = ("ok", "oom", "diverged", "timeout", "failed", "killed", "skipped")
SECTIONS = ("timing", "throughput", "memory", "accuracy", "compile", "gpu", "communication", "roofline", "data")
# The sources that decide a measurement: what a case's process runs, and what its parent gives it.
MEASURES: tuple[str, ...] = (
    *(
        f"bench/{name}.py"
        for name in (
            *(
                "adam",
                "basis",
                "capture",
                "child",
                "fuse",
                "gpu",
                "measure",
                "metrics",
                "muon",
                "order",
                "overlap",
                "parallel",
                "reach",
                "runner",
                "sharded",
                "speedrun",
                "start",
                "step",
                "train",
            ),
        )
    ),
    *("bench/tuning.py", "bench/workloads.py", "bench/data", "kernels", "models"),
)

Record = dict[str, Any]


def new_record(case: dict[str, Any], machine: dict[str, Any]) -> Record:
    """A record without measurements; its id begins with the time, so that names sort by age."""
    now = datetime.now(timezone.utc)
    return {
        "schema": SCHEMA,
        "id": f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
        "created_utc": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "case": case,
        "status": "failed",
        "reason": "nothing was measured",
        **dict.fromkeys(SECTIONS),
        "machine": machine,
        "code": code_hash(),
    }


def path_of(record: Record, results: Path) -> Path:
    case = record["case"]
    name = f"{case['tuning']}-{case['mode']}-{record['id']}.json"
    return results / record["machine"]["slug"] / case["workload"] / name


def check_writable(results: Path) -> None:
    """UserError unless files can be made in `results`, which is made where it is missing."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):
            pass
    except OSError as error:
        raise UserError(f"results folder {results} cannot be written: {error.strerror}") from error


def save(record: Record, results: Path) -> Path:
    """Writes the record beside the others; readers see it whole or not at all. UserError where the disk refuses."""
    path = path_of(record, results)
    write_atomically(path, compact(record))
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file through a temporary one in its folder, on disk before it gets its name."""
    write_locked(path, content).close()


def write_locked(path: Path, content: bytes) -> BinaryIO:
    """The same; the file is returned open and, like the temporary one before, locked until it is closed.

    The kernel gives the lock back when the process ends, however it ends: what has none belongs to nobody.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _new_locked(temporary)
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # what is in its buffer may fit as little as what was written before
                file.close()
            raise
    except OSError as error:
        what = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror
        raise UserError(f"{path} cannot be written: {what}") from error
    finally:
        with suppress(OSError):  # it has its name by now, or its folder could not be made
            temporary.unlink()
    return file


def _new_locked(path: Path) -> BinaryIO:
    while True:
        file = path.open("xb")
        with suppress(OSError):  # a file system without locks: there `inflight.sweep` takes nothing for left over
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()  # swept away in the moment before it had its lock


def compact(record: Record) -> bytes:
    """The record as JSON, of at most 16 KiB unless its curve alone is longer.

    Every second raw block is dropped until it fits, or few are left, and `blocks_thinned_by` says so.
    """
    while True:
        content = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        timing = record["timing"]
        if len(content) <= LARGEST_BYTES or not timing or len(timing["block_s"]) < 2 * FEWEST_BLOCKS:
            return content
        thinned = timing | {"block_s": timing["block_s"][::2], "blocks_thinned_by": 2 * timing["blocks_thinned_by"]}
        record = record | {"timing": thinned}


def load(path: Path) -> Record:
    """One record. UserError naming the file where it is unreadable, no record, or of another schema."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} is not a readable record: {error}") from error
    return parse(content, path)


def parse(content: bytes, path: Path | str) -> Record:
    """A record from the content of its file; `path` is named where it is none."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable record: {error}") from error
    if not isinstance(record, dict) or "schema" not in record:
        raise UserError(f"{path} is no record of Netdyno: it has no 'schema'")
    check_schema(record["schema"], str(path))
    whole = {
        "id": isinstance(record.get("id"), str),
        "case": isinstance(record.get("case"), dict),
        "status": record.get("status") in STATUSES,
        "machine": isinstance(record.get("machine"), dict),
    }
    if not all(whole.values()):
        wrong = ", ".join(name for name, right in whole.items() if not right)
        raise UserError(f"{path} is no whole record: {wrong} missing or not of its form")
    return filled(record)


def filled(record: Record) -> Record:
    """The record with the settings that its recipe did not have yet when it was written, as they then were."""
    recipe = record["case"].get("recipe")
    if isinstance(recipe, dict) and "schedule" in recipe:
        record["case"]["recipe"] = LATER_SETTINGS | _evaluate_every(record) | recipe
    return record


def _evaluate_every(record: Record) -> dict[str, int]:
    """After how many epochs a record's first evaluation came, if it has one: some hours older than the setting."""
    try:
        epoch = record["accuracy"]["curve"][0]["epoch"]
    except (IndexError, KeyError, TypeError):
        return {}
    return {"evaluate_every": epoch} if isinstance(epoch, int) else {}


def check_schema(schema: Any, name: str) -> None:
    """UserError unless it is one that this version reads; `name` is the record's file."""
    if type(schema) is int and schema == SCHEMA:
        return
    advice = "; a newer Netdyno reads it" if type(schema) is int and schema > SCHEMA else ""
    raise UserError(f"{name} has schema {str(schema)[:40]}; this version reads {SCHEMA}{advice}")


def load_all(results: Path) -> list[Record]:
    """Every record in `results/<machine>/<workload>/`, oldest first."""
    return [load(path) for path in paths_in(results)]


def paths_in(results: Path) -> list[Path]:
    """The files of all records in `results/<machine>/<workload>/`, oldest first."""
    paths = [path for path in results.glob("*/*/*.json") if path.name != "machine.json" and path.name[0] != "."]
    return sorted(paths, key=lambda path: (path.name.rsplit("-", 2)[-2:], path))


def save_machine(machine: dict[str, Any], results: Path) -> None:
    """Writes `results/<machine>/machine.json` unless it is there: the hardware alone, since versions change."""
    path = results / machine["slug"] / "machine.json"
    if not path.exists():
        hardware = {name: value for name, value in machine.items() if name != "versions"}
        write_atomically(path, json.dumps(hardware, indent=1).encode() + b"\n")


def save_ceilings(ceilings: dict[str, Any], machine: dict[str, Any], results: Path) -> Path:
    """Puts measured ceilings into `results/<machine>/machine.json`, in place of earlier ones; all else in it stays.

    Returns the file. UserError where it is there and holds no object of JSON, or cannot be written.
    """
    save_machine(machine, results)
    path = results / machine["slug"] / "machine.json"
    content = json.dumps(_machine(path) | {"ceilings": ceilings}, indent=1, allow_nan=False)
    write_atomically(path, content.encode() + b"\n")
    return path


def load_ceilings(machine: dict[str, Any], results: Path) -> dict[str, Any] | None:
    """The measured ceilings of a machine; None where nobody measured them. UserError as for `save_ceilings`."""
    path = results / machine["slug"] / "machine.json"
    return _machine(path).get("ceilings") if path.exists() else None


def _machine(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); mend or remove it") from error
    if not isinstance(described, dict):
        raise UserError(f"{path} describes no machine; mend or remove it")
    return described


def code_hash() -> str:
    """SHA-256 over the names and contents of the sources that decide a measurement."""
    top = Path(__file__).parent.parent  # the folders lie side by side in the checkout as in an installed package
    digest = hashlib.sha256()
    for name in MEASURES:
        for path in sorted([top / name] if name.endswith(".py") else (top / name).rglob("*.py")):
            digest.update(f"{path.relative_to(top).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()
