//! `occult traffic`

use anyhow::Result;
use occult_plan::cost::{Cluster, Exchange, LayerShape, StepTime, explain, predict};
use occult_plan::{LayerTraffic, Topology};
use serde_json::{Value, json};

use crate::args::{ShapeArgs, TrafficArgs};
use crate::measuring::{self, COUNTS_ONLY};
use crate::output::{Table, bytes, print, print_json, seconds};
use crate::{parallel, progress, setup};

pub(super) fn run(args: &TrafficArgs) -> Result<()> {
    let profile = setup::profile(&args.profile)?;
    let file = setup::placement(&args.placement, profile.meta())?;
    let topology = file.placement.topology();
    let cluster = setup::cluster(&args.cluster, topology)?;
    let shape = layer_shape(&args.shape)?;
    let bar = progress::bar(profile.num_layers() as u64, "layers");
    let layers = parallel::map_ordered(profile.num_layers(), setup::threads(args.threads), |layer| {
        let placement = &file.placement.layers()[layer];
        let figures = measuring::measure(&profile, layer, placement, topology, args.home)?;
        bar.inc(1);
        Ok(figures)
    });
    bar.finish_and_clear();
    let layers = layers?;
    let traffic: Option<Vec<&LayerTraffic>> = layers.iter().map(|l| l.traffic.as_ref()).collect();
    let predictions = match (&cluster, &traffic) {
        (Some(cluster), Some(traffic)) => predictions(cluster, &shape, traffic, args.shape.step_tokens)?,
        _ => Vec::new(),
    };
    if args.json {
        let layers_json = layers.iter().map(|l| {
            let more = l.traffic.as_ref().map_or(json!({}), |t| traffic_json(t, &shape));
            let mut value = l.json(json!({ "layer": l.layer_id }))?;
            value
                .as_object_mut()
                .expect("figures are an object")
                .extend(more.as_object().cloned().unwrap_or_default());
            Ok(value)
        });
        return print_json(&json!({
            "profile": args.profile,
            "placement": args.placement,
            "ranks": topology.num_ranks(),
            "nodes": topology.num_nodes(),
            "hidden": shape.hidden,
            "dtype": args.shape.dtype,
            "warnings": if traffic.is_none() { vec![COUNTS_ONLY] } else { vec![] },
            "layers": layers_json.collect::<Result<Vec<Value>>>()?,
            "mean": measuring::mean_json(&layers, json!({}))?,
            "predicted": predictions.iter().map(|(e, s)| prediction_json(cluster.as_ref(), *e, s)).collect::<Vec<_>>(),
        }));
    }
    let mut text = format!(
        "{} on {} ranks ({} nodes), method {}\n\n{}",
        args.placement.display(),
        topology.num_ranks(),
        topology.num_nodes(),
        file.meta.method,
        measuring::table(&layers, topology.num_nodes() > 1)
    );
    match &traffic {
        None => eprintln!("warning: {COUNTS_ONLY}"),
        Some(traffic) => {
            text.push_str(&bytes_text(traffic, &shape, args));
            if topology.num_ranks() <= 16 {
                text.push_str(&pairs_text(traffic, topology));
            }
            text.push_str(&predictions_text(cluster.as_ref(), &predictions, args.shape.step_tokens));
            if let (true, Some(cluster), Some((_, steps))) = (args.explain, &cluster, predictions.first()) {
                text.push_str(&format!("\nHow the time of layer {} comes about:\n", layers[0].layer_id));
                for line in explain(cluster, &shape, &steps[0]) {
                    text.push_str(&format!("  {line}\n"));
                }
            }
        }
    }
    print(&text)
}

/// Sizes of an expert layer from the command line.
pub(super) fn layer_shape(args: &ShapeArgs) -> Result<LayerShape> {
    Ok(LayerShape::gated(args.hidden, args.ffn, setup::dtype_bytes(&args.dtype)?))
}

/// Step times of every layer, for each kind of exchange that differs under this cluster.
fn predictions(
    cluster: &Cluster,
    shape: &LayerShape,
    traffic: &[&LayerTraffic],
    step_tokens: u64,
) -> Result<Vec<(Exchange, Vec<StepTime>)>> {
    let kinds = Exchange::ALL.into_iter().filter(|&e| e != Exchange::PerNode || cluster.nodes > 1);
    kinds
        .map(|kind| {
            let steps = traffic.iter().map(|t| Ok(predict(cluster, shape, t, kind, Some(step_tokens))?));
            Ok((kind, steps.collect::<Result<Vec<_>>>()?))
        })
        .collect()
}

fn sum(steps: &[StepTime], part: fn(&StepTime) -> f64) -> f64 {
    steps.iter().map(part).sum()
}

