"""What a record may hold: the type, size and range of every value, checked before others' records are shown or kept.

`read` is the strict reader, for files that somebody else may have made; `record.load` is the quick one for one's own.
Keys that this version does not know are allowed, as far as they are plain JSON: a newer version may have written them.
No torch in here.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from .errors import UserError
from .record import STATUSES, Record, check_schema, filled, paths_in
from .summary import clean

LARGEST_RECORD = 256 * 1024  # bytes; 16 KiB is the rule, a curve of 200 epochs is above it, and GPUs multiply them
LARGEST_PICTURE = 2 * 2**20
LARGEST_NUMBER = 1e18
LONGEST_TEXT = 1_000
MOST_EPOCHS = 10_000
MOST_SEEDS = 1_000
MOST_BESIDE = 1_000
MOST_RANKS = 1_024
DEEPEST = 6
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")  # what becomes part of a file's path
PICTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}\.[0-9]{1,6}\.webp")
ENERGY_SOURCE = re.compile(r"counter|sampled")
SCALING = re.compile(r"weak|strong")
SHA256 = re.compile(r"[0-9a-f]{64}")

Check = Callable[[Any, str], Iterator[str]]  # of a value and its name, to what is wrong with it


def read(path: Path) -> Record:
    """One record from a file. UserError naming the file where anything in it is not as it must be."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_RECORD + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return parse(content, str(path))


def read_all(results: Path) -> tuple[list[Record], list[str]]:
    """Every valid record in `results/<machine>/<workload>/`, oldest first, and a line on each file that is none."""
    records, problems = [], []
    for path in paths_in(results):
        try:
            records.append(read(path))
        except UserError as error:
            problems.append(str(error))
    return records, problems


def parse(content: bytes, name: str) -> Record:
    """The record in `content`. UserError with `name` in it where anything is not as it must be."""
    if len(content) > LARGEST_RECORD:
        raise UserError(f"{name} is larger than a record may be ({LARGEST_RECORD:,} bytes)")
    record = parse_json(content, name)
    if not isinstance(record, dict) or "schema" not in record:
        raise UserError(f"{name} is no record of Netdyno: it has no 'schema'")
    check_schema(record["schema"], name)
    for problem in problems(record):
        raise UserError(f"{name} is no valid record: {clean(problem)}")
    return filled(record)


