//! The report page: the data file survives a round trip, the page loads nothing from a network, hostile text stays text,
//! and a browser really draws the marks.

use occult_cli::report::{
    CoActivationMap, ExpertOrder, Measures, Part, PruningBudget, ReportData, SubgraphCurve, Training,
    TrainingPoint, render,
};
use std::path::Path;
use std::process::Command;

const FIXTURE: &str = include_str!("fixtures/report.json");

fn fixture() -> ReportData {
    ReportData::from_json(FIXTURE).expect("the fixture is a report")
}

/// The smallest honest report: counts only, no token sets, so most parts say why they are empty.
fn counts_only() -> ReportData {
    let mut data = fixture();
    for method in &mut data.methods {
        for m in method.layers.iter_mut().chain([&mut method.mean]) {
            *m = Measures { load_max_over_mean: m.load_max_over_mean, ..Measures::default() };
        }
        method.rows_per_pair.clear();
    }
    data.setting.load_cap = None;
    data.setting.uniform_copies_per_token = None;
    data.coactivation = Part::missing("This profile has no co-activation.");
    data.frontier = Part::missing("This profile has no token sets.");
    data.pruning = Part::missing("Pruning needs router_logits, which this profile does not have.");
    data.predictions = Part::missing("Times need copies per token.");
    data.subgraphs = Part::missing("Sub-graphs need co-activation.");
    data.warnings.clear();
    data
}

/// 256 experts on 64 ranks of 8 nodes: the large case, one layer, replicas in one order.
fn many_experts() -> ReportData {
    let mut data = fixture();
    let (experts, ranks) = (256_u16, 64_u32);
    data.profile.num_experts = u32::from(experts);
    data.profile.layers.truncate(1);
    (data.setting.ranks, data.setting.nodes) = (ranks, 8);
    for method in &mut data.methods {
        method.layers.truncate(1);
        method.load_per_rank = vec![(0..ranks).map(|r| 0.5 + f64::from(r) / 64.0).collect()];
        method.rows_per_pair =
            (0..ranks).map(|a| (0..ranks).map(|b| f64::from(a * 3 + b)).collect()).collect();
    }
    let p = (0..experts).flat_map(|i| (0..experts).map(move |j| f32::from(i.abs_diff(j)) / 256.0)).collect();
    let replicated = (0..experts).chain(0..ranks as u16).collect();
    let orders = vec![ExpertOrder {
        method: data.chosen.clone(),
        experts: replicated,
        rank_offsets: (0..=ranks).map(|r| r * 5).collect(),
    }];
    data.coactivation = Part::of(vec![CoActivationMap { layer: data.profile.layers[0], p, orders }]);
    data.subgraphs =
        Part::of(vec![SubgraphCurve { layer: data.profile.layers[0], points: vec![(0.0, 1), (1.0, 256)] }]);
    data
}

/// With a training run: 120 steps whose limit falls from 8 to 2, two sets of held-out text measured every 40.
fn trained() -> ReportData {
    let point = |step: u64| {
        // Few digits: the same number again after JSON.
        let t = (step as f64 / 1.2).round() / 100.0;
        let short = |v: f64| Some((v * 1e3).round() / 1e3);
        let limit = (8 - step.min(60) / 10) as u32;
        TrainingPoint {
            step,
            loss: short(3.0 - t).filter(|_| step != 7),
            held_out: if step.is_multiple_of(40) {
                vec![short(3.1 - t), (step > 40).then_some(4.0)]
            } else {
                vec![]
            },
            copies_per_token: Some(f64::from(limit).min(4.5)),
            copies_unlimited: short(4.5 + t),
            drift: short(1.0 + t / 4.5),
            load_max_over_mean: short(1.5 - t / 4.0),
            balancedness: None,
            limit: Some(limit),
        }
    };
    let domains = vec!["prose".to_owned(), "code".to_owned()];
    let run = Training { steps: 120, tokens: 1_966_080, domains, points: (1..=120).map(point).collect() };
    ReportData { training: Some(run), ..fixture() }
}

/// Text that would end a script, open a tag, close an attribute or break a line of JavaScript.
const HOSTILE: &str = "</script><script>showError('owned')</script><img src=x onerror=showError('owned')>\"'`${1}&amp;\u{2028}{{data}}";

