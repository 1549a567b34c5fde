"""Reports of made-up machines: the numbers shown, what stands side by side, and what hostile records cannot do."""

import csv
import io
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from made_up_fleet import (
    CPU,
    FULL,
    GPU,
    HOSTILE,
    T4,
    WORKLOADS,
    fleet,
    found,
    one,
    page_of,
    spoiled,
    tables,
    view,
    webp,
    write,
)
from PIL import Image
from typer.testing import CliRunner

from netdyno.bench import cli_report
from netdyno.bench.errors import UserError
from netdyno.bench.record import path_of
from netdyno.bench.report import draw, export, lists, load, markdown, sections
from netdyno.bench.report.blocks import Chart, Page, Pictures, Series, Table, Text, View

ROOT = Path(__file__).parents[1]
Made = dict[str, Any]


def charts(shown: View) -> dict[str, Chart]:
    return {block.title: block for block in shown.blocks if isinstance(block, Chart)}


def points(chart: Chart) -> dict[str, float | None]:
    return {str(at): value for one in chart.series for at, value in zip(one.at, one.value, strict=True)}


def cell(table: Table, column: str, **row: str) -> Any:
    """The one cell in `column` whose row has these texts in these columns."""
    fit = [line for line in table.rows if all(line[table.columns.index(name)] == text for name, text in row.items())]
    assert len(fit) == 1
    return fit[0][list(table.columns).index(column)]


def speeds(records: list[Made], machine: Made, workload: str, tuning: str) -> list[float]:
    return [
        made["throughput"]["images_per_s"]
        for made in records
        if (made["machine"]["slug"], made["case"]["workload"], made["case"]["tuning"])
        == (machine["slug"], workload, tuning)
    ]


# Numbers


def test_overview_shows_ratios_of_medians() -> None:
    made = list(fleet())
    page = page_of(made)
    (table,) = tables(view(page, "overview", base="NVIDIA H200"))
    ours, theirs = (sorted(speeds(made, machine, "mnist-cnn", "tuned")) for machine in (T4, GPU))
    shown, sorted_by = cell(table, "Tesla T4", workload="mnist-cnn, official data", tuning="tuned")
    ratio, low, high = ours[1] / theirs[1], ours[0] / theirs[2], ours[2] / theirs[0]
    assert shown.startswith(f"{ratio:.3g} × ({low:.3g}–{high:.3g})\n{ours[1]:,.0f}")
    assert sorted_by == ours[1]
    assert cell(table, "NVIDIA H200", workload="mnist-cnn, official data", tuning="tuned")[1] == theirs[1]

    chart = charts(view(page, "overview", base="Tesla T4"))["Training speed relative to Tesla T4"]
    (h200,) = (one for one in chart.series if one.name == "NVIDIA H200")
    assert dict(zip(h200.at, h200.value, strict=True))["mnist-cnn, official data · tuned"] == theirs[1] / ours[1]
    assert "Tesla T4" not in {one.name for one in chart.series}
    assert chart.kind == "dots"


def test_overview_says_what_differs_and_what_failed() -> None:
    (table,) = tables(view(page_of(fleet()), "overview", base="NVIDIA H200"))
    notes = "\n".join(table.notes)
    assert "torch 2.15.0 against 2.11.0" in notes
    assert "batch size 64 against 128" in notes
    assert "oom: CUDA out of memory: 2 GiB" in notes
    row = {"workload": "dcgan, official data", "tuning": "eager"}
    assert cell(table, "Tesla T4", **row)[0].startswith("oom")
    assert table.flags[[line[:2] for line in table.rows].index(list(row.values()))] == "failed"


def test_overview_of_one_machine_is_tuned_over_eager() -> None:
    made = list(fleet(1, ((GPU, 1.0),)))
    chart = charts(view(page_of(made), "overview"))["Training speed over eager"]
    ratio = speeds(made, GPU, "dcgan", "tuned")[0] / speeds(made, GPU, "dcgan", "eager")[0]
    assert points(chart)["dcgan, official data · NVIDIA H200 · tuned"] == ratio

    for record in made:
        record["gpu"] = (record["gpu"] or {}) | {"fingerprints": [record["case"]["tuning"]]}
    chart = charts(view(page_of(made), "overview"))["Training speed over eager"]
    assert all("eager on another card" in remark for one in chart.series for remark in one.said)


