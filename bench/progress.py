"""What a person sees of running cases: a bar each in a terminal, a line an evaluation elsewhere; and how they ended."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from .record import Record


class Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f} steps/s" if task.speed else "")


class Listener:
    """Takes a child's events; a bar in a terminal, else lines. `name` leads them, where several cases run at once."""

    def __init__(self, console: Console, bar: Progress, name: str = "") -> None:
        self._console, self._bar, self._name = console, bar, f"{name}  " if name else ""
        self._task = bar.add_task(f"{self._name}start", total=None, note="")
        self._epochs = 0
        self._each = "epoch"
        self._start = perf_counter()
        self.user_error = False

    def __call__(self, event: dict[str, Any]) -> None:
        self.user_error |= bool(event.get("user_error"))
        if "stage" in event:
            self._epochs = event.get("epochs", 0)
            self._each = event.get("each", "epoch")
            stage = f"{self._name}{event['stage']}"
            self._bar.update(self._task, description=stage, total=event.get("steps"), completed=0, note="")
        if "progress" in event:
            self._progress(**event["progress"])

    def _progress(self, epoch: int, step: int, loss: float | None = None, metric: float | None = None) -> None:
        where = f"{self._name}{self._each} {epoch}/{self._epochs}"
        note = "" if loss is None else f"loss {loss:.4g}"
        if metric is not None:
            note += f"  metric {metric:.2f}"
            if not self._console.is_terminal:
                line = f"  {where}  {note}  after {perf_counter() - self._start:.0f} s"
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._bar.update(self._task, description=where, completed=step, note="" if self._name else note)

    def close(self) -> None:
        """Takes its bar away."""
        self._bar.remove_task(self._task)


@contextmanager
def bars(console: Console) -> Iterator[Callable[[str], Listener]]:
    """Shows cases while they run, in 80 columns; yields what makes a listener for one of them, by its name."""
    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(bar_width=10),
        TaskProgressColumn(),
        Rate(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield partial(Listener, console, bar)


@contextmanager
def show(console: Console) -> Iterator[Listener]:
    """Shows one case while it runs; yields what takes the child's events."""
    with bars(console) as listener:
        yield listener("")


def outcome(record: Record) -> str:
    """How a case ended, in one line: its speed and final metric, or what went wrong."""
    if record["status"] != "ok":
        return f"{record['status']}: {record['reason']}"
    text = f"{record['throughput']['images_per_s']:,.0f} images/s"
    if accuracy := record["accuracy"]:
        text += f", {accuracy['metric']} {accuracy['final']:.2f} {accuracy['unit']}"
        if seeds := accuracy.get("seeds"):
            text += f" {of_seeds(accuracy, len(seeds))}"
    return text


def of_seeds(accuracy: dict[str, Any], count: int) -> str:
    """What an outcome says of the seeds of the open division behind its mean."""
    seconds = fmean(row["train_s"] for row in accuracy["seeds"])
    if count == 1:
        return f"by one seed in {seconds:.4g} s"
    spread = f"± {accuracy['standard_deviation']:.2f} over {count} seeds, at least {accuracy['lower_bound']:.2f}"
    return f"{spread}, in {seconds:.4g} s each"
