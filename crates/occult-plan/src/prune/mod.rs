//! Collaboration pruning: each token visits at most so many ranks, and keeps `K` experts.
//!
//! 1. A token that visits no more than its budget is left as it is, bit for bit.
//! 2. Otherwise *allowed ranks* are searched for it ([`Rule`], [`Budget`]).
//! 3. An expert is *reachable* when it lives on an allowed rank; one that has replicas, when any of them does. Where the
//!    allowed ranks hold fewer than `K` experts, the token's own experts ask for theirs in descending score (the lowest
//!    rank that holds it) until `K` are reachable. So a token always keeps `K` experts, if need be on more ranks.
//! 4. `K` reachable experts are chosen by the rule, and get the model's own weights ([`RouterRule`]).
//!
//! Where ranks are chosen by probability, that on a rank counts as often as the placement says
//! ([`LayerPlacement::with_rank_weights`]): so pruning can load the ranks evenly ([`balance()`]).
//!
//! Scores are the router's logits for all experts, `[T, E]`. Ties of scores go to the lower expert id.
//!
//! Group-limited routers (DeepSeek-V2 and -V3 choose among the experts of `topk_groups` groups): pruning knows nothing of
//! groups. Where groups are placed whole, a limit below `topk_groups` ranks would take from every token a group that its
//! router wanted: [`check_limit`] refuses it. Where groups are spread over ranks, `router-score` can bring in an expert of a group that the
//! router had masked; `similarity`, `best-mass` and `least-error` keep every reachable expert the router chose.

mod balance;
mod limit;
mod rank_set;
mod ranks_only;
mod router_rule;
mod rules;
mod stats;
mod token;

use crate::{
    LayerPlacement, PlanError, Result, Routing, RoutingBuf, SimilarityTable, Topology,
    dispatch_plan::check_placement,
};
pub use balance::{Balanced, balance};
pub use limit::{RoutingGroups, check_limit};
pub use ranks_only::best_mass_ranks_only;
pub use router_rule::{RouterRule, Scoring};
pub use stats::PruneStats;
use token::Pruner;

/// How the allowed ranks are found, and what takes the place of experts outside them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule<'a> {
    /// Allowed are the ranks of the token's experts, walked in descending score until the budget is used. Chosen are the
    /// best scores of all reachable experts.
    RouterScore,
    /// Allowed ranks as for [`Rule::RouterScore`]. Every reachable expert of the token is kept; the others, in descending
    /// score, are replaced each by the reachable expert most similar to it that is not chosen yet (ties: lower id).
    Similarity(&'a SimilarityTable),
    /// Allowed is the set of ranks on which the token's experts have most probability (times the weights of the ranks, where
    /// the placement has some); these experts are kept and the best scores of other reachable experts fill up. The set is exact without replicas; with replicas it is exact up to
    /// 2,000 possible sets, beyond that it is found greedily and has at least `1 - 1/e` of the best set's probability.
    BestMass,
    /// Like [`Rule::BestMass`] with squared probabilities: allowed are the ranks off which the token's experts have the least
    /// sum of squared weights. Where outputs of experts are about equally long and unlike each other, that sum is
    /// proportional to the expected squared change of the layer's output.
    LeastError,
}

/// How many ranks a token may visit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// Every token at most so many. The number of ranks of the placement, or more, changes nothing.
    Fixed {
        /// At least 1.
        max_ranks: usize,
    },
    /// Per token the fewest ranks, found by the rule for 1, 2, ... ranks, on which the router's choice keeps `share` of
    /// its probability; `max_ranks` where it takes more.
    Adaptive {
        /// At least 1.
        max_ranks: usize,
        /// Above 0, at most 1.
        share: f64,
    },
    /// Per token the fewest ranks, found by the rule for 1, 2, ... ranks, off which the router's choice has at most `error` of
    /// weight: the root of the sum of squared routing weights. `max_ranks` where it takes more. Unlike a share it asks little
    /// for tokens that weigh all their experts low, as models without `norm_topk_prob` do.
    Bounded {
        /// At least 1.
        max_ranks: usize,
        /// Above 0, in units of routing weights.
        error: f64,
    },
}

