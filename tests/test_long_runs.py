"""What tests/long_runs.py says of made-up states: the runs themselves take half an hour."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from long_runs import State, row_of, write_page

CALM = State(host_mib=500.0, gpu_mib=1000.0, files=12, processes=0)


def test_what_is_taken_once_is_no_growth() -> None:
    states = [replace(CALM, host_mib=300.0)] * 3 + [CALM] * 57
    row = row_of("a run", states)
    assert row["grew"] == []
    assert (row["count"], row["host_mib"], row["files"]) == (60, [500.0, 500.0], [12, 12])


@pytest.mark.parametrize(("name", "late"), [("host_mib", 520.0), ("gpu_mib", 1064.0), ("files", 13), ("processes", 1)])
def test_growth_is_seen(name: str, late: Any, tmp_path: Path) -> None:
    states = [CALM] * 40 + [replace(CALM, **{name: late})] * 20
    row = row_of("a run", states)
    assert row["grew"] == [name]
    page = tmp_path / "page.md"
    page.write_text("<!-- long:begin -->\n<!-- long:end -->\n")
    (tmp_path / "row.json").write_text(json.dumps(row))
    assert write_page(tmp_path, page) == 1
    assert f"| {name}" in page.read_text().replace("\\", "")


def test_too_few_states_tell_nothing() -> None:
    with pytest.raises(ValueError, match="no tenth"):
        row_of("a run", [CALM] * 19)
