//! `occult stats`

use anyhow::{Result, bail};
use occult_formats::Profile;
use occult_plan::TrafficSummary;
use occult_plan::graph::subgraph_curve;
use occult_plan::placement::contiguous;
use serde_json::{Value, json};

use crate::args::StatsArgs;
use crate::measuring::{self, COUNTS_ONLY, LayerFigures};
use crate::output::{figure, print, print_json};
use crate::{parallel, progress, setup};

pub(super) fn run(args: &StatsArgs) -> Result<()> {
    let topology = setup::topology(&args.topology)?;
    let profile = setup::profile(&args.profile)?;
    let meta = profile.meta();
    let placement = contiguous::place(meta.num_experts, topology.num_ranks())?;
    if let Some(layer) = (0..profile.num_layers()).find(|&l| !profile.has_counts(l)) {
        bail!(
            "{}: layer {layer} has neither tokens nor counts (only the order of collaborators): no figure can be computed",
            args.profile.display()
        );
    }
    let bar = progress::bar(profile.num_layers() as u64, "layers");
    let layers = parallel::map_ordered(profile.num_layers(), setup::threads(args.threads), |layer| {
        let figures = measuring::measure(&profile, layer, &placement, topology, args.home)?;
        let extra = layer_extra(&profile, layer, args.subgraph_points)?;
        bar.inc(1);
        Ok((figures, extra))
    });
    bar.finish_and_clear();
    let layers = layers?;
    let (figures, extras): (Vec<LayerFigures>, Vec<Value>) = layers.into_iter().unzip();
    let counts_only = figures.iter().any(|f| f.summary.is_none());
    if args.json {
        let layers = figures.iter().zip(extras).map(|(f, extra)| f.json(extra));
        return print_json(&json!({
            "profile": args.profile,
            "meta": meta,
            "placement": "contiguous",
            "ranks": topology.num_ranks(),
            "nodes": topology.num_nodes(),
            "warnings": if counts_only { vec![COUNTS_ONLY] } else { vec![] },
            "layers": layers.collect::<Result<Vec<_>>>()?,
            "mean": measuring::mean_json(&figures, json!({}))?,
        }));
    }
    if counts_only {
        eprintln!("warning: {COUNTS_ONLY}");
    }
    let mut text = format!(
        "{}: {} MoE layers, {} experts, top-{}{}\n",
        meta.model.as_deref().unwrap_or("routing profile"),
        meta.num_layers(),
        meta.num_experts,
        meta.top_k.map_or("?".to_owned(), |k| k.to_string()),
        if meta.domains.is_empty() {
            String::new()
        } else {
            format!(", domains {}", meta.domains.join(", "))
        },
    );
    text.push_str(&format!(
        "Experts in contiguous blocks on {} ranks ({} nodes):\n\n",
        topology.num_ranks(),
        topology.num_nodes()
    ));
    text.push_str(&measuring::table(&figures, topology.num_nodes() > 1));
    text.push_str(&more_text(&figures, &extras));
    text.push_str(
        "\ncopies/token: distinct ranks a token visits (C_T); remote: those not at home; uniform: C_T if routers chose at random;\n\
         optimum: ceil(K W / E); intra: share of co-active pairs on one rank; balanced: mean/max load.\n",
    );
    print(&text)
}

/// What the table has no room for: means, and the connected sub-graphs of the first and the last layer.
fn more_text(figures: &[LayerFigures], extras: &[Value]) -> String {
    let mut text = String::new();
    let summaries: Option<Vec<TrafficSummary>> = figures.iter().map(|f| f.summary).collect();
    if let Some(mean) = summaries.as_deref().and_then(TrafficSummary::mean) {
        text.push_str(&format!(
            "\nMeans: bounds of copies/token {:.0} to {:.0}; intra {} of pairs, {:.3} with each expert paired with itself too; \
             imbalance (max - mean)/mean {:.3}; {:.1} experts touched.\n",
            mean.copies_lower_bound,
            mean.copies_upper_bound,
            figure(mean.intra_fraction, 3),
            mean.intra_fraction_with_self,
            mean.imbalance_ratio,
            mean.experts_touched
        ));
    }
    let mut ends = vec![0, figures.len() - 1];
    ends.dedup();
    for i in ends {
        let points = extras[i]["connected_subgraphs"].as_array().map_or(&[][..], Vec::as_slice);
        if points.is_empty() {
            continue;
        }
        let step = (points.len() / 10).max(1);
        let shown = points
            .iter()
            .step_by(step)
            .map(|p| format!("{:.2}: {}", p["threshold"].as_f64().unwrap_or(0.0), p["num_subgraphs"]));
        text.push_str(&format!(
            "Connected sub-graphs of layer {} when pairs weaker than a share of the strongest are cut: {}\n",
            figures[i].layer_id,
            Vec::from_iter(shown).join(", ")
        ));
    }
    text
}

/// Connected sub-graphs, and how uneven single experts are.
fn layer_extra(profile: &Profile, layer: usize, points: usize) -> Result<Value> {
    let counts = profile.counts(layer)?;
    let (max, total) = (counts.iter().max().copied().unwrap_or(0), counts.iter().sum::<u64>());
    let expert_load = if total == 0 { 1.0 } else { max as f64 * counts.len() as f64 / total as f64 };
    let curve = match profile.coactivation(layer)? {
        Some(pairs) => json!(subgraph_curve(&pairs, points).map_err(|e| e.in_layer(layer))?),
        None => Value::Null,
    };
    Ok(json!({
        "layer": profile.meta().layer_ids[layer],
        "tokens_per_expert_max_over_mean": expert_load,
        "connected_subgraphs": curve,
    }))
}