fn hostile() -> ReportData {
    let mut data = fixture();
    for text in [
        &mut data.title,
        &mut data.tool_version,
        &mut data.profile.model,
        &mut data.profile.source,
        &mut data.setting.dtype,
    ] {
        *text = HOSTILE.to_owned();
    }
    data.warnings = vec![HOSTILE.to_owned()];
    data.profile.notices = vec![HOSTILE.to_owned()];
    data.profile.domains = vec![HOSTILE.to_owned()];
    for method in &mut data.methods {
        (method.label, method.explanation) = (HOSTILE.to_owned(), HOSTILE.to_owned());
    }
    for row in &mut data.pruning.items {
        row.rule = HOSTILE.to_owned();
    }
    for row in &mut data.predictions.items {
        (row.cluster, row.label) = (HOSTILE.to_owned(), HOSTILE.to_owned());
    }
    for point in &mut data.frontier.items {
        point.label = HOSTILE.to_owned();
    }
    data.training = trained().training.map(|t| Training { domains: vec![HOSTILE.to_owned(); 2], ..t });
    data
}

#[test]
fn data_survives_a_round_trip() {
    for data in [fixture(), counts_only(), many_experts(), hostile(), trained()] {
        let text = data.to_json().expect("writes");
        assert_eq!(ReportData::from_json(&text).expect("reads"), data);
    }
}

#[test]
fn same_data_same_page() {
    assert_eq!(render(&fixture()), render(&fixture()));
}

/// What each edit breaks, and what the error must name.
#[test]
fn data_that_does_not_fit_together_is_refused() {
    type Edit = fn(&mut ReportData);
    let edits: [(Edit, &str); 11] = [
        (|d| d.format = "other".into(), "expected format \"occult.report.v1\", found \"other\""),
        (|d| d.setting.nodes = 3, "setting.nodes is 3, expected a divisor of 8 ranks"),
        (|d| d.setting.ranks = 0, "setting.ranks is 0"),
        (|d| d.baseline = "nobody".into(), "baseline names \"nobody\", which is not a method"),
        (|d| d.methods[1].name = d.methods[0].name.clone(), "two methods have the same name"),
        (|d| d.methods[0].load_per_rank[2].truncate(7), "load_per_rank[2]: expected 8 values, found 7"),
        (|d| d.methods[0].mean.copies_per_token = Some(f64::NAN), "mean: found NaN"),
        (|d| d.coactivation.items[0].p.truncate(5), "p: expected 1024 values, found 5"),
        (|d| d.coactivation.items[0].orders[0].experts[0] = 32, "has expert 32, there are 32 experts"),
        (|d| d.coactivation.items[0].orders[0].rank_offsets[8] = 31, "do not ascend from 0 to 32"),
        (|d| d.pruning.items[0].method = "x".into(), "pruning[0] names \"x\""),
    ];
    for (edit, expected) in edits {
        let mut data = fixture();
        edit(&mut data);
        let error = format!("{:#}", data.check().expect_err(expected));
        assert!(error.contains(expected), "expected {expected:?} in {error:?}");
        assert!(data.to_json().is_err(), "{expected}: written all the same");
    }
    type RunEdit = fn(&mut Training);
    let edits: [(RunEdit, &str); 4] = [
        (|t| t.points.clear(), "no points"),
        (|t| t.points[3].step = 3, "steps do not ascend"),
        (|t| t.points[39].held_out.truncate(1), "held_out of step 40: expected 2 values, found 1"),
        (|t| t.points[9].drift = Some(f64::INFINITY), "step 10: found inf"),
    ];
    for (edit, expected) in edits {
        let mut data = trained();
        edit(data.training.as_mut().expect("a run"));
        let error = format!("{:#}", data.check().expect_err(expected));
        assert!(error.contains(expected), "expected {expected:?} in {error:?}");
    }
    let error = format!("{:#}", ReportData::from_json("{\"format\": 1").expect_err("broken JSON"));
    assert!(error.contains("line 1 column"), "{error}");
}

