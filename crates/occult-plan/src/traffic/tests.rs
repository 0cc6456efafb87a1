use super::*;
use crate::{ExpertId, placement::contiguous};
use proptest::prelude::*;

/// Everything again, token by token in the plainest way. Serving ranks come from the same chooser.
#[derive(Debug, Default, PartialEq)]
struct Slow {
    tokens: u64,
    ranks_per_token: Vec<u64>,
    copies: u64,
    node_copies: u64,
    intra_pairs: u64,
    load: Vec<u64>,
    /// `[W][E]`
    tokens_on: Vec<Vec<u64>>,
    rank_rows: Vec<f64>,
    rank_pairs: Vec<f64>,
    rank_node_rows: Vec<f64>,
    node_rows: Vec<f64>,
    forwarded_rows: Vec<f64>,
}

fn slow(placement: &LayerPlacement, topology: Topology, home: HomeRanks, routing: &Routing<'_>) -> Slow {
    let (w, nodes, per_node) = (topology.num_ranks(), topology.num_nodes(), topology.ranks_per_node());
    let top_k = routing.top_k();
    let mut s = Slow {
        ranks_per_token: vec![0; top_k.min(w) + 1],
        load: vec![0; w],
        tokens_on: vec![vec![0; placement.num_experts()]; w],
        rank_rows: vec![0.0; w * w],
        rank_pairs: vec![0.0; w * w],
        rank_node_rows: vec![0.0; w * nodes],
        node_rows: vec![0.0; nodes * nodes],
        forwarded_rows: vec![0.0; per_node * w],
        ..Slow::default()
    };
    // A token is at home at each of these, with this share. Blocks as numpy.array_split cuts them.
    let homes_of = |row: usize| -> Vec<(usize, f64)> {
        match home {
            HomeRanks::Uniform => (0..w).map(|r| (r, 1.0 / w as f64)).collect(),
            HomeRanks::Blocks { num_rows } => {
                let mut owner = Vec::new();
                for r in 0..w {
                    let size = num_rows / w + if r < num_rows % w { 1 } else { 0 };
                    owner.extend(vec![r; size]);
                }
                vec![(owner[row], 1.0)]
            }
        }
    };
    let mut chooser = crate::ReplicaChooser::new(placement, topology);
    for (row, ids) in routing.rows().enumerate() {
        let n = routing.occurrences(row);
        let mut serving = vec![0; top_k];
        chooser.assign(ids, n, &mut serving);
        s.tokens += n;
        for i in 0..top_k {
            s.load[usize::from(serving[i])] += n;
            s.tokens_on[usize::from(serving[i])][usize::from(ids[i])] += n;
            for j in 0..i {
                if serving[i] == serving[j] {
                    s.intra_pairs += n;
                }
            }
        }
        let on = |rank: usize| serving.iter().filter(|&&r| usize::from(r) == rank).count();
        let visited: Vec<usize> = (0..w).filter(|&r| on(r) > 0).collect();
        let visited_nodes: Vec<usize> =
            (0..nodes).filter(|&m| visited.iter().any(|r| r / per_node == m)).collect();
        s.copies += n * visited.len() as u64;
        s.node_copies += n * visited_nodes.len() as u64;
        s.ranks_per_token[visited.len()] += n;
        for (h, share) in homes_of(row) {
            let share = share * n as f64;
            for &r in &visited {
                s.rank_rows[h * w + r] += share;
                s.rank_pairs[h * w + r] += share * on(r) as f64;
                s.forwarded_rows[(h % per_node) * w + r] += share;
            }
            for &m in &visited_nodes {
                s.rank_node_rows[h * nodes + m] += share;
                s.node_rows[h / per_node * nodes + m] += share;
            }
        }
    }
    s
}

/// Experts on ranks, unevenly, perhaps with empty ranks, perhaps replicated, from a mask per expert.
fn placement_from(masks: &[u16], num_ranks: usize, replicas: bool) -> LayerPlacement {
    let mut ranks = vec![Vec::new(); num_ranks];
    for (e, &mask) in masks.iter().enumerate() {
        ranks[usize::from(mask) % num_ranks].push(e as ExpertId);
        let second = usize::from(mask >> 8) % num_ranks;
        if replicas && mask % 3 == 0 && second != usize::from(mask) % num_ranks {
            ranks[second].push(e as ExpertId);
        }
    }
    LayerPlacement::from_rank_experts(masks.len(), &ranks).unwrap()
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * (1.0 + a.abs().max(b.abs()))
}

fn all_close(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(&a, &b)| close(a, b))
}

