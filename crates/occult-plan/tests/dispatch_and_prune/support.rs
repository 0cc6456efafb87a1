//! Random layers: placements with empty ranks and replicas, routing with and without tokens.

use occult_plan::{LayerPlacement, Rank, ReplicaChooser, Routing, RoutingBuf, Topology};
use proptest::prelude::*;

/// The routing of one rank's tokens, and where the experts are.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) routing: RoutingBuf,
    pub(crate) placement: LayerPlacement,
}

impl Case {
    pub(crate) fn routing(&self) -> Routing<'_> {
        self.routing.view().expect("generated routing is valid")
    }

    pub(crate) fn topology(&self) -> Topology {
        Topology::flat(self.placement.num_ranks()).expect("there are ranks")
    }

    /// The rank that serves each entry, `[T, K]`.
    pub(crate) fn entry_ranks(&self) -> Vec<Rank> {
        let mut chooser = ReplicaChooser::new(&self.placement, self.topology());
        let mut ranks = vec![0; self.routing.expert_ids.len()];
        for (ids, ranks) in self.routing().rows().zip(ranks.chunks_exact_mut(self.routing.top_k)) {
            chooser.assign(ids, 1, ranks);
        }
        ranks
    }
}

/// Experts on `num_ranks` ranks: each on a random rank, so ranks are uneven and may be empty; in half of the cases some
/// experts have further replicas.
pub(crate) fn placement(num_experts: usize, num_ranks: usize) -> impl Strategy<Value = LayerPlacement> {
    let home = 0..num_ranks;
    let further = prop_oneof![4 => Just(0u8), 1 => any::<u8>()];
    let replicated = any::<bool>();
    (prop::collection::vec((home, further), num_experts), replicated).prop_map(move |(homes, replicated)| {
        let ranks: Vec<Vec<u16>> = (0..num_ranks)
            .map(|rank| {
                let here =
                    |(home, further): (usize, u8)| home == rank || (replicated && further >> rank & 1 == 1);
                (0..num_experts).filter(|&e| here(homes[e])).map(|e| e as u16).collect()
            })
            .collect();
        LayerPlacement::from_rank_experts(num_experts, &ranks).expect("every expert has a home")
    })
}

/// `top_k` distinct experts in any order.
pub(crate) fn expert_ids(num_experts: usize, top_k: usize) -> impl Strategy<Value = Vec<u16>> {
    let all: Vec<u16> = (0..num_experts as u16).collect();
    prop::sample::subsequence(all, top_k).prop_shuffle()
}

/// Number of experts, top_k and ranks.
pub(crate) fn shape() -> impl Strategy<Value = (usize, usize, usize)> {
    let ranks = prop::sample::select(vec![1usize, 2, 3, 4, 8]);
    (1usize..=20, ranks).prop_flat_map(|(experts, ranks)| (Just(experts), 1..=experts.min(8), Just(ranks)))
}

/// The tokens of `num_ranks` ranks (or of as many as asked for), all under one placement.
pub(crate) fn cases(senders: Option<usize>) -> impl Strategy<Value = Vec<Case>> {
    shape().prop_flat_map(move |(num_experts, top_k, num_ranks)| {
        let tokens = prop::collection::vec((expert_ids(num_experts, top_k), weights(top_k)), 0..=12);
        let tokens = prop::collection::vec(tokens, senders.unwrap_or(num_ranks));
        (placement(num_experts, num_ranks), tokens).prop_map(move |(placement, ranks)| {
            let case = |tokens: Vec<(Vec<u16>, Vec<f32>)>| {
                let (ids, weights): (Vec<_>, Vec<_>) = tokens.into_iter().unzip();
                let routing = RoutingBuf {
                    num_experts,
                    top_k,
                    expert_ids: ids.concat(),
                    weights: Some(weights.concat()),
                    ..RoutingBuf::default()
                };
                Case { routing, placement: placement.clone() }
            };
            ranks.into_iter().map(case).collect()
        })
    })
}

fn weights(top_k: usize) -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(0.0f32..1.0, top_k)
}

/// One rank's tokens.
pub(crate) fn case() -> impl Strategy<Value = Case> {
    cases(Some(1)).prop_map(|mut cases| cases.remove(0))
}
