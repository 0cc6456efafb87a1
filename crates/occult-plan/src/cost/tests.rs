use super::*;
use crate::{HomeRanks, LayerPlacement, LayerTraffic, Routing, Topology, placement::contiguous};
use proptest::prelude::*;

/// Round numbers, so that times can be added up by hand.
fn cluster(nodes: usize, ranks_per_node: usize, per: LinkEnd) -> Cluster {
    Cluster {
        name: "round".into(),
        nodes,
        ranks_per_node,
        intra: Link { bandwidth_bytes_per_s: 1000.0, latency_s: 0.001 },
        inter: (nodes > 1)
            .then_some(InterLink { link: Link { bandwidth_bytes_per_s: 100.0, latency_s: 0.01 }, per }),
        compute: Compute { flops_per_s: 1e4, memory_bandwidth_bytes_per_s: 1e3 },
    }
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * (a.abs() + b.abs())
}

/// The tokens of the traffic's golden example: token 0 at home on rank 0 visits ranks 0 (twice), 1, 3; token 1, three
/// times, at home on rank 1, visits ranks 2 (twice) and 3 (twice). Rows of 20 bytes.
fn golden() -> LayerTraffic {
    let placement = contiguous::place(8, 4).unwrap();
    let ids = [0, 1, 2, 7, 4, 5, 6, 7];
    let routing = Routing::new(8, 4, &ids).unwrap().with_occurrences(&[1, 3]).unwrap();
    let home = HomeRanks::Blocks { num_rows: 2 };
    LayerTraffic::measure(&placement, Topology::new(4, 2).unwrap(), home, &routing).unwrap()
}

#[test]
fn golden_example() {
    let shape = LayerShape::gated(10, 4, 2.0);
    let predict = |per, exchange| predict(&cluster(2, 2, per), &shape, &golden(), exchange, None).unwrap();

    let step = predict(LinkEnd::Rank, Exchange::PerNode);
    let [between, within] = &step.forward.dispatch.steps[..] else { panic!("two levels") };
    // Between nodes: token 0 sends one row with one pair to rank 2, token 1 three rows with twelve pairs to rank 3.
    assert_eq!(between.out_bytes, [26.0, 60.0 + 72.0, 0.0, 0.0]);
    assert_eq!(between.in_bytes, [0.0, 0.0, 26.0, 132.0]);
    assert_eq!((between.peers, between.busiest), (1, 1));
    assert!(close(between.seconds, 0.01 + 1.32));
    // Within: token 0 from rank 0 to 1 and, having arrived at 2, to 3; token 1, having arrived at 3, to 2 (three rows with
    // two pairs each).
    assert_eq!(within.out_bytes, [26.0, 0.0, 26.0, 60.0 + 36.0]);
    assert_eq!(within.in_bytes, [0.0, 26.0, 96.0, 26.0]);
    assert!(close(within.seconds, 0.001 + 0.096));
    // Combine carries rows alone.
    assert!(close(step.forward.combine.seconds, 0.01 + 0.6 + 0.001 + 0.06));
    // Load 2, 1, 6, 7 pairs of 240 flops; weights of two experts of 240 bytes on the busiest rank.
    assert_eq!(step.ranks.iter().map(|r| r.flops).collect::<Vec<_>>(), [480.0, 240.0, 1440.0, 1680.0]);
    assert_eq!(step.ranks.iter().map(|r| r.weight_bytes).collect::<Vec<_>>(), [480.0, 240.0, 480.0, 480.0]);
    assert_eq!((step.forward.compute_s, step.slowest_rank), (0.48, 0));
    let total = 1.33 + 0.097 + 0.48 + 0.671;
    assert!(close(step.forward.total_s, total));
    // Backward: rows, then rows with 4 bytes per pair; twice the compute.
    assert!(close(step.backward.total_s, 0.671 + 0.96 + (0.01 + 1.08 + 0.001 + 0.084)));

    // Straight to each rank: token 1 crosses twice, three rows with two pairs each time.
    let step = predict(LinkEnd::Rank, Exchange::PerRank);
    let [between, within] = &step.forward.dispatch.steps[..] else { panic!("two levels") };
    assert_eq!(between.out_bytes, [26.0, 192.0, 0.0, 0.0]);
    assert_eq!(between.in_bytes, [0.0, 0.0, 96.0, 122.0]);
    assert_eq!(between.peers, 2);
    assert_eq!(within.out_bytes, [26.0, 0.0, 0.0, 0.0]);

    // One row per expert.
    let step = predict(LinkEnd::Rank, Exchange::PerExpert);
    assert_eq!(step.forward.combine.steps[0].out_bytes, [20.0, 240.0, 0.0, 0.0]);

    // One link for the node.
    let step = predict(LinkEnd::Node, Exchange::PerNode);
    assert_eq!(step.forward.dispatch.steps[0].out_bytes, [158.0, 0.0]);
    assert!(close(step.forward.dispatch.steps[0].seconds, 0.01 + 1.58));
}

#[test]
fn a_step_of_another_size_scales_rows_and_samples_experts() {
    let shape = LayerShape::gated(10, 4, 2.0);
    let cluster = cluster(2, 2, LinkEnd::Rank);
    let traffic = golden();
    let whole = predict(&cluster, &shape, &traffic, Exchange::PerNode, None).unwrap();
    let double = predict(&cluster, &shape, &traffic, Exchange::PerNode, Some(8)).unwrap();
    assert_eq!(double.tokens, 8.0);
    let bytes = |s: &StepTime| s.forward.dispatch.steps[0].busiest_bytes;
    assert_eq!(bytes(&double), 2.0 * bytes(&whole));
    assert_eq!(double.ranks[3].flops, 2.0 * whole.ranks[3].flops);
    // Rank 3: expert 6 by three of four tokens, expert 7 by all.
    let touched = double.ranks[3].experts_touched;
    assert!(close(touched, 1.0 - 0.25f64.powi(8) + 1.0), "{touched}");
    assert!(predict(&cluster, &shape, &traffic, Exchange::PerNode, Some(0)).is_err());
}