proptest! {
    #[test]
    fn same_as_the_obvious_one(
        masks in prop::collection::vec(any::<u16>(), 12),
        (num_ranks, num_nodes) in prop::sample::select(vec![(1, 1), (2, 1), (3, 1), (5, 1), (4, 2), (6, 3), (6, 2), (8, 2), (16, 4)]),
        replicas: bool,
        blocks: bool,
        rows in prop::collection::vec(
            (prop::sample::subsequence((0u16..12).collect::<Vec<_>>(), 4).prop_shuffle(), 0u32..5), 1..40),
        cut in 0usize..40,
    ) {
        let placement = placement_from(&masks, num_ranks, replicas);
        let topology = Topology::new(num_ranks, num_nodes).unwrap();
        let ids: Vec<u16> = rows.iter().flat_map(|(ids, _)| ids.clone()).collect();
        let mut occurrences: Vec<u32> = rows.iter().map(|&(_, n)| n).collect();
        occurrences[0] += 1;
        let routing = Routing::new(12, 4, &ids).unwrap().with_occurrences(&occurrences).unwrap();
        let home = if blocks { HomeRanks::Blocks { num_rows: rows.len() } } else { HomeRanks::Uniform };
        let traffic = LayerTraffic::measure(&placement, topology, home, &routing).unwrap();
        let slow = slow(&placement, topology, home, &routing);

        prop_assert_eq!(traffic.num_tokens(), slow.tokens);
        prop_assert_eq!(traffic.ranks_per_token(), &slow.ranks_per_token[..]);
        prop_assert_eq!(traffic.intra_pairs(), slow.intra_pairs);
        prop_assert_eq!(traffic.all_pairs(), slow.tokens * 6);
        prop_assert_eq!(traffic.load(), slow.load.clone());
        prop_assert_eq!(traffic.rank_rows().total(), slow.copies);
        prop_assert_eq!(traffic.rank_pairs().total(), slow.tokens * 4);
        prop_assert_eq!(traffic.rank_node_rows().total(), slow.node_copies);
        prop_assert!(all_close(&traffic.rank_rows().to_vec(), &slow.rank_rows));
        prop_assert!(all_close(&traffic.rank_pairs().to_vec(), &slow.rank_pairs));
        prop_assert!(all_close(&traffic.rank_node_rows().to_vec(), &slow.rank_node_rows));
        prop_assert!(all_close(&traffic.node_rows().to_vec(), &slow.node_rows));
        prop_assert!(all_close(&traffic.forwarded_rows().to_vec(), &slow.forwarded_rows));
        prop_assert_eq!(traffic.rank_rows().is_exact(), blocks);
        for r in 0..num_ranks {
            let of_rank: Vec<u64> =
                placement.experts_of(r as u16).iter().map(|&e| slow.tokens_on[r][usize::from(e)]).collect();
            prop_assert_eq!(traffic.tokens_per_local_expert(r as u16), &of_rank[..]);
            let touched = of_rank.iter().filter(|&&n| n > 0).count();
            prop_assert_eq!(traffic.experts_touched_per_rank()[r], touched);
        }
        let touched = (0..12).filter(|&e| slow.tokens_on.iter().any(|t| t[e] > 0)).count();
        prop_assert_eq!(traffic.num_experts_touched(), touched);

        let s = traffic.summary();
        let t = slow.tokens as f64;
        let off_diagonal = |rows: &[f64], stays: &dyn Fn(usize) -> usize, columns: usize| -> f64 {
            (0..rows.len()).filter(|i| i % columns != stays(i / columns)).map(|i| rows[i]).sum()
        };
        let per_node = num_ranks / num_nodes;
        prop_assert!(close(s.copies_per_token, slow.copies as f64 / t));
        prop_assert!(close(s.remote_copies_per_token, off_diagonal(&slow.rank_rows, &|r| r, num_ranks) / t));
        prop_assert!(close(s.node_copies_per_token, slow.node_copies as f64 / t));
        prop_assert!(close(
            s.remote_node_copies_per_token,
            off_diagonal(&slow.rank_node_rows, &|r| r / per_node, num_nodes) / t
        ));
        prop_assert!(close(
            s.conventional_remote_copies_per_token,
            off_diagonal(&slow.rank_pairs, &|r| r, num_ranks) / t
        ));
        if !blocks {
            let w = num_ranks as f64;
            prop_assert!(close(s.remote_copies_per_token, s.copies_per_token * (w - 1.0) / w));
        }
        prop_assert!(close(s.intra_fraction.unwrap(), slow.intra_pairs as f64 / (6.0 * t)));
        // Ordered pairs with each expert's own: 16 per token.
        let with_self = (2 * slow.intra_pairs + 4 * slow.tokens) as f64 / (16.0 * t);
        prop_assert!(close(s.intra_fraction_with_self, with_self));
        let max = *slow.load.iter().max().unwrap() as f64;
        let mean = 4.0 * t / num_ranks as f64;
        prop_assert!(close(s.load_max_over_mean, max / mean));
        prop_assert!(close(s.balancedness, mean / max));
        prop_assert!(close(s.imbalance_ratio, (max - mean) / mean));
        prop_assert!(s.copies_lower_bound <= s.copies_per_token && s.copies_per_token <= s.copies_upper_bound);

        // In two chunks: the same to the last bit.
        let cut = cut.min(rows.len());
        let mut meter = TrafficMeter::new(&placement, topology, home).unwrap();
        for rows in [0..cut, cut..rows.len()] {
            let chunk = Routing::new(12, 4, &ids[rows.start * 4..rows.end * 4]).unwrap();
            meter.add(&chunk.with_occurrences(&occurrences[rows]).unwrap()).unwrap();
        }
        prop_assert_eq!(meter.finish().unwrap(), traffic);
    }

    /// The closed form against every set of experts, counted once each.
    #[test]
    fn uniform_copies_are_the_mean_over_all_sets(
        masks in prop::collection::vec(any::<u16>(), 8),
        (num_ranks, num_nodes) in prop::sample::select(vec![(1, 1), (3, 1), (4, 2), (6, 3)]),
        top_k in 1u32..6,
    ) {
        let placement = placement_from(&masks, num_ranks, false);
        let topology = Topology::new(num_ranks, num_nodes).unwrap();
        let sets = (0u16..256).filter(|s| s.count_ones() == top_k);
        let ids: Vec<u16> = sets.flat_map(|s| (0..8).filter(move |e| s >> e & 1 == 1)).collect();
        let routing = Routing::new(8, top_k as usize, &ids).unwrap();
        let s = LayerTraffic::measure(&placement, topology, HomeRanks::Uniform, &routing).unwrap().summary();
        prop_assert!(close(s.copies_uniform.unwrap(), s.copies_per_token));
        prop_assert!(close(s.node_copies_uniform.unwrap(), s.node_copies_per_token));
        // Every set occurred, so the fewest ranks any of them needs is the bound.
        let fewest = LayerTraffic::measure(&placement, topology, HomeRanks::Uniform, &routing).unwrap();
        let fewest = fewest.ranks_per_token().iter().position(|&n| n > 0).unwrap();
        prop_assert_eq!(s.copies_lower_bound, fewest as f64);
    }
}

