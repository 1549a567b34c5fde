"""The largest batch that a workload trains with: doubled until one is out of memory, then by bisection.

Each try is a child process that compiles, trains two steps of each form and evaluates twice, so that one which is out
of memory leaves nothing behind.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UserError
from .order import Order
from .record import Record
from .runner import Listen, watch
from .workloads import Case, resolve

GRAIN = 8  # every batch tried is a multiple: tensor cores take their operands in eights
SHARE = 32  # the search ends when what is left to it is this part of what trains


class Found(NamedTuple):
    """What the search came to."""

    trains: int | None  # the largest that did; None: not even `GRAIN` images
    fails: int | None  # the smallest that did not; None: the training set has no more images


def find_batch_size(case: Case, *, images: int, data: Path, machine: dict[str, Any], listen: Listen) -> Found:
    """Searches up to `images`, those of the training set; `listen` is called with the events of each child.

    UserError where a child ends in anything but "ok" and "out of memory".
    """

    def trains(batch_size: int) -> bool:
        with tempfile.TemporaryDirectory() as scratch:
            order = Order(
                case=case,
                data=data,
                pictures=Path(scratch),
                started=time.time(),
                gpu=machine["gpu"],
                compile_only=True,
                batch_size=batch_size,
            )
            record: Record = {"compile": {}}
            watch(order, record, Path(scratch), listen)
        if record["status"] not in ("ok", "oom"):
            raise UserError(f"{case} with batches of {batch_size:,}: {record['status']}: {record['reason']}")
        return record["status"] == "ok"

    return search(trains, start=resolve(case).recipe.batch_size, most=images)


def search(trains: Callable[[int], bool], *, start: int, most: int) -> Found:
    """The border between batches that train and those that do not, both multiples of `GRAIN` and at most `most`."""
    most -= most % GRAIN
    lowest, highest = 0, None
    at = min(max(GRAIN, start - start % GRAIN), most)
    while at > lowest and (highest is None or highest - lowest > max(GRAIN, lowest // SHARE)):
        if trains(at):
            lowest = at
        else:
            highest = at
        at = min(2 * lowest, most) if highest is None else (lowest + highest) // 2 // GRAIN * GRAIN
    return Found(lowest or None, highest)
