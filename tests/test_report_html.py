"""The HTML report: that it loads nothing, runs nothing of a record, and works in a real browser."""

import base64
import hashlib
import html as html_escapes
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from made_up_fleet import GPU, HOSTILE, fleet, one, page_of, spoiled, tables, view, write

from netdyno.bench.record import path_of
from netdyno.bench.report import html, load, sections
from netdyno.bench.report.blocks import Chart


def data_of(page: str) -> dict[str, Any]:
    """The JSON in a page, by the id of its element."""
    found = re.findall(r'<script type="application/json" id="([^"]*)">(.*?)</script>', page)
    return {id: json.loads(text) for id, text in found}


@pytest.mark.fault("a record that would run a script in the report")
def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    write([spoiled(), {**spoiled(), "id": "20261124T1", "status": "failed"}], tmp_path)
    read, problems = load.find([tmp_path])
    assert (len(read), problems) == (2, [])
    page = sections.page(read, [HOSTILE])
    text = html.to_html(page)
    assert text.count("<script") == text.count("</script>") == len(page.tabs) + 3
    assert "onerror" not in re.sub(r"<script type=.*?</script>", "", text, flags=re.DOTALL).replace(
        html_escapes.escape("<img src=x onerror=alert(2)>"), ""
    )
    assert "<img" not in text
    assert "\x1b" not in text
    assert "\\u003c/script>" in text
    assert "<script>alert" in json.dumps(data_of(text), ensure_ascii=False)  # it is shown, as the text that it is


def test_html_is_the_same_every_time_and_loads_nothing(tmp_path: Path) -> None:
    made = list(fleet(1))
    text = html.to_html(page_of(made))
    assert text == html.to_html(page_of(list(reversed(made))))
    own = re.sub(r'<script[^>]*id="plotly">.*?</script>', "", text, flags=re.DOTALL)
    assert not re.search(r"<(link|iframe|object|embed|base|form)\b|\bsrc=|@import|url\(", own)
    assert re.findall(r"https?://[^\"' ]+", own) == ["http://www.w3.org/2000/svg"]  # a name, which nobody fetches
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    assert "default-src 'none'" in policy[1]
    script = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy[1]


@pytest.mark.parametrize("junk", [None, "text", [[]], -1.5, 10**400, {"a": 1}], ids=lambda junk: repr(junk)[:9])
def test_a_record_without_form_is_refused_or_shown(junk: Any, tmp_path: Path) -> None:
    whole = path_of(one(), tmp_path)
    write([one()], tmp_path)
    for section in one():
        for inner in (None, *(one()[section] if isinstance(one()[section], dict) else ())):
            made = one(id="20261124T000000Z-spoiled")
            if inner is None:
                made[section] = junk
            else:
                made[section] = {**made[section], inner: junk}
            path = whole.with_name("spoiled.json")
            path.write_text(json.dumps(made))
            read, problems = load.find([tmp_path])
            assert len(read) + len(problems) == 2, (section, inner)
            assert all(problem.startswith(str(path)) for problem in problems)
            sections.page(read, problems)


# A real browser


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND"),
    "--remote-debugging-pipe",
)
PATIENCE = 120  # seconds without a word from the browser
HELP = """
    const wait = (ms) => new Promise((done) => setTimeout(done, ms));
    const until = async (ready) => { for (let i = 0; i < 600 && !ready(); i++) await wait(50); };
"""


