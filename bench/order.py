"""What the parent of a case's process asks of it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from .workloads import Case


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the parent asks of the child."""

    case: Case
    data: Path
    pictures: Path  # an empty folder for pictures, `<epoch>.webp` each
    started: float  # time.time() when the parent started the child
    gpu: str | None = None  # the GPU's name where the machine has one: the case must not run without it
    compile_only: bool = False  # compile, say how long it took, and end
    batch_size: int | None = None  # in place of the recipe's
    trace: Path | None = None  # where to put a profiler trace
    restarts: int = 0  # of the ranks of a case on several GPUs, at most

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @staticmethod
    def from_json(text: str) -> "Order":
        values = json.loads(text)
        paths = {name: Path(values[name]) if values[name] else None for name in ("data", "pictures", "trace")}
        return Order(**(values | paths | {"case": Case(**values["case"])}))
