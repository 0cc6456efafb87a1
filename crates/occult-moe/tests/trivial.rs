//! Movement without arithmetic: every expert doubles its row, so the answer is known for every token.

mod common;

use std::sync::Arc;

use common::{Case, run};
use occult_comm::{SoloComm, ThreadOptions};
use occult_moe::exchange::{Exchanger, Rows};
use occult_moe::{MoeError, Timers};
use occult_plan::{DispatchPlan, LayerPlacement, Rank, Routing, Topology};

/// A row whose values say which token it is: exact in f32, and so are all sums of it here.
fn row(token: usize, d: usize) -> Vec<f32> {
    (0..d).map(|i| (token * d + i) as f32).collect()
}

#[test]
fn every_token_comes_back_doubled_as_often_as_it_has_experts() {
    let (d, k) = (3, 3);
    for (seed, (world, nodes)) in [(1, 1), (2, 1), (3, 1), (4, 2), (8, 2), (8, 4)].into_iter().enumerate() {
        for rows in [Rows::PerRank, Rows::PerExpert] {
            let case = Case::random(seed as u64, world, 7, k, d, 1);
            let topology = Topology::new(world, nodes).unwrap();
            let two_level = nodes > 1 && rows == Rows::PerRank;
            let results = run(world, &ThreadOptions::default(), |comm| {
                let tokens = case.rows_of(comm.rank());
                let x: Vec<f32> = tokens.clone().flat_map(|t| row(t, d)).collect();
                // Experts t, t+2, t+4 modulo 7 are distinct; weights are powers of two.
                let ids: Vec<u16> =
                    tokens.clone().flat_map(|t| (0..k).map(move |i| ((t + 2 * i) % 7) as u16)).collect();
                let weights: Vec<f32> = tokens.flat_map(|_| [1.0, 2.0, 4.0]).collect();
                let plan = DispatchPlan::build(&Routing::new(7, k, &ids)?, &case.placement, topology)?;
                let local = case.placement.experts_of(comm.rank() as Rank).len();
                let timers = Arc::new(Timers::default());
                let exchanger = Exchanger::new(comm, &case.placement, topology, rows, two_level, timers)?;
                let rows = exchanger.rows(&plan, 0..plan.num_tokens());
                let counts = exchanger.exchange_counts(std::slice::from_ref(&rows))?.remove(0);
                let (mut received, handle) =
                    exchanger.start_dispatch(rows, counts, &x, &weights, d)?.finish()?;
                let experts = handle.row_experts();
                assert!(experts.local_experts().iter().all(|&e| usize::from(e) < local));
                for (i, row) in received.chunks_exact_mut(d).enumerate() {
                    let weight: f32 = experts.weights()[experts.pairs(i..i + 1)].iter().sum();
                    row.iter_mut().for_each(|v| *v *= 2.0 * weight);
                }
                let y = handle.start_combine(&received)?.finish()?;
                let want: Vec<f32> = x.iter().map(|v| v * 14.0).collect();
                assert_eq!(y, want);
                Ok(())
            });
            results.all().unwrap();
        }
    }
}

#[test]
fn two_levels_need_one_row_per_rank() {
    let placement = LayerPlacement::from_rank_experts(2, &[[0], [1]]).unwrap();
    let (topology, timers) = (Topology::new(2, 2).unwrap(), Arc::new(Timers::default()));
    let results = run(2, &ThreadOptions::default(), |comm| {
        Exchanger::new(comm, &placement, topology, Rows::PerExpert, true, Arc::clone(&timers)).map(drop)
    });
    assert!(results.all().unwrap_err().1.to_string().contains("two-level"));
    let error = Exchanger::new(Arc::new(SoloComm::new()), &placement, topology, Rows::PerRank, false, timers);
    assert!(matches!(error, Err(MoeError::Argument { .. })));
}