def test_the_gpu_of_most_cases_is_the_base() -> None:
    few, machine = one(machine=T4 | {"slug": "few"}), T4 | {"slug": "many"}
    cases = [one()["case"] | {"tuning": tuning} for tuning in ("eager", "tuned")]
    many = [one(id=f"20261124T00000{n}Z-1", machine=machine, case=case) for n, case in enumerate(cases)]
    assert page_of([few, *many]).bases == ["many", "few"]


def test_the_base_is_chosen_by_slug_gpu_or_name() -> None:
    for name in (T4["slug"], "Tesla T4"):
        assert page_of(fleet(1), base=name).bases[0] == "Tesla T4"
    with pytest.raises(UserError, match=r"no machine L4; known are .*tesla-t4"):
        page_of(fleet(1), base="L4")
    twins = [one(), one(id="20261124T000000Z-1", machine=T4 | {"slug": "other-t4"})]
    page = page_of(twins)
    assert page.bases == ["other-t4", T4["slug"]]  # one GPU's name for two machines names neither
    with pytest.raises(UserError, match="several machines"):
        page_of(twins, base="Tesla T4")


def test_speed() -> None:
    made = list(fleet())
    shown = view(page_of(made), "speed")
    ours = sorted(speeds(made, CPU, "cifar10-cnn", "eager"))
    table = tables(shown)[0]
    row = {"workload": "cifar10-cnn, official data", "machine": "AMD EPYC, 2 cores", "tuning": "eager"}
    assert [cell(table, name, **row)[1] for name in ("low", "images/s", "high", "n")] == [*ours, 3]
    chart = charts(shown)["cifar10-cnn, official data"]
    assert points(chart)["AMD EPYC, 2 cores · eager"] == ours[1]
    assert chart.kind == "dots"  # a GPU and a CPU lie far apart
    assert chart.notes == ["Not the same in all: batch size 128 against 64; torch 2.11.0 against 2.15.0."]
    assert points(charts(shown)["dcgan, official data"])["Tesla T4 · eager · oom"] is None
    assert "scaling efficiency" not in table.columns


def test_the_speed_of_several_gpus_has_its_scaling_efficiency() -> None:
    alone = one()
    recipe = alone["case"]["recipe"] | {"batch_size": 2 * alone["case"]["recipe"]["batch_size"]}
    case = alone["case"] | {"gpus": 2, "scaling": "weak", "recipe": recipe}
    both = one(id="20261124T000000Z-1", case=case, throughput={"images_per_s": 18_000.0})
    table = tables(view(page_of([alone, both]), "speed"))[0]
    assert [line[table.columns.index("scaling efficiency")] for line in table.rows] == [("–", None), ("75.0 %", 75.0)]
    assert not {"low", "high", "over eager"} & {*table.columns}  # nothing is in them
    alone["gpu"] = {"fingerprints": ["a"]}
    both["gpu"] = {"fingerprints": ["b", "c"]}
    table = tables(view(page_of([alone, both]), "speed"))[0]
    assert "one GPU on another card" in table.rows[1][-1]


def test_time_to_target() -> None:
    made = list(fleet())
    shown = view(page_of(made), "target")
    (chart,) = (chart for title, chart in charts(shown).items() if title.startswith("mnist-cnn"))
    seconds = [
        made["accuracy"]["train_s_to_target"]
        for made in made
        if (made["machine"]["slug"], made["case"]["workload"], made["case"]["tuning"])
        == (T4["slug"], "mnist-cnn", "amp")
    ]
    assert points(chart)["Tesla T4 · amp"] == statistics.median(seconds)
    assert "≥ 99.00 % test accuracy" in chart.title
    (missed,) = tables(shown)
    assert missed.title.startswith("cifar10-cnn")
    assert "no run reached it" in missed.title
    assert cell(missed, "outcome", run="Tesla T4 · tuned") == "missed: 76.00 %"
    assert not any("dcgan" in title for title in charts(shown))  # it has no target


