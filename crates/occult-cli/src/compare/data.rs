//! The results of a comparison as the data file of a report.

use anyhow::Result;
use occult_plan::graph::subgraph_curve;
use occult_plan::placement::Method;
use occult_plan::{LayerTraffic, PruneStats, Topology};

use super::{FRONTIER_CAPS, LayerResult, METHODS, MethodLayer, Names, PrunedLayer, Request, times};
use crate::measuring::{self, LayerFigures};
use crate::placing::Placer;
use crate::report::{self, Part};
use crate::setup;

/// Heat maps and curves are shown of so many layers, evenly spaced.
const SHOWN_LAYERS: usize = 3;
const SUBGRAPH_POINTS: usize = 41;

/// Everything that the page shows.
pub(super) fn assemble(
    request: &Request<'_>,
    placer: &Placer,
    layers: &[LayerResult],
) -> Result<report::ReportData> {
    let (meta, topology) = (request.profile.meta(), request.topology);
    let row_bytes = request.shape.hidden as f64 * setup::dtype_bytes(&request.shape.dtype)?;
    let names: Vec<Names> = METHODS
        .iter()
        .map(|m| Names {
            name: m.name().to_owned(),
            label: label(*m).to_owned(),
            explanation: explanation(*m).to_owned(),
        })
        .chain(request.placements.iter().map(|(name, file)| Names {
            name: name.clone(),
            label: name.clone(),
            explanation: format!("From a file, made by {}.", file.meta.method),
        }))
        .collect();
    let methods: Vec<report::Method> =
        names.iter().enumerate().map(|(i, names)| method(names, i, layers, topology)).collect();
    let shown: Vec<usize> = shown_layers(layers.len());
    let uniform = layers[0].methods[0].figures.summary.and_then(|s| s.copies_uniform);
    let mut warnings = Vec::new();
    if layers.iter().any(|l| l.relaxed) {
        warnings.push(format!(
            "Some layers have an expert too hot for the load cap of {}: their least loaded placement was taken.",
            placer.options.load_cap
        ));
    }
    if request.search.holdout == 0.0 {
        warnings.push("Placements were measured on the rows they were made from.".to_owned());
    } else {
        warnings.push(format!(
            "The load cap of {} holds on the rows that the search saw; these figures are of other rows.",
            placer.options.load_cap
        ));
    }
    let max = |f: fn(&LayerResult) -> u64| layers.iter().map(f).max().unwrap_or(0);
    let predictions = times::predictions(request, &names, layers, &mut warnings)?;
    Ok(report::ReportData {
        format: report::FORMAT.to_owned(),
        title: request
            .title
            .map(str::to_owned)
            .or_else(|| meta.model.clone())
            .unwrap_or("Routing profile".into()),
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        profile: report::Profile {
            model: meta.model.clone().unwrap_or_else(|| "unnamed model".to_owned()),
            source: format!("{}: {}", meta.source.format, meta.source.files.join(", ")),
            tokens: max(|l| l.tokens),
            held_out_tokens: (request.search.holdout > 0.0).then(|| max(|l| l.eval_tokens)),
            layers: meta.layer_ids.clone(),
            num_experts: meta.num_experts as u32,
            top_k: meta.top_k.unwrap_or(0) as u32,
            domains: meta.domains.clone(),
            notices: request.notices.clone(),
        },
        setting: report::Setting {
            ranks: topology.num_ranks() as u32,
            nodes: topology.num_nodes() as u32,
            load_cap: Some(placer.options.load_cap),
            hidden_size: request.shape.hidden as u32,
            dtype: request.shape.dtype.clone(),
            row_bytes: row_bytes as u64,
            uniform_copies_per_token: uniform,
        },
        baseline: Method::Contiguous.name().to_owned(),
        chosen: Method::Search.name().to_owned(),
        frontier: Part::of(frontier(&methods, layers, placer)),
        methods,
        coactivation: Part::of(
            shown.iter().map(|&l| heat_map(meta.layer_ids[l], &names, &layers[l])).collect(),
        ),
        pruning: pruning(layers),
        predictions,
        subgraphs: Part::of(
            shown
                .iter()
                .map(|&l| {
                    let curve = subgraph_curve(&layers[l].pairs, SUBGRAPH_POINTS)?;
                    let points = curve.iter().map(|p| (p.threshold, p.num_subgraphs as u32)).collect();
                    Ok(report::SubgraphCurve { layer: meta.layer_ids[l], points })
                })
                .collect::<Result<Vec<_>>>()?,
        ),
        training: None,
        warnings,
    })
}

fn label(method: Method) -> &'static str {
    match method {
        Method::Contiguous => "Contiguous",
        Method::Random => "Random",
        Method::Greedy => "Greedy (Algorithm 1)",
        Method::Eplb => "EPLB (load only)",
        Method::Search => "Search (ours)",
        Method::Apart => "Apart (ours, for decoding)",
    }
}

fn explanation(method: Method) -> &'static str {
    match method {
        Method::Contiguous => "Blocks of consecutive experts: what engines do by default.",
        Method::Random => "Equal random groups.",
        Method::Greedy => {
            "The paper's Algorithm 1: groups experts that are chosen together, looks at no load."
        }
        Method::Eplb => "DeepSeek's load balancer: evens out load, looks at no collaboration.",
        Method::Apart => "Fewest pairs of a token's experts on one rank, for steps of a few tokens.",
        Method::Search => "Fewest ranks per token on the recorded expert sets, under a cap on load.",
    }
}

