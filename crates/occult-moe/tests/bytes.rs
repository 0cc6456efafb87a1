//! Bytes counted on the way equal the bytes that occult-plan predicts, exactly, forward and backward.

mod common;

use std::sync::Arc;

use candle_core::DType;
use common::{Case, rank, run};
use occult_comm::{Communicator, Metered, Reach, Snapshot, ThreadOptions};
use occult_moe::predict::{RankBytes, predict_bytes};
use occult_moe::{LayerOptions, Mode, Overlap, PruneRule, Pruning};
use occult_plan::{Budget, ExpertId, Routing, Topology};
use proptest::prelude::*;

/// Of one rank: what it chose, and what was counted.
fn measured(case: &Case, options: &LayerOptions, threads: &ThreadOptions) -> Vec<(Vec<ExpertId>, Snapshot)> {
    run(case.tokens.len(), threads, |comm| {
        let metered = Metered::new(comm);
        let meter = metered.meter();
        let (_, ids) = rank(case, options, Arc::new(metered) as Arc<dyn Communicator>)?;
        Ok((ids, meter.snapshot()))
    })
    .all()
    .unwrap()
}

fn sum(snapshots: &[(Vec<ExpertId>, Snapshot)], part: &str, sent: bool) -> [u64; 3] {
    let names = |s: &Snapshot| s.operations.keys().copied().filter(|n| is(n, part)).collect::<Vec<_>>();
    let reach = |s: &Snapshot, name: &str| if sent { s.sent(name) } else { s.received(name) };
    let all =
        snapshots.iter().flat_map(|(_, s)| names(s).into_iter().map(|n| reach(s, n)).collect::<Vec<_>>());
    all.fold([0; 3], |[a, b, c], Reach { local, same_host, other_host }| {
        [a + local, b + same_host, c + other_host]
    })
}

/// `dispatch` is in `dispatch gradients`, too.
fn is(name: &str, part: &str) -> bool {
    let rest = name.strip_prefix("moe ").unwrap_or_default();
    rest.strip_prefix(part).is_some_and(|rest| !rest.starts_with(" gradients"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn counted_is_predicted(
        seed in 0u64..1_000_000,
        world in prop::sample::select(vec![1usize, 2, 3, 4, 8]),
        two_hosts in any::<bool>(),
        conventional in any::<bool>(),
        chunks in 1usize..4,
        max_ranks in prop::sample::select(vec![None, Some(1), Some(2)]),
        stored in prop::sample::select(vec![DType::F32, DType::BF16]),
    ) {
        let case = Case { stored, ..Case::random(seed, world, 9, 3, 8, 6) };
        let nodes = if two_hosts && world % 2 == 0 { 2 } else { 1 };
        let topology = Topology::new(world, nodes).unwrap();
        let mut options = LayerOptions::new(topology);
        options.mode = if conventional { Mode::Conventional } else { Mode::Dedup };
        options.overlap = Overlap::Chunks(chunks);
        let budget = max_ranks.map(|max_ranks| Budget::Fixed { max_ranks });
        options.pruning = budget.map(|budget| Pruning { rule: PruneRule::BestMass, budget });
        let hosts = (0..world as u16).map(|r| topology.node_of(r)).collect();
        let threads = ThreadOptions { host_of_rank: Some(hosts), ..ThreadOptions::default() };
        let ranks = measured(&case, &options, &threads);

        let mut want = RankBytes::default();
        for (home, (ids, _)) in ranks.iter().enumerate() {
            let routing = Routing::new(9, 3, ids).unwrap();
            want += predict_bytes(home, &routing, &case.placement, &options, case.d).unwrap();
        }
        let reach = |r: Reach| [r.local, r.same_host, r.other_host];
        for sent in [true, false] {
            prop_assert_eq!(sum(&ranks, "dispatch", sent), reach(want.dispatch));
            prop_assert_eq!(sum(&ranks, "combine", sent), reach(want.combine));
            prop_assert_eq!(sum(&ranks, "combine gradients", sent), reach(want.combine_gradients));
            prop_assert_eq!(sum(&ranks, "dispatch gradients", sent), reach(want.dispatch_gradients));
        }
        // Nothing else crosses but counts: 8 bytes per peer and part.
        let levels = if nodes == 2 && world > 2 && !conventional { nodes + world / nodes } else { world };
        let counts = sum(&ranks, "counts", true);
        prop_assert_eq!(counts.iter().sum::<u64>(), (world * levels * chunks * 8) as u64);
        let parts = ["counts", "dispatch", "combine", "combine gradients", "dispatch gradients"];
        let known = parts.map(|p| sum(&ranks, p, true).iter().sum::<u64>()).iter().sum::<u64>();
        let total: u64 = ranks.iter().map(|(_, s)| { let r = s.sent_total(); r.local + r.wire() }).sum();
        prop_assert_eq!(known, total);
    }
}
