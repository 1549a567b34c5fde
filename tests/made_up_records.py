"""Records that nobody measured, for the tests of what is made from records."""

import copy
from typing import Any

GPU = {
    "slug": "nvidia-h200",
    "gpu": "NVIDIA H200",
    "cpu": "AMD EPYC",
    "cores": 16,
    "memory_gib": 128,
    "versions": {"torch": "2.11.0", "dali": "2.4.0", "driver": "580.1"},
}
CPU = {
    "slug": "cpu-amd-epyc-2c",
    "gpu": None,
    "cpu": "AMD EPYC",
    "cores": 2,
    "memory_gib": 23.9,
    "versions": {"torch": "2.11.0", "dali": "2.4.0", "driver": None},
}
OFFICIAL = {"name": "mnist", "label": "official", "synthetic": False, "sha256": {"train": "aa11", "test": "bb22"}}
DRAWN = {"name": "mnist", "label": "synthetic", "synthetic": True, "sha256": {"train": "cc33", "test": "dd44"}}


def make(number: int, **changes: Any) -> dict[str, Any]:
    """Record `number`, made at second `number`; `changes` name a key of any section, or a whole section."""
    record: dict[str, Any] = {
        "schema": 1,
        "id": f"20261123T1200{number:02}Z-{number:06x}",
        "created_utc": f"2026-11-23T12:00:{number:02}Z",
        "case": {
            "workload": "mnist-cnn",
            "division": "closed",
            "tuning": "tuned",
            "mode": "e2e",
            "suite": "full",
            "seed": 0,
            "gpus": 1,
            "scaling": None,
            "recipe": {"batch_size": 128, "epochs": 2, "lr": 0.01},
        },
        "status": "ok",
        "reason": None,
        "timing": {
            "timing_version": 1,
            "block_steps": 10,
            "block_s": [0.1, 0.1],
            "blocks_thinned_by": 1,
            "wall_s": 2.0,
            "gpu_s": 1.9,
            "train_s": 1.9,
            "steps": 20,
            "steady": True,
        },
        "throughput": {"images_per_s": 1000.0, "eval_images_per_s": 20000.0},
        "memory": {
            "peak_allocated_mib": 512.0,
            "peak_reserved_mib": 600.0,
            "nvml_process_peak_mib": 1536.5,
            "nvml_process_mib": 1536.5,
            "host_rss_peak_mib": 2048.0,
            "limit_mib": None,
        },
        "accuracy": accuracy([97.0, 99.1]),
        "compile": {"cold_s": 31.0, "warm_s": 6.5, "recompiles": 0},
        "gpu": None,
        "roofline": None,
        "data": {**OFFICIAL, "loader": "dali"},
        "machine": GPU,
        "code": "c0de",
    }
    record = copy.deepcopy(record)
    for name, value in changes.items():
        sections = [record, *(part for part in record.values() if isinstance(part, dict))]
        next(section for section in sections if name in section)[name] = value
    return record


def accuracy(metrics: list[Any], target: float | None = 99.0, **changes: Any) -> dict[str, Any]:
    reached = None if target is None else metrics[-1] >= target
    first = next((number for number, metric in enumerate(metrics, 1) if reached and metric >= target), None)
    curve = [
        {"epoch": epoch, "train_s": 5.0, "eval_s": 0.5, "train_loss": 1 / epoch, "metric": metric}
        for epoch, metric in enumerate(metrics, 1)
    ]
    return {
        "metric": "test accuracy",
        "unit": "%",
        "higher_is_better": True,
        "final": metrics[-1],
        "best": max(metric for metric in metrics if metric is not None),
        "target": target,
        "reached": reached,
        "train_s_to_target": 5.0 * first if first else None,
        "curve": curve,
        **changes,
    }


def seen(energy_j: float, source: str = "counter", **changes: Any) -> dict[str, Any]:
    """What NVML saw of a run that used `energy_j`."""
    return {
        "sm_clock_mhz_mean": 1965.2,
        "sm_clock_mhz_min": 1950.0,
        "sm_clock_mhz_max": 1980.0,
        "mem_clock_mhz_mean": 3201.0,
        "power_w_mean": 540.2,
        "temperature_c_mean": 55.5,
        "temperature_c_max": 57.0,
        "utilisation_pct_mean": 88.1,
        "throttle_share": {},
        "energy_j": energy_j,
        "energy_source": source,
        "energy_sampled_j": energy_j,
        "other_processes": 0,
        "readings": 19,
        **changes,
    }


EAGER: dict[str, Any] = {"tuning": "eager", "compile": None, "loader": "baseline"}
CAPPED: dict[str, Any] = {"throttle_share": {"sw_power_cap": 0.263}, "sm_clock_mhz_min": 1500.0}


def records() -> list[dict[str, Any]]:
    """Two machines; every sort of row that the tables know."""
    swd = accuracy([90.0, 60.0, 50.0, 40.0, 30.0, 22.5], None, metric="SWD", unit="×10³", higher_is_better=False)
    swd["curve"][-1]["metrics"] = {"real": 8.25, "untrained": 310.0}
    faces = {"name": "anime_faces", "label": "own", "synthetic": False, "sha256": {"train": "ee55"}, "loader": "dali"}
    dcgan = {"workload": "dcgan", "accuracy": swd, "data": faces}
    flowers = {"batch_size": 64, "epochs": 2, "weights": "random"}
    resnet = {"workload": "resnet50-transfer", "recipe": flowers, "accuracy": accuracy([20.0, 41.5], None)}
    quick = {
        "suite": "quick",
        "machine": CPU,
        "peak_allocated_mib": None,
        "nvml_process_peak_mib": None,
        "nvml_process_mib": None,
    }
    return [
        make(1, images_per_s=540_000.0, accuracy=accuracy([97.0, 99.1]), gpu=seen(1026.0)),
        make(2, images_per_s=550_000.0, accuracy=accuracy([97.2, 99.2]), gpu=seen(1149.5), seed=1),
        make(3, images_per_s=530_000.0, accuracy=accuracy([97.4, 99.3]), gpu=seen(1208.4, **CAPPED), seed=2),
        make(4, images_per_s=45_000.0, gpu=seen(855.0, "sampled"), **EAGER),
        make(5, images_per_s=900_000.0, mode="compute", accuracy=None),
        make(6, images_per_s=10_100.5, recipe={"batch_size": 512, "epochs": 6}, **dcgan),
        make(7, images_per_s=5_050.25, recipe={"batch_size": 128, "epochs": 6}, **dcgan, **EAGER),
        make(8, status="oom", reason="CUDA out of memory: 2 GiB", **{**resnet, "accuracy": None}),
        make(9, images_per_s=81.96, **resnet, **EAGER),
        make(10, images_per_s=9_876.5, **quick),
        make(11, images_per_s=4_938.25, **quick, **EAGER),
        make(12, images_per_s=700.0, **{**quick, "data": {**DRAWN, "loader": "dali"}}),
    ]