/// Nothing in the page refers to a network: what is left of URLs are names (XML namespaces, comments, licence texts).
#[test]
fn page_needs_no_network() {
    let page = render(&fixture());
    assert!(page.contains("default-src 'none'"), "the page forbids every load");
    assert!(!page.contains("{{"), "a mark of the template was not filled");
    let lower = page.to_lowercase();
    for load in
        ["src=\"", "src='", "@import", "url(http", "url(\"http", "<link", "<iframe", "<base", "<object"]
    {
        assert!(!lower.contains(load), "the page has {load:?}");
    }
    for quote in ['"', '\''] {
        for attribute in ["href", "action", "srcset", "data"] {
            for scheme in ["http", "//"] {
                let load = format!("{attribute}={quote}{scheme}");
                assert!(!lower.contains(&load), "the page has {load:?}");
            }
        }
    }
    let ours = [
        include_str!("../src/report/assets/page.js"),
        include_str!("../src/report/assets/overview.js"),
        include_str!("../src/report/assets/maps.js"),
        include_str!("../src/report/assets/charts.js"),
        include_str!("../src/report/assets/training.js"),
        include_str!("../src/report/assets/main.js"),
    ];
    for call in ["fetch(", "XMLHttpRequest", "import(", "WebSocket", "sendBeacon", "innerHTML", "eval("] {
        assert!(ours.iter().all(|source| !source.contains(call)), "a script of the page uses {call}");
    }
}

#[test]
fn hostile_text_stays_text() {
    let page = render(&hostile());
    assert!(!page.contains("<script>showError('owned')"), "text became a script");
    assert!(!page.contains("<img"), "text became an element");
    // As many script ends as with harmless data.
    assert_eq!(page.matches("</script").count(), render(&fixture()).matches("</script").count());
    let (_, after) = page.split_once("id=\"report-data\">").expect("data");
    let (json, _) = after.split_once("</script>").expect("end of data");
    let back: serde_json::Value = serde_json::from_str(json).expect("the inlined data are JSON");
    assert_eq!(back["title"], HOSTILE);
}

/// The vendored libraries are the ones that the notes beside them name.
#[test]
fn vendored_files_are_small_and_carry_their_licences() {
    let libraries = [
        include_str!("../src/report/assets/vendor/d3-7.9.2.min.js"),
        include_str!("../src/report/assets/vendor/plot-0.6.17.umd.min.js"),
    ];
    assert!(libraries.iter().map(|l| l.len()).sum::<usize>() < 1 << 20);
    assert!(libraries.iter().all(|l| !l.to_lowercase().contains("</script")), "would end its own element");
    let page = render(&fixture());
    for notice in
        ["Copyright 2010-2026 Mike Bostock", "Copyright 2020-2025 Observable, Inc.", "Mikola Lysenko"]
    {
        assert!(page.contains(notice), "{notice} is missing from the page");
    }
}

// ---- in a browser -----------------------------------------------------------------------------------------------------

/// Opens a file in headless Chromium (the command `chromium`, or what the variable `CHROMIUM` names) and gives the document
/// as it stands after all scripts ran.
fn browse(file: &Path, window_width: u32, fragment: &str) -> String {
    let profile = tempfile::tempdir().expect("temporary directory");
    let program = std::env::var_os("CHROMIUM").unwrap_or_else(|| "chromium".into());
    let output = Command::new(&program)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        .args(["--disable-component-update", "--disable-sync", "--no-first-run", "--dump-dom"])
        .arg("--virtual-time-budget=10000")
        .arg(format!("--window-size={window_width},900"))
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("file://{}#{fragment}", file.display()))
        .output()
        .unwrap_or_else(|error| panic!("starting {program:?}: {error}"));
    let dom = String::from_utf8(output.stdout).expect("the document is UTF-8");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && dom.contains("</html>"), "{program:?} drew nothing: {log}");
    dom
}

/// The document of a report after it drew itself without an error.
fn draw(data: &ReportData, fragment: &str) -> String {
    draw_with(data, fragment, "</body>")
}

fn draw_with(data: &ReportData, fragment: &str, end_of_body: &str) -> String {
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = dir.path().join("report.html");
    std::fs::write(&file, render(data).replace("</body>", end_of_body)).expect("page");
    let dom = browse(&file, 1400, fragment);
    if let Some((_, error)) = dom.split_once("class=\"js-error\">") {
        panic!("the page reports an error: {}", error.split_once("</p>").map_or(error, |(text, _)| text));
    }
    assert!(dom.contains("data-drawn="), "the scripts did not run to their end");
    dom
}

