"""What a person sees of a running case: a bar in a terminal, a line an epoch elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text


class Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f} steps/s" if task.speed else "")


class Listener:
    """Takes a child's events; a bar in a terminal, else lines."""

    def __init__(self, console: Console, title: str, bar: Progress) -> None:
        self._console, self._title, self._bar = console, title, bar
        self._task = bar.add_task(escape(title), total=None, note="starting")
        self._epochs = self._steps = 0
        self._start = perf_counter()
        self.user_error = False

    def __call__(self, event: dict[str, Any]) -> None:
        self.user_error |= bool(event.get("user_error"))
        if "status" in event:
            self._console.print(f"{self._title}: {event['status']}: {event['reason']}", markup=False, style="red")
        if "stage" in event:
            self._epochs, self._steps = event.get("epochs", 0), event.get("steps_per_epoch", 0)
            self._bar.update(self._task, total=self._epochs * self._steps or None, completed=0, note=event["stage"])
        if "progress" in event:
            self._progress(**event["progress"])

    def _progress(self, epoch: int, step: int, loss: float | None = None, metric: float | None = None) -> None:
        note = f"epoch {epoch}/{self._epochs}"
        if loss is not None:
            note += f"  loss {loss:.4g}"
        if metric is not None:
            note += f"  metric {metric:.2f}"
            if not self._console.is_terminal:
                elapsed = perf_counter() - self._start
                self._console.print(f"{self._title}  {note}  {elapsed:.0f} s", markup=False, highlight=False)
        self._bar.update(self._task, completed=(epoch - 1) * self._steps + step, note=note)


@contextmanager
def show(console: Console, title: str) -> Iterator[Listener]:
    """Shows one case while it runs; yields what takes the child's events."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        Rate(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Listener(console, title, bar)
