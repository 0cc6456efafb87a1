// The page, in the order in which a newcomer needs it.
const report = document.getElementById("report");
const sections = [methodsTable, coactivationSection, layersSection, loadSection, pairsSection, frontierSection, pruningSection,
  predictionsSection, subgraphsSection, trainingSection, glossary, provenance];
for (const build of [opening, ...sections]) {
  try {
    const part = build();
    if (part) report.append(part);
  } catch (error) {
    showError(error);
  }
}
document.getElementById("contents").append(...[...report.querySelectorAll("section > h2")].map((h) => el("li", {}, el("a", { href: `#${h.parentNode.id}` }, h.textContent))));

for (const c of charts) c.redraw();
// Again when the width changes; the height follows from the width, so it is not watched.
let pending = 0;
new ResizeObserver(() => {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => {
    for (const c of charts) if (c.figure && Math.abs(c.figure.querySelector(".plot").clientWidth - c.width) > 1) c.redraw();
  });
}).observe(report);

// Paper is white.
let onScreen = null;
addEventListener("beforeprint", () => {
  onScreen = document.documentElement.dataset.theme;
  if (onScreen === "dark") setTheme("light", false);
});
addEventListener("afterprint", () => { if (onScreen === "dark") setTheme("dark", false); });
// Follows the system until somebody chooses.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => {
  let stored = null;
  try { stored = localStorage.getItem("occult-theme"); } catch { /* nobody has chosen */ }
  if (!stored) setTheme(event.matches ? "dark" : "light", false);
});
document.documentElement.dataset.drawn = String(report.querySelectorAll("figure.chart .plot > *").length);