def test_curves() -> None:
    made = list(fleet())
    shown = charts(view(page_of(made), "curves"))
    by_epoch = shown["mnist-cnn, official data: test accuracy by epoch"]
    by_time = shown["mnist-cnn, official data: test accuracy by training time"]
    name = "NVIDIA H200 · tuned"
    (epochs,) = (one for one in by_epoch.series if one.name == name)
    (times,) = (one for one in by_time.series if one.name == name)
    assert (list(epochs.at), list(epochs.value)) == ([1, 2, 3], list(WORKLOADS["mnist-cnn"]["curve"]))
    fast = speeds(made, GPU, "mnist-cnn", "tuned")
    runs = [run for run in made if (run["throughput"] or {}).get("images_per_s") in fast]
    first = statistics.median(run["accuracy"]["curve"][0]["train_s"] for run in runs)
    assert times.at[0] == first
    assert by_time.level == (99.0, "target")
    assert by_time.at_logarithmic
    assert not by_epoch.at_logarithmic
    assert shown["conv-autoencoder, official data: PSNR by epoch"].value_label == "PSNR, dB"


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    made = one()
    made["accuracy"]["curve"] = [{"epoch": epoch, "train_s": 1.0, "metric": float(epoch)} for epoch in range(1, 1_001)]
    (series,) = charts(view(page_of([made]), "curves"))["dcgan, official data: SWD by training time"].series
    assert len(series.at) <= 202
    assert (series.at[0], series.at[-1], series.value[-1]) == (1.0, 1000.0, 1000.0)


def test_memory_parts_add_up_to_the_process() -> None:
    shown = charts(view(page_of(fleet()), "memory"))
    chart = shown["dcgan, official data: peak GPU memory by owner"]
    parts = {one.name: dict(zip(one.at, one.value, strict=True))["NVIDIA H200 · tuned"] for one in chart.series}
    assert parts == {
        "torch, in use": 512.0,
        "torch, cached": 88.0,
        "outside torch: CUDA context, DALI, libraries": 936.5,
    }
    assert not any("EPYC" in category for category in chart.categories)
    assert points(shown["dcgan, official data: peak host memory, resident"])["AMD EPYC, 2 cores · tuned"] == 2048.0


def test_energy_and_cost(tmp_path: Path) -> None:
    made = list(fleet(1))
    prices = tmp_path / "prices.csv"
    prices.write_text("machine,usd_per_hour,source\ntesla t4,0.36,me\nnvidia-h200,3.6,me\n")
    shown = charts(view(page_of(made, prices=load.read_prices(prices)), "cost"))
    (speed,) = speeds(made, T4, "mnist-cnn", "tuned")
    t4 = "Tesla T4 · tuned"
    energy = shown["mnist-cnn, official data: energy for 1,000 images"]
    assert points(energy)[t4] == pytest.approx(1000 * 68.0 / speed)
    said = {series.name: set(series.said) for series in energy.series}
    assert (said["NVIDIA H200"], said["Tesla T4"]) == ({"GPU alone, energy counter"}, {"GPU alone, sampled power"})
    dollars = shown["mnist-cnn, official data: images per dollar"]
    assert points(dollars)[t4] == speed * 3600 / 0.36
    assert "AMD EPYC, 2 cores · tuned" not in points(dollars)
    assert dollars.notes[0] == "Prices: prices.csv."
    seconds = next(m for m in made if m["machine"]["slug"] == T4["slug"])["accuracy"]["train_s_to_target"]
    price = points(shown["mnist-cnn, official data: price of reaching the target"])[t4]
    assert price == pytest.approx(seconds * 0.36 / 3600)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "machine,price\nt4,1\n",
        "machine,usd_per_hour\nt4,free\n",
        "machine,usd_per_hour\nt4,-1\n",
        "machine,usd_per_hour\nt4,0\n",
        "machine,usd_per_hour\nt4,nan\n",
        "machine,usd_per_hour\nt4,1e999\n",
        "machine,usd_per_hour\n,1\n",
        "machine,usd_per_hour\nt4\n",
        "machine,usd_per_hour\nt4,1\nT4,2\n",
        'machine,usd_per_hour\n"t4,1\n',
        "machine,usd_per_hour\n\xff,1\n",
    ],
)
def test_prices_are_checked(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(str(path))):
        load.read_prices(path)


