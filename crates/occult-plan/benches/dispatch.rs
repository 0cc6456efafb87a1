//! Time of one layer's index work on one core: the sender's dispatch plan and the receiver's BRIM_1.
//!
//! `cargo bench -p occult-plan --bench dispatch`
//!
//! Every rank routes 4,096 tokens to random experts (uniform, so about as many copies as there can be). Timed is what one
//! rank does: the plan of its own tokens, and joining and expanding the rows it receives from all ranks. A pair is one
//! (token, expert) pair of its own tokens. Medians of 50 runs, after 5 that are not counted.

use std::{hint::black_box, time::Instant};

use occult_plan::{DispatchPlan, ExpertRows, LayerPlacement, Rank, Routing, RowExperts, Topology};
use rand_core::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;

const TOKENS: usize = 4096;
const RUNS: usize = 50;
const WARM_UP: usize = 5;

fn main() {
    for (top_k, num_experts, num_ranks) in [(8, 64, 8), (8, 64, 4), (4, 60, 8), (8, 256, 64), (2, 8, 8)] {
        run(top_k, num_experts, num_ranks);
    }
}

fn run(top_k: usize, num_experts: usize, num_ranks: usize) {
    let mut rng = Pcg64Mcg::seed_from_u64(7);
    let topology = Topology::flat(num_ranks).expect("some ranks");
    let expert_ranks: Vec<Rank> = (0..num_experts).map(|e| (e * num_ranks / num_experts) as Rank).collect();
    let placement = LayerPlacement::from_expert_ranks(num_ranks, &expert_ranks).expect("a placement");
    let weights = vec![1.0 / top_k as f32; TOKENS * top_k];
    let ids: Vec<Vec<u16>> = (0..num_ranks).map(|_| random_ids(&mut rng, num_experts, top_k)).collect();
    let plans: Vec<DispatchPlan> = ids
        .iter()
        .map(|ids| {
            let routing = Routing::new(num_experts, top_k, ids).expect("valid ids");
            let routing = routing.with_weights(&weights).expect("valid weights");
            DispatchPlan::build(&routing, &placement, topology).expect("a plan")
        })
        .collect();
    // What arrives at rank 0 from each rank.
    let arriving: Vec<(Vec<u32>, &[u16], &[f32])> = plans
        .iter()
        .map(|plan| {
            let (experts, rows) = (plan.row_experts(), plan.rows_for(0));
            let pairs = experts.pairs(rows.clone());
            let counts = experts.counts(rows).collect();
            (counts, &experts.local_experts()[pairs.clone()], &experts.weights()[pairs])
        })
        .collect();

    let routing = Routing::new(num_experts, top_k, &ids[0]).expect("valid ids");
    let routing = routing.with_weights(&weights).expect("valid weights");
    let mut plan = DispatchPlan::default();
    let (mut received, mut rows) = (RowExperts::new(), ExpertRows::default());
    let (mut plan_ns, mut brim_ns, mut both_ns) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..WARM_UP + RUNS {
        let start = Instant::now();
        black_box(&mut plan).build_into(black_box(&routing), &placement, topology).expect("a plan");
        let between = Instant::now();
        received.clear();
        for (counts, experts, weights) in &arriving {
            received.append(counts.iter().copied(), experts, weights).expect("rows");
        }
        black_box(&mut rows)
            .build_into(placement.experts_of(0).len(), black_box(&received))
            .expect("expert rows");
        let end = Instant::now();
        if run >= WARM_UP {
            plan_ns.push((between - start).as_nanos());
            brim_ns.push((end - between).as_nanos());
            both_ns.push((end - start).as_nanos());
        }
    }
    let rate = |ns: &mut Vec<u128>| {
        ns.sort_unstable();
        (TOKENS * top_k) as f64 / ns[ns.len() / 2] as f64 * 1e3
    };
    println!(
        "{TOKENS} tokens, top-{top_k} of {num_experts}, {num_ranks} ranks: {:6.1} million pairs/s \
         (plan {:.1}, BRIM_1 {:.1}); {} rows sent, {} received, {} expanded",
        rate(&mut both_ns),
        rate(&mut plan_ns),
        rate(&mut brim_ns),
        plan.num_rows(),
        received.num_rows(),
        rows.brim().num_targets(),
    );
}

fn random_ids(rng: &mut Pcg64Mcg, num_experts: usize, top_k: usize) -> Vec<u16> {
    let mut experts: Vec<u16> = (0..num_experts as u16).collect();
    let mut ids = Vec::with_capacity(TOKENS * top_k);
    for _ in 0..TOKENS {
        for i in 0..top_k {
            let other = i + rng.next_u64() as usize % (num_experts - i);
            experts.swap(i, other);
            ids.push(experts[i]);
        }
    }
    ids
}
