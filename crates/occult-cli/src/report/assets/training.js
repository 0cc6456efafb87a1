// A training run: loss, and how the routing moved under the placement.

/** Copies, drift, load and balancedness, as far as the run has logged them: [key, title, format, lines]. */
const RUN_MEASURES = [
  ["copies", "Copies per token", fixed, [["copies_per_token", "as trained", "var(--chosen)", "none"], ["copies_unlimited", "router's own choices", "var(--method-2)", "none"], ["limit", "limit", "var(--warn)", "4,3"]]],
  ["drift", "Drift", (v) => fixed(v, 3), [["drift", "copies of the router's own choices, over those at the start", "var(--method-2)", "none"]]],
  ["load", "Max / mean load", times, [["load_max_over_mean", "ranks", "var(--chosen)", "none"]]],
  ["balance", "Balancedness of experts", (v) => fixed(v, 2), [["balancedness", "mean / max tokens of an expert", "var(--chosen)", "none"]]],
];

/** A line over steps; `lines`: [name, colour, dash, points of {step, value}]. Held-out losses have dots, being few. */
function overSteps({ width, lines, title, format, rule, from }) {
  const few = width < 560;
  const all = lines.flatMap(([name, colour, dash, points]) => points.map((p) => ({ ...p, name, colour })));
  const [low, high] = d3.extent(all, (p) => p.value);
  const room = (high - low) * 0.06 || Math.abs(high) * 0.05 || 0.1;
  const atStep = d3.groups(all, (p) => p.step).map(([step, group]) => ({ step, value: d3.max(group, (p) => p.value),
    title: [`Step ${whole(step)}`, ...group.map((p) => `${p.name}  ${format(p.value)}`)].join("\n") }));
  return plot({
    width, height: few ? 280 : 340, marginLeft: 46, marginRight: 14, marginTop: 20, marginBottom: 42,
    x: { label: "Step", labelAnchor: "center", labelArrow: "none", tickFormat: (v) => whole(v), ticks: few ? 4 : 8, tickSize: 0 },
    y: { domain: [from === undefined ? low - room : Math.min(from, low - room), high + room], label: title, labelArrow: "none", grid: true, ticks: 5, tickSize: 0 },
    marks: [
      rule === undefined ? null : Plot.ruleY([rule], { stroke: "var(--ink-3)", strokeDasharray: "5,4" }),
      Plot.ruleX(atStep, Plot.pointerX({ x: "step", stroke: "var(--ink-3)", strokeOpacity: 0.5 })),
      ...lines.map(([name, colour, dash, points]) => Plot.lineY(points, { x: "step", y: "value", stroke: colour, strokeWidth: dash === "none" ? 1.8 : 1.4, strokeDasharray: dash, curve: name === "limit" ? "step-before" : "linear" })),
      ...lines.filter(([, , , points]) => points.length <= 40).map(([, colour, , points]) => Plot.dot(points, { x: "step", y: "value", fill: colour, r: 2.6, stroke: "var(--paper)", strokeWidth: 0.8 })),
      Plot.tip(atStep, Plot.pointerX({ x: "step", y: "value", title: "title", lineHeight: 1.35 })),
    ],
  });
}

function trainingSection() {
  const run = data.training;
  if (!run) return null;
  const series = (key) => run.points.filter((p) => known(p[key])).map((p) => ({ step: p.step, value: p[key] }));
  const hues = (i) => `var(--method-${i % 5})`;
  const dashes = ["none", "6,3", "2,3"];
  const heldOut = run.domains.map((name, i) => [name, hues(i), dashes[Math.floor(i / 5) % dashes.length],
    run.points.filter((p) => known(p.held_out?.[i])).map((p) => ({ step: p.step, value: p.held_out[i] }))]);
  const losses = [["training", "var(--chosen)", "none", series("loss")], ...heldOut].filter(([, , , points]) => points.length);
  const key = (lines) => legend([], lines.map(([name, colour, dash]) => [name, dash, colour]));
  const last = (points) => points[points.length - 1]?.value;
  const lossChart = chart({
    id: "training-loss", caption: "",
    describe: () => `Loss over ${whole(run.steps)} steps: ${losses.map(([name, , , points]) => `${name} ${fixed(points[0].value)} to ${fixed(last(points))}`).join("; ")}`,
    draw: (width) => (losses.length ? [key(losses), overSteps({ width, lines: losses, title: "Loss, nats per token", format: (v) => fixed(v, 3) })] : reason({ reason: "The log has no finite loss." })),
    table: () => [["Step", "Training", ...run.domains], run.points.map((p) => [whole(p.step), fixed(p.loss, 3), ...run.domains.map((_, i) => fixed(p.held_out?.[i], 3))])],
  });
  const measures = RUN_MEASURES.filter(([, , , lines]) => lines.some(([field]) => field !== "limit" && series(field).length));
  const state = { measure: measures[0] };
  const linesOf = ([, , , lines]) => lines.map(([field, name, colour, dash]) => [name, colour, dash, series(field)]).filter(([, , , points]) => points.length);
  const routing = measures.length ? chart({
    id: "training-routing", caption: "",
    describe: () => `${state.measure[1]} over ${whole(run.steps)} steps: ${linesOf(state.measure).map(([name, , , points]) => `${name} ${state.measure[2](points[0].value)} to ${state.measure[2](last(points))}`).join("; ")}`,
    draw: (width) => {
      const [name, title, format] = state.measure;
      const lines = linesOf(state.measure);
      return [key(lines), overSteps({ width, lines, title, format, rule: name === "drift" || name === "load" ? 1 : undefined, from: name === "load" ? 1 : undefined })];
    },
    table: () => [["Step", ...state.measure[3].map(([, name]) => name)], run.points.map((p) => [whole(p.step), ...state.measure[3].map(([field]) => (field === "limit" ? whole(p.limit) : state.measure[2](p[field])))])],
  }) : null;
  const drift = last(series("drift"));
  const lede = [`${whole(run.steps)} steps on ${whole(run.tokens)} tokens. `,
    known(drift) ? `A token's own choice of experts now needs ${fixed(drift, 2)} times the copies that the placement began with or promised; when this rises, experts are better placed again.` : ""];
  return section("training", "How it was trained", lede, lossChart, routing
    ? el("div", { class: "controls after-chart" }, measures.length > 1 ? choice("Show", measures.map((m) => [m, m[1]]), state.measure, (m) => { state.measure = m; routing.redraw(); }) : null) : null, routing);
}