/// OLMoE on four ranks: the paper gives 3.66 for uniform routing (and 8 copies for the conventional exchange), and prints
/// intra : inter as 0.33 : 0.67 with every expert paired with itself.
#[test]
fn figures_of_the_paper() {
    let placement = contiguous::place(64, 4).unwrap();
    let [ranks, nodes] = uniform_copies(&placement, Topology::flat(4).unwrap(), 8).unwrap();
    assert!((ranks - 3.66).abs() < 0.005, "{ranks}");
    assert_eq!(nodes, 1.0);
    let bounds = copy_bounds(&placement, 8);
    assert_eq!((bounds.optimum, bounds.this_placement, bounds.upper), (1, 1, 4));
    assert_eq!(copy_bounds(&contiguous::place(64, 32).unwrap(), 8).optimum, 4);
    // Uniform routing: two different experts meet with 15 / 63.
    let intra = 28.0 * 15.0 / 63.0;
    assert!(((8.0f64 + 2.0 * intra) / 64.0 - 0.33).abs() < 0.005);
}

/// Two tokens at home on ranks 0 and 1 of four, two nodes; worked by hand.
#[test]
fn golden_example() {
    let placement = contiguous::place(8, 4).unwrap();
    let topology = Topology::new(4, 2).unwrap();
    // Token 0: ranks 0 (twice), 1, 3. Token 1, three times: ranks 2 (twice), 3 (twice).
    let ids = [0, 1, 2, 7, 4, 5, 6, 7];
    let routing = Routing::new(8, 4, &ids).unwrap().with_occurrences(&[1, 3]).unwrap();
    let home = HomeRanks::Blocks { num_rows: 2 };
    let traffic = LayerTraffic::measure(&placement, topology, home, &routing).unwrap();
    #[rustfmt::skip]
    assert_eq!(traffic.rank_rows().to_vec(), [
        1., 1., 0., 1.,
        0., 0., 3., 3.,
        0., 0., 0., 0.,
        0., 0., 0., 0.,
    ]);
    assert_eq!(traffic.node_rows().to_vec(), [1., 4., 0., 0.]);
    // Position 0: token 0, arriving at ranks 0 and 2; position 1: token 1, at ranks 1 and 3.
    assert_eq!(traffic.forwarded_rows().to_vec(), [1., 1., 0., 1., 0., 0., 3., 3.]);
    assert_eq!(traffic.load(), [2, 1, 6, 7]);
    assert_eq!(traffic.ranks_per_token(), [0, 0, 3, 1, 0]);
    assert_eq!(traffic.experts_touched_per_rank(), [2, 1, 2, 2]);
    let s = traffic.summary();
    assert_eq!((s.copies_per_token, s.remote_copies_per_token), (9.0 / 4.0, 8.0 / 4.0));
    assert_eq!((s.node_copies_per_token, s.remote_node_copies_per_token), (5.0 / 4.0, 4.0 / 4.0));
    assert_eq!(s.conventional_remote_copies_per_token, 14.0 / 4.0);
    assert_eq!(s.load_max_over_mean, 7.0 / 4.0);
    assert_eq!(s.intra_fraction, Some(7.0 / 24.0));
    assert_eq!(s.experts_touched, 7.0);
    let bytes = traffic.bytes(10, 2.0);
    assert_eq!((bytes.dispatch_row_bytes, bytes.combine_row_bytes), (160.0, 160.0));
    assert_eq!((bytes.dispatch_id_bytes, bytes.dispatch_weight_bytes), (28.0, 56.0));
    assert_eq!((bytes.conventional_dispatch_row_bytes, bytes.node_dispatch_row_bytes), (280.0, 80.0));
}

