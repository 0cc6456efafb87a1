//! The ratios that people compare.

use super::LayerTraffic;

/// One layer under one placement, or the mean of several layers. Rows per token unless said otherwise.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct TrafficSummary {
    /// Tokens measured.
    pub tokens: f64,
    /// `C_T`: distinct ranks per token, the home rank included where the token visits it.
    pub copies_per_token: f64,
    /// Copies that leave the home rank.
    pub remote_copies_per_token: f64,
    /// Distinct nodes per token.
    pub node_copies_per_token: f64,
    /// Copies that leave the home node in the two-level exchange.
    pub remote_node_copies_per_token: f64,
    /// Rows of the conventional exchange: one per (token, expert), so `K`.
    pub conventional_copies_per_token: f64,
    /// Those that leave the home rank.
    pub conventional_remote_copies_per_token: f64,
    /// `ceil(K W / E)`, the best an even placement without replicas could do.
    pub copies_optimum: f64,
    /// The fewest ranks of this placement that hold `K` experts.
    pub copies_lower_bound: f64,
    /// `min(K, W)`.
    pub copies_upper_bound: f64,
    /// `C_T` if routers chose uniformly at random; none with replicas.
    pub copies_uniform: Option<f64>,
    /// The same for nodes.
    pub node_copies_uniform: Option<f64>,
    /// Share of pairs of different experts of one token that are on one rank; none when `K` is 1.
    pub intra_fraction: Option<f64>,
    /// The other pairs: `1 - intra_fraction`.
    pub inter_fraction: Option<f64>,
    /// The share among ordered pairs that include each expert with itself, `(K + 2 intra) / K^2`. The 0.33 / 0.67 printed
    /// in the paper count this way.
    pub intra_fraction_with_self: f64,
    /// `1 - intra_fraction_with_self`.
    pub inter_fraction_with_self: f64,
    /// Load ((token, expert) pairs) of the busiest rank over the mean of all ranks ("overload factor").
    pub load_max_over_mean: f64,
    /// `mean / max`, as vLLM and SGLang report it; 1 is even.
    pub balancedness: f64,
    /// `(max - mean) / mean`, as TensorRT-LLM reports it; 0 is even.
    pub imbalance_ratio: f64,
    /// Experts with at least one token.
    pub experts_touched: f64,
}

impl TrafficSummary {
    pub(super) fn of(traffic: &LayerTraffic) -> Self {
        let (tokens, k) = (traffic.num_tokens() as f64, traffic.top_k() as f64);
        let per_token = |rows: f64| rows / tokens;
        let topology = traffic.topology();
        let load = traffic.load();
        let (max, total) = (load.iter().copied().max().unwrap_or(0), load.iter().sum::<u64>());
        // max / (total / W), rounded once or twice at most.
        let max_over_mean = (u128::from(max) * topology.num_ranks() as u128) as f64 / total as f64;
        let intra = traffic.intra_pairs() as f64;
        let intra_fraction = (traffic.all_pairs() > 0).then(|| intra / traffic.all_pairs() as f64);
        let with_self = (k + 2.0 * per_token(intra)) / (k * k);
        let bounds = traffic.bounds();
        Self {
            tokens,
            copies_per_token: per_token(traffic.rank_rows().total() as f64),
            remote_copies_per_token: per_token(traffic.rank_rows().remote_total(|r| r)),
            node_copies_per_token: per_token(traffic.rank_node_rows().total() as f64),
            remote_node_copies_per_token: per_token(
                traffic.rank_node_rows().remote_total(|r| r / topology.ranks_per_node()),
            ),
            conventional_copies_per_token: k,
            conventional_remote_copies_per_token: per_token(traffic.rank_pairs().remote_total(|r| r)),
            copies_optimum: bounds.optimum as f64,
            copies_lower_bound: bounds.this_placement as f64,
            copies_upper_bound: bounds.upper as f64,
            copies_uniform: traffic.uniform_copies().map(|[ranks, _]| ranks),
            node_copies_uniform: traffic.uniform_copies().map(|[_, nodes]| nodes),
            intra_fraction,
            inter_fraction: intra_fraction.map(|f| 1.0 - f),
            intra_fraction_with_self: with_self,
            inter_fraction_with_self: 1.0 - with_self,
            load_max_over_mean: max_over_mean,
            balancedness: 1.0 / max_over_mean,
            imbalance_ratio: max_over_mean - 1.0,
            experts_touched: traffic.num_experts_touched() as f64,
        }
    }

    /// Mean over layers, each layer counting the same, as papers report it. A figure that any layer lacks is missing.
    /// `None` when there are no layers.
    pub fn mean(layers: &[Self]) -> Option<Self> {
        if layers.is_empty() {
            return None;
        }
        let n = layers.len() as f64;
        let mean = |f: fn(&Self) -> f64| layers.iter().map(f).sum::<f64>() / n;
        let maybe =
            |f: fn(&Self) -> Option<f64>| layers.iter().map(f).sum::<Option<f64>>().map(|sum| sum / n);
        Some(Self {
            tokens: mean(|s| s.tokens),
            copies_per_token: mean(|s| s.copies_per_token),
            remote_copies_per_token: mean(|s| s.remote_copies_per_token),
            node_copies_per_token: mean(|s| s.node_copies_per_token),
            remote_node_copies_per_token: mean(|s| s.remote_node_copies_per_token),
            conventional_copies_per_token: mean(|s| s.conventional_copies_per_token),
            conventional_remote_copies_per_token: mean(|s| s.conventional_remote_copies_per_token),
            copies_optimum: mean(|s| s.copies_optimum),
            copies_lower_bound: mean(|s| s.copies_lower_bound),
            copies_upper_bound: mean(|s| s.copies_upper_bound),
            copies_uniform: maybe(|s| s.copies_uniform),
            node_copies_uniform: maybe(|s| s.node_copies_uniform),
            intra_fraction: maybe(|s| s.intra_fraction),
            inter_fraction: maybe(|s| s.inter_fraction),
            intra_fraction_with_self: mean(|s| s.intra_fraction_with_self),
            inter_fraction_with_self: mean(|s| s.inter_fraction_with_self),
            load_max_over_mean: mean(|s| s.load_max_over_mean),
            balancedness: mean(|s| s.balancedness),
            imbalance_ratio: mean(|s| s.imbalance_ratio),
            experts_touched: mean(|s| s.experts_touched),
        })
    }
}
