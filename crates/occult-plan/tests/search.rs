//! The search against every placement there is, and what it promises: caps, counts, groups, determinism, bounds.

use occult_plan::placement::search::{SearchOptions, SearchOutcome, place};
use occult_plan::{LayerPlacement, PlanError, ReplicaChooser, Routing, Topology};
use proptest::prelude::*;

/// Token sets of `k` of `e` experts with topics, so that experts collaborate.
fn tokens(e: u16, k: usize, rows: usize, seed: u64) -> Vec<u16> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    let mut ids = Vec::new();
    for _ in 0..rows {
        let topic = next() % 4;
        let mut scored: Vec<(u32, u16)> =
            (0..e).map(|x| (next() % 100 + if u32::from(x) * 7 % 4 == topic { 60 } else { 0 }, x)).collect();
        scored.sort_by_key(|&(score, x)| (std::cmp::Reverse(score), x));
        ids.extend(scored[..k].iter().map(|&(_, x)| x));
    }
    ids
}

/// Mean ranks visited and max/mean load, by their definitions.
fn measure(routing: &Routing<'_>, placement: &LayerPlacement) -> (f64, f64) {
    let topology = Topology::flat(placement.num_ranks()).unwrap();
    let mut chooser = ReplicaChooser::new(placement, topology);
    let mut copies = 0;
    let mut ranks = vec![0; routing.top_k()];
    for (ids, n) in routing.weighted_rows() {
        chooser.assign(ids, n, &mut ranks);
        copies += n * std::collections::BTreeSet::from_iter(&ranks).len() as u64;
    }
    let tokens: u64 = routing.weighted_rows().map(|(_, n)| n).sum();
    let load = chooser.load();
    let mean = load.iter().sum::<u64>() as f64 / load.len() as f64;
    (copies as f64 / tokens as f64, *load.iter().max().unwrap() as f64 / mean)
}

fn search(routing: &Routing<'_>, ranks: usize, options: &SearchOptions) -> SearchOutcome {
    place(routing, Topology::flat(ranks).unwrap(), options, &mut || true).unwrap()
}