#[test]
fn what_does_not_fit_is_refused() {
    let placement = contiguous::place(8, 4).unwrap();
    let flat = Topology::flat(4).unwrap();
    let routing = Routing::new(8, 2, &[0, 1, 2, 3]).unwrap();
    let error = |topology, home, routing: &Routing<'_>| {
        LayerTraffic::measure(&placement, topology, home, routing).unwrap_err().to_string()
    };
    let uniform = HomeRanks::Uniform;
    assert_eq!(
        error(Topology::flat(2).unwrap(), uniform, &routing),
        "placement: it has 4 ranks, the topology has 2"
    );
    let other = Routing::new(9, 2, &[0, 1]).unwrap();
    assert_eq!(error(flat, uniform, &other), "placement: it places 8 experts, the routing has 9");
    assert_eq!(error(flat, uniform, &Routing::new(8, 2, &[]).unwrap()), "there are no tokens");
    let never = routing.with_occurrences(&[0, 0]).unwrap();
    assert_eq!(error(flat, uniform, &never), "there are no tokens");
    for num_rows in [1, 3] {
        let message = error(flat, HomeRanks::Blocks { num_rows }, &routing);
        assert_eq!(message, format!("rows of the layer: expected {num_rows} values, found 2"));
    }
    let mut meter = TrafficMeter::new(&placement, flat, uniform).unwrap();
    meter.add(&routing).unwrap();
    let message = meter.add(&Routing::new(8, 3, &[0, 1, 2]).unwrap()).unwrap_err().to_string();
    assert_eq!(message, "top_k is 3, expected 2 as in the chunks before");
    // What was refused was not counted.
    assert_eq!(meter.finish().unwrap(), LayerTraffic::measure(&placement, flat, uniform, &routing).unwrap());
    let wide = contiguous::place(5000, 5000).unwrap();
    let message = TrafficMeter::new(&wide, Topology::flat(5000).unwrap(), HomeRanks::Blocks { num_rows: 1 })
        .unwrap_err();
    assert!(message.to_string().contains("4096"));
}

#[test]
fn one_expert_per_token_has_no_pairs_and_the_mean_says_so() {
    let placement = contiguous::place(2, 2).unwrap();
    let flat = Topology::flat(2).unwrap();
    let measure = |ids: &[u16], top_k| {
        let routing = Routing::new(2, top_k, ids).unwrap();
        LayerTraffic::measure(&placement, flat, HomeRanks::Uniform, &routing).unwrap().summary()
    };
    let one = measure(&[0, 1, 1, 1], 1);
    assert_eq!((one.intra_fraction, one.intra_fraction_with_self), (None, 1.0));
    let two = measure(&[0, 1], 2);
    assert_eq!(two.intra_fraction, Some(0.0));
    let mean = TrafficSummary::mean(&[one, two]).unwrap();
    assert_eq!((mean.copies_per_token, mean.load_max_over_mean), (1.5, 1.25));
    assert_eq!(mean.intra_fraction, None);
    assert_eq!(TrafficSummary::mean(&[two]), Some(two));
    assert_eq!(TrafficSummary::mean(&[]), None);
}
