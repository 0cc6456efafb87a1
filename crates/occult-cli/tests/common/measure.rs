//! The measures, from their definitions: a token's copies are the distinct ranks of its experts; two experts of a token
//! collaborate intra when they are on one rank; the load of a rank is its (token, expert) pairs.

use std::collections::BTreeSet;

use serde_json::Value;

/// Experts of each rank of each layer, as a placement file lists them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Table {
    pub(crate) experts: usize,
    pub(crate) ranks: usize,
    pub(crate) nodes: usize,
    pub(crate) layer_ids: Vec<usize>,
    /// `[layers][ranks]`, ascending experts.
    pub(crate) layers: Vec<Vec<Vec<usize>>>,
}

impl Table {
    /// Reads a placement file, and checks that every expert of every layer is placed, on a rank at most once.
    #[track_caller]
    pub(crate) fn of(file: &Value) -> Self {
        let number = |key: &str| file[key].as_u64().unwrap_or_else(|| panic!("{key} in {file}")) as usize;
        let (experts, ranks, nodes) = (number("num_experts"), number("num_ranks"), number("num_nodes"));
        let mut table = Self { experts, ranks, nodes, layer_ids: vec![], layers: vec![] };
        for layer in file["layers"].as_array().unwrap() {
            table.layer_ids.push(layer["layer"].as_u64().unwrap() as usize);
            let lists: Vec<Vec<usize>> = layer["ranks"].as_array().unwrap().iter().map(super::ints).collect();
            assert_eq!(lists.len(), ranks);
            for list in &lists {
                assert!(
                    list.iter().collect::<BTreeSet<_>>().len() == list.len(),
                    "twice on a rank: {list:?}"
                );
            }
            let all: BTreeSet<usize> = lists.iter().flatten().copied().collect();
            assert_eq!(all, (0..experts).collect(), "every expert is placed");
            table.layers.push(lists);
        }
        table
    }

    /// Equal blocks of consecutive experts.
    pub(crate) fn contiguous(experts: usize, ranks: usize, layers: usize) -> Self {
        assert_eq!(experts % ranks, 0);
        let all = Vec::from_iter(0..experts);
        let lists: Vec<Vec<usize>> = all.chunks(experts / ranks).map(<[usize]>::to_vec).collect();
        Self { experts, ranks, nodes: 1, layer_ids: (0..layers).collect(), layers: vec![lists; layers] }
    }

    /// Expert slots of a layer, replicas included.
    pub(crate) fn slots(&self, layer: usize) -> usize {
        self.layers[layer].iter().map(Vec::len).sum()
    }

    /// Rank of each expert of a layer without replicas.
    pub(crate) fn rank_of(&self, layer: usize) -> Vec<usize> {
        assert_eq!(self.slots(layer), self.experts, "no replicas");
        let mut rank_of = vec![usize::MAX; self.experts];
        for (rank, list) in self.layers[layer].iter().enumerate() {
            list.iter().for_each(|&e| rank_of[e] = rank);
        }
        rank_of
    }

    /// Measures rows `(expert set, tokens it stands for)` of a layer.
    pub(crate) fn measure(&self, layer: usize, rows: &[(Vec<usize>, u64)]) -> Measured {
        let rank_of = self.rank_of(layer);
        let mut m = Measured { load: vec![0; self.ranks], ..Measured::default() };
        let (mut tokens, mut intra, mut pairs) = (0, 0, 0);
        for (set, n) in rows {
            let ranks: Vec<usize> = set.iter().map(|&e| rank_of[e]).collect();
            let distinct: BTreeSet<usize> = ranks.iter().copied().collect();
            let nodes: BTreeSet<usize> = distinct.iter().map(|r| r * self.nodes / self.ranks).collect();
            tokens += n;
            m.copies += (distinct.len() as u64 * n) as f64;
            m.node_copies += (nodes.len() as u64 * n) as f64;
            for (i, a) in ranks.iter().enumerate() {
                m.load[*a] += n;
                for b in &ranks[i + 1..] {
                    pairs += n;
                    intra += if a == b { *n } else { 0 };
                }
            }
        }
        m.copies /= tokens as f64;
        m.node_copies /= tokens as f64;
        m.tokens = tokens;
        m.intra = intra as f64 / pairs as f64;
        let k = rows[0].0.len() as f64;
        m.intra_with_self = (k + 2.0 * intra as f64 / tokens as f64) / (k * k);
        m.load_ratio =
            *m.load.iter().max().unwrap() as f64 * self.ranks as f64 / m.load.iter().sum::<u64>() as f64;
        m
    }

    /// Measures rows that stand for one token each.
    pub(crate) fn measure_sets(&self, layer: usize, sets: &[Vec<usize>]) -> Measured {
        self.measure(layer, &Vec::from_iter(sets.iter().map(|s| (s.clone(), 1))))
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Measured {
    pub(crate) tokens: u64,
    pub(crate) copies: f64,
    pub(crate) node_copies: f64,
    pub(crate) intra: f64,
    pub(crate) intra_with_self: f64,
    pub(crate) load: Vec<u64>,
    pub(crate) load_ratio: f64,
}

impl Measured {
    /// Compares with the figures of one layer.
    #[track_caller]
    pub(crate) fn check(&self, figures: &Value, ranks: usize) {
        let w = ranks as f64;
        for (key, expected) in [
            ("copies_per_token", self.copies),
            // Any rank is home with the same chance, so a copy stays at home once in W.
            ("remote_copies_per_token", self.copies * (w - 1.0) / w),
            ("node_copies_per_token", self.node_copies),
            ("intra_fraction", self.intra),
            ("intra_fraction_with_self", self.intra_with_self),
            ("inter_fraction", 1.0 - self.intra),
            ("load_max_over_mean", self.load_ratio),
            ("balancedness", 1.0 / self.load_ratio),
            ("imbalance_ratio", self.load_ratio - 1.0),
        ] {
            close(super::number(figures, key), expected, key);
        }
    }
}

/// Equal but for rounding.
#[track_caller]
pub(crate) fn close(found: f64, expected: f64, what: &str) {
    let tolerance = 1e-9 * expected.abs().max(1.0);
    assert!((found - expected).abs() <= tolerance, "{what} is {found}, expected {expected}");
}
