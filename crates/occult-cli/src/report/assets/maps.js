// Heat maps: co-activation before and after ordering, load per rank, rows per rank pair.

/** Boundaries as thin lines over a map of `n` x `m` cells: `at` in cells, on x and on y. */
const rules = (at, size, axis, options) => (axis === "x"
  ? Plot.ruleX(at, { y1: 0, y2: size, ...options })
  : Plot.ruleY(at, { x1: 0, x2: size, ...options }));

/**
 * A map of `rows` x `columns` values (row-major). Many cells become one image, few become rectangles with their figures.
 * `paint(value, row, column)` gives the fill, `tip(row, column)` the lines of the tooltip, `marks` what lies above.
 */
function mapPlot({ width, height, margins, rows, columns, value, paint, tip, text, marks = [], x = {}, y = {}, ariaLabel }) {
  const cells = rows * columns;
  const asImage = cells > 700;
  const indices = d3.range(cells);
  const row = (i) => Math.floor(i / columns);
  const column = (i) => i % columns;
  const base = asImage ? null : Plot.rect(indices, {
    x1: column, x2: (i) => column(i) + 1, y1: row, y2: (i) => row(i) + 1, fill: (i) => paint(value(row(i), column(i)), row(i), column(i)),
    inset: 0.75, rx: 1.5,
  });
  const cellWidth = (width - margins.marginLeft - margins.marginRight) / columns;
  const figures = !asImage && text && cellWidth >= 27 ? [Plot.text(indices, {
    x: (i) => column(i) + 0.5, y: (i) => row(i) + 0.5, text: (i) => text(value(row(i), column(i))),
    fill: (i) => inkOn(paint(value(row(i), column(i)), row(i), column(i))), fontSize: cellWidth > 40 ? 11 : 9.5, fontVariant: "tabular-nums",
  })] : [];
  const svg = plot({
    width, height, ...margins, ariaLabel, color: { type: "identity" },
    x: { axis: null, domain: [0, columns], ...x }, y: { axis: null, domain: [0, rows], ...y },
    marks: [
      ...(asImage ? [imageMark(rows, columns, value, paint)] : [base]), ...figures, ...marks,
    ],
  });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * width - margins.marginLeft;
    const py = ((event.clientY - box.top) / box.height) * height - margins.marginTop;
    const c = Math.floor((px / (width - margins.marginLeft - margins.marginRight)) * columns);
    const r = Math.floor((py / (height - margins.marginTop - margins.marginBottom)) * rows);
    if (r < 0 || c < 0 || r >= rows || c >= columns) return hideTip();
    showTip(event, tip(r, c));
  });
  svg.addEventListener("pointerleave", hideTip);
  return svg;
}

/** What has no value, such as an expert with itself. */
const NEUTRAL = () => (dark() ? "#2a2f36" : "#dfdbd1");

/** All cells as the pixels of one image. */
function imageMark(rows, columns, value, paint) {
  const canvas = el("canvas", { width: columns, height: rows });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  for (let r = 0, at = 0; r < rows; r += 1) {
    for (let c = 0; c < columns; c += 1, at += 4) {
      const { r: red, g, b } = d3.rgb(paint(value(r, c), r, c));
      pixels.data.set([red, g, b, 255], at);
    }
  }
  context.putImageData(pixels, 0, 0);
  const url = canvas.toDataURL();
  // One image over the whole frame: its corners are the corners of the scales.
  return (index, scales, channels, dimensions) => {
    const image = document.createElementNS("http://www.w3.org/2000/svg", "image");
    const { marginLeft, marginTop, marginRight, marginBottom, width, height } = dimensions;
    const at = { href: url, x: marginLeft, y: marginTop, width: width - marginLeft - marginRight, height: height - marginTop - marginBottom,
      preserveAspectRatio: "none", "image-rendering": "pixelated", style: "image-rendering:pixelated" };
    for (const [name, v] of Object.entries(at)) image.setAttribute(name, v);
    return image;
  };
}

// ---- co-activation -----------------------------------------------------------------------------------------------------
const SCALES = { root: ["Square root", (v) => Math.sqrt(v)], linear: ["Linear", (v) => v], log: ["Log", (v) => (v <= 0 ? 0 : Math.max(0, 1 + Math.log10(v) / 3))] };

