//! Data in, page out: the data and the assets are put into the marks of `template.html`.

use super::data::ReportData;
use serde_json::Value;

const TEMPLATE: &str = include_str!("assets/template.html");
const STYLE: &str = include_str!("assets/report.css");
const LICENSES: &str = include_str!("assets/vendor/LICENSES.txt");
const LIBRARIES: [&str; 2] =
    [include_str!("assets/vendor/d3-7.9.2.min.js"), include_str!("assets/vendor/plot-0.6.17.umd.min.js")];
const SCRIPTS: [&str; 6] = [
    include_str!("assets/page.js"),
    include_str!("assets/overview.js"),
    include_str!("assets/maps.js"),
    include_str!("assets/charts.js"),
    include_str!("assets/training.js"),
    include_str!("assets/main.js"),
];

/// One HTML page that needs no network: libraries, looks and data are inside. The same data gives the same bytes.
///
/// Figures are inlined with six significant digits; no more can be seen. Nothing in the data can end a script or
/// become markup: strings travel as JSON with `<`, `>` and `&` escaped, and the page sets them as text.
pub fn render(data: &ReportData) -> String {
    // A struct of plain fields always becomes a JSON value; a page that says so is better than a panic.
    let json = serde_json::to_value(data).map_or_else(|error| Value::String(error.to_string()), rounded);
    let fill = |mark: &str| match mark {
        "title" => escape_text(&data.title),
        "style" => STYLE.to_owned(),
        "data" => escape_json(&json.to_string()),
        "libraries" => LIBRARIES.map(|source| format!("<script>{source}</script>")).join("\n"),
        // One scope for our scripts, and none of their names outside.
        "scripts" => format!("<script>\n\"use strict\";\n(() => {{\n{}}})();\n</script>", SCRIPTS.concat()),
        "licenses" => escape_text(LICENSES),
        _ => String::new(),
    };
    let mut page = String::with_capacity(1 << 20);
    let mut rest = TEMPLATE;
    // One pass: what was filled in is never searched for marks again.
    while let Some((before, (mark, after))) =
        rest.split_once("{{").and_then(|(before, tail)| Some((before, tail.split_once("}}")?)))
    {
        page.push_str(before);
        page.push_str(&fill(mark));
        rest = after;
    }
    page.push_str(rest);
    page
}

/// Six significant digits for every number with a fraction.
fn rounded(value: Value) -> Value {
    match value {
        Value::Number(number) if number.is_f64() => {
            let short = number.as_f64().and_then(|v| format!("{v:.5e}").parse::<f64>().ok());
            short.map_or(Value::Number(number), |v| {
                // 1.0 and 0.0 are most of a heat map: write them as 1 and 0.
                if v.fract() == 0.0 && v.abs() < 1e9 { Value::from(v as i64) } else { Value::from(v) }
            })
        }
        Value::Array(items) => items.into_iter().map(rounded).collect(),
        Value::Object(fields) => fields.into_iter().map(|(key, item)| (key, rounded(item))).collect(),
        other => other,
    }
}

/// JSON that may stand in a `<script>` element: no character that HTML or JavaScript reads as more than text.
fn escape_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '<' => out.push_str("\\u003c"),
            '>' => out.push_str("\\u003e"),
            '&' => out.push_str("\\u0026"),
            '\u{2028}' => out.push_str("\\u2028"),
            '\u{2029}' => out.push_str("\\u2029"),
            c => out.push(c),
        }
    }
    out
}

/// Text for HTML, inside an element or a quoted attribute.
fn escape_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}