fn prediction_json(cluster: Option<&Cluster>, kind: Exchange, steps: &[StepTime]) -> Value {
    json!({
        "cluster": cluster.map(|c| c.name.as_str()),
        "exchange": kind.name(),
        "forward_seconds": sum(steps, |s| s.forward.total_s),
        "forward_dispatch_seconds": sum(steps, |s| s.forward.dispatch.seconds),
        "forward_compute_seconds": sum(steps, |s| s.forward.compute_s),
        "forward_combine_seconds": sum(steps, |s| s.forward.combine.seconds),
        "backward_seconds": sum(steps, |s| s.backward.total_s),
        "layers": steps,
    })
}

fn traffic_json(traffic: &LayerTraffic, shape: &LayerShape) -> Value {
    let w = traffic.topology().num_ranks();
    let row_bytes = shape.hidden as f64 * shape.dtype_bytes;
    let matrix = |scale: f64| -> Vec<Vec<f64>> {
        traffic.rank_rows().to_vec().chunks(w).map(|row| row.iter().map(|r| r * scale).collect()).collect()
    };
    json!({
        "rows_per_rank_pair": matrix(1.0),
        "bytes_per_rank_pair": matrix(row_bytes),
        "node_rows_per_pair": traffic.node_rows().to_vec(),
        "bytes": traffic.bytes(shape.hidden, shape.dtype_bytes),
        "experts_touched_per_rank": traffic.experts_touched_per_rank(),
        "ranks_per_token_histogram": traffic.ranks_per_token(),
    })
}

fn bytes_text(traffic: &[&LayerTraffic], shape: &LayerShape, args: &TrafficArgs) -> String {
    let per_token = |f: fn(&occult_plan::traffic::TrafficBytes) -> f64| {
        let sum: f64 = traffic
            .iter()
            .map(|t| f(&t.bytes(shape.hidden, shape.dtype_bytes)) / t.num_tokens() as f64)
            .sum();
        bytes(sum / traffic.len() as f64)
    };
    let mut text = format!(
        "\nBytes per token and layer that cross ranks (hidden {}, {}): dispatch {} + ids and weights {} + {}, combine {};\n\
         the conventional exchange sends {} each way.\n",
        shape.hidden,
        args.shape.dtype,
        per_token(|b| b.dispatch_row_bytes),
        per_token(|b| b.dispatch_id_bytes),
        per_token(|b| b.dispatch_weight_bytes),
        per_token(|b| b.combine_row_bytes),
        per_token(|b| b.conventional_dispatch_row_bytes),
    );
    if traffic.first().is_some_and(|t| t.topology().num_nodes() > 1) {
        text.push_str(&format!(
            "Between nodes, one row per (token, node): {}.\n",
            per_token(|b| b.node_dispatch_row_bytes)
        ));
    }
    text
}

/// Rows per rank pair and 1,000 tokens, mean over layers.
fn pairs_text(traffic: &[&LayerTraffic], topology: Topology) -> String {
    let w = topology.num_ranks();
    let header: Vec<String> =
        std::iter::once("from\\to".to_owned()).chain((0..w).map(|r| r.to_string())).collect();
    let mut table = Table::new(header.iter().map(String::as_str));
    for from in 0..w {
        let cell = |to: usize| {
            let rate = |t: &&LayerTraffic| 1000.0 * t.rank_rows().get(from, to) / t.num_tokens() as f64;
            format!("{:.0}", traffic.iter().map(rate).sum::<f64>() / traffic.len() as f64)
        };
        table.row(std::iter::once(from.to_string()).chain((0..w).map(cell)));
    }
    format!(
        "\nRows from rank to rank per 1,000 tokens (mean of layers; the diagonal stays at home):\n\n{}",
        table.render()
    )
}

fn predictions_text(
    cluster: Option<&Cluster>,
    predictions: &[(Exchange, Vec<StepTime>)],
    step_tokens: u64,
) -> String {
    let Some(cluster) = cluster.filter(|_| !predictions.is_empty()) else { return String::new() };
    let mut table = Table::new(["exchange", "dispatch", "compute", "combine", "forward", "backward"]);
    for (kind, steps) in predictions {
        table.row([
            kind.name().to_owned(),
            seconds(sum(steps, |s| s.forward.dispatch.seconds)),
            seconds(sum(steps, |s| s.forward.compute_s)),
            seconds(sum(steps, |s| s.forward.combine.seconds)),
            seconds(sum(steps, |s| s.forward.total_s)),
            seconds(sum(steps, |s| s.backward.total_s)),
        ]);
    }
    format!(
        "\nPredicted time of all layers, {step_tokens} tokens, {} (per-expert is the conventional exchange):\n\n{}",
        cluster.name,
        table.render()
    )
}