function coactivationSection() {
  const part = data.coactivation;
  const lede = "Each cell is a pair of experts; the stronger its colour, the more tokens choose both. On the left experts stand in the order of the checkpoint, on the right "
    + "rank after rank. A good placement gathers the strong pairs into the outlined blocks: those never leave a device.";
  if (!part.items.length) return section("coactivation", "Which experts work together", null, reason(part));
  const state = { map: part.items[0], scale: "root" };
  const orders = () => state.map.orders;
  const start = () => orders().find((o) => o.method === data.chosen)?.method ?? orders()[0]?.method;
  state.method = start();
  const order = () => orders().find((o) => o.method === state.method) ?? orders()[0];
  const byId = () => ({ method: null, experts: d3.range(data.profile.num_experts), rank_offsets: null });
  const draw = (pick) => (width) => {
    const { experts, rank_offsets: offsets } = pick();
    const n = experts.length;
    const E = data.profile.num_experts;
    const size = Math.min(width, 620);
    const margins = { marginLeft: 26, marginRight: 2, marginTop: 20, marginBottom: 22 };
    const height = size - 28 + margins.marginTop + margins.marginBottom;
    const colour = interpolator(RAMP);
    const curve = SCALES[state.scale][1];
    const lookup = d3.range(256).map((i) => d3.rgb(colour(i / 255)));
    const rankOf = (i) => d3.bisectRight(offsets, i) - 1;
    const strength = (r, c) => state.map.p[experts[r] * E + experts[c]];
    const marks = [];
    if (offsets) {
      const blocks = d3.range(offsets.length - 1).filter((r) => offsets[r + 1] > offsets[r]);
      const room = (size / n) * (n / blocks.length) > 20;
      marks.push(Plot.rect(blocks, { x1: (r) => offsets[r], x2: (r) => offsets[r + 1], y1: (r) => offsets[r], y2: (r) => offsets[r + 1],
        stroke: "var(--outline)", strokeWidth: size / blocks.length < 14 ? 0.8 : 1.75, fill: "none" }));
      if (room) marks.push(Plot.text(blocks, { x: (r) => (offsets[r] + offsets[r + 1]) / 2, y: 0, dy: -9, text: (r) => `${blocks.length > 10 ? "" : "r"}${r}`, fill: "var(--ink-3)", fontSize: 11 }));
      if (room) marks.push(Plot.text(blocks, { x: 0, y: (r) => (offsets[r] + offsets[r + 1]) / 2, dx: -6, textAnchor: "end", text: (r) => `${blocks.length > 10 ? "" : "r"}${r}`, fill: "var(--ink-3)", fontSize: 11 }));
    }
    const step = Math.max(1, Math.ceil(n / 8 / 4) * 4);
    const ticks = offsets ? [] : d3.range(0, n, step);
    marks.push(Plot.text(ticks, { x: (t) => t + 0.5, y: n, dy: 11, text: (t) => `${experts[t]}`, fill: "var(--ink-3)", fontSize: 11 }));
    marks.push(Plot.text(ticks, { x: 0, y: (t) => t + 0.5, dx: -6, textAnchor: "end", text: (t) => `${experts[t]}`, fill: "var(--ink-3)", fontSize: 11 }));
    return mapPlot({
      width: size, height, margins, rows: n, columns: n, value: strength, y: { reverse: true }, marks,
      paint: (v, r, c) => (experts[r] === experts[c] ? NEUTRAL() : lookup[Math.round(255 * Math.min(1, curve(v)))]),
      ariaLabel: `Co-activation of layer ${state.map.layer}, experts ${offsets ? `by rank under ${label(state.method)}` : "by id"}`,
      tip: (r, c) => [`Expert ${experts[r]} and ${experts[c]}`,
        experts[r] === experts[c] ? "the same expert" : `${percent(strength(r, c), 1)} of the strongest pair`,
        ...(offsets ? [rankOf(r) === rankOf(c) ? `together on rank ${rankOf(r)}` : `ranks ${rankOf(r)} and ${rankOf(c)}`] : [])],
    });
  };
  const before = chart({ id: "coactivation-before", caption: "By expert id", describe: () => "Co-activation by expert id", draw: draw(byId) });
  const after = chart({ id: "coactivation-after", caption: "By rank", describe: () => "Co-activation by rank", draw: orders().length ? draw(order) : () => reason({}) });
  const key = el("div");
  const words = () => {
    after.querySelector("figcaption").textContent = `By rank: ${label(state.method)}`;
    key.replaceChildren(rampLegend(RAMP, state.scale === "log" ? "0.001" : "0", "1", "Co-activation over the strongest pair"));
  };
  const refresh = () => {
    words();
    before.redraw();
    after.redraw();
  };
  // The legend has the colours of the theme, so it is redrawn with the charts.
  charts.push({ redraw: words });
  words();
  const methods = orders().map((o) => [o.method, label(o.method)]);
  return section("coactivation", "Which experts work together", lede,
    el("div", { class: "controls" },
      part.items.length > 1 ? choice("Layer", part.items.map((m) => [m, `${m.layer}`]), state.map, (m) => { state.map = m; refresh(); }) : null,
      methods.length > 1 ? choice("Placement", methods, state.method, (m) => { state.method = m; refresh(); }) : null,
      choice("Scale", Object.entries(SCALES).map(([k, [text]]) => [k, text]), state.scale, (s) => { state.scale = s; refresh(); })),
    el("div", { class: "pair" }, before, after), key);
}