impl Budget {
    /// The most ranks of any token.
    pub fn max_ranks(self) -> usize {
        match self {
            Self::Fixed { max_ranks }
            | Self::Adaptive { max_ranks, .. }
            | Self::Bounded { max_ranks, .. } => max_ranks,
        }
    }

    /// The same budget with another most number of ranks.
    pub fn with_max_ranks(self, max_ranks: usize) -> Self {
        match self {
            Self::Fixed { .. } => Self::Fixed { max_ranks },
            Self::Adaptive { share, .. } => Self::Adaptive { max_ranks, share },
            Self::Bounded { error, .. } => Self::Bounded { max_ranks, error },
        }
    }

    fn check(self) -> Result<()> {
        if self.max_ranks() == 0 {
            return Err(PlanError::range("max_ranks", "at least 1", 0));
        }
        match self {
            Self::Adaptive { share, .. } if !(share > 0.0 && share <= 1.0) => {
                Err(PlanError::range("share of routing mass", "above 0, at most 1", share))
            }
            Self::Bounded { error, .. } if !(error > 0.0 && error.is_finite()) => {
                Err(PlanError::range("bound on the weight lost", "above 0, finite", error))
            }
            _ => Ok(()),
        }
    }
}

/// How the tokens of a layer are pruned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PruneSpec<'a> {
    /// How ranks and experts are found.
    pub rule: Rule<'a>,
    /// How many ranks.
    pub budget: Budget,
    /// How the model weighs the experts that are kept.
    pub router: &'a RouterRule,
}

/// Pruned routing, and what pruning did.
#[derive(Debug, Clone, PartialEq)]
pub struct Pruned {
    /// Rows that changed have their ids in descending score. Weights exist where the input had them, occurrences
    /// likewise. Scores are not repeated: those of the input are still the router's.
    pub routing: RoutingBuf,
    /// Figures of this layer's tokens.
    pub stats: PruneStats,
}

/// Limits the ranks that each token of one layer visits.
///
/// Needs router logits as `routing`'s scores. Errors when they are missing, when the placement or the similarity table is
/// of other experts or ranks, and when a budget or router rule makes no sense.
pub fn prune(
    routing: &Routing<'_>,
    placement: &LayerPlacement,
    topology: Topology,
    spec: PruneSpec<'_>,
) -> Result<Pruned> {
    let num_experts = routing.num_experts();
    check_placement(routing, placement, topology)?;
    spec.budget.check()?;
    spec.router.check(num_experts)?;
    if let Rule::Similarity(table) = spec.rule
        && table.num_experts() != num_experts
    {
        let (expected, found) = (num_experts, table.num_experts());
        return Err(PlanError::Shape { what: "experts of the similarity table", expected, found });
    }
    let Some(scores) = routing.scores() else {
        let (what, missing) = ("collaboration pruning", "router logits of all experts (scores [T, E])");
        return Err(PlanError::Missing { what, missing });
    };

    let mut pruned = Pruned {
        routing: RoutingBuf {
            num_experts,
            top_k: routing.top_k(),
            expert_ids: routing.expert_ids().to_vec(),
            weights: routing.weights().map(<[f32]>::to_vec),
            scores: None,
            occurrences: routing.occurrences_slice().map(<[u32]>::to_vec),
        },
        stats: PruneStats::default(),
    };
    let mut pruner = Pruner::new(routing, placement, topology, spec);
    for (row, logits) in scores.chunks_exact(num_experts).enumerate() {
        let entries = row * routing.top_k()..(row + 1) * routing.top_k();
        let weights = pruned.routing.weights.as_mut().map(|weights| &mut weights[entries.clone()]);
        let ids = &mut pruned.routing.expert_ids[entries];
        pruner.token(logits, routing.occurrences(row), ids, weights, &mut pruned.stats);
    }
    Ok(pruned)
}
