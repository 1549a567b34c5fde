"""What `bench/doctor.py` tries out in a process of its own: `python -m netdyno.bench.probes NAME`.

A probe prints what it found as the last line of standard output, or why it failed as the last line of standard error.
What crashes or hangs here takes nothing else with it, and an error of CUDA does not spoil the probes that follow.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import ceilings
from .child import first_line
from .errors import UserError


def compiling() -> str:
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * 2).square().sum()  # of values that do not cancel: another order of adding hardly matters

    x = torch.randn(1_000, device=device())
    start = time.perf_counter()
    result = torch.compile(function, fullgraph=True, dynamic=False)(x)
    seconds = time.perf_counter() - start
    torch.testing.assert_close(result, function(x))
    return f"torch.compile made a function that computes what it should, in {seconds:.0f} s on the {place()}"


def dali() -> str:
    from PIL import Image

    from .data.dali import decode

    side, grey = 64, 128
    with tempfile.TemporaryDirectory(prefix="netdyno-") as folder:
        path = Path(folder) / "grey.jpg"
        Image.new("RGB", (side, side), (grey, grey, grey)).save(path)
        (image,) = decode([path], device())
    if image.shape != (side, side, 3) or abs(int(image.min()) - grey) > 2 or abs(int(image.max()) - grey) > 2:
        raise RuntimeError(f"a grey image was decoded to {[*image.shape]}, {image.min()} to {image.max()}")
    return f"a pipeline decoded an image on the {place()}"


def graphs() -> str:
    x = torch.zeros(1_000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = 2 * x + 1
    x.fill_(3)
    graph.replay()
    torch.testing.assert_close(y, torch.full_like(y, 7))
    return "a CUDA graph was captured and replayed"


def ceilings_of_this_machine() -> str:
    return json.dumps(ceilings.measure(device()), allow_nan=False)


PROBES = {"compiling": compiling, "dali": dali, "graphs": graphs, "ceilings": ceilings_of_this_machine}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place() -> str:
    return "GPU" if device().type == "cuda" else "CPU"


def main() -> None:
    try:
        print(PROBES[sys.argv[1]](), flush=True)
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        print(kind + first_line(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)  # as in bench/start.py: taking down CUDA and DALI in order takes seconds


if __name__ == "__main__":
    main()
