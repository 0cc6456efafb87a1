// Lines, dots and bars: copies per layer, frontier, pruning, predicted time, connected sub-graphs.

// ---- per layer --------------------------------------------------------------------------------------------------------------
const MEASURES = [
  ["copies_per_token", "Copies per token", fixed], ["remote_copies_per_token", "Remote copies per token", fixed],
  ["node_copies_per_token", "Hosts per token", fixed], ["load_max_over_mean", "Max / mean load", times], ["intra_fraction", "Pairs on one rank", (v) => percent(v, 1)],
];

function layersSection() {
  const { layers } = data.profile;
  const measures = MEASURES.filter(([key]) => data.methods.some((m) => m.layers.some((l) => known(l[key]))) && (key !== "node_copies_per_token" || data.setting.nodes > 1));
  const state = { measure: measures[0] };
  const points = () => data.methods.flatMap((m) => m.layers.map((l, i) => ({ method: m.name, at: i, value: l[state.measure[0]] })).filter((p) => known(p.value)));
  const figure = chart({
    id: "layers",
    caption: "",
    describe: () => `${state.measure[1]} per layer: ${data.methods.map((m) => `${m.label} ${state.measure[2](m.mean[state.measure[0]])} on average`).join("; ")}`,
    draw: (width) => {
      const [key, title, format] = state.measure;
      const all = points();
      const bound = key === "copies_per_token" ? chosen.layers.map((l, i) => ({ at: i, value: l.lower_bound })).filter((p) => known(p.value)) : [];
      const uniform = key === "copies_per_token" ? data.setting.uniform_copies_per_token : null;
      const cap = key === "load_max_over_mean" ? data.setting.load_cap : null;
      const low = d3.min([...all, ...bound], (p) => p.value);
      const high = Math.max(d3.max(all, (p) => p.value), uniform ?? 0, cap ?? 0);
      const room = (high - low) * 0.08 || 0.1;
      const few = width < 560;
      const every = Math.max(1, Math.ceil(layers.length / (width / 34)));
      const atLayer = d3.groups(all, (p) => p.at).map(([at, group]) => ({ at, value: d3.max(group, (p) => p.value),
        title: [`Layer ${layers[at]}`, ...data.methods.map((m) => group.find((p) => p.method === m.name)).filter(Boolean).map((p) => `${label(p.method)}  ${format(p.value)}`)].join("\n") }));
      const order = (name) => (name === data.chosen ? 1 : 0);
      const drawn = d3.sort(all, (p) => order(p.method));
      const lines = [bound.length ? ["lower bound", "5,4", "var(--ink-3)"] : null, known(uniform) ? [`uniform routing ${fixed(uniform)}`, "1,4", "var(--ink-2)"] : null,
        known(cap) ? [`load cap ${times(cap)}`, "4,3", "var(--warn)"] : null].filter(Boolean);
      return [legend(data.methods.map((m) => m.name), lines), plot({
        width, height: few ? 300 : 380, marginLeft: 40, marginRight: 12, marginTop: 20, marginBottom: 40,
        x: { domain: [-0.3, layers.length - 0.7], ticks: d3.range(0, layers.length, every), tickFormat: (i) => `${layers[i] ?? ""}`, label: "MoE layer", labelAnchor: "center", labelArrow: "none", tickSize: 0 },
        y: { domain: [low - room, high + room], grid: true, ticks: 5, label: title, labelArrow: "none", tickFormat: key === "intra_fraction" ? (v) => percent(v) : undefined, tickSize: 0 },
        color: methodScale, symbol: symbolScale,
        marks: [
          bound.length ? Plot.areaY(bound, { x: "at", y1: low - room, y2: "value", fill: "var(--none)", fillOpacity: 0.55 }) : null,
          bound.length ? Plot.lineY(bound, { x: "at", y: "value", stroke: "var(--ink-3)", strokeDasharray: "5,4" }) : null,
          known(uniform) ? Plot.ruleY([uniform], { stroke: "var(--ink-2)", strokeDasharray: "1,4", strokeLinecap: "round", strokeWidth: 1.5 }) : null,
          known(cap) ? Plot.ruleY([cap], { stroke: "var(--warn)", strokeDasharray: "4,3" }) : null,
          Plot.ruleX(atLayer, Plot.pointerX({ x: "at", stroke: "var(--ink-3)", strokeOpacity: 0.5 })),
          Plot.lineY(drawn, { x: "at", y: "value", z: "method", stroke: "method", strokeWidth: (p) => (p.method === data.chosen ? 2.6 : 1.3) }),
          Plot.dot(drawn, { x: "at", y: "value", fill: "method", symbol: "method", r: layers.length > 40 || few ? 2.4 : 3.4, stroke: "var(--paper)", strokeWidth: 0.8 }),
          Plot.tip(atLayer, Plot.pointerX({ x: "at", y: "value", title: "title", lineHeight: 1.35 })),
        ],
      })];
    },
    table: () => [["Layer", ...data.methods.map((m) => m.label), ...(state.measure[0] === "copies_per_token" ? ["Lower bound"] : [])],
      layers.map((id, i) => [id, ...data.methods.map((m) => state.measure[2](m.layers[i][state.measure[0]])), ...(state.measure[0] === "copies_per_token" ? [fixed(chosen.layers[i].lower_bound)] : [])])],
  });
  return section("layers", "Layer by layer", ["Every layer has its own placement.", data.methods.some((m) => m.layers.some((l) => known(l.lower_bound))) ? " No placement needs fewer copies than the lower bound." : ""],
    el("div", { class: "controls" }, measures.length > 1 ? choice("Show", measures.map((m) => [m, m[1]]), state.measure, (m) => { state.measure = m; figure.redraw(); }) : null), figure);
}