def test_ladder_climbs_from_eager_to_tuned() -> None:
    made = list(fleet(1, ((GPU, 1.0),)))
    policy = next(made for made in fleet(1) if made["case"]["tuning"] == "tuned")
    policy = {**policy, "id": "20261124T000000Z-t4", "case": {**policy["case"], "tuning": "t4"}}
    shown = charts(view(page_of([*made, policy]), "ladder"))
    chart = shown["mnist-cnn, official data on NVIDIA H200: from eager to tuned"]
    (series,) = chart.series
    eager, amp, tuned = (speeds(made, GPU, "mnist-cnn", name)[0] for name in ("eager", "amp", "tuned"))
    assert list(series.at) == ["eager", "amp", "tuned"]  # t4 is no rung of it
    assert (list(series.start), list(series.value)) == ([0.0, eager, amp], [eager, amp, tuned])
    assert series.said[2] == f"{tuned / amp:.2f} ×"


def test_roofline() -> None:
    made = list(fleet(1))
    chart = charts(view(page_of(made), "roofline"))["Roofline of Tesla T4"]
    roof = chart.series[0]
    assert roof.at[1] == 6e14 / 4e12
    assert list(roof.value[1:]) == [6e14, 6e14]
    assert roof.value[0] == pytest.approx(4e12 * roof.at[0])
    (speed,) = speeds(made, T4, "cifar10-cnn", "amp")
    looks = [(one.colour % len(draw.COLOURS), one.style % len(draw.SYMBOLS)) for one in chart.series[1:]]
    assert len(set(looks)) == len(looks) == 11  # and the run out of memory has no point
    (point,) = (one for one in chart.series if one.name == "cifar10-cnn, official data · amp")
    assert (point.at[0], point.value[0]) == (pytest.approx(50.0), speed * 2e8)


def test_every_precision_has_its_own_roof() -> None:
    half, single = one(), one(id="20261124T000000Z-1")
    half["case"]["precision"], single["case"] = "fp16", {**single["case"], "precision": "fp32", "tuning": "fp32"}
    single["roofline"] = single["roofline"] | {"ceiling_flop_per_s": 4e12, "share": 0.25}
    bare = one(id="20261124T000000Z-2", roofline=None)
    bare["case"] = {**bare["case"], "workload": "mnist-cnn"}
    shown = view(page_of([half, single, bare]), "roofline")
    (chart,) = charts(shown).values()
    roofs = {series.name: max(filter(None, series.value)) for series in chart.series if series.colour < 0}
    assert roofs == {"ceilings, fp16": 6e14, "ceilings, fp32": 4e12}
    (point,) = (series for series in chart.series if series.name.endswith("· fp32"))
    assert list(point.said) == ["25.0 % of the images/s that the ceilings allow"]
    (text,) = (block.text for block in shown.blocks if isinstance(block, Text))
    assert text == "Not shown, because it recorded no roofline: mnist-cnn, official data."

    bare = one(roofline={"flop_per_s": 1e12, "bytes_per_s": 1e9, "ceiling_flop_per_s": None})
    (chart,) = charts(view(page_of([bare]), "roofline")).values()
    assert "run netdyno doctor" in chart.notes[1]


def test_doubts_stand_beside_the_numbers() -> None:
    made = one()
    made["gpu"] |= {"other_processes": 5}
    made["case"]["recipe"] = {**made["case"]["recipe"], "weights": "random"}
    page = page_of([made])
    for tab in ("speed", "curves", "memory", "cost"):
        for chart in charts(view(page, tab)).values():
            doubt = "Tesla T4 · tuned: beside 5 other processes on the card; random weights."
            assert doubt in chart.notes, chart.title


