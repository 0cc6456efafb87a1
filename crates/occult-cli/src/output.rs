//! Tables for people, JSON for programs.

use std::io::Write;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

/// A table with right-aligned columns (the first left-aligned), for a monospaced terminal.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new<'a>(header: impl IntoIterator<Item = &'a str>) -> Self {
        Self { rows: vec![header.into_iter().map(str::to_owned).collect()] }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |c: usize| self.rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max();
        let widths: Vec<usize> = (0..columns).map(|c| width(c).unwrap_or(0)).collect();
        let mut text = String::new();
        for (i, row) in self.rows.iter().enumerate() {
            let cells =
                row.iter().zip(&widths).enumerate().map(|(c, (cell, &w))| {
                    if c == 0 { format!("{cell:<w$}") } else { format!("{cell:>w$}") }
                });
            text.push_str(Vec::from_iter(cells).join("  ").trim_end());
            text.push('\n');
            if i == 0 {
                let line = widths.iter().map(|&w| "-".repeat(w));
                text.push_str(&Vec::from_iter(line).join("  "));
                text.push('\n');
            }
        }
        text
    }
}

/// Writes text to standard output.
pub(crate) fn print(text: &str) -> Result<()> {
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")
}

/// Writes a JSON value to standard output.
pub(crate) fn print_json(value: &Value) -> Result<()> {
    print(&(serde_json::to_string_pretty(value).context("cannot write JSON")? + "\n"))
}

/// A figure, or a dash where it cannot be computed.
pub(crate) fn figure(value: Option<f64>, decimals: usize) -> String {
    value.map_or("-".to_owned(), |v| format!("{v:.decimals$}"))
}

/// Serialises a struct of figures and adds fields to the object.
pub(crate) fn object(figures: &impl serde::Serialize, more: Value) -> Result<Value> {
    let mut object: Map<String, Value> = match serde_json::to_value(figures).context("cannot write JSON")? {
        Value::Object(object) => object,
        other => return Ok(json!({ "value": other })),
    };
    if let Value::Object(more) = more {
        // The name of a thing before its figures.
        let figures = std::mem::replace(&mut object, more);
        object.extend(figures);
    }
    Ok(Value::Object(object))
}

/// Seconds in a unit people read.
pub(crate) fn seconds(s: f64) -> String {
    match s {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.1} us", s * 1e6),
    }
}

/// Bytes in a unit people read (powers of 1,000).
pub(crate) fn bytes(b: f64) -> String {
    match b {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.2} MB", b / 1e6),
        b if b >= 1e3 => format!("{:.1} kB", b / 1e3),
        b => format!("{b:.0} B"),
    }
}