/** A place for each name where it covers no point and no other name; a name without a place is left to the tooltip. */
function placeLabels(names, frame, x, y) {
  const places = [[11, 0, "start"], [-11, 11, "end"], [-11, 0, "end"], [0, -16, "middle"], [0, 17, "middle"]];
  const dots = names.map(({ p }) => [x(p.load_max_over_mean), y(p.copies_per_token)]);
  const taken = [];
  const placed = [];
  for (const name of d3.sort(names, (n) => (n.bold ? 0 : 1))) {
    const size = name.text.length * (name.bold ? 7.4 : 6.2);
    const [px, py] = [x(name.p.load_max_over_mean), y(name.p.copies_per_token)];
    // Names along the curve stand below and left of it, where nothing can be.
    for (const [dx, dy, anchor] of name.bold ? places : [places[1], places[2], places[4]]) {
      const left = px + dx - (anchor === "end" ? size : anchor === "middle" ? size / 2 : 0);
      const box = [left, py + dy - 8, left + size, py + dy + 8];
      const inside = box[0] >= frame.marginLeft && box[2] <= frame.width && box[1] >= 0 && box[3] <= frame.height - frame.marginBottom;
      const free = taken.every((b) => b[2] < box[0] || box[2] < b[0] || b[3] < box[1] || box[3] < b[1])
        && dots.every(([a, b]) => a < box[0] - 4 || a > box[2] + 4 || b < box[1] || b > box[3]);
      if (inside && free) {
        taken.push(box);
        placed.push({ ...name, dx, dy, anchor });
        break;
      }
    }
  }
  return placed;
}