def test_history_needs_two_times() -> None:
    made = list(fleet())
    for record in made:
        record["code"] = str(record["case"]["seed"] % 2)  # by turns
    chart = charts(view(page_of(made), "history"))["mnist-cnn, official data: images/s over time"]
    (series,) = (one for one in chart.series if one.name == "NVIDIA H200 · tuned")
    assert list(series.value) == speeds(made, GPU, "mnist-cnn", "tuned")
    assert list(series.at) == sorted(series.at)
    assert len({text for text in series.said}) == 2  # two versions of the code
    (history,) = (tab for tab in page_of(fleet(1)).tabs if tab.id == "history")
    assert not history.views


# What stands side by side


def other(**changes: Any) -> Made:
    """A second record of the T4's dcgan, in which a key of a section differs."""
    made = one(id="20261124T000000Z-000002", created_utc="2026-11-24T00:00:00Z")
    for section in (made["case"], made["data"], made["timing"]):
        section |= {name: value for name, value in changes.items() if name in section}
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sha256": {"train": "ff" * 32}}, {"data ffffffff"}),
        ({"label": "re-split"}, {"re-split data", "official data"}),
        ({"timing_version": 2}, {"timing version 1", "timing version 2"}),
        ({"division": "open"}, {"open division"}),
        ({"gpus": 2}, {"2 GPUs"}),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_may_not_be_compared_stands_apart(changes: Made, words: set[str]) -> None:
    page = page_of([one(), other(**changes)])
    (table,) = tables(view(page, "overview"))
    titles = {str(line[0]) for line in table.rows}
    assert len(titles) == len(table.rows) == 2
    assert all(any(word in title for title in titles) for word in words)
    shown = charts(view(page, "speed"))
    assert set(shown) == titles
    assert all(len(points(chart)) == 1 for chart in shown.values())


def test_every_title_names_its_timing_version_where_a_report_holds_two() -> None:
    new = other(timing_version=2)
    new["case"]["workload"] = "mnist-cnn"
    page = page_of([one(), new])
    (table,) = tables(view(page, "overview"))
    assert [line[0] for line in table.rows] == [
        "dcgan, official data, timing version 1",
        "mnist-cnn, official data, timing version 2",
    ]
    assert any("never compare rows of two" in note for note in table.notes)
    (records,) = tables(view(page, "records"))
    column = list(records.columns).index("timing version")
    assert {line[column] for line in records.rows} == {("1", 1), ("2", 2)}


def test_synthetic_data_other_suites_and_modes_have_scopes_of_their_own() -> None:
    made = [one(), other(synthetic=True, label="synthetic"), other(suite="quick"), other(mode="compute")]
    for number, record in enumerate(made):
        record["id"] = f"20261124T000000Z-{number}"
    page = page_of(made)
    assert page.scopes == [
        FULL,
        "full suite · real data · training alone",
        "quick suite · real data · end to end",
        "full suite · synthetic data · end to end",
    ]
    for scope in page.scopes:
        (table,) = tables(view(page, "overview", scope=scope))
        assert len(table.rows) == 1


def test_recipes_of_one_machine_are_told_apart() -> None:
    small, large = one(), other()
    large["case"]["recipe"] = {**large["case"]["recipe"], "batch_size": 512}
    (chart,) = charts(view(page_of([small, large]), "speed")).values()
    assert set(points(chart)) == {"Tesla T4 · tuned · batch size 128", "Tesla T4 · tuned · batch size 512"}
    assert chart.notes == ["Not the same in all: batch size 128 against 512."]


def test_the_overview_takes_the_recipe_that_most_machines_ran() -> None:
    large = other()
    large["case"]["recipe"] = {**large["case"]["recipe"], "batch_size": 512}
    h200 = one(id="20261125T000000Z-1", machine=GPU)
    (table,) = tables(view(page_of([one(), large, h200]), "overview", base="NVIDIA H200"))
    assert "batch" not in " ".join(table.notes)
    assert "one of 2 recipes that Speed shows" in " ".join(table.notes)
    assert cell(table, "Tesla T4", tuning="tuned")[1] == one()["throughput"]["images_per_s"]


