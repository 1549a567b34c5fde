"""The Triton kernels that torch.compile makes of the six networks under the T4 policy, kept in t4_kernels.json.

They are what it made on the card that the file names; what it would make on a T4 may differ in sizes. Networks, step
and compiler go on meanwhile: collect them anew when one of them changes what is compiled.

    python tests/t4_kernels.py [CACHES]

collects them anew, on a GPU: it runs each network under the T4 policy with an empty compiler cache. CACHES, a folder
with a cache for each network, brings those of a run elsewhere.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from netdyno.bench.record import load_all
from netdyno.bench.workloads import names

FIXTURE = Path(__file__).with_suffix(".json")
MADE_BY = ("torch", "triton")
# What stands before a kernel in the file that inductor writes for it; its device is that of the run, ours is a T4.
HEAD = """
import triton
import triton.language as tl
from torch._inductor.runtime import hints, triton_helpers, triton_heuristics
from torch._inductor.runtime.hints import AutotuneHint, ReductionHint, TileHint
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math

def DeviceProperties():
    return hints.DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=40,
        cc=75,
        major=7,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=1024,
        max_threads_per_block=1024,
        warp_size=32,
    )
"""


class Kernel(NamedTuple):
    """One kernel, and the networks that use it."""

    name: str
    networks: list[str]
    source: str  # from its heuristics on

    def load(self, folder: Path) -> Any:
        """Inductor's autotuner of this kernel, for a T4; its source must be in a file."""
        path = folder / f"{self.name}.py"
        path.write_text(HEAD + self.source)
        spec = importlib.util.spec_from_file_location(self.name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, self.name)


def kept() -> tuple[list[Kernel], dict[str, str]]:
    """The kernels, and on what they were collected: the card and the versions of torch and Triton."""
    content = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return [Kernel(**row) for row in content["kernels"]], content["made_on"]


def make_caches(folder: Path) -> None:
    """Runs each network under the T4 policy, two epochs, with a compiler cache of its own below `folder`."""
    for network in names():
        environment = os.environ | {"XDG_CACHE_HOME": str(folder / network)}
        command = [sys.executable, "-m", "netdyno.bench", "run", network, "--tuning", "t4", "--mode", "compute"]
        options = ["--suite", "ladder", "--results", str(folder / "results")]
        subprocess.run([*command, *options], env=environment, check=True)


def collected(caches: Path) -> Iterator[Kernel]:
    """Every kernel once, however it is called."""
    found: dict[str, tuple[str, str, set[str]]] = {}
    for path in sorted(caches.glob("*/netdyno/compile/*/*/*.py")):
        text = path.read_text(encoding="utf-8")
        start = text.find("@triton_heuristics.")
        if start < 0 or "async_compile" in text:  # the file that calls them
            continue
        source = text[start:]
        name = re.findall(r"^def (\w+)\(", source, re.MULTILINE)[0]
        source = re.sub(r"'backend_hash': '[^']*', |(?<=DeviceProperties\()[^)]*(?=\))", "", source).strip() + "\n"
        _, _, networks = found.setdefault(source.replace(name, "kernel"), (name, source, set()))
        networks.add(path.relative_to(caches).parts[0])
    for number, (name, source, networks) in enumerate(found.values()):
        unique = f"k{number}_{name}"[:80]
        yield Kernel(unique, sorted(networks), source.replace(name, unique))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        caches = Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        if len(sys.argv) == 1:
            make_caches(caches)
        rows = [kernel._asdict() for kernel in collected(caches)]
        record = load_all(caches / "results")[-1]["machine"]
    made_on = {"gpu": record["gpu"]} | {name: record["versions"][name] for name in MADE_BY}
    FIXTURE.write_text(json.dumps({"made_on": made_on, "kernels": rows}, indent=0) + "\n", encoding="utf-8")
    print(f"{len(rows)} kernels in {FIXTURE}")


if __name__ == "__main__":
    main()