// ---- load per rank -------------------------------------------------------------------------------------------------------
function loadSection() {
  const { layers } = data.profile;
  const { ranks, load_cap: cap } = data.setting;
  const state = { layer: "all" };
  const most = d3.max(data.methods, (m) => d3.max(m.load_per_rank, (row) => d3.max(row))) || 1;
  const reach = Math.max(most - 1, 0.25);
  const paint = (v) => interpolator(DIVERGING)(Math.max(0, Math.min(1, 0.5 + (v - 1) / reach / 2)));
  const describe = (m) => `Load per rank under ${m.label}; the busiest rank of a layer carries ${times(m.mean.load_max_over_mean)} the mean on average`;
  const small = (m, width) => {
    const rows = layers.length;
    const cellHeight = Math.max(4, Math.min(22, 420 / rows));
    const margins = { marginLeft: 28, marginRight: 2, marginTop: 4, marginBottom: 20 };
    const height = margins.marginTop + margins.marginBottom + cellHeight * rows;
    const every = Math.max(1, Math.ceil(14 / cellHeight));
    const acrossEvery = Math.max(1, Math.ceil(ranks / Math.max(1, Math.floor(width / 26))));
    return mapPlot({
      width, height, margins, rows, columns: ranks, value: (r, c) => m.load_per_rank[r][c], paint, y: { reverse: true }, ariaLabel: describe(m),
      text: rows <= 12 ? (v) => v.toFixed(1) : null,
      tip: (r, c) => [`Layer ${layers[r]}, rank ${c}`, `${times(m.load_per_rank[r][c])} the mean load`],
      marks: [
        Plot.text(d3.range(0, rows, every), { x: 0, y: (r) => r + 0.5, dx: -5, textAnchor: "end", text: (r) => `${layers[r]}`, fill: "var(--ink-3)", fontSize: 10.5 }),
        Plot.text(d3.range(0, ranks, acrossEvery), { x: (c) => c + 0.5, y: rows, dy: 10, text: (c) => `${c}`, fill: "var(--ink-3)", fontSize: 10.5 }),
      ],
    });
  };
  const bars = (m, width, at) => plot({
    width, height: 190, marginLeft: 34, marginBottom: 28, marginTop: 14, marginRight: 4, ariaLabel: describe(m),
    x: { type: "band", label: null, domain: d3.range(ranks), tickSize: 0, padding: 0.25, ticks: d3.range(0, ranks, Math.max(1, Math.ceil(ranks / (width / 26)))) },
    y: { domain: [0, Math.max(most, cap ?? 0)], ticks: 4, label: null, grid: true, tickSize: 0 },
    marks: [
      Plot.barY(d3.range(ranks), { x: (r) => r, y: (r) => m.load_per_rank[at][r], fill: colourOf.get(m.name), rx1: 2, rx2: 2, tip: true, title: (r) => `Rank ${r}\n${times(m.load_per_rank[at][r])} the mean load` }),
      Plot.ruleY([1], { stroke: "var(--ink-2)" }),
      known(cap) ? Plot.ruleY([cap], { stroke: "var(--warn)", strokeDasharray: "4,3" }) : null,
    ],
  });
  const grid = (width) => multiples(data.methods, width, ranks > 16 ? 300 : 160,
    (m, each) => [methodTitle(m), state.layer === "all" ? small(m, each) : bars(m, each, state.layer)]);
  const key = () => (state.layer === "all" ? [rampLegend(DIVERGING, times(Math.max(0, 1 - reach)), times(1 + reach), "Load over the mean: blue is less than a fair share, orange is more")]
    : [el("p", { class: "ramp" }, "Solid line: mean load.", known(cap) ? ` Dashed line: load cap ${times(cap)}.` : "")]);
  const figure = chart({
    id: "load", caption: "Down: layers. Across: ranks.", describe: () => "Load per rank for each method", draw: (width) => [grid(width), ...key()],
    table: () => [["Method", ...d3.range(ranks).map((r) => `Rank ${r}`)],
      data.methods.flatMap((m) => m.load_per_rank.map((row, l) => [l, row]).filter(([l]) => state.layer === "all" || l === state.layer)
        .map(([l, row]) => [`${m.label}, layer ${layers[l]}`, ...row.map((v) => fixed(v))]))],
  });
  const options = [["all", "All layers"], ...layers.map((id, i) => [i, `Layer ${id}`])];
  return section("load", "Load per rank",
    "All devices wait for the busiest one, so an even load is a fast one.",
    el("div", { class: "controls" }, choice("Show", options, "all", (v) => {
      state.layer = v;
      figure.querySelector("figcaption").textContent = v === "all" ? "Down: layers. Across: ranks." : `Layer ${layers[v]}, rank by rank.`;
      figure.redraw();
    })), figure);
}

