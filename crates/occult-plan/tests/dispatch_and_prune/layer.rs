//! A whole layer as index work: dispatch, exchange, scatter, a trivial expert, merge, exchange back, combine.

use occult_plan::{DispatchPlan, ExpertRows};
use proptest::prelude::*;

use crate::{
    brim::receive,
    support::{Case, cases},
};

/// A token's hidden state is one number, known to every rank.
fn token_value(rank: usize, token: usize) -> f64 {
    (1 + 1000 * rank + token) as f64
}

/// Expert `id` multiplies by `id + 1`.
fn expert(id: u16, x: f64) -> f64 {
    x * f64::from(id + 1)
}

/// What each token's output must be, straight from the routing.
fn direct(cases: &[Case]) -> Vec<Vec<f64>> {
    let layer = |(rank, case): (usize, &Case)| {
        let weights = case.routing.weights.as_ref().unwrap().chunks_exact(case.routing.top_k);
        let token = |(token, (ids, weights)): (usize, (&[u16], &[f32]))| {
            let x = token_value(rank, token);
            ids.iter().zip(weights).map(|(&id, &w)| expert(id, x) * f64::from(w)).sum()
        };
        case.routing().rows().zip(weights).enumerate().map(token).collect()
    };
    cases.iter().enumerate().map(layer).collect()
}

/// The same through plans and BRIMs, `[ranks][tokens]`.
fn distributed(cases: &[Case]) -> Vec<Vec<f64>> {
    let placement = &cases[0].placement;
    let num_ranks = placement.num_ranks();
    let plans: Vec<DispatchPlan> = cases
        .iter()
        .map(|c| DispatchPlan::build(&c.routing(), &c.placement, c.topology()).unwrap())
        .collect();
    // Dispatch: every rank reads its tokens into SFD rows.
    let sent: Vec<Vec<f64>> = plans
        .iter()
        .enumerate()
        .map(|(rank, p)| p.row_token().iter().map(|&t| token_value(rank, t as usize)).collect())
        .collect();

    let mut returned: Vec<Vec<f64>> = sent.iter().map(|rows| vec![f64::NAN; rows.len()]).collect();
    for rank in 0..num_ranks as u16 {
        // Exchange: this rank's rows from all ranks, ranks ascending.
        let sfd: Vec<f64> = plans.iter().zip(&sent).flat_map(|(p, s)| s[p.rows_for(rank)].to_vec()).collect();
        let received = receive(&plans, rank);
        let experts = placement.experts_of(rank);
        let rows = ExpertRows::build(experts.len(), &received).unwrap();
        // Scatter, expert, weight modulation.
        let mut epd = vec![f64::NAN; rows.brim().num_targets()];
        for (local, &id) in experts.iter().enumerate() {
            for row in rows.brim().group(local) {
                let x = sfd[rows.brim().scatter_idx()[row] as usize];
                let weight = received.weights()[rows.pair_idx()[row] as usize];
                epd[row] = expert(id, x) * f64::from(weight);
            }
        }
        // Merge, then the exchange back: the same sizes reversed.
        let merge = |row: usize| rows.brim().targets_of(row).iter().map(|&t| epd[t as usize]).sum();
        let mut merged = (0..received.num_rows()).map(merge);
        for (plan, returned) in plans.iter().zip(&mut returned) {
            for row in plan.rows_for(rank) {
                returned[row] = merged.next().unwrap();
            }
        }
        assert_eq!(merged.next(), None);
    }
    // Combine.
    let combine = |(plan, rows): (&DispatchPlan, &Vec<f64>)| {
        let token = |t: usize| plan.brim().targets_of(t).iter().map(|&row| rows[row as usize]).sum();
        (0..plan.num_tokens()).map(token).collect()
    };
    plans.iter().zip(&returned).map(combine).collect()
}

proptest! {
    #[test]
    fn through_the_ranks_equals_the_direct_sum(cases in cases(None)) {
        let (expected, found) = (direct(&cases), distributed(&cases));
        for (rank, (expected, found)) in expected.iter().zip(&found).enumerate() {
            prop_assert_eq!(expected.len(), found.len());
            for (token, (e, f)) in expected.iter().zip(found).enumerate() {
                prop_assert!((e - f).abs() <= 1e-9 * e.abs(), "rank {rank}, token {token}: {e} != {f}");
            }
        }
    }
}
