"""Records of several machines that nobody measured, for the tests of reports: valid in everything, unlike one's own."""

import hashlib
import io
import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from made_up_records import CPU, GPU, accuracy, make, seen
from PIL import Image

from netdyno.bench.record import path_of
from netdyno.bench.report import load, sections
from netdyno.bench.report.blocks import Page, Table, View

T4 = {
    "slug": "tesla-t4-xeon-2c",
    "gpu": "Tesla T4",
    "cpu": "Xeon",
    "cores": 2,
    "memory_gib": 13,
    "os": "Linux",
    "versions": {"torch": "2.15.0", "dali": "2.4.0", "driver": "580.1"},
}
MACHINES = ((GPU, 1.0), (T4, 0.06), (CPU, 0.0005))  # and how fast they are beside the first
WORKLOADS: dict[str, dict[str, Any]] = {
    "mnist-cnn": {"speed": 540_000.0, "curve": (97.0, 98.6, 99.1), "target": 99.0, "data": "mnist"},
    "cifar10-cnn": {"speed": 170_000.0, "curve": (55.0, 68.0, 76.0), "target": 78.0, "data": "cifar10"},
    "conv-autoencoder": {"speed": 90_000.0, "curve": (21.0, 25.0, 27.5), "target": 27.0, "data": "cifar10"},
    "dcgan": {"speed": 12_000.0, "curve": (80.0, 45.0, 30.0), "target": None, "data": "anime_faces"},
}
METRICS = {"conv-autoencoder": ("PSNR", "dB", True), "dcgan": ("SWD", "×10³", False)}
TUNINGS = (("tuned", 1.0), ("amp", 0.4), ("eager", 0.1))
FULL = "full suite · real data · end to end"
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> "
    "<b>b</b> $x$ %{y} [a](javascript:b) | ` & \x1b[31m 画"
)
START = datetime(2026, 11, 1)


def webp(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 80, 200)).save(out, "WEBP")
    return out.getvalue()


def fleet(repeats: int = 3, machines: tuple[tuple[dict[str, Any], float], ...] = MACHINES) -> Iterator[dict[str, Any]]:
    """Every workload, tuning and machine, `repeats` times, the last of each on a failing card or an older version."""
    number = 0
    for repeat in range(repeats):
        for machine, pace in machines:
            for workload, facts in WORKLOADS.items():
                for tuning, share in TUNINGS:
                    number += 1
                    yield record(number, repeat, machine, pace, workload, facts, tuning, share)


def record(
    number: int,
    repeat: int,
    machine: dict[str, Any],
    pace: float,
    workload: str,
    facts: dict[str, Any],
    tuning: str,
    share: float,
) -> dict[str, Any]:
    when = START + timedelta(minutes=number)
    metric, unit, higher = METRICS.get(workload, ("test accuracy", "%", True))
    speed = facts["speed"] * pace * share * (1 + 0.02 * ((number * 7) % 5 - 2))
    measured = accuracy(list(facts["curve"]), facts["target"], metric=metric, unit=unit, higher_is_better=higher)
    for row in measured["curve"]:
        row["train_s"] = round(60_000 / speed, 4)
    if measured["reached"]:
        measured["train_s_to_target"] = sum(row["train_s"] for row in measured["curve"])
    made = make(
        1,
        id=f"{when:%Y%m%dT%H%M%S}Z-{number:06x}",
        created_utc=f"{when:%Y-%m-%dT%H:%M:%SZ}",
        workload=workload,
        tuning=tuning,
        seed=repeat,
        images_per_s=speed,
        train_s=180_000 / speed,
        recipe={"batch_size": 128 if machine["gpu"] else 64, "epochs": 3, "lr": 0.01},
        accuracy=measured,
        machine=machine,
        data={
            "name": facts["data"],
            "label": "official",
            "synthetic": False,
            "sha256": {"train": hashlib.sha256(facts["data"].encode()).hexdigest()},
            "loader": "dali",
        },
    )
    if machine["gpu"]:
        power, source = (650.0, "counter") if machine is GPU else (68.0, "sampled")
        made["gpu"] = seen(power * 180_000 / speed, source, power_w_mean=power)
        made["roofline"] = {
            "flop_per_s": speed * 2e8,
            "bytes_per_s": speed * 4e6,
            "ceiling_flop_per_s": 6e14,
            "ceiling_bytes_per_s": 4e12,
        }
    else:
        made["memory"] |= {"peak_allocated_mib": None, "peak_reserved_mib": None, "nvml_process_peak_mib": None}
    if machine is T4 and workload == "dcgan" and tuning == "eager":
        made |= {"status": "oom", "reason": "CUDA out of memory: 2 GiB", "throughput": None, "accuracy": None}
        made |= {"timing": None, "data": None}
    if workload == "dcgan" and tuning == "tuned" and made["accuracy"]:
        made["accuracy"]["pictures"] = [
            {
                "epoch": epoch,
                "file": f"{made['id']}.{epoch}.webp",
                "sha256": hashlib.sha256(webp(90 * epoch)).hexdigest(),
            }
            for epoch in (1, 2)
        ]
    return made


def one(**changes: Any) -> dict[str, Any]:
    """A record of the T4 with two pictures."""
    facts = {"speed": 12_000.0, "curve": (80.0, 30.0), "target": None, "data": "anime_faces"}
    return record(1, 0, T4, 1.0, "dcgan", facts, "tuned", 1.0) | changes


def write(records: Iterator[dict[str, Any]] | list[dict[str, Any]], results: Path) -> Path:
    """Records and their pictures as files below `results`."""
    for made in records:
        path = path_of(made, results)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made), encoding="utf-8")
        for listed in (made.get("accuracy") or {}).get("pictures", []):
            path.with_name(listed["file"]).write_bytes(webp(90 * listed["epoch"]))
    return results


def spoiled(**changes: Any) -> dict[str, Any]:
    """A valid record with markup wherever a record may hold free text."""
    made = one(reason=HOSTILE, **changes)
    made["machine"] = {**T4, "gpu": HOSTILE, "cpu": HOSTILE, "os": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    made["data"] |= {"name": HOSTILE, "label": HOSTILE, "loader": HOSTILE, "sha256": {HOSTILE: HOSTILE}}
    made["accuracy"] |= {"metric": HOSTILE, "unit": HOSTILE, "also_at_least": {HOSTILE: 1.0}, "target": 20.0}
    made["case"]["recipe"] = {HOSTILE: HOSTILE, "batch_size": HOSTILE, "weights": HOSTILE}
    return made | {"code": HOSTILE}


def found(
    records: Iterator[dict[str, Any]] | list[dict[str, Any]], results: Path = Path("results")
) -> list[load.Found]:
    return [load.Found(record=made, file=path_of(made, results)) for made in records]


def page_of(records: Iterator[dict[str, Any]] | list[dict[str, Any]], **options: Any) -> Page:
    return sections.page(found(records), **options)


def view(page: Page, tab: str, **place: str) -> View:
    """The one view of a tab in the full suite, or in `scope`, and relative to `base`."""
    (views,) = ([view for view in one.views] for one in page.tabs if one.id == tab)
    place = {"scope": FULL, **place}
    (fit,) = (view for view in views if all(getattr(view, name) in (value, None) for name, value in place.items()))
    return fit


def tables(shown: View) -> list[Table]:
    return [block for block in shown.blocks if isinstance(block, Table)]