// ---- copies against load ---------------------------------------------------------------------------------------------------------
function frontierSection() {
  const points = data.frontier.items;
  const lede = "Down is less to send, left is more even. A method is only worth its copies at the load it pays for them; "
    + "the line shows what the search finds under different load caps.";
  if (!points.length) return section("frontier", "Copies against load", null, reason(data.frontier));
  const counted = d3.rollup(points, (g) => g.length, (p) => p.method);
  const { load_cap: cap } = data.setting;
  const figure = chart({
    id: "frontier", caption: "",
    describe: () => `Copies per token against max/mean load: ${points.map((p) => `${p.label} ${fixed(p.copies_per_token)} at ${times(p.load_max_over_mean)}`).join("; ")}`,
    draw: (width) => {
      const few = width < 560;
      const x = d3.extent([1, ...points.map((p) => p.load_max_over_mean)]);
      const y = d3.extent(points, (p) => p.copies_per_token);
      const pad = (y[1] - y[0]) * 0.14 || 0.2;
      const curves = d3.sort(points.filter((p) => counted.get(p.method) > 1), (p) => p.load_max_over_mean);
      const curve = (p) => counted.get(p.method) > 1;
      const words = (p) => (curve(p) && known(p.load_cap) ? `cap ${p.load_cap}` : p.label);
      const frame = { width, height: few ? 340 : 420, marginLeft: 40, marginRight: few ? 14 : 30, marginTop: 22, marginBottom: 42 };
      const spread = x[1] - 1 || 0.2;
      const xDomain = [1 - spread * 0.03, x[1] + spread * 0.06];
      const labels = placeLabels(points.map((p) => ({ p, text: words(p), bold: !curve(p) })), frame,
        d3.scaleLinear(xDomain, [frame.marginLeft, width - frame.marginRight]), d3.scaleLinear([y[0] - pad, y[1] + pad], [frame.height - frame.marginBottom, frame.marginTop]));
      return plot({
        ...frame, r: { type: "identity" },
        x: { domain: xDomain, label: "Max / mean load", labelAnchor: "center", labelArrow: "none", grid: true, ticks: few ? 4 : 8, tickSize: 0 },
        y: { domain: [y[0] - pad, y[1] + pad], label: "Copies per token", labelArrow: "none", grid: true, ticks: 6, tickSize: 0 },
        color: methodScale, symbol: symbolScale,
        marks: [
          known(cap) ? Plot.ruleX([cap], { stroke: "var(--warn)", strokeDasharray: "4,3" }) : null,
          known(cap) ? Plot.text([`load cap ${cap}`], { x: cap, y: y[1] + pad, dx: 6, dy: 7, textAnchor: "start", text: (t) => t, fill: "var(--warn)" }) : null,
          Plot.lineY(curves, { x: "load_max_over_mean", y: "copies_per_token", z: "method", stroke: "method", strokeWidth: 2.4, curve: "monotone-x" }),
          Plot.dot(points, { x: "load_max_over_mean", y: "copies_per_token", fill: "method", symbol: "method", r: (p) => (curve(p) ? 4 : 6.5), stroke: "var(--paper)", strokeWidth: 1 }),
          Plot.dot(points.filter((p) => p.method === data.chosen && curve(p) && p.load_cap === cap), { x: "load_max_over_mean", y: "copies_per_token", r: 8.5, stroke: "var(--chosen)", strokeWidth: 1.5 }),
          ...labels.map(({ p, text, bold, dx, dy, anchor }) => Plot.text([p], { x: "load_max_over_mean", y: "copies_per_token", text: () => text, dx, dy, textAnchor: anchor,
            fill: bold ? "var(--ink)" : "var(--ink-2)", fontWeight: bold ? 600 : 400, fontSize: bold ? 12 : 11, ...HALO })),
          Plot.tip(points, Plot.pointer({ x: "load_max_over_mean", y: "copies_per_token", title: (p) => `${p.label}\n${fixed(p.copies_per_token)} copies per token\n${times(p.load_max_over_mean)} max / mean load` })),
        ],
      });
    },
    table: () => [["Placement", "Load cap", "Copies per token", "Max / mean load"], points.map((p) => [p.label, known(p.load_cap) ? p.load_cap : ABSENT, fixed(p.copies_per_token), times(p.load_max_over_mean)])],
  });
  return section("frontier", "Copies against load", lede, figure);
}

