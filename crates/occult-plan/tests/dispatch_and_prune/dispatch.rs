//! The dispatch plan against the routing it was made from.

use occult_plan::{DispatchPlan, LayerPlacement, PlanError, Rank, Routing, Topology};
use proptest::prelude::*;

use crate::support::{case, expert_ids};

/// Every (rank, token, local expert, entry) that has to travel, in travelling order: sorted, nothing clever.
fn expected_pairs(routing: &Routing<'_>, ranks: &[Rank], placement: &LayerPlacement) -> Vec<[u32; 4]> {
    let mut pairs: Vec<[u32; 4]> = (routing.expert_ids().iter().zip(ranks).enumerate())
        .map(|(entry, (&id, &rank))| {
            let local = placement.experts_of(rank).iter().position(|&e| e == id).unwrap();
            [u32::from(rank), (entry / routing.top_k()) as u32, local as u32, entry as u32]
        })
        .collect();
    pairs.sort_unstable();
    pairs
}

fn actual_pairs(plan: &DispatchPlan) -> Vec<[u32; 4]> {
    let mut pairs = Vec::new();
    for rank in 0..plan.num_ranks() as Rank {
        for row in plan.rows_for(rank) {
            for pair in plan.row_experts().pairs(row..row + 1) {
                let local = plan.row_experts().local_experts()[pair];
                pairs.push([
                    u32::from(rank),
                    plan.row_token()[row],
                    u32::from(local),
                    plan.entry_idx()[pair],
                ]);
            }
        }
    }
    pairs
}

proptest! {
    #[test]
    fn every_pair_travels_once_in_order(case in case()) {
        let plan = DispatchPlan::build(&case.routing(), &case.placement, case.topology()).unwrap();
        let expected = expected_pairs(&case.routing(), &case.entry_ranks(), &case.placement);
        prop_assert_eq!(actual_pairs(&plan), expected);
        let weights = case.routing.weights.as_deref().unwrap();
        for (&entry, &weight) in plan.entry_idx().iter().zip(plan.row_experts().weights()) {
            prop_assert_eq!(weight, weights[entry as usize]);
        }
        prop_assert_eq!(plan.row_experts().weights().len(), weights.len());
        prop_assert_eq!(plan.row_experts().num_rows(), plan.num_rows());
        prop_assert!(plan.row_experts().counts(0..plan.num_rows()).all(|n| n > 0), "a row without experts");
    }

    #[test]
    fn a_reused_plan_is_a_fresh_plan(first in case(), second in case()) {
        let mut plan = DispatchPlan::build(&first.routing(), &first.placement, first.topology()).unwrap();
        plan.build_into(&second.routing(), &second.placement, second.topology()).unwrap();
        let fresh = DispatchPlan::build(&second.routing(), &second.placement, second.topology()).unwrap();
        prop_assert_eq!(plan, fresh);
    }

    /// More experts than one word has bits; and so many that a token's entries are ordered another way.
    #[test]
    fn many_experts_are_ordered_too(
        (num_experts, ids) in prop::sample::select(vec![65, 200, 1024, 1025, 3000]).prop_flat_map(|e| {
            (Just(e), prop::collection::vec(expert_ids(e, 6), 0..20))
        }),
        seed in 1usize..3000,
    ) {
        let ranks: Vec<Rank> = (0..num_experts).map(|e| (e * seed % 7) as Rank).collect();
        let placement = LayerPlacement::from_expert_ranks(7, &ranks).unwrap();
        let ids = ids.concat();
        let routing = Routing::new(num_experts, 6, &ids).unwrap();
        let plan = DispatchPlan::build(&routing, &placement, Topology::flat(7).unwrap()).unwrap();
        let entry_ranks: Vec<Rank> = ids.iter().map(|&id| ranks[usize::from(id)]).collect();
        prop_assert_eq!(actual_pairs(&plan), expected_pairs(&routing, &entry_ranks, &placement));
    }
}

#[test]
fn no_tokens_is_a_plan_that_sends_nothing() {
    let placement = LayerPlacement::from_expert_ranks(3, &[0, 2]).unwrap();
    let routing = Routing::new(2, 1, &[]).unwrap();
    let plan = DispatchPlan::build(&routing, &placement, Topology::flat(3).unwrap()).unwrap();
    assert_eq!((plan.num_tokens(), plan.num_ranks(), plan.num_rows()), (0, 3, 0));
    assert_eq!(plan.rank_offsets(), [0, 0, 0, 0]);
    assert_eq!(plan.token_offsets(), [0]);
    assert_eq!(plan.row_experts().offsets(), [0]);
}

#[test]
fn a_plan_needs_a_placement_of_its_experts_and_ranks() {
    let placement = LayerPlacement::from_expert_ranks(2, &[0, 1, 1]).unwrap();
    let four_experts = Routing::new(4, 1, &[3]).unwrap();
    let three_experts = Routing::new(3, 1, &[2]).unwrap();
    let mut plan = DispatchPlan::build(&three_experts, &placement, Topology::flat(2).unwrap()).unwrap();
    let before = plan.clone();

    let error = plan.build_into(&four_experts, &placement, Topology::flat(2).unwrap()).unwrap_err();
    assert_eq!(error, PlanError::Placement("it is of 3 experts, the routing is of 4".into()));
    let error = plan.build_into(&three_experts, &placement, Topology::flat(4).unwrap()).unwrap_err();
    assert_eq!(error, PlanError::Placement("it is on 2 ranks, the topology has 4".into()));
    assert_eq!(plan, before);
}
