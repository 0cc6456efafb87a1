//! `occult import`

use anyhow::Result;
use occult_formats::{ImportOptions, ImportSummary};
use serde_json::json;

use crate::args::ImportArgs;
use crate::output::{print, print_json};
use crate::progress;

pub(super) fn run(args: &ImportArgs) -> Result<()> {
    let options = ImportOptions {
        format: args.format,
        num_experts: args.experts,
        top_k: args.top_k,
        model: args.model.clone(),
        num_hidden_layers: args.hidden_layers,
        layer_ids: args.layer_ids.clone(),
        norm_topk_prob: args.norm_topk_prob,
        num_groups: args.groups,
        section: args.section.clone(),
        ..ImportOptions::default()
    };
    let bar = progress::bytes("importing");
    let summary = occult_formats::import(&args.inputs, &options, &args.output, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let summary = summary?;
    if args.json {
        let ImportSummary { format, meta, rows, warnings } = &summary;
        return print_json(&json!({
            "output": args.output,
            "format": format.name(),
            "meta": meta,
            "rows": rows,
            "warnings": warnings,
        }));
    }
    for warning in &summary.warnings {
        eprintln!("warning: {warning}");
    }
    print(&describe(&summary, &args.output.display().to_string()))
}

/// What was made, in a few lines.
pub(super) fn describe(summary: &ImportSummary, output: &str) -> String {
    let meta = &summary.meta;
    let rows = match (summary.rows.iter().flatten().min(), summary.rows.iter().flatten().max()) {
        (Some(min), Some(max)) if min == max => format!("{min} rows in every layer"),
        (Some(min), Some(max)) => format!("{min} to {max} rows per layer"),
        _ => "counts only".to_owned(),
    };
    let top_k = meta.top_k.map_or("unknown".to_owned(), |k| k.to_string());
    let mut text = format!(
        "{output}: {} MoE layers, {} experts, top-{top_k}, {rows} (from {})\n",
        meta.num_layers(),
        meta.num_experts,
        summary.format.name(),
    );
    for note in &meta.source.notes {
        text.push_str(&format!("  note: {note}\n"));
    }
    text
}
