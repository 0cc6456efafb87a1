// Headline, cards, table of methods, warnings: the result before the charts.
const where = `${whole(data.setting.ranks)} ranks`;
const byName = (m) => (m === baseline ? "the conventional placement" : m.label);

function headline() {
  const [now, before] = [chosen.mean, baseline.mean];
  const { ranks } = data.setting;
  const figure = (v) => el("em", {}, v);
  if (known(now.copies_per_token) && chosen !== baseline) {
    return ["Each token visits ", figure(fixed(now.copies_per_token)), ` of\u00a0${ranks} devices instead of ${fixed(before.copies_per_token)}.`];
  }
  if (known(now.copies_per_token)) return ["Each token visits ", figure(fixed(now.copies_per_token)), ` of\u00a0${ranks} devices.`];
  return ["The busiest of ", `${ranks} devices does `, figure(times(now.load_max_over_mean)), " the mean work",
    chosen === baseline ? "." : ` instead of ${times(before.load_max_over_mean)}.`];
}

function subline() {
  const [now, before] = [chosen.mean, baseline.mean];
  const parts = [];
  const less = change(now.remote_copies_per_token, before.remote_copies_per_token, ["fewer", "more"]);
  if (less && chosen !== baseline) {
    parts.push(`Placing the experts of ${data.profile.model} by “${inline(chosen.label)}” instead of “${inline(baseline.label)}” sends `
      + `${less} rows between devices: ${fixed(now.remote_copies_per_token)} instead of ${fixed(before.remote_copies_per_token)} per token and layer. `);
  }
  const { load_cap: cap } = data.setting;
  parts.push(`The busiest device carries ${times(now.load_max_over_mean)} the mean load`
    + `${chosen === baseline ? "" : `, against ${times(before.load_max_over_mean)} before`}${known(cap) ? ` (cap ${times(cap)})` : ""}. `
    + "Means over " + (data.profile.layers.length === 1 ? "one layer" : `${data.profile.layers.length} layers`)
    + (known(data.profile.held_out_tokens) ? `, measured on ${whole(data.profile.held_out_tokens)} tokens that no placement had seen.` : "."));
  return parts;
}

function card(title, hint, now, before, format, words, was) {
  if (!known(now)) return null;
  const top = Math.max(now, before ?? 0) || 1;
  const bar = (v, name, kind) => el("div", { class: `bar ${kind}` }, el("i", { style: `width:${(100 * v) / top}%` }), el("span", {}, `${name} ${format(v)}`));
  const compared = known(before) && chosen !== baseline;
  return el("li", { class: "card" }, el("h3", {}, title), el("p", { class: "big" }, format(now)),
    compared ? el("p", { class: "delta" }, change(now, before, words) ?? "") : null,
    compared ? el("div", { class: "bars", "aria-hidden": "true" }, bar(now, chosen.label, "now"), bar(before, was ?? baseline.label, "was")) : null,
    el("p", { class: "hint" }, hint));
}

function cards() {
  const [now, before] = [chosen.mean, baseline.mean];
  const best = data.predictions.items.length ? data.predictions.items[0].cluster : null;
  const step = (name) => data.predictions.items.find((p) => p.cluster === best && p.method === name);
  const rowBytes = (m) => (known(m.remote_copies_per_token) ? m.remote_copies_per_token * data.setting.row_bytes : null);
  return el("ul", { class: "cards" }, [
    card("Copies per token", "Devices that hold experts of a token, its own included.", now.copies_per_token, before.copies_per_token, fixed, ["fewer", "more"]),
    card("Sent per token", `To other devices, per layer, in rows of ${bytes(data.setting.row_bytes)}; as much returns.`, rowBytes(now), rowBytes(before), bytes, ["less", "more"]),
    data.setting.nodes > 1 ? card("Hosts per token", `Of ${data.setting.nodes}; the links between them are the slow ones.`, now.node_copies_per_token, before.node_copies_per_token, fixed, ["fewer", "more"]) : null,
    card("Busiest device", "Its load over the mean load; 1× is even.", now.load_max_over_mean, before.load_max_over_mean, times, ["lower", "higher"]),
    card("Predicted step", best ? `All MoE layers, ${best}.` : "", step(data.chosen)?.total_seconds, step(data.baseline)?.total_seconds, seconds, ["faster", "slower"], step(data.baseline)?.label),
  ].filter(Boolean));
}

