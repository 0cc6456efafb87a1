// Helpers: elements, figures in words, colours, chart frames. Everything below shares one scope with the other scripts.
const data = JSON.parse(document.getElementById("report-data").textContent);

/** A DOM element; strings become text, never markup. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

// ---- figures -------------------------------------------------------------------------------------------------------
const ABSENT = "–";
const known = (v) => v !== null && v !== undefined;
const fixed = (v, digits = 2) => (known(v) ? v.toFixed(digits) : ABSENT);
const times = (v) => (known(v) ? `${v.toFixed(2)}×` : ABSENT);
const percent = (v, digits = 0) => (known(v) ? `${(100 * v).toFixed(digits)}\u00a0%` : ABSENT);
const whole = (v) => (known(v) ? v.toLocaleString("en-US") : ABSENT);
const short = (v) => (v >= 100 || v === 0 ? v.toFixed(0) : v >= 10 ? v.toFixed(1) : v.toPrecision(2));

function scaled(v, steps) {
  const [size, unit] = steps.find(([s]) => Math.abs(v) >= s) ?? steps[steps.length - 1];
  const x = v / size;
  return `${x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x.toFixed(2)}\u00a0${unit}`;
}
const bytes = (v) => (known(v) ? scaled(v, [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]]) : ABSENT);
const seconds = (v) => (known(v) ? scaled(v, [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]]) : ABSENT);

/** "19 % fewer" of two figures that are both on the page. */
function change(now, before, [less, more] = ["less", "more"]) {
  if (!known(now) || !known(before) || before === 0) return null;
  const ratio = now / before - 1;
  if (Math.abs(ratio) < 0.005) return "the same";
  return `${Math.abs(100 * ratio).toFixed(0)}\u00a0% ${ratio < 0 ? less : more}`;
}

// ---- methods and their colours -------------------------------------------------------------------------------------
const methodByName = new Map(data.methods.map((m) => [m.name, m]));
const baseline = methodByName.get(data.baseline);
const chosen = methodByName.get(data.chosen);
const label = (name) => methodByName.get(name)?.label ?? name;
/** Lower case in the middle of a sentence, but never an abbreviation. */
const inline = (text) => (/^[A-Z][a-z]/.test(text) ? text[0].toLowerCase() + text.slice(1) : text);

const everyName = [...new Set([...methodByName.keys(), ...data.frontier.items.map((p) => p.method)])];
const colourOf = new Map();
const symbolOf = new Map();
{
  const symbols = ["square", "triangle", "diamond2", "star", "cross", "wye", "plus"];
  let next = 0;
  for (const name of everyName) {
    if (name === data.chosen) {
      colourOf.set(name, "var(--chosen)");
      symbolOf.set(name, "circle");
    } else if (name === data.baseline) {
      colourOf.set(name, "var(--baseline)");
      symbolOf.set(name, "square");
    } else {
      colourOf.set(name, `var(--method-${next % 5})`);
      symbolOf.set(name, symbols[1 + (next % (symbols.length - 1))]);
      next += 1;
    }
  }
}
const methodScale = { domain: everyName, range: everyName.map((n) => colourOf.get(n)) };
const symbolScale = { domain: everyName, range: everyName.map((n) => symbolOf.get(n)) };

/** Methods with their marks, then lines as `[text, dash, colour]`. */
function legend(names, lines = []) {
  const entry = (name) => {
    const path = d3.symbol(Plot_symbol(symbolOf.get(name)), 70)();
    const mark = d3.create("svg").attr("viewBox", "-7 -7 14 14").attr("width", 12).attr("height", 12).attr("aria-hidden", "true");
    mark.append("path").attr("d", path).attr("fill", colourOf.get(name));
    return el("li", {}, mark.node(), label(name));
  };
  return el("ul", { class: "legend", "aria-label": "Legend" }, names.map(entry),
    lines.map(([words, dash, colour]) => {
      const mark = d3.create("svg").attr("viewBox", "0 -6 26 12").attr("width", 26).attr("height", 12).attr("aria-hidden", "true");
      mark.append("line").attr("x2", 26).attr("stroke", colour).attr("stroke-width", 1.6).attr("stroke-dasharray", dash).attr("stroke-linecap", "round");
      return el("li", {}, mark.node(), words);
    }));
}
const Plot_symbol = (name) =>
  ({ circle: d3.symbolCircle, square: d3.symbolSquare, triangle: d3.symbolTriangle, diamond2: d3.symbolDiamond2,
     star: d3.symbolStar, cross: d3.symbolCross, wye: d3.symbolWye, plus: d3.symbolPlus })[name];

// ---- ramps (both run from "nothing", the paper, to "a lot") ----------------------------------------------------------
const dark = () => document.documentElement.dataset.theme === "dark";
const RAMP = {
  light: ["#f6f4ef", "#d3e0e6", "#8fb9d0", "#3f86b5", "#14548c", "#0a2647"],
  dark: ["#191d22", "#1d3a50", "#22608a", "#3a94c2", "#8fd0e0", "#f4f6d8"],
};
const DIVERGING = {
  light: ["#2a6f9e", "#9cc3d9", "#f6f4ef", "#eeb07f", "#b3470f"],
  dark: ["#7cc4f0", "#3777a1", "#22262b", "#b0632f", "#ffad75"],
};
const stops = (ramp) => ramp[dark() ? "dark" : "light"];
const interpolator = (ramp) => d3.piecewise(d3.interpolateLab, stops(ramp));

