"""Tries every fault in full and writes docs/reliability.md: python tests/faults.py

A fault is a test with the mark `fault("what")`. As part of the suite it is tried a few times; here the killed suites
are killed hundreds of times. A test counts as one try unless it says how many it made; what it lost it says too, and a
test that fails without saying has lost one.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
FULL = "NETDYNO_FAULTS"  # set: in full
Tell = Callable[[str, int], None]  # pytest's record_property, with "tried" and "lost"


def times(few: int, many: int) -> int:
    return many if FULL in os.environ else few


class Count:
    """Adds up what became of the tests that bear the mark."""

    def __init__(self) -> None:
        self.faults: dict[str, str] = {}  # test → fault
        self.tried: dict[str, int] = {}
        self.lost: dict[str, int] = {}
        self.skipped: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if mark := item.get_closest_marker("fault"):
                self.faults[item.nodeid] = mark.args[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        fault = self.faults.get(report.nodeid)
        if fault is None:
            return
        if report.skipped:
            self.skipped.append(fault)
        elif report.when == "call" or report.failed:
            told = dict(report.user_properties)
            self.tried[fault] = self.tried.get(fault, 0) + int(told.get("tried", 1))
            self.lost[fault] = self.lost.get(fault, 0) + int(told.get("lost", report.failed))

    def table(self) -> str:
        faults = dict.fromkeys(self.faults.values())
        rows = [
            f"| {fault} | {self.tried[fault]:,} | {self.lost[fault] or 'nothing'} |"
            for fault in faults
            if fault in self.tried
        ]
        rows += [f"| {fault} | not tried here | |" for fault in dict.fromkeys(self.skipped) if fault not in self.tried]
        return "\n".join(["| fault | tried | lost |", "| --- | ---: | ---: |", *rows])


def main() -> int:
    from netdyno.bench.table import replace_section

    os.environ[FULL] = "1"
    count = Count()
    code = pytest.main(["-m", "fault", "--quiet", "--timeout=3600", *sys.argv[1:]], plugins=[count])
    page = replace_section(PAGE.read_text(encoding="utf-8"), "faults", count.table())
    PAGE.write_text(page, encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