def parse_json(content: bytes, name: str) -> Any:
    """Strict JSON: no NaN, no infinity, no key twice, no depth that breaks the parser."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice in one object")
        return found

    try:
        return json.loads(content.decode("utf-8"), parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not readable JSON: {error}") from error


def problems(record: Mapping[str, Any]) -> Iterator[str]:
    """Everything that is wrong with a record, each with the name of the value, such as `timing.train_s`."""
    yield from RECORD(record, "")


def machine_problems(machine: Any) -> Iterator[str]:
    """Everything that is wrong with the content of a `machine.json`."""
    yield from MACHINE(machine, "machine")


# Checks


def _fits(pattern: re.Pattern[str], kind: str) -> Check:
    def check(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            yield f"{where} is no {kind}"

    return check


def _time(value: Any, where: str) -> Iterator[str]:
    try:
        datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ")
    except (TypeError, ValueError):
        yield f"{where} is no time such as 2026-11-23T12:34:56Z"


def _text(value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"{where} is no text"
    elif len(value) > LONGEST_TEXT:
        yield f"{where} is longer than {LONGEST_TEXT:,} characters"
    elif any("\ud800" <= letter <= "\udfff" for letter in value):
        yield f"{where} holds half a character"


def _number(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        yield f"{where} is no number"
    elif not abs(value) <= LARGEST_NUMBER:  # NaN is not either
        yield f"{where} is beyond any measurement"


def _measure(value: Any, where: str) -> Iterator[str]:
    yield from _number(value, where)
    if isinstance(value, (int, float)) and value < 0:
        yield f"{where} is negative"


def _share(value: Any, where: str) -> Iterator[str]:
    yield from _measure(value, where)
    if isinstance(value, (int, float)) and value > 1:
        yield f"{where} is more than the whole"


def _rate(value: Any, where: str) -> Iterator[str]:
    yield from _number(value, where)
    if isinstance(value, (int, float)) and not value > 0:
        yield f"{where} is not above zero"


def _count(value: Any, where: str) -> Iterator[str]:
    yield from _measure(value, where)
    if isinstance(value, float) and (not math.isfinite(value) or value != int(value)):
        yield f"{where} is no whole number"


def _flag(value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, bool):
        yield f"{where} is neither true nor false"


def _plain(value: Any, where: str, depth: int = 0) -> Iterator[str]:
    """Any JSON, within bounds."""
    if depth > DEEPEST:
        yield f"{where} is nested too deeply"
    elif isinstance(value, str):
        yield from _text(value, where)
    elif isinstance(value, (int, float)):
        if not isinstance(value, bool):
            yield from _number(value, where)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _text(name, f"a key of {where}")
            yield from _plain(item, f"{where}.{name}", depth + 1)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _plain(item, f"{where}[{number}]", depth + 1)
    elif value is not None:
        yield f"{where} is nothing that JSON knows"


def _or_null(check: Check) -> Check:
    def either(value: Any, where: str) -> Iterator[str]:
        if value is not None:
            yield from check(value, where)

    return either


def _each(check: Check, most: int) -> Check:
    def every(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, list):
            yield f"{where} is no list"
        elif len(value) > most:
            yield f"{where} has more than {most:,} entries"
        else:
            for number, item in enumerate(value):
                yield from check(item, f"{where}[{number}]")

    return every


def _table(check: Check) -> Check:
    """An object with keys of any name and values of one kind."""

    def every(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, Mapping):
            yield f"{where} is no object"
            return
        for name, item in value.items():
            yield from _text(name, f"a key of {where}")
            yield from check(item, f"{where}.{name}")

    return every


def _object(known: Mapping[str, Check], *, required: Collection[str] = ()) -> Check:
    """An object with some known keys; others may hold anything plain."""

    def check(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, Mapping):
            yield f"{where or 'it'} is no object"
            return
        prefix = f"{where}." if where else ""
        for name in required:
            if name not in value:
                yield f"{prefix}{name} is missing"
        for name, item in value.items():
            yield from _text(name, f"a key of {where or 'the record'}")
            yield from known.get(name, _plain)(item, f"{prefix}{name}")

    return check


def _curve(value: Any, where: str) -> Iterator[str]:
    """Rows in the order of their epochs."""
    yield from _each(_EPOCH, MOST_EPOCHS)(value, where)
    epochs = [row.get("epoch") for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []
    numbers = [epoch for epoch in epochs if isinstance(epoch, (int, float))]
    if any(later <= earlier for earlier, later in pairwise(numbers)):
        yield f"{where} is not in the order of its epochs"


def _status(value: Any, where: str) -> Iterator[str]:
    if value not in STATUSES:
        yield f"{where} is none of {', '.join(STATUSES)}"


_name = _fits(NAME, "name of letters, digits, '.', '_', '+' and '-', at most 100")
_EPOCH = _object(
    {
        "epoch": _count,
        "train_s": _or_null(_measure),
        "eval_s": _or_null(_measure),
        "train_loss": _or_null(_number),
        "metric": _or_null(_number),
        "metrics": _or_null(_table(_or_null(_number))),
    },
    required=("epoch",),
)
_SEED = _object({"seed": _count, "train_s": _measure, "metric": _number}, required=("seed", "train_s", "metric"))
CEILINGS = _object(
    {
        "measured_utc": _time,
        "torch": _text,
        **dict.fromkeys(("matmul_bf16_tflops", "matmul_fp16_tflops", "matmul_fp32_tflops", "copy_gb_per_s"), _rate),
        "matmul_sm_clock_mhz": _or_null(_measure),
        "copy_buffer_mib": _or_null(_measure),
        "other_processes": _or_null(_count),
    },
    required=("measured_utc", "torch", "copy_gb_per_s"),
)
MACHINE = _object(
    {
        "slug": _name,
        "gpu": _or_null(_text),
        "cpu": _or_null(_text),
        "cores": _or_null(_count),
        "memory_gib": _or_null(_measure),
        "os": _or_null(_text),
        "versions": _or_null(_table(_or_null(_text))),
        "ceilings": _or_null(CEILINGS),
    },
    required=("slug",),
)
GPU: dict[str, Check] = {
    **dict.fromkeys(("temperature_c_mean", "temperature_c_max"), _or_null(_number)),
    **dict.fromkeys(
        (
            *("sm_clock_mhz_mean", "sm_clock_mhz_min", "sm_clock_mhz_max", "mem_clock_mhz_mean"),
            *("power_w_mean", "utilisation_pct_mean", "energy_j", "energy_sampled_j"),
        ),
        _or_null(_measure),
    ),
    "energy_source": _or_null(_fits(ENERGY_SOURCE, "source of an energy")),
    "throttle_share": _or_null(_table(_or_null(_share))),
    **dict.fromkeys(("other_processes", "readings", "failed_readings"), _or_null(_count)),
}
RECORD = _object(
    {
        "schema": _count,
        "id": _name,
        "created_utc": _time,
        "case": _object(
            {
                **dict.fromkeys(("workload", "tuning", "mode"), _name),
                **dict.fromkeys(("division", "suite", "precision"), _or_null(_name)),
                "seed": _or_null(_count),
                "seeds": _or_null(_each(_count, MOST_SEEDS)),
                "gpus": _or_null(_count),
                "scaling": _or_null(_fits(SCALING, "way to scale")),
                "recipe": _or_null(_table(_plain)),
            },
            required=("workload", "tuning", "mode"),
        ),
        "status": _status,
        "reason": _or_null(_text),
        "timing": _or_null(
            _object(
                {
                    **dict.fromkeys(("timing_version", "block_steps", "blocks_thinned_by", "steps"), _or_null(_count)),
                    **dict.fromkeys(("wall_s", "gpu_s", "train_s"), _or_null(_measure)),
                    "block_s": _or_null(_each(_measure, 100_000)),
                    "steady": _or_null(_flag),
                }
            )
        ),
        "throughput": _or_null(_table(_or_null(_measure))),
        "memory": _or_null(
            _object(
                dict.fromkeys(("loaders_mib", "libraries_mib"), _or_null(_number))  # differences, which may be negative
                | dict.fromkeys(
                    (
                        "peak_allocated_mib",
                        "peak_reserved_mib",
                        "nvml_process_peak_mib",
                        "host_rss_peak_mib",
                        "nvml_process_mib",
                        "context_mib",
                        "warm_up_reserved_mib",
                        "limit_mib",
                    ),
                    _or_null(_measure),
                )
            )
        ),
        "accuracy": _or_null(
            _object(
                {
                    "metric": _or_null(_text),
                    "unit": _or_null(_text),
                    "higher_is_better": _or_null(_flag),
                    **dict.fromkeys(("reached", "surely"), _or_null(_flag)),
                    **dict.fromkeys(
                        ("final", "best", "target", "standard_deviation", "lower_bound"), _or_null(_number)
                    ),
                    "seeds": _or_null(_each(_SEED, MOST_SEEDS)),
                    "train_s_to_target": _or_null(_measure),
                    "also_at_least": _or_null(_table(_or_null(_number))),
                    "references": _or_null(_table(_or_null(_number))),
                    "curve": _or_null(_curve),
                    "pictures": _or_null(
                        _each(
                            _object(
                                {
                                    "epoch": _count,
                                    "file": _fits(PICTURE, "name of a picture"),
                                    "sha256": _fits(SHA256, "SHA-256"),
                                },
                                required=("epoch", "file", "sha256"),
                            ),
                            1_000,
                        )
                    ),
                }
            )
        ),
        "compile": _or_null(_table(_plain)),
        "gpu": _or_null(
            _object(
                {
                    **GPU,
                    "cards": _or_null(_each(_object(GPU), MOST_RANKS)),
                    "fingerprints": _or_null(_each(_text, MOST_RANKS)),
                    "card": _or_null(_count),
                    "beside": _or_null(_each(_text, MOST_BESIDE)),
                }
            )
        ),
        "communication": _or_null(
            _object(
                {
                    "restarts": _or_null(_count),
                    "rank_train_s": _or_null(_each(_measure, MOST_RANKS)),
                    "exposed_s": _or_null(_number),  # a difference, which may be negative
                    **dict.fromkeys(
                        ("step_s", "apart_step_s", "add_up_s", "add_up_mib", "shared_mib"), _or_null(_measure)
                    ),
                }
            )
        ),
        "roofline": _or_null(
            _object(
                dict.fromkeys(
                    ("flop_per_s", "bytes_per_s", "ceiling_flop_per_s", "ceiling_bytes_per_s", "share"),
                    _or_null(_measure),
                )
            )
        ),
        "data": _or_null(
            _object(
                {
                    "name": _or_null(_text),
                    "label": _or_null(_text),
                    "synthetic": _or_null(_flag),
                    "sha256": _or_null(_table(_or_null(_text))),
                    "loader": _or_null(_text),
                    "resident": _or_null(_flag),
                }
            )
        ),
        "machine": MACHINE,
        "code": _or_null(_text),
    },
    required=("schema", "id", "created_utc", "case", "status", "machine"),
)