function rampLegend(ramp, from, to, title) {
  const gradient = `linear-gradient(90deg, ${stops(ramp).join(", ")})`;
  return el("p", { class: "ramp" }, el("span", {}, title), el("span", { class: "num" }, from),
    el("i", { style: `background:${gradient}`, "aria-hidden": "true" }), el("span", { class: "num" }, to));
}
/** Ink that can be read on a fill. */
const inkOn = (fill) => (d3.lab(fill).l > 58 ? "#16181b" : "#ffffff");

// ---- sections, controls, charts ---------------------------------------------------------------------------------------
function section(id, title, lede, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title),
    lede ? el("p", { class: "lede" }, ...[lede].flat()) : null, ...children);
}
const reason = (part) => el("p", { class: "absent" }, part.reason ?? "Not computed for this report.");

/** A choice: buttons where few, a list where many. `change` is called with the value. */
function choice(title, options, value, change) {
  const wide = options.length > 3;
  if (wide) {
    const list = el("select", { onchange: (event) => change(options[event.target.selectedIndex][0]) },
      options.map(([v, text]) => el("option", { selected: v === value }, text)));
    return el("label", { class: "choice" }, el("span", {}, title), list);
  }
  const buttons = options.map(([v, text]) => el("button", { type: "button", "aria-pressed": String(v === value), onclick: () => {
    buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(options[i][0] === v)));
    change(v);
  } }, text));
  return el("div", { class: "choice", role: "group", "aria-label": title }, el("span", { "aria-hidden": "true" }, title),
    el("span", { class: "segments" }, buttons));
}

const charts = [];
/**
 * A chart in its frame. `draw(width)` returns nodes and is called again when the width or the theme changes;
 * `describe()` is the text for those who do not see it; `table()` the same figures as [head, rows].
 */
function chart({ id, caption, describe, draw, table, className = "" }) {
  const plot = el("div", { class: "plot" });
  const words = el("figcaption", {}, caption ?? "");
  const figure = el("figure", { id: `chart-${id}`, class: `chart ${className}` }, plot, words);
  if (table) figure.append(tableUnder(table));
  const entry = { figure, width: 0, redraw() {
    const width = Math.floor(plot.clientWidth);
    if (width === 0) return;
    entry.width = width;
    hideTip();
    try {
      const nodes = [draw(width)].flat();
      for (const svg of nodes.flatMap((n) => [n, ...n.querySelectorAll("svg")]).filter((n) => n.matches("svg[class*=plot]"))) {
        svg.setAttribute("role", "img");
        if (!svg.hasAttribute("aria-label")) svg.setAttribute("aria-label", describe());
      }
      plot.replaceChildren(...nodes);
    } catch (error) {
      showError(error);
    }
  } };
  charts.push(entry);
  figure.redraw = () => {
    entry.redraw();
    const open = figure.querySelector("details[open]");
    if (open) open.dispatchEvent(new Event("toggle"));
  };
  return figure;
}

/** The figures of a chart as a table, built when it is opened. */
function tableUnder(table) {
  const body = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Figures of the chart above" });
  return el("details", { class: "figures", ontoggle: (event) => {
    if (event.target.open) body.replaceChildren(plainTable(...table()));
  } }, el("summary", {}, "Figures"), body);
}
function plainTable(head, rows) {
  const cell = (v, i) => (i === 0 ? el("th", { scope: "row" }, String(v)) : el("td", {}, String(v)));
  return el("table", {}, el("thead", {}, el("tr", {}, head.map((h) => el("th", { scope: "col" }, h)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell)))));
}

/** Columns for `n` small charts of at least `least` pixels, so that the last row is not left almost empty. */
function columnsFor(n, width, least) {
  const most = Math.max(1, Math.min(n, Math.floor((width + 24) / (least + 24))));
  return Math.ceil(n / Math.ceil(n / most));
}
/** Small charts side by side; `one(item, width)` draws each. */
function multiples(items, width, least, one, gap = 24) {
  const columns = columnsFor(items.length, width, least);
  const each = Math.floor((width - gap * (columns - 1)) / columns);
  return el("div", { class: "multiples", style: `grid-template-columns:repeat(${columns}, minmax(0, 1fr));column-gap:${gap}px` },
    items.map((item) => el("div", { class: "multiple" }, ...one(item, each))));
}
const methodTitle = (m) => el("h3", {}, el("span", { class: "swatch", style: `background:${colourOf.get(m.name)}` }), m.label);
/** Text over lines and dots stays readable. */
const HALO = { stroke: "var(--paper)", strokeWidth: 4, paintOrder: "stroke" };

/** What every plot has in common. */
function plot(options) {
  return Plot.plot({ ...options, style: { background: "none", color: "var(--ink-2)", fontFamily: "inherit", fontSize: "12px",
    overflow: "visible", ...options.style } });
}

// ---- one tooltip for the maps ---------------------------------------------------------------------------------------
const hoverTip = document.getElementById("hover-tip");
function hideTip() { hoverTip.hidden = true; }
function showTip(event, lines) {
  hoverTip.replaceChildren(...lines.map((line, i) => el(i === 0 ? "strong" : "span", {}, line)));
  hoverTip.hidden = false;
  const { offsetWidth: w, offsetHeight: h } = hoverTip;
  const x = Math.min(event.clientX + 14, document.documentElement.clientWidth - w - 8);
  const y = event.clientY + h + 20 > innerHeight ? event.clientY - h - 10 : event.clientY + 14;
  hoverTip.style.transform = `translate(${Math.max(8, x)}px, ${y}px)`;
}
