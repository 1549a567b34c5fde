"""Records for pandas and DuckDB: one row a record, as CSV or parquet. docs/report.md lists the columns."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from ..summary import at, clean
from .load import Found

if TYPE_CHECKING:
    import pandas as pd

PYARROW = "pyarrow>=14"  # as the extra `parquet` of pyproject.toml has it
TYPES = {"text": "string", "number": "float64", "flag": "boolean", "json": "string"}


@dataclass(frozen=True, kw_only=True)
class Column:
    name: str
    path: tuple[str, ...]  # where the value stands in a record
    kind: Literal["text", "number", "flag", "json"]
    what: str


def _column(name: str, path: str, kind: Literal["text", "number", "flag", "json"], what: str) -> Column:
    return Column(name=name, path=tuple(path.split(".")), kind=kind, what=what)


COLUMNS = (
    _column("id", "id", "text", "the record's own name"),
    _column("created_utc", "created_utc", "text", "when the run began, ISO 8601"),
    _column("machine", "machine.slug", "text", "folder of the machine's records"),
    _column("gpu", "machine.gpu", "text", "name of the GPU; empty without one"),
    _column("cpu", "machine.cpu", "text", "name of the CPU"),
    _column("cores", "machine.cores", "number", "CPU cores that the run could use"),
    _column("memory_gib", "machine.memory_gib", "number", "the machine's main memory"),
    _column("versions", "machine.versions", "json", "Python, torch, DALI, driver, …"),
    _column("workload", "case.workload", "text", "which network and data"),
    _column("division", "case.division", "text", "closed or open"),
    _column("suite", "case.suite", "text", "quick, full or source"),
    _column("tuning", "case.tuning", "text", "how it was executed"),
    _column("mode", "case.mode", "text", "e2e, compute or loader"),
    _column("precision", "case.precision", "text", "of products and convolutions: bf16, fp16 or fp32"),
    _column("tf32_convolutions", "case.tf32_convolutions", "flag", "fp32 convolutions ran as TF32"),
    _column("captured", "case.captured", "flag", "the step was one CUDA graph"),
    _column("seed", "case.seed", "number", "of weights, order and augmentation"),
    _column("gpus", "case.gpus", "number", "GPUs used"),
    _column(
        "scaling", "case.scaling", "text", "of several GPUs: weak, the recipe's work on each, or strong, shared out"
    ),
    _column("batch_size", "case.recipe.batch_size", "number", "images a step"),
    _column("epochs", "case.recipe.epochs", "number", "epochs that the recipe asks for"),
    _column("recipe", "case.recipe", "json", "every setting that decides the work"),
    _column("status", "status", "text", "ok, oom, diverged, timeout, failed, killed or skipped"),
    _column("reason", "reason", "text", "why it is not ok"),
    _column("data", "data.name", "text", "image set"),
    _column("data_label", "data.label", "text", "official, re-split, own or synthetic"),
    _column("synthetic", "data.synthetic", "flag", "a drawn stand-in took the place of real data"),
    _column("data_sha256", "data.sha256", "json", "digest of each split"),
    _column("loader", "data.loader", "text", "dali or torch"),
    _column("timing_version", "timing.timing_version", "number", "rules of timing; never compare two of them"),
    _column("steady", "timing.steady", "flag", "warm-up reached a steady step time"),
    _column("steps", "timing.steps", "number", "optimizer steps timed"),
    _column("train_s", "timing.train_s", "number", "seconds of all timed steps"),
    _column("wall_s", "timing.wall_s", "number", "the same by the host's clock"),
    _column("images_per_s", "throughput.images_per_s", "number", "images trained on, over train_s"),
    _column("eval_images_per_s", "throughput.eval_images_per_s", "number", "images evaluated a second"),
    _column("peak_allocated_mib", "memory.peak_allocated_mib", "number", "GPU memory in use by torch, peak"),
    _column("peak_reserved_mib", "memory.peak_reserved_mib", "number", "GPU memory held by torch, peak"),
    _column("nvml_process_peak_mib", "memory.nvml_process_peak_mib", "number", "GPU memory of the whole process, peak"),
    _column("host_rss_peak_mib", "memory.host_rss_peak_mib", "number", "resident main memory, peak"),
    _column("metric", "accuracy.metric", "text", "what final, best and target measure"),
    _column("metric_unit", "accuracy.unit", "text", "its unit"),
    _column("higher_is_better", "accuracy.higher_is_better", "flag", "which way is good"),
    _column("final", "accuracy.final", "number", "metric after the last epoch"),
    _column("best", "accuracy.best", "number", "best metric of any epoch"),
    _column("target", "accuracy.target", "number", "what the final metric must reach"),
    _column("reached", "accuracy.reached", "flag", "whether it did"),
    _column("train_s_to_target", "accuracy.train_s_to_target", "number", "seconds of training until it did"),
    _column("curve", "accuracy.curve", "json", "a row an evaluation: epoch, train_s, eval_s, train_loss, metric"),
    _column("compile_cold_s", "compile.cold_s", "number", "first step and evaluation, empty compiler cache"),
    _column("compile_warm_s", "compile.warm_s", "number", "the same, filled cache"),
    _column("recompiles", "compile.recompiles", "number", "graphs compiled again in the timed region"),
    _column("sm_clock_mhz_mean", "gpu.sm_clock_mhz_mean", "number", "mean SM clock of the GPU while training"),
    _column("sm_clock_mhz_min", "gpu.sm_clock_mhz_min", "number", "lowest of them while it was busy"),
    _column("sm_clock_mhz_max", "gpu.sm_clock_mhz_max", "number", "highest of them while it was busy"),
    _column("throttle_share", "gpu.throttle_share", "json", "share of readings in which each reason slowed it"),
    _column("fingerprints", "gpu.fingerprints", "json", "which GPUs: equal where two records are of the same ones"),
    _column("other_processes", "gpu.other_processes", "number", "on the GPU beside the run, the most at once"),
    _column("power_w_mean", "gpu.power_w_mean", "number", "mean power of the GPU while training"),
    _column("energy_j", "gpu.energy_j", "number", "energy of the GPU while training"),
    _column("energy_source", "gpu.energy_source", "text", "counter: its own; sampled: mean power by time"),
    _column("energy_sampled_j", "gpu.energy_sampled_j", "number", "the same energy from sampled power, to compare"),
    _column("flop_per_s", "roofline.flop_per_s", "number", "counted operations over measured time"),
    _column("bytes_per_s", "roofline.bytes_per_s", "number", "counted bytes over measured time"),
    _column("ceiling_flop_per_s", "roofline.ceiling_flop_per_s", "number", "what matrix products reach here"),
    _column("ceiling_bytes_per_s", "roofline.ceiling_bytes_per_s", "number", "what copies reach here"),
    _column("share_of_ceilings", "roofline.share", "number", "of the images/s that the ceilings allow"),
    _column("code", "code", "text", "digest of the sources that decide a measurement"),
)


def to_frame(found: Sequence[Found]) -> pd.DataFrame:
    """A row a record, in the order of their names; numbers unrounded, missing values empty."""
    import pandas as pd  # here, because it takes longer to import than all else that is needed

    ordered = sorted(found, key=lambda one: one.name)
    columns = {column.name: [_value(one, column) for one in ordered] for column in COLUMNS}
    return pd.DataFrame(columns).astype({column.name: TYPES[column.kind] for column in COLUMNS})


def _value(one: Found, column: Column) -> Any:
    value = at(one.record, *column.path)
    if value is None or column.kind in ("number", "flag"):
        plain = (int, float) if column.kind == "number" else (bool,)
        return value if isinstance(value, plain) else None  # a recipe may hold anything
    return json.dumps(value, ensure_ascii=False) if column.kind == "json" else clean(str(value))


def to_csv(found: Sequence[Found]) -> bytes:
    """A text that a spreadsheet would take for a formula is led by an apostrophe."""
    frame = to_frame(found)
    for column in COLUMNS:
        if column.kind == "text":
            frame[column.name] = frame[column.name].str.replace(r"^(?=[=+\-@])", "'", regex=True)
    return frame.to_csv(index=False, lineterminator="\n").encode()


def to_parquet(found: Sequence[Found]) -> bytes:
    """UserError where pandas has no engine for it."""
    out = io.BytesIO()
    try:
        to_frame(found).to_parquet(out, index=False)
    except ImportError as error:
        raise UserError(
            f"parquet needs pyarrow, which is not here or too old; install it with: {sys.executable} -m pip install "
            f"'{PYARROW}' (--format csv needs nothing)"
        ) from error
    return out.getvalue()
