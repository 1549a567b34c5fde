"use strict";
// Draws the page from the JSON beside it. Every string is put in as text, never as markup; nothing is ever loaded.

const FIRST_ROWS = 50; // of a table; more on demand
const LONG = 30; // letters from which a cell breaks into lines
const FILTERED_FROM = 8; // rows from which a table has a filter
const SVG = "http://www.w3.org/2000/svg";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const page = read("page");
const state = { tab: null, scope: page.scopes[0], base: page.bases[0] };
const drawn = new Map(); // chart element → its figure

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// Tabs

const tabs = [...document.querySelectorAll('[role="tab"]')];
const panels = new Map(tabs.map((tab) => [tab, document.getElementById(tab.getAttribute("aria-controls"))]));

function show(tab, focus = false) {
  state.tab = tab;
  for (const other of tabs) {
    const selected = other === tab;
    other.setAttribute("aria-selected", selected);
    other.tabIndex = selected ? 0 : -1;
    panels.get(other).hidden = !selected;
  }
  if (focus) tab.focus();
  tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  fill(tab);
}

for (const [place, tab] of tabs.entries()) {
  tab.addEventListener("click", () => {
    show(tab);
    history.replaceState(null, "", "#" + tab.dataset.tab);
  });
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -place, End: tabs.length - 1 - place }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(tabs[(place + step + tabs.length) % tabs.length], true);
  });
}

function fill(tab) {
  const panel = panels.get(tab);
  const wanted = JSON.stringify([state.scope, state.base]);
  if (panel.dataset.filled === wanted) return;
  const views = read("tab-" + tab.dataset.tab);
  const fits = (view) => (view.scope ?? state.scope) === state.scope && (view.base ?? state.base) === state.base;
  const view = views.find(fits);
  for (const chart of panel.querySelectorAll(".plot")) {
    if (window.Plotly) Plotly.purge(chart);
    drawn.delete(chart);
  }
  const title = make("h2", { className: "printed-title" }, [tab.textContent, view?.scope].filter(Boolean).join(": "));
  const others = [...new Set(views.map((other) => other.scope))].join("; ");
  const rest = others ? ` There is some for: ${others}.` : "";
  const content = view
    ? make("div", { className: "blocks" }, ...view.blocks.map(block))
    : make("p", {}, `Nothing to show for: ${state.scope}. It takes ${tab.dataset.needs}.${rest}`);
  panel.replaceChildren(title, content);
  panel.dataset.filled = wanted;
  for (const chart of panel.querySelectorAll(".plot")) seen.observe(chart);
}

const block = (data) =>
  make("section", { className: "block " + data.kind }, ...{ text, table, chart, pictures }[data.kind](data));
const notes = (data) => (data.notes ?? []).map((note) => make("p", { className: "note" }, note));
const text = (data) => [make("p", {}, data.text)];
const heading = (data) => make("h2", {}, data.title);

function pictures(data) {
  const figures = data.pictures.map(({ label, webp }) => {
    const image = make("img", { src: "data:image/webp;base64," + webp, alt: `${data.title}, ${label}`, loading: "lazy" });
    return make("figure", {}, image, make("figcaption", {}, label));
  });
  return [heading(data), make("div", { className: "gallery" }, ...figures), ...notes(data)];
}

// Tables: a cell is a text, or [what is shown, the number to sort by]