/// Uses every control of the page once, opens every table, and notes what can be seen then.
const USE_EVERYTHING: &str = r##"<script>setTimeout(() => {
    let used = 0;
    for (const list of document.querySelectorAll(".choice select")) {
        for (let i = list.options.length - 1; i >= 0; i -= 1, used += 1) {
            list.selectedIndex = i;
            list.dispatchEvent(new Event("change"));
            if (list.closest("#load") && i === 1) document.documentElement.dataset.bars = document.querySelectorAll("#chart-load g[aria-label=bar] > *").length;
        }
    }
    for (const button of document.querySelectorAll(".segments button, button.theme")) { button.click(); used += 1; }
    for (const svg of document.querySelectorAll(".chart svg")) {
        const box = svg.getBoundingClientRect();
        const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, bubbles: true, pointerType: "mouse" };
        for (const kind of ["pointerenter", "pointermove", "pointerleave"]) svg.dispatchEvent(new PointerEvent(kind, at));
    }
    for (const figures of document.querySelectorAll("details.figures")) figures.open = true;
    dispatchEvent(new Event("beforeprint"));
    dispatchEvent(new Event("afterprint"));
    document.documentElement.dataset.used = used;
}, 500)</script></body>"##;

/// What a report of a given width says about itself. It stands in a frame, because a window is never narrower than 500
/// pixels.
fn in_frame(data: &ReportData, width: u32, theme: &str) -> serde_json::Value {
    let dir = tempfile::tempdir().expect("temporary directory");
    let probe = r#"<script>setTimeout(() => {
        const root = document.documentElement;
        const outside = (e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, .page-end, .skip");
        parent.postMessage(JSON.stringify({ width: innerWidth, theme: root.dataset.theme, drawn: root.dataset.drawn ?? "no",
            errors: document.querySelectorAll(".js-error").length, sticks_out: root.scrollWidth - root.clientWidth,
            outside: [...document.querySelectorAll("body *")].filter(outside).map((e) => `${e.tagName} ${e.getAttribute("class")}`),
            wrong_width: [...document.querySelectorAll(".chart svg")].filter((s) => s.width.baseVal.value > innerWidth).length }), "*");
    }, 1500)</script></body>"#;
    std::fs::write(dir.path().join("report.html"), render(data).replace("</body>", probe)).expect("page");
    let host = format!(
        "<!doctype html><meta charset=utf-8><script>onmessage = (e) => {{ document.title = e.data; }}</script>\
         <iframe src='report.html#theme={theme}' style='border:0;width:{width}px;height:800px'></iframe>"
    );
    let file = dir.path().join("host.html");
    std::fs::write(&file, host).expect("host");
    let dom = browse(&file, 1700, "");
    let said =
        dom.split_once("<title>").and_then(|(_, rest)| rest.split_once("</title>")).map(|(json, _)| json);
    serde_json::from_str(said.expect("the report says something")).expect("JSON")
}

/// The frame of one chart.
fn figure<'a>(dom: &'a str, id: &str) -> &'a str {
    let (_, rest) =
        dom.split_once(&format!("<figure id=\"chart-{id}\"")).unwrap_or_else(|| panic!("no chart {id}"));
    rest.split_once("</figure>").expect("end of figure").0
}

/// Elements of one kind inside the groups of one kind of mark (Plot names its groups).
fn marks(part: &str, group: &str, tag: &str) -> usize {
    let start = format!("<g aria-label=\"{group}\"");
    let groups = part.split(&start).skip(1);
    groups.map(|g| g.split_once("</g>").map_or(g, |(inside, _)| inside)).map(|g| g.matches(tag).count()).sum()
}