// ---- pruning ------------------------------------------------------------------------------------------------------------------------
function pruningSection() {
  const rows = data.pruning.items;
  if (!rows.length) return section("pruning", "Collaboration pruning", null, reason(data.pruning));
  const budget = ({ budget: b }) => (known(b.max_ranks) ? `${b.max_ranks} ${b.max_ranks === 1 ? "rank" : "ranks"}` : `${percent(b.mass_share)} of mass`);
  const kind = ({ budget: b }) => (known(b.max_ranks) ? "fixed" : "adaptive");
  const series = (p) => `${p.method} ${p.rule} ${kind(p)}`;
  const rules = [...new Set(rows.map((p) => p.rule))];
  const symbols = ["circle", "diamond2", "triangle", "square", "star"];
  const dashes = ["none", "6,4", "2,3", "8,3,2,3", "1,3"];
  const methods = [...new Set(rows.map((p) => p.method))];
  const lines = d3.sort(rows, (p) => p.copies_per_token);
  const keys = [...new Set(rows.map((p) => `${p.rule}, ${kind(p)}`))];
  const dashOf = new Map(keys.map((k, i) => [k, dashes[i % dashes.length]]));
  const symbolFor = new Map(keys.map((k, i) => [k, symbols[i % symbols.length]]));
  const keyOf = (p) => `${p.rule}, ${kind(p)}`;
  const ruleLegend = () => el("ul", { class: "legend" },
    methods.map((name) => el("li", {}, el("span", { class: "swatch", style: `background:${colourOf.get(name)}` }), label(name))),
    keys.map((k) => {
      const mark = d3.create("svg").attr("width", 30).attr("height", 12).attr("viewBox", "-15 -6 30 12").attr("aria-hidden", "true");
      mark.append("line").attr("x1", -15).attr("x2", 15).attr("stroke", "var(--ink-2)").attr("stroke-width", 1.6).attr("stroke-dasharray", dashOf.get(k));
      mark.append("path").attr("d", d3.symbol(Plot_symbol(symbolFor.get(k)), 42)()).attr("fill", "var(--ink-2)");
      return el("li", {}, mark.node(), k);
    }));
  const figure = chart({
    id: "pruning", caption: "Up and left is better: little sent, little lost.",
    describe: () => `Retained routing mass against copies per token for ${rules.join(", ")}`,
    draw: (width) => {
      const few = width < 560;
      const groups = d3.groups(lines, series);
      const [x, y] = [d3.extent(lines, (p) => p.copies_per_token), d3.extent(lines, (p) => p.retained_mass)];
      const wide = x[1] - x[0] || 1;
      const high = y[1] - y[0] || 0.1;
      // The best rule at each limit is named, unless another name stands there already.
      const named = [];
      for (const p of d3.sort(lines.filter((q) => q.method === data.chosen), (q) => -q.retained_mass)) {
        const near = (q) => Math.abs(q.copies_per_token - p.copies_per_token) < 0.07 * wide && Math.abs(q.retained_mass - p.retained_mass) < 0.08 * high;
        if (!named.some((q) => near(q) || budget(q) === budget(p))) named.push(p);
      }
      return [ruleLegend(), plot({
        width, height: few ? 320 : 380, marginLeft: 46, marginRight: 16, marginTop: 22, marginBottom: 42, color: methodScale,
        x: { label: "Copies per token", labelAnchor: "center", labelArrow: "none", grid: true, domain: [x[0] - 0.07 * wide, x[1] + 0.04 * wide], ticks: few ? 4 : 8, tickSize: 0 },
        y: { label: "Routing mass kept", labelArrow: "none", grid: true, domain: [y[0] - 0.06 * high, y[1] + 0.06 * high], ticks: 5, tickFormat: (v) => percent(v), tickSize: 0 },
        symbol: { domain: keys, range: keys.map((k) => symbolFor.get(k)) },
        marks: [
          ...groups.map(([, group]) => Plot.lineY(group, { x: "copies_per_token", y: "retained_mass", stroke: colourOf.get(group[0].method), strokeDasharray: dashOf.get(keyOf(group[0])), strokeWidth: 1.8, curve: "monotone-x" })),
          Plot.dot(lines, { x: "copies_per_token", y: "retained_mass", fill: "method", symbol: keyOf, r: 4.5, stroke: "var(--paper)", strokeWidth: 0.8 }),
          few ? null : Plot.text(named, { x: "copies_per_token", y: "retained_mass", text: budget, dy: -8, dx: -7, textAnchor: "end", fill: "var(--ink-2)", fontSize: 11, ...HALO }),
          Plot.tip(lines, Plot.pointer({ x: "copies_per_token", y: "retained_mass", title: (p) => `${label(p.method)}, ${p.rule}\nat most ${budget(p)}\n${fixed(p.copies_per_token)} copies per token\n${percent(p.retained_mass, 1)} of mass kept\n${percent(p.replaced_fraction, 1)} replaced${known(p.load_max_over_mean) ? `\n${times(p.load_max_over_mean)} load` : ""}` })),
        ],
      })];
    },
  });
  const table = el("div", { class: "scroll compact", tabindex: "0", role: "region", "aria-label": "Pruning figures" }, plainTable(
    ["Rule and placement", "Limit", "Copies per token", "Mass kept", "Experts replaced", "Max / mean load"],
    rows.map((p) => [`${p.rule}, ${inline(label(p.method))}`, budget(p), fixed(p.copies_per_token), percent(p.retained_mass, 1), percent(p.replaced_fraction, 1), known(p.load_max_over_mean) ? times(p.load_max_over_mean) : ABSENT])));
  return section("pruning", "Collaboration pruning", "Placement alone never changes the model. Pruning goes further: a token may visit only a few ranks, "
    + "and experts elsewhere are replaced by ones within reach. What it costs is the routing mass that is lost.", figure, table);
}