function table(data, plain = false) {
  let rows = data.rows.map((cells, place) => ({ cells, flag: data.flags?.[place] }));
  let words = [];
  let all = false;
  const numeric = data.columns.map((_, column) => data.rows.some((row) => Array.isArray(row[column])));
  const body = make("tbody");
  const count = make("span", { role: "status" });
  const more = make("button", { type: "button" });
  const shown = (cell) => (Array.isArray(cell) ? cell[0] : cell);
  const kind = (cell, column) =>
    [numeric[column] ? "number" : "", data.columns[column] === "status" ? "status" : "", shown(cell).length > LONG ? "long" : ""].join(" ").trim();

  function refresh() {
    const fit = rows.filter((row) => {
      const line = row.cells.map(shown).join("\n").toLowerCase();
      return words.every((word) => line.includes(word));
    });
    const part = all ? fit : fit.slice(0, FIRST_ROWS);
    body.replaceChildren(
      ...part.map((row) =>
        make("tr", { className: row.flag ?? "" }, ...row.cells.map((cell, column) => make("td", { className: kind(cell, column) }, shown(cell)))),
      ),
    );
    count.textContent = words.length ? `${fit.length} of ${rows.length} rows` : `${rows.length} rows`;
    more.hidden = part.length === fit.length;
    more.textContent = `Show all ${fit.length} rows`;
  }

  more.addEventListener("click", () => {
    all = true;
    refresh();
  });

  const heads = data.columns.map((name, column) => {
    const button = make("button", { type: "button" }, name);
    const head = make("th", { scope: "col", className: numeric[column] ? "number" : "" }, button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === (numeric[column] ? "descending" : "ascending") ? -1 : 1;
      const ascending = numeric[column] ? -sign : sign; // numbers: the largest first
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", ascending > 0 ? "ascending" : "descending");
      const value = (row) => (numeric[column] ? (Array.isArray(row.cells[column]) ? row.cells[column][1] : null) : row.cells[column]);
      rows = rows.toSorted((one, other) => {
        const [a, b] = [value(one), value(other)];
        if (a === null || b === null) return (a === null) - (b === null); // what is missing comes last either way
        return ascending * (numeric[column] ? a - b : a.localeCompare(b, "en", { numeric: true }));
      });
      refresh();
    });
    return head;
  });

  const tools = make("div", { className: "tools" });
  if (data.rows.length > FILTERED_FROM) {
    const filter = make("input", { type: "search", placeholder: "Filter rows", "aria-label": `Filter ${data.title}` });
    filter.addEventListener("input", () => {
      words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      refresh();
    });
    tools.append(filter, count);
  }
  refresh();
  const grid = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
  const scroll = make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": data.title }, grid);
  return [...(plain ? [] : [heading(data)]), tools, scroll, more, ...notes(data)];
}

// Charts: plotly is unpacked when the first of them comes into view, or a little later, and each is drawn when it does

let plotly;
function loadPlotly() {
  plotly ??= (async () => {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    document.head.append(make("script", { text: await new Response(unpacked).text() }));
    return window.Plotly;
  })();
  return plotly;
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
}, { rootMargin: "200px" });

async function draw(element) {
  seen.unobserve(element);
  try {
    await loadPlotly();
    drawNow(element);
  } catch (error) {
    element.textContent = "This browser cannot draw the chart; the table below holds its data.";
    console.error(error);
  }
}

function drawNow(element) {
  const figure = drawn.get(element);
  if (!figure || element.dataset.drawn) return;
  element.dataset.drawn = "yes";
  const coarse = matchMedia("(pointer: coarse)").matches; // a finger on a chart scrolls the page
  const config = { responsive: true, displaylogo: false, plotlyServerURL: "", displayModeBar: coarse ? false : "hover", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
  Plotly.newPlot(element, figure.data, themed({ ...figure.layout, dragmode: coarse ? false : "zoom" }), config);
}

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: value("--line"), zerolinecolor: value("--line"), linecolor: value("--line") };
  return {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: value("--soft"), activecolor: value("--accent") },
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: value("--ink") },
    hoverlabel: { bgcolor: value("--back"), bordercolor: value("--line"), font: { color: value("--ink") }, align: "left" },
    xaxis: { ...layout.xaxis, ...axis },
    yaxis: { ...layout.yaxis, ...axis },
  };
}

function chart(data) {
  const height = `${data.figure.layout.height}px`;
  const element = make("div", { className: "plot", role: "img", "aria-label": `${data.title}; the table below holds its data` });
  element.style.minHeight = height;
  drawn.set(element, data.figure);
  const parts = [heading(data), element];
  if (data.figure.data.length > 1) parts.splice(1, 0, legend(data, element));
  const details = make("details", {}, make("summary", {}, "Data as a table"));
  details.addEventListener("toggle", () => {
    if (details.childElementCount === 1) details.append(...table(data.table, true));
  });
  return [...parts, ...notes(data), details];
}