class Chromium:
    """A headless browser and what one page of it complains of and asks for.

    It is spoken to over its pipe: JSON, each message ended by a zero byte.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self.reader, self.writer = reader, writer
        self.number, self.rest, self.session = 0, b"", ""
        self.loaded = False
        self.errors: list[str] = []
        self.requests: list[str] = []

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        os.write(
            self.writer, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0"
        )
        while (answer := self.read()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def read(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select.select([self.reader], [], [], PATIENCE)[0], "the browser says nothing"
            new = os.read(self.reader, 2**20)
            assert new, "the browser has ended"
            self.rest += new
        text, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(text)
        self.hear(message.get("method"), message.get("params", {}))
        return message

    def hear(self, event: str | None, told: dict[str, Any]) -> None:
        assert event != "Page.javascriptDialogOpening", told  # an alert would stop the page for good
        self.loaded |= event == "Page.loadEventFired"
        if event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        if event in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(json.dumps(told))
        if event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(told["args"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Chromium]:
    """Starts a browser and ends it; skips where there is none."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no Chromium here to open the report in: none of {', '.join(BROWSERS)} is installed")
    (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
    command = [browser, *FLAGS, f"--user-data-dir={profile}"]
    shell = f'exec "$@" 3<&{its_in} 4>&{its_out}'  # where it looks for the two ends of its pipe
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", *command], pass_fds=(its_in, its_out), stderr=subprocess.DEVNULL
    )
    try:
        os.close(its_in)
        os.close(its_out)
        yield Chromium(our_in, our_out)
    finally:
        os.close(our_out)  # it ends when its pipe does
        os.close(our_in)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def in_browser(text: str, body: str, tmp_path: Path, width: int = 1280) -> dict[str, Any]:
    """Opens a page as it is, runs the body of an async function beside it and returns what that returned.

    Fails where the console said anything, anything was asked of a network, the page's policy was broken or an alert
    opened; skips without a browser.
    """
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    with chromium(tmp_path / "profile") as browser:
        target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        browser.session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            browser.ask(f"{domain}.enable")
        browser.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=4000, deviceScaleFactor=1, mobile=width < 600
        )
        browser.ask("Page.navigate", url=path.as_uri())
        while not browser.loaded:
            browser.read()
        expression = f"(async () => {{ {HELP} {body} }})()"
        done = browser.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        browser.ask("Page.stopLoading")  # whatever the page did until now has been heard when this is answered
        assert "exceptionDetails" not in done, done
        assert browser.errors == []
        assert {url for url in browser.requests if not url.startswith(("data:", "blob:"))} == {path.as_uri()}
    return done["result"]["value"]


def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    made = list(fleet())
    page = page_of(made)
    click = Path(__file__).with_name("click_report.js").read_text(encoding="utf-8")
    seen = in_browser(html.to_html(page), click, tmp_path)
    assert list(seen["tabs"]) == [tab.title for tab in page.tabs]
    for tab in page.tabs:
        state = seen["tabs"][tab.title]
        blocks = tab.views[0].blocks
        assert (state["drawn"], state["blocks"]) == (True, len(blocks)), tab.title
        assert state["charts"] == sum(isinstance(block, Chart) for block in blocks)

    numbers = sorted((made["throughput"]["images_per_s"] for made in made if made["throughput"]), reverse=True)
    assert [float(text.replace(",", "")) for text in seen["descending"][:3]] == list(map(round, numbers[:3]))
    assert float(seen["ascending"][0]) == pytest.approx(numbers[-1], rel=0.01)
    assert seen["order"] == "ascending"
    assert (seen["filtered"], seen["count"]) == (9, "9 of 108 rows")
    assert seen["wrapped"] == "Overview"
    assert (seen["off"], seen["on"]) == (["legendonly", "false"], [True, "true"])
    assert seen["rows"] == 9
    assert seen["heading"].endswith("as many as Tesla T4")
    (table,) = tables(view(page, "overview", base="Tesla T4"))
    assert seen["overview"] == [[cell if isinstance(cell, str) else cell[0] for cell in line] for line in table.rows]
    assert seen["colours"] == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


@pytest.mark.parametrize(
    "markup",
    [
        "<script>console.error('no')</script>",
        "<script>throw new Error('no')</script>",
        "<script>alert(1)</script>",
        "<img src='http://example.invalid/a.png'>",
        "<img src='other.png'>",
        "<meta http-equiv='Content-Security-Policy' content=\"img-src 'none'\"><img src='data:,'>",
    ],
)
def test_the_browser_tells_what_a_page_does(markup: str, tmp_path: Path) -> None:
    assert in_browser("<title>empty</title>", "return 1;", tmp_path) == 1
    with pytest.raises(AssertionError):
        in_browser(markup, "await wait(300); return 1;", tmp_path)


