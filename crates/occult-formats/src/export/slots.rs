//! From a placement to slots: the same number on every rank of every layer.

use occult_plan::{ExpertId, LayerPlacement};

use super::ExportOptions;
use crate::PlacementFile;
use crate::error::{FormatError, Result};

/// `[layers][W * slots_per_rank]` expert ids, and how many slots hold replicas that the placement did not ask for.
pub(super) struct Slots {
    pub(super) layers: Vec<Vec<ExpertId>>,
    pub(super) per_rank: usize,
    pub(super) added: usize,
}

impl Slots {
    /// Fills the free slots of short ranks with replicas of the hottest experts.
    pub(super) fn of(file: &PlacementFile, options: &ExportOptions) -> Result<Self> {
        let placement = &file.placement;
        let experts = placement.num_experts();
        let needed = placement.layers().iter().flat_map(rank_sizes).max().unwrap_or(0);
        let per_rank = options.slots_per_rank.unwrap_or(needed);
        if per_rank < needed || per_rank > experts {
            let message = format!(
                "slots per rank: {per_rank} were asked for, this placement needs {needed} and at most {experts} (the number of experts) make sense"
            );
            return Err(FormatError::Request(message));
        }
        if let Some(counts) = &options.counts
            && (counts.len() != placement.layers().len() || counts.iter().any(|c| c.len() != experts))
        {
            let message = format!(
                "the counts are for another model: expected {} layers of {experts} experts",
                placement.layers().len()
            );
            return Err(FormatError::Request(message));
        }
        let mut layers = Vec::with_capacity(placement.layers().len());
        let mut added = 0;
        for (i, layer) in placement.layers().iter().enumerate() {
            let counts = options.counts.as_ref().and_then(|c| c.get(i));
            if counts.is_none() && rank_sizes(layer).any(|n| n < per_rank) {
                return Err(uneven(file, i, layer, per_rank));
            }
            added += layer.num_ranks() * per_rank - layer.num_slots();
            layers.push(fill(layer, per_rank, counts.map_or(&[], Vec::as_slice)));
        }
        Ok(Self { layers, per_rank, added })
    }

    /// Notes for the user about redundant slots.
    pub(super) fn notes(&self, file: &PlacementFile) -> Vec<String> {
        let layers = self.layers.len();
        let mut notes = Vec::new();
        if self.added > 0 {
            notes.push(format!(
                "{} slots over {layers} layers that the placement leaves free hold replicas of the hottest experts: an engine \
                 needs equal slots on all ranks",
                self.added
            ));
        }
        let redundant = self.total() - file.placement.num_experts();
        notes.push(format!(
            "{} slots on {} ranks, {redundant} of them redundant",
            self.total(),
            file.placement.topology().num_ranks()
        ));
        notes
    }

    /// `R`, slots on all ranks.
    pub(super) fn total(&self) -> usize {
        self.layers.first().map_or(0, Vec::len)
    }
}

fn rank_sizes(layer: &LayerPlacement) -> impl Iterator<Item = usize> {
    (0..layer.num_ranks()).map(|r| layer.experts_of(r as u16).len())
}

fn uneven(file: &PlacementFile, i: usize, layer: &LayerPlacement, per_rank: usize) -> FormatError {
    let sizes: Vec<String> = rank_sizes(layer).map(|n| n.to_string()).collect();
    let id = file.meta.layer_ids.get(i).copied().unwrap_or_default();
    FormatError::Request(format!(
        "layer {i} (layer {id} of the model) has {} experts on its ranks, but this format needs {per_rank} slots on each: \
         give the profile, so that the free slots can hold replicas of its hottest experts, or place equal experts per rank",
        sizes.join(", ")
    ))
}

/// Slots of one layer: the experts of each rank, then replicas. The next replica is of the expert with the largest load
/// per replica among those the rank does not hold (ties: the lower id).
fn fill(layer: &LayerPlacement, per_rank: usize, counts: &[u64]) -> Vec<ExpertId> {
    let mut replicas: Vec<u64> =
        (0..layer.num_experts()).map(|e| layer.ranks_of(e as ExpertId).len() as u64).collect();
    let mut slots = Vec::with_capacity(layer.num_ranks() * per_rank);
    for rank in 0..layer.num_ranks() {
        let start = slots.len();
        slots.extend_from_slice(layer.experts_of(rank as u16));
        while slots.len() < start + per_rank {
            let mut best: Option<(u128, u128, ExpertId)> = None;
            for (e, (&count, &n)) in counts.iter().zip(&replicas).enumerate() {
                let e = e as ExpertId;
                let (count, n) = (u128::from(count), u128::from(n));
                let hotter = best.is_none_or(|(c, m, _)| count * m > c * n);
                if hotter && slots.get(start..).is_some_and(|own| !own.contains(&e)) {
                    best = Some((count, n, e));
                }
            }
            // `per_rank` is at most the number of experts, so there is one that the rank does not hold.
            let Some((_, _, e)) = best else { break };
            if let Some(n) = replicas.get_mut(usize::from(e)) {
                *n += 1;
            }
            slots.push(e);
        }
    }
    slots
}