function legend(data, element) {
  const buttons = data.figure.data.map((trace, place) => {
    const pressed = trace.visible !== "legendonly";
    const button = make("button", { type: "button", "aria-pressed": String(pressed) }, swatch(trace), data.names[place]);
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", on);
      trace.visible = on ? true : "legendonly";
      if (element.dataset.drawn) Plotly.restyle(element, { visible: trace.visible }, [place]);
    });
    return button;
  });
  return make("div", { className: "legend", role: "group", "aria-label": `Series of ${data.title}` }, ...buttons);
}

const SHAPES = {
  circle: "M6 5a5 5 0 1 0 10 0a5 5 0 1 0 -10 0", square: "M6 0H16V10H6Z", diamond: "M11 0L16 5L11 10L6 5Z",
  "triangle-up": "M11 0L16 10H6Z", x: "M6 2L8 0L11 3L14 0L16 2L13 5L16 8L14 10L11 7L8 10L6 8L9 5Z",
  cross: "M9 0H13V3H16V7H13V10H9V7H6V3H9Z",
};
function swatch(trace) {
  const svg = document.createElementNS(SVG, "svg");
  const mark = document.createElementNS(SVG, "path");
  const lined = trace.type === "scatter" && trace.mode.includes("lines");
  const dashes = { dash: "5 3", dot: "2 2", dashdot: "5 2 1 2", longdash: "8 3" };
  for (const [name, value] of Object.entries({ width: 22, height: 10, viewBox: "0 0 22 10", "aria-hidden": "true" })) svg.setAttribute(name, value);
  mark.setAttribute("d", lined ? "M0 5H22" : SHAPES[trace.marker.symbol] ?? SHAPES.square);
  mark.setAttribute(lined ? "stroke" : "fill", trace.marker.color);
  if (lined) {
    mark.setAttribute("stroke-width", 3);
    mark.setAttribute("stroke-dasharray", dashes[trace.line.dash] ?? "none");
  }
  svg.append(mark);
  return svg;
}

// Controls

for (const name of ["scope", "base"]) {
  document.getElementById(name)?.addEventListener("change", (event) => {
    state[name] = page[name + "s"][event.target.selectedIndex];
    fill(state.tab);
  });
}

const themes = ["system", "light", "dark"];
const themeButton = document.getElementById("theme");
function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  themeButton.textContent = `Colours: ${theme}`;
  themeButton.dataset.theme = theme;
  recolour();
}
function recolour() {
  for (const element of drawn.keys()) {
    if (element.dataset.drawn && element.layout) Plotly.relayout(element, themed(element.layout));
  }
}
themeButton.addEventListener("click", () => setTheme(themes[(themes.indexOf(themeButton.dataset.theme ?? "system") + 1) % themes.length]));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);

// On paper every section is shown, in light colours

let before;
addEventListener("beforeprint", () => {
  before = themeButton.dataset.theme ?? "system";
  tabs.forEach(fill);
  for (const panel of panels.values()) panel.hidden = false;
  document.body.style.width = "180mm";
  setTheme("light");
  if (!window.Plotly) return;
  for (const element of drawn.keys()) drawNow(element);
  for (const element of drawn.keys()) Plotly.relayout(element, { width: element.clientWidth });
});
addEventListener("afterprint", () => {
  document.body.style.width = "";
  setTheme(before);
  for (const element of drawn.keys()) if (element.dataset.drawn) Plotly.relayout(element, { width: null, autosize: true });
  show(state.tab);
});

show(tabs.find((tab) => "#" + tab.dataset.tab === location.hash) ?? tabs[0]);
setTimeout(() => loadPlotly().catch(() => {}), 1000); // paper cannot wait for it: whoever prints may have seen no chart yet
document.documentElement.dataset.firstView = Math.round(performance.now()); // ms since the page began to load