fn measures(figures: &LayerFigures, lower_bound: Option<f64>) -> report::Measures {
    let s = figures.summary;
    report::Measures {
        copies_per_token: s.map(|s| s.copies_per_token),
        remote_copies_per_token: s.map(|s| s.remote_copies_per_token),
        node_copies_per_token: s.map(|s| s.node_copies_per_token),
        load_max_over_mean: figures.load_max_over_mean(),
        intra_fraction: figures.intra_fraction,
        lower_bound,
    }
}

fn method(names: &Names, index: usize, layers: &[LayerResult], topology: Topology) -> report::Method {
    let w = topology.num_ranks();
    let of_method: Vec<&MethodLayer> = layers.iter().map(|l| &l.methods[index]).collect();
    let figures: Vec<LayerFigures> = of_method.iter().map(|m| m.figures.clone()).collect();
    let mean_bound = of_method.iter().map(|m| m.lower_bound).sum::<Option<f64>>();
    let intra = figures.iter().map(|f| f.intra_fraction).sum::<Option<f64>>();
    let n = layers.len() as f64;
    let load_per_rank = figures
        .iter()
        .map(|f| {
            let mean = f.load.iter().sum::<u64>() as f64 / w as f64;
            f.load.iter().map(|&l| l as f64 / mean).collect()
        })
        .collect();
    let pair = |from: usize, to: usize| {
        let rate = |t: &LayerTraffic| 1000.0 * t.rank_rows().get(from, to) / t.num_tokens() as f64;
        figures.iter().filter_map(|f| f.traffic.as_ref()).map(rate).sum::<f64>() / n
    };
    report::Method {
        name: names.name.clone(),
        label: names.label.clone(),
        explanation: names.explanation.clone(),
        layers: of_method.iter().map(|m| measures(&m.figures, m.lower_bound)).collect(),
        mean: report::Measures {
            copies_per_token: measuring::mean_of(&figures, |s| s.copies_per_token),
            remote_copies_per_token: measuring::mean_of(&figures, |s| s.remote_copies_per_token),
            node_copies_per_token: measuring::mean_of(&figures, |s| s.node_copies_per_token),
            load_max_over_mean: measuring::mean_load(&figures),
            intra_fraction: intra.map(|s| s / n),
            lower_bound: mean_bound.map(|s| s / n),
        },
        load_per_rank,
        rows_per_pair: (0..w).map(|from| (0..w).map(|to| pair(from, to)).collect()).collect(),
    }
}

fn shown_layers(n: usize) -> Vec<usize> {
    let mut shown: Vec<usize> = (0..SHOWN_LAYERS).map(|i| i * (n - 1) / (SHOWN_LAYERS - 1)).collect();
    shown.dedup();
    shown
}

fn heat_map(layer: u32, names: &[Names], result: &LayerResult) -> report::CoActivationMap {
    let max = result.pairs.max().max(1) as f32;
    let order = |(names, method): (&Names, &MethodLayer)| {
        let placement = &method.placement;
        let mut experts = Vec::new();
        let mut rank_offsets = vec![0];
        for r in 0..placement.num_ranks() {
            experts.extend_from_slice(placement.experts_of(r as u16));
            rank_offsets.push(experts.len() as u32);
        }
        report::ExpertOrder { method: names.name.clone(), experts, rank_offsets }
    };
    report::CoActivationMap {
        layer,
        p: result.pairs.as_slice().iter().map(|&n| n as f32 / max).collect(),
        orders: names.iter().zip(&result.methods).map(order).collect(),
    }
}

fn frontier(
    methods: &[report::Method],
    layers: &[LayerResult],
    placer: &Placer,
) -> Vec<report::FrontierPoint> {
    let n = layers.len() as f64;
    let mut points: Vec<report::FrontierPoint> = methods
        .iter()
        .filter_map(|m| {
            Some(report::FrontierPoint {
                method: m.name.clone(),
                label: m.label.clone(),
                load_cap: (m.name == Method::Search.name()).then_some(placer.options.load_cap),
                copies_per_token: m.mean.copies_per_token?,
                load_max_over_mean: m.mean.load_max_over_mean,
            })
        })
        .collect();
    for (i, &cap) in FRONTIER_CAPS.iter().enumerate().filter(|(_, cap)| **cap != placer.options.load_cap) {
        points.push(report::FrontierPoint {
            method: Method::Search.name().to_owned(),
            label: format!("Search, cap {cap}"),
            load_cap: Some(cap),
            copies_per_token: layers.iter().map(|l| l.frontier[i].0).sum::<f64>() / n,
            load_max_over_mean: layers.iter().map(|l| l.frontier[i].1).sum::<f64>() / n,
        });
    }
    points
}

fn pruning(layers: &[LayerResult]) -> Part<report::PruningRow> {
    let rows: Vec<report::PruningRow> = (0..layers[0].pruning.len())
        .map(|i| {
            let mut stats = PruneStats::default();
            layers.iter().for_each(|l| stats.merge(&l.pruning[i].stats));
            let load = layers
                .iter()
                .map(|l| l.pruning[i].traffic.as_ref().map(|t| t.summary().load_max_over_mean))
                .sum::<Option<f64>>();
            let PrunedLayer { rule, budget, .. } = &layers[0].pruning[i];
            report::PruningRow {
                method: Method::Search.name().to_owned(),
                rule: rule.name().to_owned(),
                budget: *budget,
                copies_per_token: stats.copies_per_token_after(),
                retained_mass: stats.retained_mass(),
                replaced_fraction: stats.replaced_experts as f64 / stats.pairs.max(1) as f64,
                load_max_over_mean: load.map(|s| s / layers.len() as f64),
            }
        })
        .collect();
    if rows.is_empty() {
        Part::missing("Pruning needs router weights or scores, and this profile has neither.")
    } else {
        Part::of(rows)
    }
}
