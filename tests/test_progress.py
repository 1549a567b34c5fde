import io
from typing import Any

import pytest
from made_up_records import accuracy, make
from rich.console import Console

from netdyno.bench.progress import bars, outcome, show

EVENTS: list[dict[str, Any]] = [
    {"stage": "data"},
    {"section": "data", "value": {}},
    {"stage": "compile"},
    {"stage": "train", "epochs": 10, "steps": 1_000},
    {"progress": {"epoch": 1, "step": 50, "loss": 1.23456}},
    {"progress": {"epoch": 1, "step": 100, "loss": 0.54321, "metric": 97.104}},
    {"progress": {"epoch": 2, "step": 200, "loss": 0.04321, "metric": 98.0}},
]


def shown(events: list[dict[str, Any]], **options: Any) -> str:
    file = io.StringIO()
    console = Console(file=file, legacy_windows=False, **options)
    with show(console) as listen:
        for event in events:
            listen(event)
    return file.getvalue()


def test_a_log_gets_a_line_an_epoch() -> None:
    lines = shown(EVENTS, width=40).splitlines()
    assert lines == [
        "  epoch 1/10  loss 0.5432  metric 97.10  after 0 s",
        "  epoch 2/10  loss 0.04321  metric 98.00  after 0 s",
    ]


def test_modes_without_a_metric_print_no_line_in_a_log() -> None:
    stage = {"stage": "measure", "epochs": 1, "steps": 10}
    assert shown([stage, {"progress": {"epoch": 1, "step": 10}}], width=80) == ""


def test_a_terminal_of_80_columns_gets_a_bar_of_one_line_that_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    widest = [
        {"stage": "train", "epochs": 100, "steps": 1_000},
        {"progress": {"epoch": 99, "step": 990, "loss": -0.00012345, "metric": 97.104}},
    ]
    text = shown(widest, width=80, force_terminal=True, color_system=None)
    assert "epoch 99/100 ━━━━━━━━━" in text
    assert " 99%" in text
    assert "loss -0.0001234  metric 97.10\n" in text  # nothing was cut off or broken
    assert "97.10  after 0 s" not in text  # the lines of a log
    assert text.count("\x1b[1A") == 1  # one line was to be cleared
    assert text.endswith("\x1b[2K")


def test_stages_before_training_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert "  compile " in shown(EVENTS[:3], width=80, force_terminal=True, color_system=None)


def test_markup_in_a_childs_words_stays_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert "[bold]x[/nope]" in shown([{"stage": "[bold]x[/nope]"}], width=80, force_terminal=True, color_system=None)


def test_a_user_error_is_remembered() -> None:
    with show(Console(file=io.StringIO())) as listen:
        listen({"status": "failed", "reason": "r"})
        assert not listen.user_error
        listen({"status": "failed", "reason": "r", "user_error": True})
        listen({"stage": "data"})
    assert listen.user_error


def test_outcomes() -> None:
    assert outcome(make(1, images_per_s=12345.6)) == "12,346 images/s, test accuracy 99.10 %"
    assert outcome(make(1, images_per_s=12345.6, mode="loader", accuracy=None)) == "12,346 images/s"
    swd = accuracy([90.0, 22.5], None, metric="SWD", unit="×10³")
    assert outcome(make(1, accuracy=swd)) == "1,000 images/s, SWD 22.50 ×10³"
    assert outcome(make(1, status="oom", reason="too large", throughput=None)) == "oom: too large"


def test_cases_at_once_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(**options: Any) -> str:
        file = io.StringIO()
        with bars(Console(file=file, legacy_windows=False, width=80, **options)) as listener:
            first, second = listener("card 0"), listener("card 1")
            for event in EVENTS[:6]:
                first(event)
                second(event)
            first.close()
            second({"stage": "evaluate"})
        return file.getvalue()

    assert both().splitlines() == [
        "  card 0  epoch 1/10  loss 0.5432  metric 97.10  after 0 s",
        "  card 1  epoch 1/10  loss 0.5432  metric 97.10  after 0 s",
    ]
    monkeypatch.setenv("TERM", "xterm")
    text = both(force_terminal=True, color_system=None)
    assert "loss" not in text  # its place on the line is the name's
    last = text.split("\x1b[2K")[-2]
    assert "  card 1  evaluate " in last
    assert "card 0" not in last
