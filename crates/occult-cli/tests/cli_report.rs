//! `report` and `demo`: the files they write. What the page draws is tested in `report.rs`.

mod common;

use common::{Lab, Rows, Table, close, list, number, says};

/// One HTML file that asks for nothing: no address, no other file.
#[track_caller]
fn self_contained(page: &str) {
    assert!(page.trim_start().to_lowercase().starts_with("<!doctype html>"), "{}", &page[..80]);
    assert!(page.trim_end().ends_with("</html>"));
    for loads in ["src=\"", "src='", "<link", "@import", "url(http", "url(\"http", "<iframe"] {
        assert!(!page.contains(loads), "the page has {loads}");
    }
    // Nor may anything in the chart library, or slipped in by a name, load something.
    assert!(page.contains("http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';"));
}

#[test]
fn a_report_is_one_page_with_every_method() {
    let rows = Rows::new(51, 400, 3, 16, 4);
    let lab = Lab::with(&rows);
    lab.ok("place profile.safetensors --method random --seed 9 -o mine.json");
    let before = lab.names();
    let outcome = lab.ok("report profile.safetensors mine.json --restarts 1 -o page.html --title Comparison");
    assert_eq!(outcome.stdout, "page.html\n");
    let mut after = lab.names();
    after.retain(|name| !before.contains(name));
    assert_eq!(after, ["page.html"], "one file");
    let page = lab.text("page.html");
    self_contained(&page);
    says(
        &page,
        &["Comparison", "Contiguous", "Algorithm 1", "EPLB", "Search", "mine", "router-score", "best-mass"],
    );
}

#[test]
fn the_data_of_a_report_are_the_figures_of_the_other_commands() {
    let rows = Rows::new(52, 400, 2, 16, 4);
    let lab = Lab::with(&rows);
    lab.ok("place profile.safetensors --method random --seed 9 -o mine.json");
    lab.ok("report profile.safetensors mine.json --restarts 2 --data data.json -o page.html");
    let data = lab.json("data.json");
    let table = Table::of(&lab.json("mine.json"));
    let methods = list(&data, "methods");
    for (name, own) in [
        ("contiguous", "--method contiguous"),
        ("greedy", "--method greedy"),
        ("eplb", "--method eplb"),
        ("search", "--method search --restarts 2"),
    ] {
        let shown = methods.iter().find(|m| m["name"] == name).unwrap();
        let figures = lab.figures(&format!("place profile.safetensors {own}"));
        for key in ["copies_per_token", "remote_copies_per_token", "load_max_over_mean", "intra_fraction"] {
            close(number(&shown["mean"], key), number(&figures["mean"], key), key);
        }
    }
    let mine = methods.iter().find(|m| m["name"] == "mine").unwrap();
    for layer in 0..2 {
        let expected = table.measure_sets(layer, &rows.sets(layer));
        close(number(&mine["layers"][layer], "copies_per_token"), expected.copies, "copies");
        close(number(&mine["layers"][layer], "load_max_over_mean"), expected.load_ratio, "load");
    }
}

#[test]
fn reports_of_other_shapes() {
    let lab = Lab::with(&Rows::new(53, 200, 1, 16, 4).ids_only());
    lab.ok("report profile.safetensors --ranks 8 --nodes 2 --restarts 1 --clusters 16x8xh100-400g -o a.html");
    lab.ok("report profile.safetensors --ranks 1 --restarts 1 -o b.html");
    lab.ok("report profile.safetensors --ranks 4 --replicas 4 --restarts 1 --holdout 0.5 -o c.html");
    ["a.html", "b.html", "c.html"].iter().for_each(|page| self_contained(&lab.text(page)));
    lab.ok("place profile.safetensors --ranks 8 --method contiguous -o eight.json");
    let message = lab.refused(1, "report profile.safetensors eight.json --ranks 4 -o d.html");
    says(&message, &["eight.json", "8 ranks", "4"]);
}

/// Titles and names come from files: they stay text.
#[test]
fn names_from_files_are_text_on_the_page() {
    let hostile = "</script><script>alert(1)</script>";
    let lab = Lab::with(&Rows::new(54, 100, 1, 8, 2).with("model", hostile));
    lab.ok("report profile.safetensors --restarts 1 -o page.html");
    let page = lab.text("page.html");
    assert!(!page.contains(hostile));
    self_contained(&page);
}

#[test]
fn a_report_of_counts_says_what_is_missing_or_is_refused() {
    let lab = Lab::new();
    lab.write("loads.json", "[[90,132,40,61,104,165,39,4]]");
    lab.ok("import loads.json --format eplb -o profile.safetensors");
    says(&lab.refused(1, "report profile.safetensors -o page.html"), &["profile.safetensors"]);
}

#[test]
fn the_demo_needs_nothing_and_leaves_files_that_other_commands_read() {
    let lab = Lab::new();
    let demo = lab.ok("demo");
    says(
        &demo.stdout,
        &[
            "occult profile occult-demo/model",
            "17960 tokens of 7 domains through 4 MoE layers of 64 experts, top-8",
            "a row per expert",
            "at most 2 ranks",
            "--max-ranks 2 --max-tokens 40 --temperature",
            "report.html",
        ],
    );
    assert_eq!(lab.names(), ["occult-demo"], "one folder");
    self_contained(&lab.text("occult-demo/report.html"));
    let table = Table::of(&lab.json("occult-demo/placement.json"));
    assert_eq!((table.experts, table.ranks, table.layers.len()), (64, 4, 4));
    says(&lab.text("occult-demo/texts/NOTICE"), &["licence"]);
    let stats = lab.figures("stats occult-demo/profile.safetensors --ranks 4");
    let traffic = lab.figures("traffic occult-demo/profile.safetensors occult-demo/placement.json");
    let copies = |f: &serde_json::Value| number(&f["mean"], "copies_per_token");
    assert!(copies(&traffic) < 0.8 * copies(&stats), "{} {}", copies(&traffic), copies(&stats));
    // Again into the same folder, as JSON.
    let figures = lab.figures("demo");
    assert!(list(&figures, "methods").len() >= 5);
    let modes = list(&figures, "measured");
    let of = |key: &str| modes.iter().map(|mode| number(mode, key)).collect::<Vec<_>>();
    for key in ["rows_per_token", "bytes_per_token"] {
        assert!(of(key).is_sorted_by(|more, fewer| more > fewer), "{key}: {:?}", of(key));
    }
    let (perplexity, rows) = (of("perplexity"), of("rows_per_token"));
    assert_eq!(modes.len(), 5);
    for exact in [1, 2] {
        assert!((perplexity[exact] / perplexity[0] - 1.0).abs() < 1e-5, "{perplexity:?}");
    }
    // The limits cost something, and hold: 4 layers, ranks beside the token's own.
    assert!(perplexity[4] > perplexity[0], "{perplexity:?}");
    assert!(rows[3] <= 8.0 && rows[4] <= 4.0, "{rows:?}");
    // A folder that cannot be made.
    lab.write("file", "");
    let message = lab.refused(1, "demo --out-dir file/inside");
    says(&message, &["file/inside"]);
}