def test_precision_is_named_where_it_differs() -> None:
    ours, theirs = one(), one(id="20261125T000000Z-1", machine=GPU)
    ours["case"]["precision"], theirs["case"]["precision"] = "fp16", "bf16"
    (table,) = tables(view(page_of([ours, theirs]), "overview", base="NVIDIA H200"))
    assert "precision fp16 against bf16" in table.notes[0]


def test_environment() -> None:
    made = list(fleet())
    for record in made:
        record["code"] = record["machine"]["slug"]
    shown = view(page_of(made), "environment")
    (table,) = tables(shown)
    rows = {str(line[0]): list(line[1:]) for line in table.rows}
    assert rows["torch"] == ["differs", "2.11.0", "2.15.0", "2.11.0"]
    assert rows["dali"] == ["same", "2.4.0", "2.4.0", "2.4.0"]
    assert rows["driver"] == ["same", "580.1", "580.1", "–"]
    assert {str(table.rows[row][0]) for row in table.flags} >= {"torch", "GPU", "Netdyno's code"}
    assert "Differs – torch: 2.11.0 (NVIDIA H200, AMD EPYC, 2 cores) against 2.15.0 (Tesla T4)." in table.notes
    only = one()
    only["machine"]["versions"] = {"other": "1"}
    (table,) = tables(view(page_of([*fleet(1, ((GPU, 1.0),)), only]), "environment"))
    assert ["other", "–", "–", "1"] in [list(line) for line in table.rows]  # one machine alone is the same as none


def test_failures_and_records() -> None:
    made = list(fleet())
    again = {**one(), "status": "failed", "reason": "a bug", "created_utc": "2026-10-01T00:00:00Z", "id": "20261001T-1"}
    again["case"] = {**again["case"], "seed": 0}
    page = page_of([*made, again])
    (failures,) = tables(view(page, "failures"))
    assert {line[list(failures.columns).index("status")] for line in failures.rows} == {"oom", "failed"}
    assert cell(failures, "later ok", record="20261001T-1") == "yes"
    assert "4 did not end well" in page.summary
    (records,) = tables(view(page, "records"))
    assert len(records.rows) == len(made) + 1
    assert len(records.flags) == 4
    for made_one in made:
        shown = cell(records, "images/s", record=made_one["id"])
        assert shown[1] == (made_one["throughput"] or {}).get("images_per_s")


def test_tabs_without_data_say_what_they_need() -> None:
    made = one(gpu=None, roofline=None, accuracy=None, memory=None)
    tabs = {tab.id: tab for tab in page_of([made]).tabs}
    assert [name for name, tab in tabs.items() if tab.views] == ["overview", "speed", "environment", "records"]
    assert tabs["ladder"].needs.startswith("two rungs of the ladder")
    assert {name for name, tab in tabs.items() if not tab.views and not tab.needs} == set()
    assert not {"pictures", "failures"} & set(tabs)  # nobody misses these


# Reading


