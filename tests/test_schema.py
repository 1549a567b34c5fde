"""What a record may hold, and what is said of one that holds something else."""

from pathlib import Path
from typing import Any

import pytest
from made_up_fleet import fleet, one
from made_up_records import seen

from netdyno.bench import schema
from netdyno.bench.errors import UserError


def test_takes_what_runs_write() -> None:
    for made in fleet(1):
        assert list(schema.problems(made)) == []
    assert list(schema.problems({**one(), "later": {"versions": ["know", 1, None, True]}})) == []


@pytest.mark.parametrize("junk", [None, "text", [[]], 7, {"a": []}, True], ids=repr)
def test_says_what_is_wrong_and_never_fails(junk: Any) -> None:
    for section in one():
        for inner in (None, *(one()[section] if isinstance(one()[section], dict) else ())):
            made = one()
            if inner is None:
                made[section] = junk
            else:
                made[section] = {**made[section], inner: junk}
            assert all(isinstance(problem, str) for problem in schema.problems(made))
    assert list(schema.problems({"id": junk}))


def test_refuses_a_curve_out_of_order() -> None:
    made = one()
    made["accuracy"]["curve"].reverse()
    assert list(schema.problems(made)) == ["accuracy.curve is not in the order of its epochs"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"energy_j": -1.0}, "gpu.energy_j is negative"),
        ({"energy_source": "a guess"}, "gpu.energy_source is no source of an energy"),
        ({"throttle_share": {"sw_power_cap": 1.5}}, "gpu.throttle_share.sw_power_cap is more than the whole"),
        ({"throttle_share": 0.5}, "gpu.throttle_share is no object"),
        ({"sm_clock_mhz_min": "1980"}, "gpu.sm_clock_mhz_min is no number"),
        ({"readings": 1.5}, "gpu.readings is no whole number"),
    ],
)
def test_the_state_of_the_gpu(changes: dict[str, Any], problem: str) -> None:
    assert list(schema.problems(one(gpu=seen(1.0) | changes))) == [problem]


@pytest.mark.parametrize("text", ['{"schema": NaN}', '{"schema": 1, "schema": 1}', "\ud800", "[1", '"x"'], ids=ascii)
def test_strict_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=str(path)):
        schema.read(path)
