"""Tables of made-up records against tests/golden, and what may break them.

After a wanted change of a format `python tests/test_table.py` writes the golden files anew: read the difference.
"""

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_records import CPU, DRAWN, EAGER, GPU, accuracy, make, records, seen
from rich.cells import cell_len
from rich.console import Console

from netdyno.bench import table
from netdyno.bench.record import load_all, path_of

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

Made = list[dict[str, Any]]


def on_screen(made: Made, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)
    for renderable in table.to_rich(made):
        console.print(renderable)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines) + "\n"


FORMATS: dict[str, Callable[[Made], str]] = {
    "table.md": table.to_markdown,
    "table.csv": table.to_csv,
    "table.json": table.to_json,
    "readme.md": lambda made: table.readme_table(made) + "\n",
    "screen-120.txt": lambda made: on_screen(made, 120),
    "screen-80.txt": lambda made: on_screen(made, 80),
}

HOSTILE = "a|b\nc\r\n<script>x</script> **d** [e](javascript:f) `g` [bold]h[/bold] <!-- table:end --> \x1b[31m\\|"


def hostile(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A record whose every string is HOSTILE, but those that say when and how it ended."""

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: spoil(item) for name, item in value.items()} | ({HOSTILE: HOSTILE} if "lr" in value else {})
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return HOSTILE if isinstance(value, str) else value

    record = make(number)
    keep = {"id": record["id"], "created_utc": record["created_utc"], "status": "ok"}
    return spoil(record) | keep | changes


@pytest.mark.parametrize("name", FORMATS)
def test_golden(name: str) -> None:
    assert FORMATS[name](records()) == (GOLDEN / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FORMATS)
def test_no_records(name: str) -> None:
    text = FORMATS[name]([])
    if name == "table.json":
        assert json.loads(text) == []
    elif name == "table.csv":
        assert len(text.splitlines()) == 1
    else:
        assert "No records yet" in text


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].replace("\\|", "¦").split("|")] for line in lines]


def test_markdown_lines_up_in_its_source() -> None:
    for block in table.to_markdown([*records(), make(20, data={**DRAWN, "label": "画像"})]).split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({cell_len(line) for line in lines}) <= 1


def test_hostile_strings_break_no_markdown() -> None:
    failed = hostile(2, status="failed", reason=HOSTILE)
    for text in (table.to_markdown([hostile(), failed]), table.tables_page([hostile(), failed])):
        assert len({len(line) for line in cells(text)}) == 1
        assert len(cells(text)) == 4  # head, rule, two rows
        assert not {"<", ">", "\x1b", "\r"} & set(text)
        assert "[e](" not in text.replace("\\[", "").replace("\\]", "")
        assert "**d**" not in text
    case = {**hostile()["case"], "tuning": "tuned", "mode": "e2e", "suite": "quick"}
    body = table.readme_table([hostile(case=case), hostile(2, case=case, status="failed", reason=HOSTILE)])
    assert len(cells(body)) == 4
    readme = table.replace_section("<!-- table:begin -->\n<!-- table:end -->\n", "table", body)
    assert readme == table.replace_section(readme, "table", body)


def test_hostile_strings_break_no_csv_json_or_screen() -> None:
    made = [hostile(), hostile(2, status="failed", reason=HOSTILE)]
    assert len({len(line) for line in csv.reader(io.StringIO(table.to_csv(made)))}) == 1
    assert [row["status"] for row in json.loads(table.to_json(made))] == ["ok", "failed"]
    for width in (80, 120):
        screen = on_screen(made, width)
        assert "[bold]h[/bold]" in "".join(screen.split())
        assert "\x1b" not in screen


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("junk", [None, "text", [[]], -math.inf, 10**400], ids=lambda junk: repr(junk)[:9])
def test_a_record_that_lacks_a_section_crashes_no_table(name: str, junk: Any) -> None:
    for section in make(1):
        assert FORMATS[name]([make(1) | {section: junk}, make(2, **EAGER)])
    assert FORMATS[name]([{}])


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_is_wide_enough(width: int) -> None:
    screen = on_screen(records(), width)
    assert max(cell_len(line) for line in screen.splitlines()) <= width
    for wanted in ("resnet50-transfer", "540,000", "12.0 ×", "1,536", "99.10", "oom"):
        assert wanted in screen


def test_a_narrow_screen_cuts_no_number_of_the_published_records() -> None:
    published = load_all(ROOT / "results")
    screen = on_screen(published, 80)
    assert max(cell_len(line) for line in screen.splitlines()) <= 80
    assert not re.search(r"[\d,]…", screen)
    rows = table.rows(published)
    for column in ("images_per_s", "nvml_process_peak_mib"):
        assert all(table.figure(value) in screen for value in rows[rows.status == "ok"][column].dropna())
    assert all(table.fixed(value) in screen for value in rows["metric_final"].dropna())


def test_json_and_csv_hold_numbers_unrounded() -> None:
    made = [make(1, images_per_s=1 / 3), make(2, **EAGER)]
    tuned = json.loads(table.to_json(made))[0]
    assert tuned["images_per_s"] == 1 / 3
    assert tuned["images_per_s_low"] is None
    assert tuned["speedup_over_eager"] == 1 / 3 / 1000
    line = next(csv.DictReader(io.StringIO(table.to_csv(made))))
    assert float(line["images_per_s"]) == 1 / 3
    assert line["images_per_s_low"] == ""
    assert json.loads(line["recipe"]) == {"batch_size": 128, "epochs": 2, "lr": 0.01}


def test_rows_are_numeric_where_numbers_belong() -> None:
    frame = table.rows(records())
    assert frame["images_per_s"].dtype == float
    assert frame["images_per_s_low"].isna().sum() == len(frame) - 1
    mnist = frame[(frame.workload == "mnist-cnn") & (frame.tuning == "tuned") & (frame.suite == "full")]
    assert mnist["speedup_over_eager"].iloc[0] == 12.0
    assert list(table.rows([]).columns) == list(frame.columns)


def test_real_and_synthetic_data_never_share_a_table() -> None:
    drawn = make(2, images_per_s=321.0, data=DRAWN)
    before, after = table.to_markdown([make(1, images_per_s=654.0), drawn]).split("### Suite full, synthetic data")
    assert "321" not in before
    assert "321" in after
    assert "654" not in after


def test_the_readme_shows_the_full_suite_of_a_machine_where_there_is_one() -> None:
    quick, full = make(1, suite="quick", images_per_s=111.0), make(2, images_per_s=222.0)
    assert "111" in table.readme_table([quick])
    assert "111" not in table.readme_table([quick, full])
    elsewhere = make(3, suite="quick", images_per_s=333.0, machine=CPU)
    assert "333" in table.readme_table([quick, full, elsewhere])
    assert "444" not in table.readme_table([make(4, images_per_s=444.0, mode="compute")])


def test_the_readme_tells_machines_with_the_same_gpu_apart() -> None:
    other = {**GPU, "slug": "nvidia-h200-32c", "cores": 32}
    assert "**NVIDIA H200: suite" in table.readme_table([make(1), make(2, machine=CPU)])
    both = table.readme_table([make(1), make(2, machine=other)])
    assert [line.split(": ")[0] for line in both.splitlines() if line.startswith("**")] == [
        "**NVIDIA H200 (nvidia-h200)",
        "**NVIDIA H200 (nvidia-h200-32c)",
    ]


def test_the_readme_shows_the_newest_recipe() -> None:
    older, newer = (
        make(n, images_per_s=n * 111.0, recipe={"batch_size": 128 * n, "epochs": 2, "lr": 0.01}) for n in (1, 2)
    )
    (line,) = cells(table.readme_table([older, newer]))[2:]
    assert line[2] == "222"
    (line,) = cells(table.readme_table([newer, make(3, images_per_s=333.0)]))[2:]  # the old one, measured once more
    assert line[2] == "333"
    assert "111" in table.to_markdown([older, newer])
    eager = [make(n, images_per_s=n * 10.0, **EAGER) for n in (4, 5)]
    eager[1]["case"]["recipe"] = {"batch_size": 64, "epochs": 2, "lr": 0.01}  # no row is beside it
    (line,) = cells(table.readme_table([newer, make(3, images_per_s=400.0), *eager]))[2:]
    assert line[2:5] == ["400", "40.0", "10.0 ×"]


@pytest.mark.parametrize(("tuned", "eager"), [("ok", "oom"), ("oom", "ok"), ("oom", "timeout"), ("ok", "ok")])
def test_the_readme_shows_both_of_a_pair_failed_or_not(tuned: str, eager: str) -> None:
    made = [make(1, images_per_s=222.0, status=tuned), make(2, images_per_s=111.0, status=eager, **EAGER)]
    (line,) = cells(table.readme_table(made))[2:]
    assert line[2].startswith("222" if tuned == "ok" else tuned)
    assert line[3].startswith("111" if eager == "ok" else eager)
    assert line[4] == ("2.00 ×" if tuned == eager == "ok" else "–")


def test_rows_that_would_read_the_same_say_what_sets_them_apart() -> None:
    text = table.to_markdown([make(1), make(2, recipe={"batch_size": 128, "epochs": 2, "lr": 0.5})])
    assert "- ¹ lr 0.01" in text
    assert "- ² lr 0.5" in text


def test_a_row_of_an_older_timing_version_says_so() -> None:
    older, newer = make(1, workload="cifar10-cnn"), make(2, timing_version=2)
    lines = table.to_markdown([older, newer]).splitlines()
    assert "- ¹ timing version 1, newest 2" in lines
    assert [line.split("|")[1].strip() for line in lines if "-cnn" in line] == ["cifar10-cnn¹", "mnist-cnn"]
    assert "timing version" not in table.to_markdown([older, make(2)])
    elsewhere = table.to_markdown([make(1, suite="source"), newer])  # in a table of its own it is no newer
    assert "- ¹ timing version 1, newest 2" in elsewhere


def test_what_weakens_a_number_stands_beside_it() -> None:
    beside = {"other_processes": 1, "readings": 9}
    text = table.to_markdown([make(1, steady=False), make(2, steady=False, gpu=beside)])
    assert "not steady after warm-up; beside 1 other process on the card (1 of 2 runs)" in text


def test_what_ran_on_another_card_stands_beside_the_comparison() -> None:
    a, b = ({"gpu": {"fingerprints": [card]}} for card in "ab")
    text = table.to_markdown([make(1, **a), make(2, tuning="eager", **b), make(3, mode="compute", **a), make(4, **a)])
    assert text.count("- ¹ eager on another card") == 1
    assert "1.00 × ¹ |" in text
    assert "100.0 % |" in text
    assert "- ¹ compute-only on another card" in table.to_markdown([make(1, **a), make(3, mode="compute", **b)])
    other = {"recipe": {"batch_size": 64}, "tuning": "eager"}
    text = table.to_markdown([make(1, **a), make(2, **other, **b)])
    assert re.search("- ¹ recipe differs from eager's: .* against 64.*; eager on another card", text)
    two = {"gpus": 2, "scaling": "weak", "recipe": {"batch_size": 256, "epochs": 2, "lr": 0.01}}
    assert "- ¹ one GPU on another card" in table.to_markdown([make(1, **a), make(2, **two, **b)])


def test_scaling_efficiency_is_in_every_table() -> None:
    recipe = {"batch_size": 128, "epochs": 2, "lr": 0.01}
    both = {"batch_size": 256, "epochs": 4, "lr": 0.01}
    made = [
        make(20 * place + number, workload="conv-autoencoder", mode=mode, images_per_s=speed + number, **changes)
        for place, (mode, speed, changes) in enumerate(
            (mode, speed, changes)
            for mode in ("e2e", "compute")
            for speed, changes in (
                (1_000_000.0, {"recipe": recipe}),
                (1_800_000.0, {"recipe": both, "gpus": 2, "scaling": "weak"}),
            )
        )
        for number in range(3)
    ]
    eager = make(99, workload="conv-autoencoder", tuning="eager", images_per_s=1e5, recipe=recipe)
    for records_made in (made, [*made, eager]):
        screens = [on_screen(records_made, width) for width in (80, 100, 120)]
        readme = table.readme_table(records_made)
        assert readme.count("90.0 %") == 1
        assert all(text.count("90.0 %") == 2 for text in (table.to_markdown(records_made), *screens))
        for text in screens:
            assert "…" not in text  # no cell is cut off
            assert text.count("accuracy") >= 4  # and no metric a letter a line
            # nor a column without a value
            assert bool(re.search(r"\bover\b", text)) == ("10.0 ×" in text) == (eager in records_made)
        assert "conv-autoencoder, 2 GPUs" not in screens[2]  # folds, to leave the others their room
    alone = [*made[:3], *made[6:9]]
    assert "scaling" not in table.to_markdown(alone) + on_screen(alone, 120)


def test_the_source_of_an_energy_that_no_counter_gave_stands_beside_it() -> None:
    for source, mark in (("counter", ""), ("sampled", "¹")):
        text = table.to_markdown([make(1, images_per_s=1000.0, gpu=seen(1900.0, source))])
        assert cells(text)[2][9] == f"1,000 {mark}".strip()
        assert ("- ¹ from sampled power instead of a counter" in text) == (source == "sampled")
    assert "energy" not in table.to_markdown([make(1)])  # a column for nothing


def test_runs_that_end_alike_have_no_spread() -> None:
    """As those of one seed do: ± 0.00 would be taken for certainty."""
    for finals, shown in (((98.0, 98.4, 98.2), "98.20 ± 0.20 %"), ((98.2,) * 3, "98.20 %")):
        text = table.to_markdown([make(n, accuracy=accuracy([final])) for n, final in enumerate(finals, 1)])
        assert f"| {shown} test accuracy " in text


def test_targets() -> None:
    lower = accuracy([30.0, 20.0], 25.0, higher_is_better=False, reached=True, metric="SWD", unit="×10³")
    assert "≤ 25.00 ×10³ reached" in table.to_markdown([make(1, accuracy=lower)])
    assert "≥ 99.00 % missed" in table.to_markdown([make(1, accuracy=accuracy([98.0]))])
    assert "1 of 2 reached" in table.to_markdown([make(1), make(2, accuracy=accuracy([97.0, 98.0]))])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, "–"), (0.0, "0"), (0.01234, "0.0123"), (1.0, "1.00"), (9.996, "10.0"), (82.34, "82.3")),
        *((99.96, "100"), (1234.5678, "1,235"), (1234567.0, "1,234,567"), (1e300, "1e+300"), (-5.0, "-5.00")),
    ],
)
def test_figures(value: float | None, text: str) -> None:
    cell = table.to_markdown([make(1, images_per_s=value)])
    assert cells(cell)[2][5] == text


def test_replace_section() -> None:
    text = "a\n<!-- t:begin -->\nold\n<!-- t:end -->\nb\n"
    assert table.replace_section(text, "t", "new") == "a\n<!-- t:begin -->\n\nnew\n\n<!-- t:end -->\nb\n"
    for broken in ("", "<!-- t:begin -->", "<!-- t:end --><!-- t:begin -->", text + text):
        with pytest.raises(ValueError, match="t:begin"):
            table.replace_section(broken, "t", "new")


@pytest.mark.parametrize("made", [[], records()], ids=["none", "some"])
def test_write_tables(made: Made, tmp_path: Path) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    for record in made:
        path = path_of(record, results)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record), encoding="utf-8")
    readme.write_text("# N\n<!-- table:begin -->\n<!-- table:end -->\n", encoding="utf-8")
    for _ in range(2):  # the second time changes nothing
        table.write_tables(results, readme)
        assert (results / "TABLES.md").read_text(encoding="utf-8") == table.tables_page(made)
        assert table.readme_table(made) in readme.read_text(encoding="utf-8")
    assert (results / "TABLES.md").read_text(encoding="utf-8").startswith("Generated from the records in this folder")


def test_committed_tables_are_those_of_the_committed_records() -> None:
    made, advice = load_all(ROOT / "results"), "run `make tables`"
    assert (ROOT / "results" / "TABLES.md").read_text(encoding="utf-8") == table.tables_page(made), advice
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == table.replace_section(readme, "table", table.readme_table(made)), advice


def test_tables_need_no_torch() -> None:
    code = (
        "import sys; from netdyno.bench import table; table.to_markdown([{}]); table.to_rich([{}]); table.rows([{}]);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


if __name__ == "__main__":
    for file, write in FORMATS.items():
        (GOLDEN / file).write_text(write(records()), encoding="utf-8")