def test_find_reads_each_record_once_and_names_what_it_cannot_read(tmp_path: Path) -> None:
    results = write([one()], tmp_path / "a")
    write([one()], tmp_path / "b")
    (tmp_path / "a" / "machine.json").write_text("{")
    bad = tmp_path / "b" / "bad.json"
    bad.write_text('{"schema": 1, "id": "<b>"}')
    changed = write([one(code="other")], tmp_path / "c")
    read, problems = load.find([results, tmp_path / "b", changed])
    assert len(read) == 1
    assert len(problems) == 2
    assert problems[0].startswith(f"{bad} is no valid record: created_utc is missing")
    assert "another record of the same name" in problems[1]
    (path,) = results.glob("*/*/*.json")
    assert [one.file for one in load.find([path])[0]] == [path]
    with pytest.raises(UserError, match=r"no results at .*nowhere"):
        load.find([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=f"no record in {tmp_path / 'b' / 'bad.json'}\n{bad} is no valid"):
        load.find([bad])


def test_pictures_are_those_of_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = one()
    results = write([made], tmp_path)
    first, second = (path_of(made, results).with_name(listed["file"]) for listed in made["accuracy"]["pictures"])

    def shown() -> Any:
        (block,) = (block for block in view(sections.page(load.find([results])[0]), "pictures").blocks)
        return block

    block = shown()
    assert isinstance(block, Pictures)
    assert [(one.label, one.webp) for one in block.pictures] == [("epoch 1", webp(90)), ("epoch 2", webp(180))]
    second.write_bytes(webp(7))
    assert [one.label for one in shown().pictures] == ["epoch 1"]
    assert shown().notes == [
        f"Epoch 2 is not shown: {second.name} is not the picture that its record names: the SHA-256 differs."
    ]
    first.unlink()
    assert "not beside its record" in shown().notes[0]
    write([made], tmp_path)
    monkeypatch.setattr(lists, "MOST_PICTURES", len(webp(90)))
    blocks = view(sections.page(load.find([results])[0]), "pictures").blocks
    assert isinstance(blocks[0], Text)
    assert blocks[0].text.startswith("1 pictures are left out")


# Drawing


def every_chart(page: Page) -> list[Chart]:
    return [block for tab in page.tabs for view in tab.views for block in view.blocks if isinstance(block, Chart)]


@pytest.fixture(scope="module")
def drawn() -> list[Chart]:
    """One chart of each kind, of made-up machines."""
    of_kind = {(chart.kind, bool(chart.level), chart.at_logarithmic): chart for chart in every_chart(page_of(fleet(2)))}
    assert {kind for kind, *_ in of_kind} == {"bars", "stack", "dots", "lines", "points"}
    return list(of_kind.values())


def test_plotly_takes_every_figure(drawn: list[Chart]) -> None:
    import plotly.graph_objects

    for chart in drawn:
        plotly.graph_objects.Figure(draw.to_plotly(chart))  # raises where it knows a name or value not


def test_every_chart_becomes_a_picture(drawn: list[Chart]) -> None:
    for chart in drawn:
        with Image.open(io.BytesIO(draw.to_png(chart))) as image:
            assert min(image.size) > 100


def test_ticks_are_plain_numbers() -> None:
    assert draw.log_ticks(3, 30) == [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
    assert draw.log_ticks(3, 3e5) == [10.0**power for power in range(-1, 8)]
    assert len(draw.log_ticks(5e-324, 1e308)) < 20  # whatever a record holds
    assert [draw.tick(10.0**power) for power in (-3, 0, 3, 4, 6, 14)] == ["0.001", "1", "1000", "10 k", "1 M", "100 T"]


def test_every_chart_has_its_data_as_a_table(drawn: list[Chart]) -> None:
    for chart in drawn:
        table = chart.table()
        values = [value for one in chart.series for value in one.value]
        column = list(table.columns).index(chart.value_label)
        assert [line[column][1] for line in table.rows] == values


def test_hostile_names_are_drawn_as_text() -> None:
    series = Series(name=HOSTILE, at=[HOSTILE, "b"], value=[1.0, None], said=[HOSTILE, HOSTILE])
    for kind in ("bars", "dots", "stack", "lines"):
        chart = Chart(
            kind=kind,  # type: ignore[arg-type]
            title=HOSTILE,
            at_label=HOSTILE,
            value_label=HOSTILE,
            series=[series if kind != "lines" else Series(name=HOSTILE, at=[1.0, 2.0], value=[1.0, None])],
            categories=[HOSTILE, "b"],
            level=(0.5, HOSTILE),
        )
        text = json.dumps(draw.to_plotly(chart), ensure_ascii=False)
        assert set(re.findall("<[^>]*>", text)) <= {"<br>", "<extra>", "</extra>"}
        assert draw.to_png(chart).startswith(b"\x89PNG")


# Markdown, CSV, parquet, commands


def test_markdown_has_tables_and_pictures(tmp_path: Path) -> None:
    made = [made for made in fleet(1) if made["case"]["workload"] in ("mnist-cnn", "dcgan")]
    page = sections.page(load.find([write(made, tmp_path / "results")])[0])
    out = tmp_path / "my report.md"
    markdown.write_markdown(page, out)
    text = out.read_text()
    links = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert len(links) == len(set(links)) > 20
    files = {path.name for path in (tmp_path / "my report_files").iterdir()}
    assert {link.removeprefix("my%20report_files/") for link in links} == files
    assert "| mnist-cnn, official data | tuned |" in text
    assert text.count("## ") == len(page.tabs)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1


def test_hostile_strings_break_no_markdown(tmp_path: Path) -> None:
    page = page_of([spoiled()], problems=[HOSTILE])
    markdown.write_markdown(page, tmp_path / "out.md")
    text = (tmp_path / "out.md").read_text()
    assert set(re.findall("<[^>]*>", text)) <= {"<br>", "<details>", "<summary>", "</summary>", "</details>"}
    assert "[a](" not in text.replace("\\[", "").replace("\\]", "")
    assert "\x1b" not in text


def test_csv_holds_every_record() -> None:
    made = list(fleet(1))
    lines = {line["id"]: line for line in csv.DictReader(io.StringIO(export.to_csv(found(made)).decode()))}
    assert len(lines) == len(made)
    for record in made:
        line = lines[record["id"]]
        assert (line["machine"], line["status"]) == (record["machine"]["slug"], record["status"])
        assert json.loads(line["recipe"]) == record["case"]["recipe"]
        if record["status"] == "ok":
            assert float(line["images_per_s"]) == record["throughput"]["images_per_s"]
        else:
            assert line["images_per_s"] == line["images_per_s"] == ""


def test_csv_holds_no_formulas_and_no_wrong_types() -> None:
    made = spoiled(status="failed") | {"reason": '=HYPERLINK("x")'}
    (line,) = csv.DictReader(io.StringIO(export.to_csv(found([made])).decode()))
    assert line["reason"] == '\'=HYPERLINK("x")'
    assert line["batch_size"] == ""  # a recipe may hold anything; the column holds numbers
    frame = export.to_frame(found([made, one(id="20261124T1")]))
    assert list(frame["batch_size"].dropna()) == [128.0]


def test_parquet_or_how_to_get_it(tmp_path: Path) -> None:
    made = found(fleet(1))
    assert f'parquet = ["{export.PYARROW}"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=re.escape(f"{sys.executable} -m pip install '{export.PYARROW}'")):
            export.to_parquet(made)
        return
    import pandas as pd

    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(export.to_parquet(made))), export.to_frame(made))


