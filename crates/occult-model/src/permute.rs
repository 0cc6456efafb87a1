//! A checkpoint whose expert order realises a placement under any engine's contiguous split.

use std::path::Path;

use occult_plan::{ExpertId, LayerPlacement, Placement};

use crate::batch::Batch;
use crate::decoder::Logits;
use crate::error::{ModelError, Result};
use crate::load::{LoadOptions, ModelFiles};
use crate::moe::RoutingRecord;
use crate::rewrite::{ConvertOptions, Progress, rewrite};
use crate::spec::{ModelSpec, RoutingGroups};

/// Largest difference of logits that a permutation may make, as a part of their range: other orders of additions.
pub const MAX_LOGIT_DIFFERENCE: f32 = 2e-4;

/// What [`permute`] did.
#[derive(Debug, Clone, PartialEq)]
pub struct PermuteReport {
    /// For every MoE layer, the old expert at each new index.
    pub orders: Vec<Vec<ExpertId>>,
    /// Tokens on which the two models were compared.
    pub checked_tokens: usize,
    /// Largest difference of logits, as a part of their range.
    pub logit_difference: f32,
    /// (token, layer) pairs that chose other experts; only ties and near-ties can.
    pub routing_changes: usize,
}

/// The experts of rank 0, then those of rank 1 and so on: entry `i` is the old id of new expert `i`. Every rank must hold
/// equally many experts and none twice, because a contiguous split gives every rank equally many.
///
/// With routing groups, every group of consecutive new experts must be one of the old groups, or the model would change.
pub fn expert_order(layer: &LayerPlacement, groups: Option<RoutingGroups>) -> Result<Vec<ExpertId>> {
    let (e, w) = (layer.num_experts(), layer.num_ranks());
    if layer.has_replicas() {
        let message =
            format!("{} slots hold {e} experts: replicas cannot be a permutation", layer.num_slots());
        return Err(ModelError::request(message));
    }
    let mut order = Vec::with_capacity(e);
    for rank in 0..w {
        let held = layer.experts_of(rank as u16);
        if held.len() * w != e {
            let message = format!(
                "rank {rank} holds {} of {e} experts; a contiguous split over {w} ranks needs equal parts",
                held.len()
            );
            return Err(ModelError::request(message));
        }
        order.extend_from_slice(held);
    }
    if let Some(groups) = groups {
        let size = e / groups.num_groups;
        for (g, chunk) in order.chunks(size).enumerate() {
            let mut old: Vec<usize> = chunk.iter().map(|&id| usize::from(id) / size).collect();
            old.dedup();
            if old.len() != 1 {
                let message = format!(
                    "new experts {} to {} come from routing groups {old:?}: experts of a group must stay together",
                    g * size,
                    (g + 1) * size - 1
                );
                return Err(ModelError::request(message));
            }
        }
    }
    Ok(order)
}

/// Is given a directory that has everything but its name, and [`PermuteReport::orders`].
pub type Beside<'a> = dyn FnMut(&Path, &[Vec<ExpertId>]) -> Result<()> + 'a;