// ---- predicted time -----------------------------------------------------------------------------------------------------------------
const PARTS = [["dispatch_seconds", "Dispatch", "var(--part-0)"], ["compute_seconds", "Experts", "var(--part-1)"], ["combine_seconds", "Combine", "var(--part-2)"]];

function predictionsSection() {
  const rows = data.predictions.items;
  if (!rows.length) return section("predictions", "Predicted step time", null, reason(data.predictions));
  const clusters = d3.groups(rows, (p) => p.cluster);
  const one = ([cluster, list], width) => {
    const bars = list.flatMap((p, at) => {
      let from = 0;
      return PARTS.map(([key, name]) => ({ at, part: name, from, to: (from += p[key]), seconds: p[key], p }));
    });
    const longest = d3.max(list, (p) => Math.max(p.total_seconds, PARTS.reduce((sum, [key]) => sum + p[key], 0)));
    const rowHeight = 46;
    const base = list.find((p) => p.method === data.baseline);
    const words = (p) => [seconds(p.total_seconds), base && p !== base && p.total_seconds > 0 ? `${(base.total_seconds / p.total_seconds).toFixed(2)}× as fast` : null].filter(Boolean).join(" · ");
    const svg = plot({
      width, height: list.length * rowHeight + 8, marginLeft: 1, marginRight: 1, marginTop: 2, marginBottom: 6,
      ariaLabel: `Predicted step time on ${cluster}: ${list.map((p) => `${p.label} ${seconds(p.total_seconds)}`).join("; ")}`,
      x: { axis: null, domain: [0, longest || 1] }, y: { axis: null, domain: [0, list.length], reverse: true },
      color: { domain: PARTS.map((p) => p[1]), range: PARTS.map((p) => p[2]) },
      marks: [
        Plot.rect(bars, { x1: "from", x2: "to", y1: (b) => b.at + 0.48, y2: (b) => b.at + 0.86, fill: "part", insetRight: 0.75, rx: 1.5 }),
        Plot.tip(bars, Plot.pointer({ x: (b) => (b.from + b.to) / 2, y: (b) => b.at + 0.67, maxRadius: 400, title: (b) => `${b.p.label}\n${PARTS.map(([key, name]) => `${name} ${seconds(b.p[key])}`).join("\n")}\nTotal ${seconds(b.p.total_seconds)}` })),
        Plot.text(list, { x: 0, y: (_, i) => i + 0.26, text: "label", textAnchor: "start", fill: "var(--ink)", lineWidth: (width - 140) / 12, textOverflow: "ellipsis", fontWeight: (p) => (p.method === data.chosen ? 600 : 400) }),
        Plot.text(list, { frameAnchor: "right", y: (_, i) => i + 0.26, text: words, textAnchor: "end", fill: "var(--ink-2)", fontVariant: "tabular-nums" }),
      ],
    });
    return [el("h3", {}, cluster), svg];
  };
  const overlap = rows.some((p) => p.total_seconds < 0.995 * (p.dispatch_seconds + p.compute_seconds + p.combine_seconds));
  const figure = chart({
    id: "predictions", caption: `Each cluster has its own scale.${overlap ? " Totals are less than the sum of the parts where these overlap." : ""}`,
    describe: () => "Predicted step time by cluster and method",
    draw: (width) => {
      const keys = el("ul", { class: "legend" }, PARTS.map(([, name, colour]) => el("li", {}, el("span", { class: "swatch", style: `background:${colour}` }), name)));
      return [keys, multiples(clusters, width, 300, one, 36)];
    },
    table: () => [["Placement", "Cluster", ...PARTS.map((p) => p[1]), "Total"], rows.map((p) => [p.label, p.cluster, ...PARTS.map(([key]) => seconds(p[key])), seconds(p.total_seconds)])],
  });
  return section("predictions", "Predicted step time", "A model of links and arithmetic, not a measurement: time of all MoE layers in one step, on clusters with published bandwidths.", figure);
}

