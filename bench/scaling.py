"""How data parallel training scales, by records, and would on more GPUs than were measured, which is all *projected*.

No torch in here.

A step on n GPUs is taken to last as long as one in which each is left to itself, and on top of it what the fewest that
were measured, mostly two, spend on adding up, and what NCCL's all-reduce of n takes longer than that of those
(`project`): at worst, as the backward pass hides no more of it than with them. The time of an all-reduce is NCCL's own
model, by which it chooses between ring and tree (`all_reduce_s`). Nothing is fitted.

`python -m netdyno.bench.scaling` writes the tables of docs/scaling.md anew, from the records in results/.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .schema import read_all
from .summary import at, comparable, on_each, summarise
from .table import MISSING, aligned, figure, replace_section

ROOT = Path(__file__).resolve().parents[1]
GPUS_A_HOST = 8
PROJECTED = (8, 64)


@dataclass(frozen=True, kw_only=True)
class Links:
    """What an all-reduce has to go by, in GB/s one way."""

    name: str
    within_host: float  # of one GPU to the others
    between_hosts: float  # of one host to the others, all its GPUs together


# NVLink: the 450 GB/s each way of the datasheets of H100 and H200. The network: eight NICs of 400 Gbit/s in a host, as
# in NVIDIA's DGX H100, or one of 100 Gbit/s, as clouds have them.
NETWORKS = (
    Links(name="8 × 400 Gbit/s a host", within_host=450, between_hosts=400),
    Links(name="100 Gbit/s a host", within_host=450, between_hosts=12.5),
)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One of the ways in which NCCL sends: latencies in µs, and what it has of the links' rate."""

    start_us: float
    within_host_us: float  # of a step to another GPU of the host
    between_hosts_us: float
    share: float


# NVIDIA/nccl, src/graph/tuning.cc, commit 01afd20: baseLat, hwLat, and the factors of bandwidth beside them. LL is for
# short messages, Simple for long ones; Simple's steps of a tree hold the time of a chunk.
RING = (
    Protocol(start_us=3.6, within_host_us=0.47, between_hosts_us=2.7, share=1 / 4),
    Protocol(start_us=8.4, within_host_us=3.4, between_hosts_us=9.6, share=1),
)
TREE = (
    Protocol(start_us=4.4, within_host_us=0.52, between_hosts_us=5.0, share=0.9 / 3.8),
    Protocol(start_us=0, within_host_us=28, between_hosts_us=50, share=0.9),
)