// ---- rows per rank pair ----------------------------------------------------------------------------------------------------
function pairsSection() {
  const shown = data.methods.filter((m) => m.rows_per_pair.length);
  if (!shown.length) return section("pairs", "What travels between ranks", null, reason({ reason: "Rows per rank pair cannot be computed from this profile." }));
  const { ranks, nodes, row_bytes: rowBytes } = data.setting;
  const state = { unit: "rows" };
  const most = d3.max(shown, (m) => d3.max(m.rows_per_pair, (row, r) => d3.max(row, (v, c) => (r === c ? 0 : v)))) || 1;
  const inUnit = (v) => (state.unit === "rows" ? v : v * rowBytes);
  const words = (v) => (state.unit === "rows" ? `${short(v)} rows` : bytes(v * rowBytes));
  const one = (m, width) => {
    const size = Math.min(width, 380);
    const margins = { marginLeft: 22, marginRight: 2, marginTop: 18, marginBottom: 4 };
    const every = Math.max(1, Math.ceil(ranks / Math.max(1, Math.floor(size / 22))));
    const colour = interpolator(RAMP);
    const edges = d3.range(1, nodes).map((n) => (n * ranks) / nodes);
    return mapPlot({
      width: size, height: size - 2, margins, rows: ranks, columns: ranks, value: (r, c) => m.rows_per_pair[r][c], y: { reverse: true },
      paint: (v, r, c) => (r === c ? NEUTRAL() : colour(v / most)),
      text: (v) => (state.unit === "rows" ? short(v) : d3.format(".2~s")(inUnit(v))),
      ariaLabel: `Rows from rank to rank under ${m.label}`,
      tip: (r, c) => [r === c ? `Rank ${r} to itself` : `Rank ${r} to rank ${c}`, `${words(m.rows_per_pair[r][c])} per 1,000 tokens and layer`, ...(r === c ? ["stays at home"] : [])],
      marks: [
        Plot.text(d3.range(0, ranks, every), { x: 0, y: (r) => r + 0.5, dx: -5, textAnchor: "end", text: (r) => `${r}`, fill: "var(--ink-3)", fontSize: 10.5 }),
        Plot.text(d3.range(0, ranks, every), { x: (c) => c + 0.5, y: 0, dy: -8, text: (c) => `${c}`, fill: "var(--ink-3)", fontSize: 10.5 }),
        rules(edges, ranks, "x", { stroke: "var(--outline)", strokeWidth: 1.5 }), rules(edges, ranks, "y", { stroke: "var(--outline)", strokeWidth: 1.5 }),
      ],
    });
  };
  const figure = chart({
    id: "pairs", caption: `Down: the rank that sends. Across: the rank that receives.${nodes > 1 ? " Lines divide the hosts." : ""} Per 1,000 tokens and layer.`,
    describe: () => "Rows sent between ranks for each method",
    draw: (width) => {
      return [multiples(shown, width, 250, (m, each) => [methodTitle(m), one(m, each)]),
      rampLegend(RAMP, "0", words(most), "Per 1,000 tokens and layer")];
    },
    table: () => [["From", ...d3.range(ranks).map((r) => `To ${r}`)],
      shown.flatMap((m) => m.rows_per_pair.map((row, r) => [`${m.label}, rank ${r}`, ...row.map((v) => (state.unit === "rows" ? fixed(v, 1) : bytes(inUnit(v))))]))],
  });
  return section("pairs", "What travels between ranks",
    "Rows that one rank sends to another so that experts there can work on them; the same amount returns. Grey cells stay at home and cost nothing.",
    el("div", { class: "controls" }, choice("Unit", [["rows", "Rows"], ["bytes", "Bytes"]], "rows", (v) => { state.unit = v; figure.redraw(); })), figure);
}
