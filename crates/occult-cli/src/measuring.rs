//! What placements cost on the rows of a profile, layer by layer.

use anyhow::Result;
use occult_formats::{Columns, Profile};
use occult_plan::{
    CoActivation, HomeRanks, LayerPlacement, LayerTraffic, RoutingBuf, Topology, TrafficMeter, TrafficSummary,
};
use serde_json::{Value, json};

use crate::args::Home;
use crate::output::{Table, figure, object};

/// Rows that are in memory at a time.
const CHUNK_ROWS: usize = 65_536;

/// One layer under one placement. `traffic` is absent where a profile has counts only.
#[derive(Debug, Clone)]
pub(crate) struct LayerFigures {
    pub(crate) layer_id: u32,
    pub(crate) load: Vec<u64>,
    pub(crate) intra_fraction: Option<f64>,
    pub(crate) traffic: Option<LayerTraffic>,
    pub(crate) summary: Option<TrafficSummary>,
}

impl LayerFigures {
    pub(crate) fn of_traffic(layer_id: u32, traffic: LayerTraffic) -> Self {
        let summary = traffic.summary();
        Self {
            layer_id,
            load: traffic.load(),
            intra_fraction: summary.intra_fraction,
            summary: Some(summary),
            traffic: Some(traffic),
        }
    }

    /// What counts alone tell: load, and with co-activation the intra fraction. Replicas share their expert's tokens
    /// equally.
    pub(crate) fn of_counts(
        layer_id: u32,
        placement: &LayerPlacement,
        counts: &[u64],
        coactivation: Option<&CoActivation>,
    ) -> Self {
        let mut load = vec![0; placement.num_ranks()];
        for (e, &n) in counts.iter().enumerate() {
            let holders = placement.ranks_of(e as u16);
            for (i, &r) in holders.iter().enumerate() {
                let (part, rest) = (n / holders.len() as u64, n % holders.len() as u64);
                load[usize::from(r)] += part + u64::from((i as u64) < rest);
            }
        }
        let ranks = placement.expert_ranks();
        let intra_fraction = coactivation.zip(ranks).and_then(|(pairs, ranks)| {
            let e = ranks.len();
            let (mut intra, mut all) = (0, 0);
            for i in 0..e {
                for j in i + 1..e {
                    all += pairs.get(i, j);
                    intra += if ranks[i] == ranks[j] { pairs.get(i, j) } else { 0 };
                }
            }
            (all > 0).then(|| intra as f64 / all as f64)
        });
        Self { layer_id, load, intra_fraction, traffic: None, summary: None }
    }

    /// Load of the busiest rank over the mean; 1 without load.
    pub(crate) fn load_max_over_mean(&self) -> f64 {
        let total: u64 = self.load.iter().sum();
        let max = self.load.iter().copied().max().unwrap_or(0);
        if total == 0 { 1.0 } else { max as f64 * self.load.len() as f64 / total as f64 }
    }

    /// The figures as JSON, with `more` fields. What cannot be computed is null.
    pub(crate) fn json(&self, more: Value) -> Result<Value> {
        let mut value = match &self.summary {
            Some(summary) => object(summary, more)?,
            None => object(&counts_json(self.load_max_over_mean(), self.intra_fraction), more)?,
        };
        value["load_per_rank"] = json!(self.load);
        Ok(value)
    }
}

fn counts_json(load_max_over_mean: f64, intra_fraction: Option<f64>) -> Value {
    json!({
        "copies_per_token": null,
        "remote_copies_per_token": null,
        "node_copies_per_token": null,
        "intra_fraction": intra_fraction,
        "load_max_over_mean": load_max_over_mean,
        "balancedness": 1.0 / load_max_over_mean,
        "imbalance_ratio": load_max_over_mean - 1.0,
    })
}

/// Mean over layers as JSON, with `more` fields.
pub(crate) fn mean_json(layers: &[LayerFigures], more: Value) -> Result<Value> {
    let summaries: Option<Vec<TrafficSummary>> = layers.iter().map(|l| l.summary).collect();
    match summaries.as_deref().and_then(TrafficSummary::mean) {
        Some(mean) => object(&mean, more),
        None => object(&counts_json(mean_load(layers), mean_intra(layers)), more),
    }
}