#[test]
fn finds_the_optimum_of_small_layers_and_bounds_it() {
    for seed in 0..6 {
        let (e, w) = (8u16, 3usize);
        let ids = tokens(e, 3, 200, seed);
        let routing = Routing::new(usize::from(e), 3, &ids).unwrap();
        let cap = 1.3;
        let mut optimum = f64::INFINITY;
        for code in 0..(w as u32).pow(u32::from(e)) {
            let ranks: Vec<u16> = (0..u32::from(e)).map(|x| (code / 3u32.pow(x) % 3) as u16).collect();
            let (copies, load) = measure(&routing, &LayerPlacement::from_expert_ranks(w, &ranks).unwrap());
            if load <= cap {
                optimum = optimum.min(copies);
            }
        }
        let found = search(&routing, w, &SearchOptions { load_cap: cap, seed, ..Default::default() });
        assert!((found.copies_per_token - optimum).abs() < 1e-9, "seed {seed}: {found:?}, optimum {optimum}");
        assert!(found.copies_lower_bound <= optimum + 1e-9, "seed {seed}: {found:?}, optimum {optimum}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn keeps_its_limits_and_reports_what_it_found(
        e in 6u16..40, w in 1usize..7, rows in 1usize..300, seed in any::<u64>(), cap in 1.05f64..3.0, replicas in 0usize..4,
    ) {
        let ids = tokens(e, 3, rows, seed);
        let routing = Routing::new(usize::from(e), 3, &ids).unwrap();
        let most = usize::from(e).div_ceil(w) + 2;
        let options = SearchOptions {
            load_cap: cap, seed, replicas, restarts: Some(1), max_experts_per_rank: Some(most), ..Default::default()
        };
        match place(&routing, Topology::flat(w).unwrap(), &options, &mut || true) {
            Ok(found) => {
                let (copies, load) = measure(&routing, &found.placement);
                prop_assert!((copies - found.copies_per_token).abs() < 1e-9);
                prop_assert!((load - found.load_max_over_mean).abs() < 1e-9);
                prop_assert!(load <= cap + 1e-9);
                prop_assert!(replicas > 0 || found.copies_lower_bound <= copies + 1e-9);
                prop_assert!(found.placement.num_slots() <= usize::from(e) + replicas);
                for r in 0..w { prop_assert!((1..=most).contains(&found.placement.experts_of(r as u16).len())); }
                prop_assert_eq!(found, place(&routing, Topology::flat(w).unwrap(), &options, &mut || true).unwrap());
            }
            Err(error) => prop_assert!(matches!(error, PlanError::Infeasible(_)), "{error}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_placement_within_the_limits_is_below_the_bounds(
        k in 1usize..4, sets in prop::collection::vec((any::<u32>(), 0u32..1000), 1..12), flat in any::<bool>(),
        cap in 1.0f64..2.5, room in 0usize..4,
    ) {
        // Expert 6 is never chosen.
        let (e, w) = (7usize, 4usize);
        let mut ids = Vec::new();
        for &(seed, _) in &sets {
            let mut set: Vec<u16> = (0..6).collect();
            set.sort_by_key(|&x| (seed.rotate_left(5 * u32::from(x)).wrapping_mul(0x9E37_79B9), x));
            ids.extend_from_slice(&set[..k]);
        }
        let occurrences: Vec<u32> = sets.iter().map(|&(_, n)| n).collect();
        prop_assume!(occurrences.iter().any(|&n| n > 0));
        let routing = Routing::new(e, k, &ids).unwrap().with_occurrences(&occurrences).unwrap();
        let topology = Topology::new(w, if flat { 1 } else { 2 }).unwrap();
        let most = e.div_ceil(w) + room;
        let tokens = f64::from(occurrences.iter().sum::<u32>());
        let (mut optimum, mut node_optimum) = (f64::INFINITY, f64::INFINITY);
        for code in 0..1usize << (2 * e) {
            let rank = |x: usize| code >> (2 * x) & 3;
            let (mut load, mut experts, mut copies, mut node_copies) = ([0.0; 4], [0; 4], 0.0, 0.0);
            (0..e).for_each(|x| experts[rank(x)] += 1);
            for (set, &n) in ids.chunks(k).zip(&occurrences) {
                let (mut on, mut on_node) = (0u32, 0u32);
                for &x in set {
                    let r = rank(usize::from(x));
                    load[r] += f64::from(n);
                    on |= 1 << r;
                    on_node |= 1 << topology.node_of(r as u16);
                }
                copies += f64::from(n * on.count_ones());
                node_copies += f64::from(n * on_node.count_ones());
            }
            let limit = cap * tokens * k as f64 / w as f64 + 1e-6;
            if load.iter().all(|&l| l <= limit) && experts.iter().all(|&n| n <= most) {
                optimum = optimum.min(copies / tokens);
                node_optimum = node_optimum.min(node_copies / tokens);
            }
        }
        let options = SearchOptions { load_cap: cap, max_experts_per_rank: Some(most), ..Default::default() };
        match place(&routing, topology, &options, &mut || true) {
            Ok(found) => {
                prop_assert!(found.copies_lower_bound <= optimum + 1e-9, "{found:?}, optimum {optimum}");
                prop_assert!(found.node_copies_lower_bound <= node_optimum + 1e-9, "{found:?}, {node_optimum}");
                prop_assert!(found.copies_per_token >= optimum - 1e-9, "{found:?}, optimum {optimum}");
            }
            Err(error) => prop_assert!(optimum == f64::INFINITY, "{error}, but there is one at {optimum}"),
        }
    }
}

#[test]
fn nodes_count_when_they_cost() {
    let ids = tokens(32, 4, 2_000, 3);
    let routing = Routing::new(32, 4, &ids).unwrap();
    let topology = Topology::new(8, 4).unwrap();
    let with = |rank_cost, node_cost| {
        let options = SearchOptions { rank_cost, node_cost, ..Default::default() };
        place(&routing, topology, &options, &mut || true).unwrap()
    };
    let (nodes_dear, nodes_free) = (with(1.0, 50.0), with(1.0, 0.0));
    assert!(nodes_dear.node_copies_per_token < nodes_free.node_copies_per_token);
    assert!(nodes_free.copies_per_token <= nodes_dear.copies_per_token);
    assert!(nodes_dear.node_copies_lower_bound <= nodes_dear.node_copies_per_token);
}

#[test]
fn replicas_save_copies_and_let_a_hot_expert_fit() {
    // Expert 0 is in every set: alone it is 2 times the mean load of 4 ranks with k = 2.
    let ids: Vec<u16> = (0..600).flat_map(|i| [0, 1 + i % 11]).collect();
    let routing = Routing::new(12, 2, &ids).unwrap();
    let hard = SearchOptions { load_cap: 1.25, ..Default::default() };
    let error = place(&routing, Topology::flat(4).unwrap(), &hard, &mut || true).unwrap_err();
    assert!(error.to_string().contains("expert 0 alone is 2.000 times the mean load"), "{error}");
    let relaxed = search(&routing, 4, &SearchOptions { relax_cap: true, ..hard.clone() });
    assert!(relaxed.load_max_over_mean >= 2.0);
    let replicated = search(&routing, 4, &SearchOptions { replicas: 3, ..hard });
    assert!(replicated.placement.ranks_of(0).len() > 1, "{replicated:?}");
    let (copies, load) = (replicated.copies_per_token, replicated.load_max_over_mean);
    assert!(copies < 0.75 * relaxed.copies_per_token && load <= 1.25, "{replicated:?}");
}

#[test]
fn a_million_copies_are_not_worth_one_pair_above_the_cap() {
    // {0, 1} and {2, 3} together would halve the copies, one (token, expert) pair above an exactly even load.
    let ids = [0, 1, 2, 3];
    let routing = Routing::new(4, 2, &ids).unwrap().with_occurrences(&[1_000_001, 1_000_000]).unwrap();
    let found = search(&routing, 2, &SearchOptions { load_cap: 1.0, ..Default::default() });
    assert_eq!((found.load_max_over_mean, found.copies_per_token), (1.0, 2.0));
}

#[test]
fn routing_groups_stay_whole() {
    let ids = tokens(24, 4, 1_000, 9);
    let routing = Routing::new(24, 4, &ids).unwrap();
    let options =
        |num_groups| SearchOptions { num_groups: Some(num_groups), load_cap: 3.0, ..Default::default() };
    // Two whole groups of three on each of four ranks.
    let found = search(&routing, 4, &options(8));
    for group in 0..8u16 {
        let rank = found.placement.first_rank_of(group * 3);
        assert!((0..3).all(|i| found.placement.first_rank_of(group * 3 + i) == rank), "group {group}");
    }
    assert!((0..4).all(|r| found.placement.experts_of(r).len() == 6));
    // A group of twelve fills three of six ranks.
    let found = search(&routing, 6, &options(2));
    for r in 0..6 {
        let experts = found.placement.experts_of(r);
        assert!(
            experts.len() == 4 && experts.iter().all(|e| e / 12 == experts[0] / 12),
            "rank {r}: {experts:?}"
        );
    }
    let error = place(&routing, Topology::flat(5).unwrap(), &options(8), &mut || true).unwrap_err();
    assert!(error.to_string().contains("whole groups"), "{error}");
}

#[test]
fn stops_when_told_and_still_answers() {
    let ids = tokens(32, 4, 500, 1);
    let routing = Routing::new(32, 4, &ids).unwrap();
    let mut asked = 0;
    let options = SearchOptions { restarts: Some(usize::MAX), ..Default::default() };
    let found = place(&routing, Topology::flat(4).unwrap(), &options, &mut || {
        asked += 1;
        asked < 50
    })
    .unwrap();
    assert!(found.load_max_over_mean <= 1.25 && !found.restart_copies.is_empty());
}

#[test]
fn impossible_requests_say_what_is_wrong() {
    let ids = tokens(8, 2, 50, 1);
    let routing = Routing::new(8, 2, &ids).unwrap();
    let error = |ranks, options: SearchOptions| {
        place(&routing, Topology::flat(ranks).unwrap(), &options, &mut || true).unwrap_err().to_string()
    };
    assert!(error(9, SearchOptions::default()).contains("number of ranks is 9, expected at most 8"));
    assert!(error(2, SearchOptions { load_cap: 0.5, ..Default::default() }).contains("load cap"));
    assert!(
        error(2, SearchOptions { max_experts_per_rank: Some(3), ..Default::default() })
            .contains("at least 4 for 8 experts on 2 ranks")
    );
    let empty = Routing::new(8, 2, &[]).unwrap();
    let none = place(&empty, Topology::flat(2).unwrap(), &SearchOptions::default(), &mut || true);
    assert_eq!(none.unwrap_err(), PlanError::NoTokens);
}