@pytest.mark.parametrize("width", [390, 1440])
def test_the_committed_records_are_shown(width: int, tmp_path: Path) -> None:
    read, problems = load.find([Path(__file__).parents[1] / "results"])
    page = sections.page(read, problems)
    script = """
        const wrong = [];
        const scope = document.getElementById("scope");
        for (const place of scope ? [...scope.options].keys() : [0]) {
            if (scope) {
                scope.selectedIndex = place;
                scope.dispatchEvent(new Event("change"));
            }
            for (const tab of document.querySelectorAll('[role="tab"]')) {
                tab.click();
                const panel = document.getElementById(tab.getAttribute("aria-controls"));
                const first = () => [...panel.querySelectorAll(".plot")].slice(0, 2);
                await until(() => first().every((plot) => plot.querySelector(".main-svg")));
                const empty = !panel.textContent.trim();
                if (empty || document.documentElement.scrollWidth > WIDTH) wrong.push(tab.textContent);
            }
        }
        const rows = [...document.querySelectorAll("#panel-records tbody tr")];
        return { wrong, rows: rows.map((row) => [...row.cells].map((cell) => cell.textContent)) };
    """
    seen = in_browser(html.to_html(page), script.replace("WIDTH", str(width)), tmp_path, width)
    assert seen["wrong"] == []
    (table,) = tables(page.tabs[-1].views[0])
    speed, name = (list(table.columns).index(column) for column in ("images/s", "record"))
    shown = {row[name]: float(row[speed].replace(",", "")) for row in seen["rows"] if row[speed] != "–"}
    recorded = {one.record["id"]: (one.record["throughput"] or {}).get("images_per_s") for one in read}
    assert shown
    for id, value in shown.items():
        assert value == pytest.approx(recorded[id], rel=0.005)


def test_hostile_records_run_nothing_in_a_browser(tmp_path: Path) -> None:
    page = page_of([spoiled(), {**spoiled(), "id": "20261124T1", "status": "failed"}], problems=[HOSTILE])
    script = """
        for (const tab of document.querySelectorAll('[role="tab"]')) {
            tab.click();
            await wait(300);
        }
        await until(() => document.querySelector(".main-svg"));
        return {
            images: document.querySelectorAll("img:not([src^='data:image/webp']), svg b, a").length,
            bold: document.querySelectorAll("main b, header b").length,
            text: document.querySelector("main").textContent.includes("<img src=x onerror=alert(2)>"),
            drawn: document.querySelectorAll(".main-svg").length,
        };
    """
    seen = in_browser(html.to_html(page), script, tmp_path)
    assert (seen["images"], seen["bold"], seen["text"]) == (0, 0, True)
    assert seen["drawn"] > 0


def test_paper_shows_every_section(tmp_path: Path) -> None:
    script = """
        document.querySelector('[data-tab="records"]').click();
        await until(() => window.Plotly);
        dispatchEvent(new Event("beforeprint"));
        const panels = [...document.querySelectorAll('[role="tabpanel"]')];
        const charts = [...document.querySelectorAll(".plot")];
        const undrawn = charts.filter((chart) => !chart.querySelector(".main-svg")).length;
        const during = panels.filter((panel) => !panel.hidden && panel.querySelector(".block")).length;
        dispatchEvent(new Event("afterprint"));
        return { undrawn, during, after: panels.filter((panel) => !panel.hidden).length };
    """
    page = page_of(fleet(1))
    seen = in_browser(html.to_html(page), script, tmp_path)
    filled = sum(bool(tab.views) for tab in page.tabs)
    assert (seen["undrawn"], seen["during"], seen["after"]) == (0, filled, 1)


def test_five_thousand_records_are_quick(tmp_path: Path) -> None:
    machines = [(GPU | {"slug": f"gpu-{number}", "gpu": f"Card {number}"}, 1 / (number + 1)) for number in range(10)]
    made = list(fleet(42, tuple(machines)))
    assert len(made) >= 5_000
    start = time.perf_counter()
    text = html.to_html(page_of(made))
    assert time.perf_counter() - start < 20
    assert len(text) < 20e6
    script = """
        await until(() => document.querySelector(".main-svg"));
        return { first: Number(document.documentElement.dataset.firstView), chart: performance.now() };
    """
    seen = in_browser(text, script, tmp_path)
    assert 0 < seen["first"] < 2_000
    assert seen["chart"] < 10_000  # the table is there before; a busy machine takes its time to unpack plotly