// ---- connected sub-graphs -----------------------------------------------------------------------------------------------------------
function subgraphsSection() {
  const curves = data.subgraphs.items;
  const lede = "Cut every pair of experts that work together less often than the threshold, and count what still hangs together. "
    + "A curve that rises late means that even rare pairs tie the experts into one group, so no placement can separate them for free.";
  if (!curves.length) return section("subgraphs", "Do experts fall into groups?", null, reason(data.subgraphs));
  const points = curves.flatMap((c) => c.points.map(([threshold, count]) => ({ layer: c.layer, threshold, count })));
  const ids = curves.map((c) => c.layer);
  const ramp = () => (dark() ? d3.piecewise(d3.interpolateLab, ["#f2d49b", "#e08a5b", "#b8578a", "#7c7fd6"]) : d3.piecewise(d3.interpolateLab, ["#c9a227", "#c2572b", "#8e2f6d", "#2d2a6e"]));
  const colour = (layer) => ramp()(ids.length > 1 ? ids.indexOf(layer) / (ids.length - 1) : 0.5);
  const figure = chart({
    id: "subgraphs", caption: "",
    describe: () => `Connected sub-graphs against the co-activation threshold for ${ids.length} layers`,
    draw: (width) => {
      const few = width < 560;
      const listed = ids.length > 12 ? ids.filter((_, i) => i % Math.ceil(ids.length / 10) === 0 || i === ids.length - 1) : ids;
      return [el("ul", { class: "legend" }, listed.map((id) => el("li", {}, el("span", { class: "swatch", style: `background:${colour(id)}` }), `Layer ${id}`))), plot({
        width, height: few ? 280 : 340, marginLeft: 40, marginRight: 14, marginTop: 20, marginBottom: 42,
        x: { label: "Threshold, as a share of the strongest pair", labelAnchor: "center", labelArrow: "none", tickFormat: (v) => percent(v), ticks: few ? 4 : 8, tickSize: 0 },
        y: { label: "Connected sub-graphs", labelArrow: "none", grid: true, ticks: 5, tickSize: 0, domain: [0, Math.max(data.profile.num_experts, d3.max(points, (p) => p.count) ?? 1)] },
        marks: [
          Plot.lineY(points, { x: "threshold", y: "count", z: "layer", stroke: (p) => colour(p.layer), strokeWidth: ids.length > 12 ? 1.2 : 2 }),
          Plot.dot(points, Plot.pointer({ x: "threshold", y: "count", fill: (p) => colour(p.layer), r: 4 })),
          Plot.tip(points, Plot.pointer({ x: "threshold", y: "count", title: (p) => `Layer ${p.layer}\n${p.count} sub-graphs above ${percent(p.threshold, 1)}` })),
        ],
      })];
    },
    table: () => {
      const at = [...new Set(points.map((p) => p.threshold))].sort(d3.ascending);
      return [["Threshold", ...ids.map((id) => `Layer ${id}`)], at.map((t) => [percent(t, 1), ...curves.map((c) => c.points.find(([x]) => x === t)?.[1] ?? ABSENT)])];
    },
  });
  return section("subgraphs", "Do experts fall into groups?", lede, figure);
}
