//! BRIM: the golden example, and condensed against dense.

use occult_plan::{
    DenseBrim, DispatchPlan, ExpertRows, LayerPlacement, PlanError, Routing, RowExperts, Topology,
};
use proptest::prelude::*;

use crate::support::{Case, case, cases};

const X: i32 = -1;

/// Everything that arrives at `rank`, ranks ascending.
pub(crate) fn receive(plans: &[DispatchPlan], rank: u16) -> RowExperts {
    let mut received = RowExperts::new();
    for plan in plans {
        let (experts, rows) = (plan.row_experts(), plan.rows_for(rank));
        let pairs = experts.pairs(rows.clone());
        let weights = experts.weights().get(pairs.clone()).unwrap_or_default();
        received.append(experts.counts(rows), &experts.local_experts()[pairs], weights).expect("whole rows");
    }
    received
}

#[test]
fn golden_example_of_the_paper() {
    let placement = LayerPlacement::from_rank_experts(4, &[[0, 1], [2, 3]]).unwrap();
    let topology = Topology::flat(2).unwrap();
    let plans = [[0, 3, 0, 1], [2, 3, 1, 3]]
        .map(|ids| DispatchPlan::build(&Routing::new(4, 2, &ids).unwrap(), &placement, topology).unwrap());
    let brim_0 = plans.each_ref().map(|plan| plan.brim().to_dense());
    assert_eq!(brim_0[0].as_slice(), [0, 1, 2, X]);
    assert_eq!(brim_0[1].as_slice(), [X, 0, 1, 2]);

    let rows = [0, 1].map(|rank| ExpertRows::build(2, &receive(&plans, rank)).unwrap());
    let brim_1 = rows.each_ref().map(|rows| rows.brim().to_dense());
    assert_eq!(brim_1[0].as_slice(), [0, 1, X, X, 2, 3]);
    assert_eq!(brim_1[1].as_slice(), [X, 0, X, 1, 2, 3]);

    for rank in 0..2 {
        assert_eq!(plans[rank].num_rows(), 3, "SFD rows that rank {rank} sends");
        assert_eq!(brim_1[rank].num_sources(), 3, "SFD rows that rank {rank} receives");
        assert_eq!(rows[rank].brim().num_targets(), 4, "EPD rows of rank {rank}");
    }
    // The condensed tables of rank 0, spelled out.
    assert_eq!(plans[0].rank_offsets(), [0, 2, 3]);
    assert_eq!(plans[0].row_token(), [0, 1, 0]);
    assert_eq!(plans[0].token_offsets(), [0, 2, 3]);
    assert_eq!(plans[0].token_rows(), [0, 2, 1]);
    assert_eq!(plans[0].row_experts().offsets(), [0, 1, 3, 4]);
    assert_eq!(plans[0].row_experts().local_experts(), [0, 0, 1, 1]);
    assert_eq!(plans[0].entry_idx(), [0, 2, 3, 1]);
    assert_eq!(rows[0].expert_offsets(), [0, 2, 4]);
    assert_eq!(rows[0].brim().scatter_idx(), [0, 1, 1, 2]);
    assert_eq!(rows[0].brim().merge_idx(), [0, 1, 2, 3]);
    assert_eq!(rows[1].brim().merge_idx(), [1, 0, 2, 3]);
    assert_eq!(rows[1].pair_idx(), [1, 0, 2, 3]);
}

fn dense_brim_0(case: &Case) -> DenseBrim {
    let (ranks, top_k) = (case.entry_ranks(), case.routing.top_k);
    DenseBrim::new(case.placement.num_ranks(), case.routing.num_tokens(), |rank, token| {
        ranks[token * top_k..(token + 1) * top_k].contains(&(rank as u16))
    })
}

proptest! {
    #[test]
    fn brim_0_is_its_definition(case in case()) {
        let plan = DispatchPlan::build(&case.routing(), &case.placement, case.topology()).unwrap();
        let dense = dense_brim_0(&case);
        prop_assert_eq!(plan.brim().to_dense(), dense.clone());
        prop_assert_eq!(plan.brim(), &dense.condense());
    }

    #[test]
    fn brim_1_is_its_definition(cases in cases(None)) {
        let plans: Vec<DispatchPlan> = cases
            .iter()
            .map(|c| DispatchPlan::build(&c.routing(), &c.placement, c.topology()).unwrap())
            .collect();
        let placement = &cases[0].placement;
        for rank in 0..placement.num_ranks() as u16 {
            // The definition looks at the routing, not at what travelled: one source per token with an expert here.
            let mut sources: Vec<Vec<u16>> = Vec::new();
            for case in &cases {
                let ranks = case.entry_ranks();
                for (ids, ranks) in case.routing().rows().zip(ranks.chunks_exact(case.routing.top_k)) {
                    let here = ids.iter().zip(ranks).filter(|&(_, &r)| r == rank);
                    let here: Vec<u16> = here.map(|(&id, _)| id).collect();
                    if !here.is_empty() {
                        sources.push(here);
                    }
                }
            }
            let experts = placement.experts_of(rank);
            let uses = |local: usize, source: usize| sources[source].contains(&experts[local]);
            let dense = DenseBrim::new(experts.len(), sources.len(), uses);

            let received = receive(&plans, rank);
            let rows = ExpertRows::build(experts.len(), &received).unwrap();
            prop_assert_eq!(rows.brim().to_dense(), dense.clone());
            prop_assert_eq!(rows.brim(), &dense.condense());
            for (target, &pair) in rows.pair_idx().iter().enumerate() {
                prop_assert_eq!(rows.brim().merge_idx()[pair as usize], target as u32);
            }
        }
    }
}

#[test]
fn reused_memory_gives_what_fresh_memory_gives() {
    let mut received = RowExperts::new();
    received.append([2, 1], &[0, 2, 1], &[0.5, 0.25, 1.0]).unwrap();
    let mut rows = ExpertRows::build(3, &received).unwrap();
    received.clear();
    received.append([1], &[4], &[1.0]).unwrap();
    rows.build_into(5, &received).unwrap();
    assert_eq!(rows, ExpertRows::build(5, &received).unwrap());
    assert_eq!(rows.expert_offsets(), [0, 0, 0, 0, 0, 1]);
}

#[test]
fn received_rows_that_make_no_sense_are_errors() {
    let mut received = RowExperts::new();
    let error = received.append([2, 2], &[0, 1, 0], &[]).unwrap_err();
    assert_eq!(error.to_string(), "local experts of the rows received: expected 4 values, found 3");
    assert_eq!(received, RowExperts::new(), "an error adds no rows");
    received.append([u32::MAX, 2], &[], &[]).unwrap_err();
    received.append([1], &[0], &[1.0, 2.0]).unwrap_err();
    received.append([2], &[0, 1], &[1.0, 2.0]).unwrap();
    received.append([1], &[0], &[]).unwrap_err();
    received.append([2], &[1, 0], &[1.0, 2.0]).unwrap();
    assert_eq!(received.num_rows(), 2);

    let error = ExpertRows::build(2, &received).unwrap_err();
    assert_eq!(
        error.to_string(),
        "order of a received row's local experts is 0 after 1 in row 1, expected ascending"
    );
    let error = ExpertRows::build(1, &received).unwrap_err();
    assert_eq!(error, PlanError::ExpertOutOfRange { row: 0, id: 1, num_experts: 1 });

    let mut rows = ExpertRows::default();
    rows.build_into(2, &received).unwrap_err();
    assert_eq!(rows, ExpertRows::default(), "an error leaves no half-built tables");
}
