//! The layer on 1, 2, 3, 4 and 8 ranks equals its definition: output and every gradient.

mod common;

use std::sync::Arc;

use candle_core::DType;
use common::{Case, Rng, assert_close, dense, rank, run, together};
use occult_comm::ThreadOptions;
use occult_moe::{LayerOptions, Mode, Overlap, PruneRule, Pruning};
use occult_plan::{Budget, SimilarityTable, Topology};
use proptest::prelude::*;

/// Every combination of what can be chosen about a layer, of which a test takes one.
fn options(world: usize, variant: usize) -> (LayerOptions, ThreadOptions) {
    // Several hosts where that is possible: two levels with two or more ranks each.
    let nodes = match variant & 9 {
        9 if world == 8 => 4,
        1 | 9 if world.is_multiple_of(2) => 2,
        _ => 1,
    };
    let topology = Topology::new(world, nodes).unwrap();
    let mut options = LayerOptions::new(topology);
    options.mode = if variant & 2 == 2 { Mode::Conventional } else { Mode::Dedup };
    options.overlap = if variant & 4 == 4 { Overlap::Chunks(1 + variant % 8 / 2) } else { Overlap::Off };
    let hosts = (0..world as u16).map(|r| topology.node_of(r)).collect();
    (options, ThreadOptions { host_of_rank: Some(hosts), ..ThreadOptions::default() })
}

/// Every rule of pruning, the table of similar experts made up.
fn rules(experts: usize, seed: u64) -> [PruneRule; 4] {
    let values = Rng(seed).values(experts * experts).into_iter().map(f32::abs).collect();
    let table = SimilarityTable::from_values(experts, values).unwrap();
    [
        PruneRule::RouterScore,
        PruneRule::BestMass,
        PruneRule::LeastError,
        PruneRule::Similarity(Arc::new(table)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn equals_the_definition(
        seed in 0u64..1_000_000,
        world in prop::sample::select(vec![1usize, 2, 3, 4, 8]),
        experts in 4usize..12,
        top_k in 1usize..5,
        (d, f) in (1usize..40, 1usize..24),
        variant in 0usize..16,
        max_ranks in prop::sample::select(vec![None, Some(1), Some(2)]),
        rule in 0usize..4,
        stored in prop::sample::select(vec![DType::F32, DType::BF16]),
    ) {
        let case = Case { stored, ..Case::random(seed, world, experts, top_k, d, f) };
        let (mut options, threads) = options(world, variant);
        options.pruning = max_ranks.map(|max_ranks| Pruning {
            rule: rules(experts, seed)[rule].clone(),
            budget: if seed % 2 == 0 { Budget::Fixed { max_ranks } } else { Budget::Adaptive { max_ranks, share: 0.7 } },
        });
        let ranks = || run(world, &threads, |comm| rank(&case, &options, comm)).all().unwrap();
        let first = ranks();
        let (all, ids) = together(&case, &first);
        assert_close(&all, &dense(&case, &ids));
        prop_assert_eq!(first, ranks(), "two runs differ");
    }

    /// A budget of all ranks is no pruning, bit for bit.
    #[test]
    fn bits_do_not_depend_on_a_full_budget(
        seed in 0u64..1_000_000,
        world in prop::sample::select(vec![1usize, 2, 3, 4, 8]),
        variant in 0usize..16,
        stored in prop::sample::select(vec![DType::F32, DType::BF16]),
    ) {
        let case = Case { stored, ..Case::random(seed, world, 9, 3, 8, 6) };
        let (options, threads) = options(world, variant);
        let bits = |options: &LayerOptions| {
            run(world, &threads, |comm| rank(&case, options, comm)).all().unwrap()
        };
        let plain = bits(&options);
        for rule in rules(9, seed) {
            let pruning = Some(Pruning { rule, budget: Budget::Fixed { max_ranks: world } });
            prop_assert_eq!(&bits(&LayerOptions { pruning, ..options.clone() }), &plain);
        }
        // Parts change no decision, and nothing but the rounding of sums.
        for n in [2, 5] {
            let parts = bits(&LayerOptions { overlap: Overlap::Chunks(n), ..options.clone() });
            for ((got, ids), (want, want_ids)) in parts.iter().zip(&plain) {
                prop_assert_eq!(ids, want_ids);
                assert_close(got, want);
            }
        }
    }
}