def test_docs_name_every_column() -> None:
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z0-9_]+)` \| ([a-z]+) \| (.*) \|$", text, re.MULTILINE)
    assert listed == [(column.name, column.kind, column.what) for column in export.COLUMNS]


@pytest.fixture
def command() -> Callable[..., Any]:
    app = typer.Typer()
    cli_report.register(app)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def test_commands(command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(list(fleet(1, ((T4, 1.0),)))[-3:], tmp_path / "results")
    bad = tmp_path / "results" / "bad.json"
    bad.write_text("{}")
    done = command("report")
    assert done.exit_code == 1  # not all is shown
    assert "3 records in report.html" in done.output
    assert "not shown: results/bad.json is no record" in done.output
    assert "1 file is not shown" in Path("report.html").read_text()
    bad.rename(tmp_path / "bad.json")
    assert command("report", "--format", "csv", "-o", "out.csv").exit_code == 0
    assert len(Path("out.csv").read_text().splitlines()) == 4
    assert command("report", "results", "--format", "md", "--base", "Tesla T4").exit_code == 0
    assert Path("report.md").read_text().startswith("# Netdyno report\n")
    with pytest.raises(UserError, match="cannot be written"):
        command("report", "-o", tmp_path)
    assert "3 records and 2 pictures in tesla-t4-xeon-2c.netdyno.zip" in command("pack").output
    done = command("merge", "tesla-t4-xeon-2c.netdyno.zip", "--results", "other")
    assert "3 records of tesla-t4-xeon-2c added, 0 were there already" in done.output


MODULES = (
    "schema",
    "collect",
    "cli_report",
    *(f"report.{name}" for name in ("sections", "html", "markdown", "export")),
)


@pytest.mark.parametrize("module", MODULES)
def test_no_torch_is_needed(module: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules['torch'] = None; import netdyno.bench.{module}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