/// Mean of max/mean load over layers.
pub(crate) fn mean_load(layers: &[LayerFigures]) -> f64 {
    layers.iter().map(LayerFigures::load_max_over_mean).sum::<f64>() / layers.len().max(1) as f64
}

fn mean_intra(layers: &[LayerFigures]) -> Option<f64> {
    let sum = layers.iter().map(|l| l.intra_fraction).sum::<Option<f64>>();
    sum.map(|s| s / layers.len().max(1) as f64)
}

/// Mean of a figure over layers; none where a layer lacks it.
pub(crate) fn mean_of(layers: &[LayerFigures], figure: fn(&TrafficSummary) -> f64) -> Option<f64> {
    let sum = layers.iter().map(|l| l.summary.as_ref().map(figure)).sum::<Option<f64>>();
    sum.map(|s| s / layers.len().max(1) as f64)
}

/// A table of layers and their mean, the same columns for every command.
pub(crate) fn table(layers: &[LayerFigures], several_nodes: bool) -> String {
    let mut header =
        vec!["layer", "copies/token", "remote", "uniform", "optimum", "intra", "load max/mean", "balanced"];
    if several_nodes {
        header.insert(3, "node copies");
    }
    let mut table = Table::new(header);
    let mut add = |name: String, summary: Option<TrafficSummary>, intra: Option<f64>, load: f64| {
        let get = |f: fn(&TrafficSummary) -> f64, d| figure(summary.as_ref().map(f), d);
        let mut cells = vec![
            name,
            get(|s| s.copies_per_token, 3),
            get(|s| s.remote_copies_per_token, 3),
            figure(summary.and_then(|s| s.copies_uniform), 3),
            get(|s| s.copies_optimum, 2),
            figure(intra, 3),
            format!("{load:.3}"),
            format!("{:.3}", 1.0 / load),
        ];
        if several_nodes {
            cells.insert(3, get(|s| s.node_copies_per_token, 3));
        }
        table.row(cells);
    };
    for layer in layers {
        add(layer.layer_id.to_string(), layer.summary, layer.intra_fraction, layer.load_max_over_mean());
    }
    let summaries: Option<Vec<TrafficSummary>> = layers.iter().map(|l| l.summary).collect();
    let mean = summaries.as_deref().and_then(TrafficSummary::mean);
    add("mean".to_owned(), mean, mean_intra(layers), mean_load(layers));
    table.render()
}

/// Measures one layer of a profile under a placement: all its rows, in chunks, or its counts.
pub(crate) fn measure(
    profile: &Profile,
    layer: usize,
    placement: &LayerPlacement,
    topology: Topology,
    home: Home,
) -> Result<LayerFigures> {
    let layer_id = profile.meta().layer_ids[layer];
    let Some(num_rows) = profile.num_rows(layer) else {
        let (counts, pairs) = (profile.counts(layer)?, profile.coactivation(layer)?);
        return Ok(LayerFigures::of_counts(layer_id, placement, &counts, pairs.as_ref()));
    };
    let mut meter = TrafficMeter::new(placement, topology, home_ranks(home, num_rows))?;
    profile.for_each_chunk(layer, Columns::IDS, CHUNK_ROWS, &mut |chunk| {
        meter
            .add(&chunk.routing)
            .map_err(|e| occult_formats::FormatError::plan(profile.path(), layer, chunk.first_row, e))
    })?;
    let traffic = meter.finish().map_err(|e| e.in_layer(layer))?;
    Ok(LayerFigures::of_traffic(layer_id, traffic))
}

/// Measures rows in memory.
pub(crate) fn measure_rows(
    layer_id: u32,
    rows: &RoutingBuf,
    placement: &LayerPlacement,
    topology: Topology,
    home: Home,
) -> Result<LayerFigures> {
    let home = home_ranks(home, rows.num_tokens());
    Ok(LayerFigures::of_traffic(layer_id, LayerTraffic::measure(placement, topology, home, &rows.view()?)?))
}

fn home_ranks(home: Home, num_rows: usize) -> HomeRanks {
    match home {
        Home::Uniform => HomeRanks::Uniform,
        Home::Blocks => HomeRanks::Blocks { num_rows },
    }
}

/// One sentence for a profile without token-level rows.
pub(crate) const COUNTS_ONLY: &str = "this profile has counts only: copies per token, remote copies and bytes cannot be computed \
                                      from them, only load (and the intra fraction, where co-activation was recorded)";