proptest! {
    #[test]
    fn identities(
        ranks in prop::collection::vec(0u16..6, 12),
        rows in prop::collection::vec(
            prop::sample::subsequence((0u16..12).collect::<Vec<_>>(), 3).prop_shuffle(), 1..30),
        blocks: bool,
    ) {
        let placement = LayerPlacement::from_expert_ranks(6, &ranks).unwrap();
        let ids = rows.concat();
        let routing = Routing::new(12, 3, &ids).unwrap();
        let home = if blocks { HomeRanks::Blocks { num_rows: rows.len() } } else { HomeRanks::Uniform };
        let shape = LayerShape::gated(16, 8, 2.0);
        let sum = |v: &[f64]| v.iter().sum::<f64>();
        for (nodes, per_node) in [(1, 6), (2, 3), (3, 2), (6, 1)] {
            let topology = Topology::new(6, nodes).unwrap();
            let traffic = LayerTraffic::measure(&placement, topology, home, &routing).unwrap();
            let cluster = cluster(nodes, per_node, LinkEnd::Rank);
            let [two_level, per_rank, per_expert] =
                Exchange::ALL.map(|e| predict(&cluster, &shape, &traffic, e, None).unwrap());
            // What leaves arrives, and the bytes are those of the traffic.
            let bytes = traffic.bytes(16, 2.0);
            for (step, expected) in [
                (&per_rank, bytes.combine_row_bytes),
                (&per_expert, bytes.conventional_dispatch_row_bytes),
            ] {
                let steps = &step.forward.combine.steps;
                for s in steps {
                    prop_assert!(close(sum(&s.out_bytes) + 1.0, sum(&s.in_bytes) + 1.0));
                }
                let total: f64 = steps.iter().map(|s| sum(&s.out_bytes)).sum();
                prop_assert!(close(total + 1.0, expected + 1.0));
            }
            for step in &two_level.forward.combine.steps {
                prop_assert!(close(sum(&step.out_bytes) + 1.0, sum(&step.in_bytes) + 1.0));
                if step.between_nodes {
                    prop_assert!(close(sum(&step.out_bytes) + 1.0, bytes.node_dispatch_row_bytes + 1.0));
                }
            }
            let pairs: f64 = per_rank.ranks.iter().map(|r| r.pairs).sum();
            prop_assert_eq!(pairs, ids.len() as f64);
            // On one node, and on nodes of one rank, two levels are one.
            if nodes == 1 || per_node == 1 {
                prop_assert!(close(two_level.forward.total_s, per_rank.forward.total_s));
            }
            prop_assert!(per_rank.forward.total_s <= per_expert.forward.total_s * (1.0 + 1e-12));
            prop_assert_eq!(&two_level.ranks, &per_expert.ranks);
        }
    }
}

#[test]
fn the_explanation_has_the_numbers() {
    let shape = LayerShape::gated(10, 4, 2.0);
    let cluster = cluster(2, 2, LinkEnd::Node);
    let step = predict(&cluster, &shape, &golden(), Exchange::PerNode, None).unwrap();
    let lines = explain(&cluster, &shape, &step);
    assert_eq!(lines[0], "round: 2 nodes x 2 ranks, exchange per-node, 4 tokens in the step");
    assert_eq!(
        lines[2],
        "dispatch between nodes = 10.000 ms x 1 peers + 158 B of node 0 / 100 B/s = 1.590 s"
    );
    let forward = "forward = dispatch 1.687 s + compute 480.000 ms + combine 871.000 ms = 3.038 s";
    assert_eq!(lines[lines.len() - 2], forward);
}

#[test]
fn impossible_clusters_are_named() {
    let good = cluster(2, 2, LinkEnd::Rank);
    let shape = LayerShape::gated(10, 4, 2.0);
    let error = |cluster: &Cluster| {
        predict(cluster, &shape, &golden(), Exchange::PerNode, None).unwrap_err().to_string()
    };
    let mut bad = good.clone();
    bad.intra.bandwidth_bytes_per_s = 0.0;
    assert_eq!(error(&bad), "intra bandwidth (bytes/s) is 0, expected a positive number");
    let mut bad = good.clone();
    bad.compute.flops_per_s = f64::NAN;
    assert_eq!(error(&bad), "compute FLOP/s is NaN, expected a positive number");
    let bad = Cluster { inter: None, ..good.clone() };
    assert!(error(&bad).contains("links between nodes"));
    let bad = Cluster { nodes: usize::MAX, ..good.clone() };
    assert!(error(&bad).contains("number of ranks"));
    let four = good.resized(Topology::new(8, 4).unwrap()).unwrap();
    assert_eq!(
        error(&four),
        "topology of the traffic is 4 ranks on 2 nodes, expected 8 ranks on 4 nodes, as the cluster has"
    );
    let flat = LayerShape { hidden: 0, ..shape };
    assert!(predict(&good, &flat, &golden(), Exchange::PerRank, None).is_err());
    assert!("per-token".parse::<Exchange>().is_err());
    assert_eq!("per-rank".parse(), Ok(Exchange::PerRank));
}