#[test]
#[ignore = "needs Chromium: run with --ignored"]
fn browser_draws_every_chart() {
    let data = fixture();
    let dom = draw(&data, "theme=light");
    let (methods, layers, ranks) =
        (data.methods.len(), data.profile.layers.len(), data.setting.ranks as usize);
    assert!(dom.contains("data-theme=\"light\""));
    assert!(dom.contains("of&nbsp;8 devices instead of 3.59."), "headline");

    let table = dom.split_once("class=\"methods\"").expect("table of methods").1;
    let table = table.split_once("</table>").expect("end of table").0;
    assert_eq!(table.matches("<tr").count(), methods + 1);
    assert!(table.matches("over cap").count() >= 1);

    for map in ["coactivation-before", "coactivation-after"] {
        let part = figure(&dom, map);
        let (_, image) =
            part.split_once("href=\"data:image/png;base64,").unwrap_or_else(|| panic!("no image in {map}"));
        // 32 x 32 pixels of many colours do not fit into a few bytes.
        assert!(image.split_once('"').expect("end of image").0.len() > 1500, "{map} is blank");
    }
    assert_eq!(marks(figure(&dom, "coactivation-before"), "rect", "<rect"), 0);
    assert_eq!(marks(figure(&dom, "coactivation-after"), "rect", "<rect"), ranks, "rank blocks are outlined");

    let part = figure(&dom, "layers");
    assert_eq!(marks(part, "dot", "<path"), methods * layers);
    assert_eq!(marks(part, "line", "<path"), methods + 1, "methods and the lower bound");
    assert_eq!(marks(figure(&dom, "load"), "rect", "<rect"), methods * layers * ranks);
    assert_eq!(marks(figure(&dom, "pairs"), "rect", "<rect"), methods * ranks * ranks);
    assert_eq!(marks(figure(&dom, "pairs"), "text", ">71.6</text>"), 1, "figures in the cells");

    let part = figure(&dom, "frontier");
    let dots = marks(part, "dot", "<path") + marks(part, "dot", "<circle");
    assert_eq!(dots, data.frontier.items.len() + 1, "points and the ring");
    assert_eq!(marks(part, "line", "<path"), 1);
    let part = figure(&dom, "pruning");
    assert_eq!(marks(part, "dot", "<path") + marks(part, "dot", "<circle"), data.pruning.items.len());
    let bars = marks(figure(&dom, "predictions"), "rect", "<path")
        + marks(figure(&dom, "predictions"), "rect", "<rect");
    assert_eq!(bars, 3 * data.predictions.items.len());
    assert_eq!(marks(figure(&dom, "subgraphs"), "line", "<path"), data.subgraphs.items.len());
    let page = dom.split_once("<main").expect("main").1.split_once("</main>").expect("end of main").0;
    assert!(!page.contains("NaN") && !page.contains("undefined"), "a figure that is none");
    assert!(!dom.contains("id=\"training\""), "no run, no section");
}

#[test]
#[ignore = "needs Chromium: run with --ignored"]
fn browser_draws_a_training_run() {
    let dom = draw(&trained(), "theme=light");
    let part = figure(&dom, "training-loss");
    assert_eq!(marks(part, "line", "<path"), 3, "training and two domains");
    assert_eq!(marks(part, "dot", "<circle"), 3 + 2, "held-out losses are few and have dots");
    assert!(part.contains("prose") && part.contains("code"));
    let part = figure(&dom, "training-routing");
    assert_eq!(marks(part, "line", "<path"), 3, "as trained, the routers' own choices, the limit");
    assert!(dom.contains("120 steps on 1,966,080 tokens."));
    assert!(dom.contains("<dt>Drift</dt>"));
    let page = dom.split_once("<section id=\"training\"").expect("section").1;
    let page = page.split_once("</section>").expect("end of section").0;
    assert!(!page.contains("NaN") && !page.contains("undefined"), "a figure that is none");
    // Copies, drift, load; balancedness was not logged.
    assert_eq!(page.matches("aria-pressed").count(), 3);
    let used = draw_with(&trained(), "theme=light", USE_EVERYTHING);
    assert_eq!(figure(&used, "training-loss").matches("<tr").count(), 121);
    let part = figure(&used, "training-routing");
    assert!(part.contains("Max / mean load"), "the last choice is shown");
    // A run on one rank has no copies: balancedness alone, nothing to choose.
    let mut alone = trained();
    for p in &mut alone.training.as_mut().expect("a run").points {
        *p =
            TrainingPoint { step: p.step, loss: p.loss, balancedness: Some(0.5), ..TrainingPoint::default() };
    }
    let dom = draw(&alone, "theme=dark");
    assert_eq!(marks(figure(&dom, "training-loss"), "line", "<path"), 1);
    assert_eq!(marks(figure(&dom, "training-routing"), "line", "<path"), 1);
}