/// Writes the model in `from` to the new directory `to` with its experts in the order of `placement` (one table per MoE
/// layer): router rows and experts move together. `beside` may rewrite what else in the directory names experts. Both models
/// then compute the logits of `sample`, or of made-up tokens; `to` appears only if they agree within
/// [`MAX_LOGIT_DIFFERENCE`]. `progress` is told while weights are written.
pub fn permute(
    from: &Path,
    placement: &Placement,
    to: &Path,
    sample: Option<&[u32]>,
    progress: &mut Progress<'_>,
    beside: &mut Beside<'_>,
) -> Result<PermuteReport> {
    let files = ModelFiles::open(from, LoadOptions::default())?;
    let spec = files.spec();
    let layers = placement.layers();
    if layers.len() != spec.num_moe_layers() || placement.num_experts() != spec.moe.router.num_experts {
        let message = format!(
            "the placement is for {} layers of {} experts, the model has {} of {}",
            layers.len(),
            placement.num_experts(),
            spec.num_moe_layers(),
            spec.moe.router.num_experts
        );
        return Err(ModelError::request(message));
    }
    let orders = layers
        .iter()
        .enumerate()
        .map(|(i, l)| {
            expert_order(l, spec.moe.router.groups)
                .map_err(|e| ModelError::request(format!("MoE layer {i}: {e}")))
        })
        .collect::<Result<Vec<_>>>()?;
    let ids = match sample {
        Some(ids) => ids.to_vec(),
        None => made_up(spec),
    };
    let before = run(&files, &ids)?;
    let options = ConvertOptions { layout: files.names().layout, dtype: None };
    let (mut logit_difference, mut routing_changes) = (0.0, 0);
    rewrite(&files, to, &options, Some(&orders), progress, |dir| {
        beside(dir, &orders)?;
        let after = run(&ModelFiles::open(dir, LoadOptions::default())?, &ids)?;
        logit_difference = difference(&before.logits, &after.logits);
        // A difference that is no number must not pass.
        if logit_difference.is_nan() || logit_difference > MAX_LOGIT_DIFFERENCE {
            let message = format!(
                "after permuting, logits differ by {logit_difference:.1e} of their range, limit {MAX_LOGIT_DIFFERENCE:.0e}"
            );
            return Err(ModelError::request(message));
        }
        routing_changes = changes(&before, &after, &orders);
        Ok(())
    })?;
    Ok(PermuteReport { orders, checked_tokens: ids.len(), logit_difference, routing_changes })
}

struct Outcome {
    logits: Vec<f32>,
    /// Per MoE layer `[T, K]`.
    ids: Vec<Vec<ExpertId>>,
    top_k: usize,
}

fn run(files: &ModelFiles, ids: &[u32]) -> Result<Outcome> {
    let model = files.load()?;
    let mut chosen = Vec::new();
    let mut observe = |r: &RoutingRecord<'_>| {
        chosen.push(r.routing.expert_ids.clone());
        Ok(())
    };
    let logits = model.forward(&Batch::single(ids)?, None, Logits::All, Some(&mut observe))?;
    let logits = logits.flatten_all()?.to_vec1()?;
    Ok(Outcome { logits, ids: chosen, top_k: files.spec().moe.router.top_k })
}

/// Ids spread over the vocabulary, the same for every model of its size.
fn made_up(spec: &ModelSpec) -> Vec<u32> {
    let length = spec.context_len.min(64);
    (0..length as u64).map(|i| ((i * 2_654_435_761 + 12_345) % spec.vocab_size as u64) as u32).collect()
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    let (mut low, mut high, mut diff) = (f32::INFINITY, f32::NEG_INFINITY, 0f32);
    for (a, b) in a.iter().zip(b) {
        (low, high) = (low.min(*a), high.max(*a));
        let d = (a - b).abs();
        diff = if d.is_nan() { f32::NAN } else { diff.max(d) };
        if diff.is_nan() {
            return f32::NAN;
        }
    }
    if high > low { diff / (high - low) } else { diff }
}

fn changes(before: &Outcome, after: &Outcome, orders: &[Vec<ExpertId>]) -> usize {
    let sorted = |row: &[ExpertId], map: &dyn Fn(ExpertId) -> ExpertId| {
        let mut row: Vec<ExpertId> = row.iter().map(|&id| map(id)).collect();
        row.sort_unstable();
        row
    };
    let layers = before.ids.iter().zip(&after.ids).zip(orders);
    let layer = |((old, new), order): ((&Vec<ExpertId>, &Vec<ExpertId>), &Vec<ExpertId>)| {
        let rows = old.chunks(before.top_k).zip(new.chunks(after.top_k));
        let to_old = |id: ExpertId| order.get(usize::from(id)).copied().unwrap_or(id);
        rows.filter(|(o, n)| sorted(o, &|id| id) != sorted(n, &to_old)).count()
    };
    layers.map(layer).sum()
}
