//! The decision of [`Rule::BestMass`] where only the chosen experts' weights are known.

use super::{Budget, PruneSpec, PruneStats, RouterRule, Rule, prune};
use crate::{LayerPlacement, PlanError, Result, Routing, Topology};

/// Stands for "never chosen": its probability is zero beside any chosen expert's.
const NEVER: f32 = -1e30;

/// Which ranks `best-mass` would allow each token, from its chosen experts' weights alone (positive, proportional to their
/// probabilities). Copies and the number of replaced experts are exactly those of [`prune`]. Masses are shares of a token's
/// own chosen weights, every token counting the same. *Which* experts would take the place of the others is not known, so
/// `new_mass` counts the kept experts only.
///
/// Errors when the routing has no weights, and like [`prune`].
pub fn best_mass_ranks_only(
    routing: &Routing<'_>,
    placement: &LayerPlacement,
    topology: Topology,
    budget: Budget,
) -> Result<PruneStats> {
    let Some(weights) = routing.weights() else {
        return Err(PlanError::Missing {
            what: "choosing ranks by best-mass",
            missing: "the weights [T, top_k] of the chosen experts",
        });
    };
    let (e, k) = (routing.num_experts(), routing.top_k());
    // In blocks, so that [T, E] scores are never in memory at once.
    let block = 4_096;
    let mut stats = PruneStats::default();
    let mut scores = Vec::new();
    let rows = routing.expert_ids().chunks(block * k).zip(weights.chunks(block * k)).enumerate();
    for (i, (ids, weights)) in rows {
        scores.clear();
        scores.resize(ids.len() / k * e, NEVER);
        for (row, (ids, weights)) in ids.chunks_exact(k).zip(weights.chunks_exact(k)).enumerate() {
            for (&id, &w) in ids.iter().zip(weights) {
                scores[row * e + usize::from(id)] = libm::logf(w.max(f32::MIN_POSITIVE));
            }
        }
        let occurrences: Vec<u32> = (0..ids.len() / k)
            .map(|row| u32::try_from(routing.occurrences(i * block + row)).unwrap_or(u32::MAX))
            .collect();
        let rows = Routing::new(e, k, ids)?.with_scores(&scores)?.with_occurrences(&occurrences)?;
        let spec = PruneSpec { rule: Rule::BestMass, budget, router: &RouterRule::softmax(true) };
        stats.merge(&prune(&rows, placement, topology, spec)?.stats);
    }
    Ok(stats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_best_mass_on_all_scores() {
        let (e, k, w, rows) = (12usize, 4usize, 4usize, 300usize);
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 24) as f32
        };
        let logits: Vec<f32> = (0..rows * e).map(|_| 4.0 * next()).collect();
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for row in logits.chunks_exact(e) {
            let mut order: Vec<u16> = (0..e as u16).collect();
            order.sort_by(|&a, &b| row[usize::from(b)].total_cmp(&row[usize::from(a)]).then(a.cmp(&b)));
            let sum: f32 = row.iter().map(|l| l.exp()).sum();
            ids.extend_from_slice(&order[..k]);
            weights.extend(order[..k].iter().map(|&x| row[usize::from(x)].exp() / sum));
        }
        let routing = Routing::new(e, k, &ids).unwrap();
        let placement = crate::placement::contiguous::place(e, w).unwrap();
        let topology = Topology::flat(w).unwrap();
        for budget in [Budget::Fixed { max_ranks: 2 }, Budget::Adaptive { max_ranks: 3, share: 0.8 }] {
            let with_scores = routing.with_scores(&logits).unwrap();
            let spec = PruneSpec { rule: Rule::BestMass, budget, router: &RouterRule::softmax(false) };
            let full = prune(&with_scores, &placement, topology, spec).unwrap().stats;
            let with_weights = routing.with_weights(&weights).unwrap();
            let ranks = best_mass_ranks_only(&with_weights, &placement, topology, budget).unwrap();
            assert_eq!(ranks.copies_after, full.copies_after);
            assert_eq!(ranks.replaced_experts, full.replaced_experts);
            assert!(full.replaced_experts > 0);
            let alone = (0..rows).map(|t| {
                let row = Routing::new(e, k, &ids[t * k..(t + 1) * k]).unwrap();
                let row = row.with_scores(&logits[t * e..(t + 1) * e]).unwrap();
                prune(&row, &placement, topology, spec).unwrap().stats.retained_mass()
            });
            let mean = alone.sum::<f64>() / rows as f64;
            assert!((ranks.retained_mass() - mean).abs() < 1e-5, "{} {mean}", ranks.retained_mass());
        }
        let error = best_mass_ranks_only(&routing, &placement, topology, Budget::Fixed { max_ranks: 1 });
        assert!(error.unwrap_err().to_string().contains("weights"));
    }
}