def all_reduce_s(size: float, gpus: int, links: Links) -> dict[str, float]:
    """Seconds for the sum of `size` bytes over `gpus`, by ring and by tree, each by its faster protocol.

    A ring takes 2 (n - 1) steps and sends 2 (n - 1) / n of the data through each link. A double binary tree (Sanders et
    al. 2009) takes a chain within each host and log₂ of the hosts up and down, and sends the data twice.
    """
    hosts = -(-gpus // GPUS_A_HOST)
    rate = 1e9 * (links.within_host if hosts == 1 else min(links.within_host, links.between_hosts))
    ring = min(
        1e-6 * (way.start_us + 2 * (gpus - hosts) * way.within_host_us + 2 * (hosts - 1) * way.between_hosts_us)
        + 2 * (gpus - 1) / gpus * size / (way.share * rate)
        for way in RING
    )
    chain, depth = -(-gpus // hosts) - 1, math.log2(hosts)
    tree = min(
        1e-6 * (way.start_us + 2 * (chain * way.within_host_us + depth * way.between_hosts_us))
        + 2 * size / (way.share * rate)
        for way in TREE
    )
    return {"ring": ring, "tree": tree}


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A step on so many GPUs, with the same batch on each."""

    gpus: int
    step_s: float
    efficiency: float  # of so many times the speed of one
    way: str  # of the all-reduce


def project(communication: Mapping[str, Any], measured: int, gpus: int, links: Links) -> Projection:
    """From the `communication` of a record of `measured` GPUs of one host to `gpus` of them.

    Between hosts no update is shared out: where one was, what its sums take by NCCL is taken to be exposed as a whole.
    """
    alone_s, size = communication["apart_step_s"], communication["add_up_mib"] * 2**20
    as_measured = gpus <= GPUS_A_HOST or not communication.get("shared_mib")
    exposed_s = communication["exposed_s" if as_measured else "add_up_s"]
    ways = all_reduce_s(size, gpus, links)
    way = min(ways, key=ways.__getitem__)
    longer_s = ways[way] - min(all_reduce_s(size, measured, links).values())
    step_s = alone_s + max(0.0, exposed_s + longer_s)
    return Projection(gpus=gpus, step_s=step_s, efficiency=alone_s / step_s, way=way)


def measured_table(records: Iterable[Mapping[str, Any]]) -> str:
    """Images/s of tuned runs under weak scaling beside those of one GPU of the same machine, medians of its records."""
    headers = ["machine", "workload", "mode", "GPUs", "batch", "one GPU, images/s", "all, images/s", "times one"]
    lines = []
    for row in sorted(summarise(list(records)), key=lambda row: str(row.machine)):
        if (
            row.tuning != "tuned"
            or row.scaling != "weak"
            or not (row.scaling_efficiency and row.gpus and row.batch_size)
        ):
            continue
        times, speed = row.gpus * row.scaling_efficiency, row.images_per_s or 0.0
        counts = [f"{row.gpus:.0f}", f"{row.batch_size:,.0f}"]
        said = ", ".join([f"{times:.2f}", *row.on_another_card("one GPU")])
        names = [str(row.machine), str(row.workload), str(row.mode)]
        lines.append([*names, *counts, figure(speed / times), figure(speed), said])
    if not lines:
        return "There is no record of several GPUs beside one of one yet."
    return aligned(headers, [False, False, False, True, True, True, True, True], lines)


def page_table(records: Iterable[Mapping[str, Any]]) -> str:
    """Of each workload's newest tuned case under weak scaling: what was measured, and what is projected from it.

    End to end, where it was; by the same code on the same machine. The projection is from the fewest GPUs; where more
    were measured it stands beside them. Of several runs, the one with the median of their exposed times; of an even
    number the lower.
    """
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        case = record["case"]
        whole = (
            record["status"] == "ok" and case.get("gpus") and at(record, "communication", "apart_step_s") is not None
        )
        if whole and at(record, "machine", "gpu") and (case["tuning"], case.get("scaling")) == ("tuned", "weak"):
            runs.setdefault(case["workload"], []).append(record)
    if not runs:
        return "There is no record of several GPUs yet."
    names = ["machine", "workload", "", "GPUs", "network"]
    headers = [*names, "step, µs", "exposed, µs", "efficiency by sums alone", "all-reduce"]
    lines = []
    for workload, found in sorted(runs.items()):
        group = [record for record in found if record["case"]["mode"] == "e2e"] or found
        measured: dict[int, list[Mapping[str, Any]]] = {}
        for record in group:
            if _but_for_gpus(record) == _but_for_gpus(group[-1]):
                measured.setdefault(record["case"]["gpus"], []).append(record["communication"])
        fewest, machine = min(measured), at(group[-1], "machine", "slug")
        for count in sorted({*measured, *PROJECTED}):
            if count in measured:
                one = _median(measured[count])
                names = [machine, workload, "measured", str(count), MISSING]
                share = one["apart_step_s"] / one["step_s"]
                lines.append(_line(names, one["step_s"], one["exposed_s"], share, MISSING))
            if count > fewest:
                base = _median(measured[fewest])
                for links in NETWORKS if count > GPUS_A_HOST else NETWORKS[:1]:
                    more = project(base, fewest, count, links)
                    network = links.name if count > GPUS_A_HOST else MISSING
                    exposed_s = more.step_s - base["apart_step_s"]
                    names = [machine, workload, "projected", str(count), network]
                    lines.append(_line(names, more.step_s, exposed_s, more.efficiency, more.way))
    return aligned(headers, [False, False, False, True, False, True, True, True, False], lines)


def _but_for_gpus(record: Mapping[str, Any]) -> tuple[str, str | None]:
    case = record["case"]
    recipe = on_each(case.get("recipe") or {}, case["gpus"])
    return comparable({**record, "case": {**case, "gpus": None, "recipe": recipe}}), at(record, "code")


def _median(found: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    ordered = sorted(found, key=lambda one: one["exposed_s"])
    return ordered[(len(ordered) - 1) // 2]


def _line(names: list[str], step_s: float, exposed_s: float, efficiency: float, way: str) -> list[str]:
    return [*names, figure(1e6 * step_s), figure(1e6 * exposed_s), f"{100 * efficiency:.1f} %", way]


if __name__ == "__main__":
    page, found = ROOT / "docs" / "scaling.md", read_all(ROOT / "results")[0]
    text = replace_section(page.read_text(), "measured", measured_table(found))
    page.write_text(replace_section(text, "scaling", page_table(found)))
