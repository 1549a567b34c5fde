"""What several GPUs are told to do, and the projection to more of them, against numbers worked out by hand."""

from pathlib import Path
from typing import Any

import pytest
from made_up_records import make

from netdyno.bench import scaling
from netdyno.bench.scaling import Links, all_reduce_s, project
from netdyno.bench.schema import read_all

ROOT = Path(__file__).parents[1]
LINKS = Links(name="some", within_host=100, between_hosts=50)
FOUND = {"step_s": 1.2e-3, "apart_step_s": 1e-3, "exposed_s": 2e-4, "add_up_s": 1.9e-4, "add_up_mib": 10.0}


def test_a_long_sum_on_one_host() -> None:
    """10⁸ bytes over 8 GPUs: 14 steps of 3.4 µs, and 14/8 of the data at 100 GB/s; by a tree twice the data at 90."""
    found = all_reduce_s(1e8, 8, LINKS)
    assert found["ring"] == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 1.75e-3)
    assert found["tree"] == pytest.approx(14 * 28e-6 + 2e8 / 90e9)


def test_a_short_sum_over_eight_hosts() -> None:
    """A byte: only latencies, by LL. A ring of 64 passes 14 times between hosts and 112 times within one."""
    found = all_reduce_s(1, 64, LINKS)
    assert found["ring"] == pytest.approx(3.6e-6 + 112 * 0.47e-6 + 14 * 2.7e-6, rel=1e-3)
    assert found["tree"] == pytest.approx(4.4e-6 + 2 * (7 * 0.52e-6 + 3 * 5.0e-6), rel=1e-3)


def test_the_slower_link_counts_between_hosts() -> None:
    assert all_reduce_s(1e9, 16, LINKS)["ring"] == pytest.approx(2 * 15 / 16 * 1e9 / 50e9, rel=0.02)


def test_a_projection_to_the_measured_number_is_the_measurement() -> None:
    one = project(FOUND, 2, 2, LINKS)
    assert one.step_s == pytest.approx(FOUND["step_s"])
    assert one.efficiency == pytest.approx(1 / 1.2)
    assert one.way == "ring"


def test_more_gpus_add_the_difference_of_their_sums() -> None:
    size = 10 * 2**20
    added = min(all_reduce_s(size, 64, LINKS).values()) - min(all_reduce_s(size, 2, LINKS).values())
    assert project(FOUND, 2, 64, LINKS).step_s == pytest.approx(1.2e-3 + added)


def test_sums_that_two_hide_grow_into_the_open() -> None:
    """Of 10 MiB nothing is exposed on two GPUs; 64 have what they take longer."""
    hidden = FOUND | {"step_s": 1e-3, "exposed_s": 0.0}
    size = 10 * 2**20
    longer = min(all_reduce_s(size, 64, LINKS).values()) - min(all_reduce_s(size, 2, LINKS).values())
    assert project(hidden, 2, 64, LINKS).step_s == pytest.approx(1e-3 + longer)


def test_between_hosts_no_update_is_shared_out() -> None:
    """There all of the sums is exposed; within a host it goes on as measured."""
    shared = FOUND | {"exposed_s": -1e-4, "shared_mib": 9.0}
    size = 10 * 2**20

    def longer(gpus: int) -> float:
        return min(all_reduce_s(size, gpus, LINKS).values()) - min(all_reduce_s(size, 2, LINKS).values())

    assert project(shared, 2, 64, LINKS).step_s == pytest.approx(1e-3 + 1.9e-4 + longer(64))
    assert project(shared, 2, 8, LINKS).step_s == pytest.approx(1e-3 + max(0, longer(8) - 1e-4))


def test_the_table_tells_measured_from_projected() -> None:
    two = make(1, gpus=2, scaling="weak") | {"communication": FOUND}
    lines = scaling.page_table([make(2), two, two | {"status": "failed"}]).splitlines()
    assert [[cell.strip() for cell in line.split("|")[3:5]] for line in lines[2:]] == [
        ["measured", "2"],
        *[["projected", count] for count in ("8", "64", "64")],
    ]
    assert "83.3 %" in lines[2]


