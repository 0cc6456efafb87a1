//! Weights of ranks under which pruning loads the ranks evenly.

use super::{PruneSpec, PruneStats, Rule, prune};
use crate::{HomeRanks, LayerPlacement, LayerTraffic, PlanError, Result, Routing, Topology};

/// Prunings of the whole routing on the way to the weights.
const ROUNDS: usize = 40;
/// Change of a weight's logarithm in the first round, per unit of load above the cap.
const STEP: f64 = 0.5;
/// Where within the cap the search aims, so that other tokens keep to it as well: this share of the way from even.
const AIM: f64 = 0.75;

/// What [`balance`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct Balanced {
    /// The placement with weights of its ranks.
    pub placement: LayerPlacement,
    /// Figures of the routing pruned with them.
    pub stats: PruneStats,
    /// Its load: (token, expert) pairs of the busiest rank over the mean.
    pub load_max_over_mean: f64,
}

/// Finds weights of the ranks ([`LayerPlacement::with_rank_weights`]) with which pruning as `spec` says leaves no rank with
/// more than `load_cap` times the mean load, and loses as little routing mass as may be. A token's ranks then depend on the
/// token alone, whatever it is computed with.
///
/// Dual ascent: a rank above the cap loses weight in proportion to its excess, one below it regains weight up to 1, in
/// steps that get smaller. Of all rounds the one that keeps to the cap with the most mass wins, otherwise the most even one.
/// Weights that the placement has already do not count.
///
/// Only [`Rule::BestMass`] and [`Rule::LeastError`] choose ranks by mass; other rules are refused. Errors on a cap below 1,
/// without tokens, and as [`prune`] does.
pub fn balance(
    routing: &Routing<'_>,
    placement: &LayerPlacement,
    topology: Topology,
    spec: PruneSpec<'_>,
    load_cap: f64,
) -> Result<Balanced> {
    if !matches!(spec.rule, Rule::BestMass | Rule::LeastError) {
        return Err(PlanError::range(
            "the rule that loads ranks evenly",
            "best-mass or least-error",
            "another",
        ));
    }
    if !(load_cap >= 1.0 && load_cap.is_finite()) {
        return Err(PlanError::range("load cap (max/mean)", "a number from 1", load_cap));
    }
    let num_ranks = placement.num_ranks();
    let aim = 1.0 + AIM * (load_cap - 1.0);
    let mut lost = vec![0.0f64; num_ranks];
    let mut best: Option<Balanced> = None;
    for round in 0..ROUNDS {
        let weights = lost.iter().map(|&l| libm::exp(-l) as f32).collect();
        let placement = placement.clone().with_rank_weights(weights)?;
        let pruned = prune(routing, &placement, topology, spec)?;
        let traffic =
            LayerTraffic::measure(&placement, topology, HomeRanks::Uniform, &pruned.routing.view()?)?;
        let load_max_over_mean = traffic.summary().load_max_over_mean;
        let found = Balanced { placement, stats: pruned.stats, load_max_over_mean };
        if best.as_ref().is_none_or(|best| found.is_better_than(best, load_cap)) {
            best = Some(found);
        }
        let load = traffic.load();
        let mean = load.iter().sum::<u64>() as f64 / num_ranks as f64;
        let step = STEP / (1.0 + round as f64 / 8.0);
        for (lost, &load) in lost.iter_mut().zip(&load) {
            *lost = (*lost + step * (load as f64 / mean - aim)).max(0.0);
        }
    }
    best.ok_or(PlanError::NoTokens)
}

impl Balanced {
    fn is_better_than(&self, other: &Self, load_cap: f64) -> bool {
        match [self, other].map(|b| b.load_max_over_mean <= load_cap) {
            [true, true] => self.stats.kept_mass > other.stats.kept_mass,
            [false, false] => self.load_max_over_mean < other.load_max_over_mean,
            [keeps, _] => keeps,
        }
    }
}
