"""What a record may hold, and what is said of one that holds something else."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_up_fleet import fleet, one
from made_up_records import seen

from netdyno.bench import record, schema, table
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
        ({"card": -1}, "gpu.card is negative"),
        ({"beside": "dcgan"}, "gpu.beside is no list"),
        ({"beside": [1]}, "gpu.beside[0] is no text"),
    ],
)
def test_the_state_of_the_gpu(changes: dict[str, Any], problem: str) -> None:
    assert list(schema.problems(one(gpu=seen(1.0) | changes))) == [problem]


@pytest.mark.parametrize(
    ("ceilings", "says"),
    [
        ({"matmul_bf16_tflops": 700.0, "matmul_sm_clock_mhz": None, "later": [1]}, []),
        ({"matmul_fp32_tflops": "fast"}, ["machine.ceilings.matmul_fp32_tflops is no number"]),
        ({"matmul_fp16_tflops": -1.0}, ["machine.ceilings.matmul_fp16_tflops is not above zero"]),
        ({"copy_gb_per_s": 1e30}, ["machine.ceilings.copy_gb_per_s is beyond any measurement"]),
        ({"other_processes": 0.5}, ["machine.ceilings.other_processes is no whole number"]),
        ({"measured_utc": "today"}, ["machine.ceilings.measured_utc is no time such as 2026-11-23T12:34:56Z"]),
    ],
)
def test_ceilings(ceilings: dict[str, Any], says: list[str]) -> None:
    whole = {"measured_utc": "2026-11-24T12:00:00Z", "torch": "2.11.0", "copy_gb_per_s": 240.0}
    assert list(schema.machine_problems({"slug": "a", "ceilings": whole | ceilings})) == says
    for name in whole:
        less = {key: value for key, value in whole.items() if key != name}
        assert list(schema.machine_problems({"slug": "a", "ceilings": less})) == [f"machine.ceilings.{name} is missing"]


@pytest.mark.parametrize("text", ['{"schema": NaN}', '{"schema": 1, "schema": 1}', "\ud800", "[1", '"x"'], ids=ascii)
def test_strict_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=str(path)):
        schema.read(path)


# schemas

WRITTEN = {
    int(path.stem.rpartition("-")[2]): path for path in (Path(__file__).parent / "golden").glob("record-schema-*")
}


def test_a_record_of_every_schema_is_kept() -> None:
    assert [*WRITTEN] == [*range(1, record.SCHEMA + 1)]  # who raises SCHEMA puts a record of it there


@pytest.mark.parametrize("number", WRITTEN)
def test_records_of_every_schema_are_read(number: int) -> None:
    assert f'"schema":{number},' in WRITTEN[number].read_text()
    found = [schema.read(WRITTEN[number]), record.load(WRITTEN[number])]
    assert found[0] == found[1]
    assert found[0]["schema"] == record.SCHEMA
    assert "mnist-cnn" in table.to_csv(found)


@pytest.mark.fault("a record of another schema")
@pytest.mark.parametrize("number", [record.SCHEMA + 1, 0, -1, True, 1.5, "1", None, [], 10**40])
def test_records_of_other_schemas_are_refused_politely(tmp_path: Path, number: Any) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(one() | {"schema": number}))
    for reader in (schema.read, record.load):
        with pytest.raises(UserError, match=r"some\.json has schema .*; this version reads 1") as caught:
            reader(path)
        newer = type(number) is int and number > record.SCHEMA
        assert str(caught.value).endswith("a newer Netdyno reads it") is newer