function methodsTable() {
  const { nodes, load_cap: cap } = data.setting;
  const copies = data.methods.map((m) => m.mean.copies_per_token ?? 0);
  const top = Math.max(...copies, data.setting.uniform_copies_per_token ?? 0) || 1;
  const over = (v) => known(cap) && v > cap + 0.005;
  const columns = [
    ["Method", (m) => [el("span", { class: "swatch", style: `background:${colourOf.get(m.name)}` }), el("strong", {}, m.label),
      m === chosen ? el("span", { class: "tag" }, "this report") : null, m === baseline ? el("span", { class: "tag quiet" }, "conventional") : null,
      el("span", { class: "why" }, m.explanation)]],
    ["Copies per token", (m) => [el("span", { class: "cellbar" }, el("i", { style: `width:${(100 * (m.mean.copies_per_token ?? 0)) / top}%;background:${colourOf.get(m.name)}` })),
      el("b", {}, fixed(m.mean.copies_per_token))]],
    ["Against conventional", (m) => (m === baseline ? ABSENT : change(m.mean.copies_per_token, baseline.mean.copies_per_token, ["fewer", "more"]) ?? ABSENT)],
    ["Remote copies", (m) => fixed(m.mean.remote_copies_per_token)],
    nodes > 1 ? ["Hosts per token", (m) => fixed(m.mean.node_copies_per_token)] : null,
    ["Max / mean load", (m) => [times(m.mean.load_max_over_mean), over(m.mean.load_max_over_mean) ? el("span", { class: "over", title: `over the cap of ${times(cap)}` }, " over cap") : null]],
    ["Pairs on one rank", (m) => percent(m.mean.intra_fraction)],
    ["Above lower bound", (m) => (known(m.mean.lower_bound) && known(m.mean.copies_per_token) ? percent(m.mean.copies_per_token / m.mean.lower_bound - 1) : ABSENT)],
  ].filter(Boolean);
  const row = (m) => el("tr", { class: m === chosen ? "chosen" : null }, columns.map(([, cell], i) => el(i ? "td" : "th", { scope: i ? null : "row" }, ...[cell(m)].flat().filter(known))));
  return section("methods", "Methods side by side",
    `Mean over the layers. Fewer copies mean less to send; a load close to 1× means that no device waits for another. `
    + (known(data.setting.uniform_copies_per_token) ? `If the router chose uniformly, any placement would need ${fixed(data.setting.uniform_copies_per_token)} copies.` : ""),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of methods" },
      el("table", { class: "methods" }, el("thead", {}, el("tr", {}, columns.map(([title]) => el("th", { scope: "col" }, title)))),
        el("tbody", {}, data.methods.map(row)))));
}

function opening() {
  const facts = [`${data.profile.num_experts} experts, top-${data.profile.top_k}`, `${whole(data.profile.tokens)} tokens`, where,
    data.setting.nodes > 1 ? `${data.setting.nodes} hosts` : null].filter(Boolean).join(" · ");
  return el("header", { class: "opening" },
    el("div", { class: "title-row" }, el("p", { class: "eyebrow" }, el("b", {}, data.title), el("span", {}, facts)), themeButton()),
    el("h1", {}, ...headline()), el("p", { class: "sub" }, ...subline()), cards(),
    data.warnings.length ? el("aside", { class: "warnings", "aria-label": "Warnings" }, el("h3", {}, data.warnings.length === 1 ? "Before you rely on this" : "Before you rely on these figures"),
      el("ul", {}, data.warnings.map((w) => el("li", {}, w)))) : null);
}

function themeButton() {
  return el("button", { type: "button", class: "theme", title: "Switch between light and dark", onclick: () => setTheme(dark() ? "light" : "dark", true) }, themeWord());
}
const themeWord = () => (dark() ? "Light" : "Dark");
function setTheme(theme, keep) {
  document.documentElement.dataset.theme = theme;
  for (const button of document.querySelectorAll("button.theme")) button.textContent = themeWord();
  if (keep) try { localStorage.setItem("occult-theme", theme); } catch { /* not kept, that is all */ }
  for (const c of charts) c.redraw();
}

function glossary() {
  const words = [
    ["Rank", "One device of the expert-parallel group. It holds some of the experts of every layer."],
    ["Copies per token", "How many ranks a token visits, because its experts live there: at least 1, at most top-k. The paper calls it C_T."],
    ["Remote copies", "Those that leave the rank where the token already is. Only these cross a wire."],
    ["Load, max / mean", "Token–expert pairs that the busiest rank computes, over the mean. All ranks wait for the busiest one. Its inverse is called balancedness."],
    ["Load cap", "The limit on max / mean load under which the search looks for few copies."],
    ["Co-activation", "How often two experts are chosen by one token. Experts that work together should live together."],
    ["Pairs on one rank", "The share of co-active pairs whose two experts share a rank (intra-collaboration)."],
    ["Lower bound", "No placement needs fewer copies on these tokens. The distance to it says how much could still be won."],
    ["Pruning", "Limits how many ranks a token may visit by replacing far experts with near ones. This changes the model slightly; placement alone never does."],
    ["Dispatch, combine", "Sending token rows to the ranks of their experts, and bringing the results back."],
    data.training ? ["Drift", "Copies per token of the router's own choices, over what the placement had when training began or promised. Above 1 the router has moved away from the placement."] : null,
  ].filter(Boolean);
  return section("glossary", "How to read this", null, el("dl", { class: "glossary" }, words.map(([term, text]) => el("div", {}, el("dt", {}, term), el("dd", {}, text)))));
}

function provenance() {
  const p = data.profile;
  const s = data.setting;
  const range = p.layers.length > 12 ? `${p.layers.length} (${p.layers[0]} to ${p.layers[p.layers.length - 1]})` : p.layers.join(", ");
  const facts = [
    ["Model", p.model], ["Routing recorded from", p.source],
    ["Tokens", whole(p.tokens) + (known(p.held_out_tokens) ? `; figures measured on ${whole(p.held_out_tokens)} held-out tokens` : "")],
    ["MoE layers", range], ["Experts", `${p.num_experts} per layer, top-${p.top_k}`],
    p.domains.length ? ["Domains", p.domains.join(", ")] : null,
    ["Ranks", `${s.ranks} on ${s.nodes === 1 ? "one host" : `${s.nodes} hosts`}`],
    known(s.load_cap) ? ["Load cap of the search", times(s.load_cap)] : null,
    ["Row", `${whole(s.hidden_size)} × ${s.dtype} = ${bytes(s.row_bytes)}`], ["Computed by", data.tool_version],
  ].filter(Boolean);
  return section("provenance", "Where this comes from", null, el("dl", { class: "facts" }, facts.map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, v)))),
    p.notices.length ? el("div", { class: "notices" }, el("h3", {}, "Notices"), p.notices.map((n) => el("p", {}, n))) : null);
}