#[test]
#[ignore = "needs Chromium: run with --ignored"]
fn browser_follows_theme_and_width() {
    for (width, theme) in [(320, "light"), (390, "dark"), (820, "light"), (1600, "dark")] {
        for data in [fixture(), hostile(), many_experts(), trained()] {
            let said = in_frame(&data, width, theme);
            assert_eq!((&said["width"], &said["theme"]), (&width.into(), &theme.into()), "{said}");
            assert_eq!((&said["errors"], &said["wrong_width"]), (&0.into(), &0.into()), "{said}");
            assert_eq!(said["sticks_out"], 0, "the page scrolls sideways: {said}");
            assert_eq!(said["outside"], serde_json::json!([]), "something is cut off: {said}");
            assert_ne!(said["drawn"], "no");
        }
    }
}

#[test]
#[ignore = "needs Chromium: run with --ignored"]
fn browser_survives_every_control() {
    let data = fixture();
    let (methods, layers, ranks) =
        (data.methods.len(), data.profile.layers.len(), data.setting.ranks as usize);
    let dom = draw_with(&data, "theme=light", USE_EVERYTHING);
    let used = dom.split_once("data-used=\"").expect("the controls were used").1;
    let used: usize = used.split_once('"').expect("quote").0.parse().expect("a number");
    // Layer (3) and scale (3) and unit (2) and theme are buttons; placements, measures and layers are lists.
    assert_eq!(used, (3 + 3 + 2 + 1) + 4 + 5 + (1 + layers));
    assert!(dom.contains("data-theme=\"dark\""), "the theme was switched");
    assert!(dom.contains(&format!("data-bars=\"{}\"", methods * ranks)), "one layer is shown as bars");
    let rows = figure(&dom, "layers").matches("<tr").count();
    assert_eq!(rows, layers + 1, "the figures of the chart are a table");
}

#[test]
#[ignore = "needs Chromium: run with --ignored"]
fn browser_says_what_is_missing() {
    let data = counts_only();
    let dom = draw(&data, "theme=light");
    let parts = [&data.coactivation.reason, &data.frontier.reason, &data.pruning.reason];
    for reason in parts.into_iter().chain([&data.predictions.reason, &data.subgraphs.reason]) {
        let reason = reason.as_deref().expect("a reason");
        assert!(dom.contains(&format!("class=\"absent\">{reason}<")), "{reason:?} is not shown");
    }
    assert!(dom.contains("The busiest of 8 devices does"), "a headline without copies");
    let dots = marks(figure(&dom, "layers"), "dot", "<path");
    assert_eq!(dots, data.methods.len() * data.profile.layers.len(), "load per layer remains");
    assert!(!dom.contains("id=\"chart-frontier\""));
}

#[test]
#[ignore = "needs Chromium: run with --ignored"]
fn browser_draws_256_experts_as_images() {
    let data = many_experts();
    let dom = draw(&data, "theme=dark");
    for map in ["coactivation-before", "coactivation-after", "pairs"] {
        let part = figure(&dom, map);
        assert!(part.contains("href=\"data:image/png"), "{map} has no image");
        assert!(part.matches("<rect").count() < 200, "{map} has a rectangle for each cell");
    }
    assert_eq!(marks(figure(&dom, "coactivation-after"), "rect", "<rect"), 64);
}

#[test]
#[ignore = "needs Chromium: run with --ignored"]
fn browser_shows_hostile_text_as_text() {
    let dom = draw(&hostile(), "theme=light");
    // `draw` has failed already if the text ran. The document escapes `<` in text again.
    assert!(dom.contains("&lt;/script&gt;&lt;script&gt;showError('owned')"), "the text is shown");
    assert!(!dom.contains("<img"), "the text became an element");
}

#[test]
fn budgets_are_written_as_the_field_reads_them() {
    let text =
        serde_json::to_string(&[PruningBudget::MaxRanks(2), PruningBudget::MassShare(0.9)]).expect("writes");
    assert_eq!(text, r#"[{"max_ranks":2},{"mass_share":0.9}]"#);
}