def test_of_several_runs_the_table_has_the_median() -> None:
    def exposed(number: int, exposed_s: float, **other: Any) -> dict[str, Any]:
        return make(number, gpus=2, scaling="weak") | {"communication": FOUND | {"exposed_s": exposed_s}} | other

    same = [exposed(number, 1e-6 * us) for number, us in ((2, 70), (3, 300), (4, 40))]
    others = [exposed(0, 1e-6, code="0" * 64), exposed(1, 2e-6, machine=same[0]["machine"] | {"slug": "another"})]
    compute = [record | {"case": record["case"] | {"mode": "compute"}} for record in same]

    def shown(*records: dict[str, Any]) -> list[str]:
        cells = scaling.page_table(records).splitlines()[2].split("|")
        return [cells[3].strip(), cells[7].strip()]

    assert shown(*others, *same) == ["measured", "70.0"]
    assert shown(*same[1:]) == ["measured", "40.0"]  # of two the lower
    assert shown(*same[:1], *compute) == ["measured", "70.0"]  # end to end, where it was
    assert shown(*compute[1:]) == ["measured", "40.0"]


def test_a_projection_stands_beside_what_was_measured() -> None:
    def run(number: int, gpus: int, exposed_s: float) -> dict[str, Any]:
        recipe = {"batch_size": 128 * gpus, "learning_rate": 0.1, "epochs": 2 * gpus}
        communication = FOUND | {"exposed_s": exposed_s}
        return make(number, gpus=gpus, scaling="weak", recipe=recipe) | {"communication": communication}

    lines = scaling.page_table([run(1, 2, 2e-4), run(2, 4, 1e-4)]).splitlines()[2:]
    shown = [[cell.strip() for cell in line.split("|")[3:8]] for line in lines]
    projected = project(FOUND, 2, 4, scaling.NETWORKS[0]).step_s
    assert [row[:2] for row in shown[:4]] == [
        ["measured", "2"],
        ["measured", "4"],
        ["projected", "4"],
        ["projected", "8"],
    ]
    assert [row[4] for row in shown[:3]] == ["200", "100", f"{1e6 * (projected - 1e-3):.0f}"]
    for name, value in (("batch_size", 1024), ("learning_rate", 0.5)):  # another batch on each GPU, another rate
        other = run(2, 4, 1e-4)
        other["case"]["recipe"][name] = value
        assert "measured | 2" not in " ".join(scaling.page_table([run(1, 2, 2e-4), other]).split())
    unknown = run(2, 4, 1e-4)
    unknown["case"]["recipe"] = None
    assert "measured | 4" in " ".join(scaling.page_table([unknown]).split())


def test_without_records_the_table_says_so() -> None:
    assert scaling.page_table([make(1)]) == "There is no record of several GPUs yet."


def test_several_gpus_stand_beside_one() -> None:
    def recipe(batch: int, epochs: int) -> dict[str, Any]:
        return {"batch_size": batch, "learning_rate": 0.1, "epochs": epochs}

    one = [make(number, images_per_s=speed, recipe=recipe(128, 2)) for number, speed in enumerate((9e2, 1e3, 2e3))]
    two = make(4, images_per_s=1_900.0, recipe=recipe(256, 4), gpus=2, scaling="weak")
    (line,) = scaling.measured_table([*one, two]).splitlines()[2:]
    assert [cell.strip() for cell in line.split("|")[4:-1]] == ["2", "256", "1,000", "1,900", "1.90"]
    assert "no record of several GPUs beside one" in scaling.measured_table(one)
    one = [record | {"gpu": {"fingerprints": ["a"]}} for record in one]
    two |= {"gpu": {"fingerprints": ["b", "c"]}}
    assert "1.90, one GPU on another card |" in scaling.measured_table([*one, two])


def test_the_page_is_what_the_records_say() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    records = read_all(ROOT / "results")[0]
    assert scaling.measured_table(records) in page
    assert scaling.page_table(records) in page
