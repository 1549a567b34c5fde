"""The HTML report: that it loads nothing, runs nothing of a record, and works in a real browser."""

import base64
import hashlib
import html as html_escapes
import json
import re
import shutil
import subprocess
import time
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


TRIES = 4  # a busy machine's virtual time can be over before the page's script is: then there is no result to judge
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND"),
    *("--window-size=1280,4000", "--virtual-time-budget=600000", "--dump-dom"),
)
LISTEN = """
    window.errors = [];
    addEventListener("error", (event) => errors.push("error: " + event.message));
    addEventListener("unhandledrejection", (event) => errors.push("rejection: " + event.reason));
    addEventListener("securitypolicyviolation", (event) => errors.push("policy: " + event.blockedURI));
    console.error = console.warn = (...words) => errors.push("console: " + words.join(" "));
    window.alert = () => errors.push("alert");
"""
ACT = """
    const wait = (ms) => new Promise((done) => setTimeout(done, ms));
    const until = async (ready) => { for (let i = 0; i < 4000 && !ready(); i++) await wait(50); };
    const act = async () => { BODY };
    act().catch((error) => ({ failed: String(error) })).then((result) => {
        const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
        const out = document.createElement("pre");
        out.id = "result";
        out.textContent = JSON.stringify({ ...result, errors, loaded });
        document.body.append(out);
    });
"""


def in_browser(text: str, body: str, tmp_path: Path) -> dict[str, Any]:
    """Opens a page, runs the body of an async function in it and returns what that returned; skips without a browser.

    Fails where the console showed an error, anything was loaded, the page's policy was broken or an alert opened. The
    policy allows these scripts by their hashes, as it does the page's own.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here to open the report in")
    act = ACT.replace("BODY", body)
    text = text.replace("script-src ", f"script-src {html.hash_source(LISTEN)} {html.hash_source(act)} ", 1)
    text = text.replace("<style>", f"<script>{LISTEN}</script><style>", 1)
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", f"<script>{act}</script></body>"), encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    for _ in range(TRIES):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if found := re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL):
            break
    assert found, done.stderr[-2000:]
    result = json.loads(html_escapes.unescape(found[1]))
    assert (result["errors"], result["loaded"], result.get("failed")) == ([], [], None)
    return result


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
        await until(() => document.querySelector(".main-svg"));
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
    assert (seen["undrawn"], seen["during"], seen["after"]) == (0, len(page.tabs), 1)


def test_five_thousand_records_are_quick(tmp_path: Path) -> None:
    machines = [(GPU | {"slug": f"gpu-{number}", "gpu": f"Card {number}"}, 1 / (number + 1)) for number in range(10)]
    made = list(fleet(42, tuple(machines)))
    assert len(made) >= 5_000
    start = time.perf_counter()
    text = html.to_html(page_of(made))
    assert time.perf_counter() - start < 20
    assert len(text) < 20e6
    seen = in_browser(text, "return { first: Number(document.documentElement.dataset.firstView) };", tmp_path)
    assert 0 < seen["first"] < 2_000
