// Runs inside a report, as the body of an async function: what a visitor does, and what is then to be seen.
const $ = (selector) => [...document.querySelectorAll(selector)];
const visible = () => $('[role="tabpanel"]').find((panel) => !panel.hidden);
const inside = (selector) => [...visible().querySelectorAll(selector)];

// every tab
const tabs = {};
for (const tab of $('[role="tab"]')) {
  tab.click();
  const drawn = () => inside(".plot").slice(0, 2).every((chart) => chart.querySelector(".main-svg"));
  await until(drawn);
  tabs[tab.textContent] = { drawn: drawn(), charts: inside(".plot").length, blocks: inside(".block").length };
}

// the last tab's table: sort twice, filter
const head = inside("th").find((head) => head.textContent === "images/s");
const speeds = () => inside("tbody tr").map((row) => row.cells[head.cellIndex].textContent);
head.querySelector("button").click();
const descending = speeds();
head.querySelector("button").click();
const ascending = speeds();
const filter = inside("input")[0];
filter.value = "tesla dcgan";
filter.dispatchEvent(new Event("input"));
const filtered = inside("tbody tr").length;
const count = inside('[role="status"]')[0].textContent;

// keys: from the last tab round to the first, and on to the second
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
$('[role="tab"]').at(-1).focus();
press("ArrowRight");
const wrapped = document.activeElement.textContent;
press("ArrowRight");
await until(() => inside(".plot .main-svg").length);

// a series off and on, and a chart's data
const block = inside(".block.chart")[0];
const chart = block.querySelector(".plot");
const toggle = block.querySelector(".legend button");
toggle.click();
await wait(200);
const off = [chart.data[0].visible, toggle.getAttribute("aria-pressed")];
toggle.click();
await wait(200);
const on = [chart.data[0].visible, toggle.getAttribute("aria-pressed")];
block.querySelector("summary").click();
await wait(100);
const rows = block.querySelectorAll("details tbody tr").length;

// another machine to compare with, and other colours
$('[role="tab"]')[0].click();
const base = document.getElementById("base");
base.selectedIndex = 1;
base.dispatchEvent(new Event("change"));
const heading = inside("h2:not(.printed-title)")[0].textContent;
const overview = inside("tbody tr").map((row) => [...row.cells].map((cell) => cell.textContent));
const theme = document.getElementById("theme");
const colours = [1, 2].map(() => {
  theme.click();
  return getComputedStyle(document.body).backgroundColor;
});
const order = head.getAttribute("aria-sort");
return { tabs, descending, ascending, order, filtered, count, wrapped, off, on, rows, heading, overview, colours };
