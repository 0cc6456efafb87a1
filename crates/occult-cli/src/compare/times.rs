//! Predicted step times of the compared placements.

use anyhow::Result;
use occult_plan::LayerTraffic;
use occult_plan::cost::{Cluster, Exchange, LayerShape, StepTime, predict};
use occult_plan::placement::Method;

use super::{LayerResult, Names, Request};
use crate::args::PruneRule;
use crate::report::{self, Part, PruningBudget};
use crate::setup;

/// All layers of one step: the conventional exchange under the contiguous placement, every placement with one copy per
/// rank (per node and rank where there are nodes), and the pruned routing where it is known.
pub(super) fn predictions(
    request: &Request<'_>,
    names: &[Names],
    layers: &[LayerResult],
    warnings: &mut Vec<String>,
) -> Result<Part<report::Prediction>> {
    let shape =
        LayerShape::gated(request.shape.hidden, request.shape.ffn, setup::dtype_bytes(&request.shape.dtype)?);
    let ours = if request.topology.num_nodes() > 1 { Exchange::PerNode } else { Exchange::PerRank };
    let mut items = Vec::new();
    for name in request.clusters {
        let cluster = match occult_formats::cluster::preset_or_file(name)?.resized(request.topology) {
            Ok(cluster) => cluster,
            Err(error) => {
                warnings.push(format!("No times for cluster {name}: {error}."));
                continue;
            }
        };
        let mut add = |method: &str,
                       label: String,
                       exchange: Exchange,
                       traffic: &dyn Fn(&LayerResult) -> Option<LayerTraffic>| {
            let steps: Option<Vec<LayerTraffic>> = layers.iter().map(traffic).collect();
            let Some(steps) = steps else { return Ok(()) };
            let steps: Vec<StepTime> = steps
                .iter()
                .map(|t| predict(&cluster, &shape, t, exchange, Some(request.shape.step_tokens)))
                .collect::<Result<_, _>>()?;
            items.push(prediction(&cluster, method, label, &steps));
            anyhow::Ok(())
        };
        let of = |i: usize| move |l: &LayerResult| l.methods[i].figures.traffic.clone();
        add(&names[0].name, "Conventional: one row per expert".to_owned(), Exchange::PerExpert, &of(0))?;
        for (i, names) in names.iter().enumerate() {
            add(&names.name, names.label.clone(), ours, &of(i))?;
        }
        for (i, pruned) in layers[0].pruning.iter().enumerate() {
            if let (PruneRule::BestMass, PruningBudget::MaxRanks(m @ 1..=2)) = (pruned.rule, pruned.budget) {
                let label = format!("Search, pruned to {m} rank{}", if m == 1 { "" } else { "s" });
                add(Method::Search.name(), label, ours, &|l| l.pruning[i].traffic.clone())?;
            }
        }
    }
    Ok(if items.is_empty() { Part::missing("No cluster to predict times for.") } else { Part::of(items) })
}

fn prediction(cluster: &Cluster, method: &str, label: String, steps: &[StepTime]) -> report::Prediction {
    let sum = |part: fn(&StepTime) -> f64| steps.iter().map(part).sum();
    report::Prediction {
        cluster: cluster.name.clone(),
        method: method.to_owned(),
        label,
        dispatch_seconds: sum(|s| s.forward.dispatch.seconds),
        compute_seconds: sum(|s| s.forward.compute_s),
        combine_seconds: sum(|s| s.forward.combine.seconds),
        total_seconds: sum(|s| s.forward.total_s),
    }
}
