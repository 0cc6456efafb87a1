//! A lower bound on the copies any placement within the limits can reach.
//!
//! Charge a token copy in equal parts to the experts it serves: with `n` experts of the token on the rank, `1/n` each. So
//! the copies are `sum_e sum_{t with e} 1/n(t, e)`. `1/n` is convex, so for each expert the inner sum is at least
//! `load_e * phi(mean n)`, with `phi` the piecewise linear interpolation of `1/n` at the integers (Jensen). And mean
//! `n = 1 + sum_{j beside e} pairs(e, j) / load_e`, at most what the best companions would give that fit beside `e`: a
//! fractional knapsack over their load, or the `max_experts - 1` most co-active ones, whichever is less.

use super::hypergraph::Hypergraph;
use super::state::Limits;

/// Lower bound on `sum_t copies(t)` for groups (ranks or nodes) under `limits`. Needs a hypergraph of experts, in which
/// the load of an expert is the weight of its sets.
pub(super) fn copies_lower_bound(graph: &Hypergraph, limits: Limits) -> f64 {
    let mut pairs = vec![0i64; graph.num_experts()];
    let mut bound = 0.0;
    for e in 0..graph.num_experts() {
        let load = graph.load(e);
        if load == 0 {
            continue;
        }
        pairs.fill(0);
        for &s in graph.sets_of(e) {
            let s = s as usize;
            graph.set(s).iter().for_each(|&j| pairs[usize::from(j)] += graph.weight(s));
        }
        pairs[e] = 0;
        let companions = best_companions(graph, &pairs, limits, (limits.max_load - load).max(0));
        bound += load as f64 * reciprocal_interpolated(1.0 + companions / load as f64);
    }
    // No token visits less than one rank, and none fits more experts on a rank than it can hold.
    let at_least: f64 = (0..graph.num_sets())
        .map(|s| graph.weight(s) as f64 * graph.set(s).len().div_ceil(limits.max_experts) as f64)
        .sum();
    bound.max(at_least)
}

/// Largest sum of `pairs` over experts that fit beside one expert.
fn best_companions(graph: &Hypergraph, pairs: &[i64], limits: Limits, room: i64) -> f64 {
    let mut order: Vec<usize> = (0..pairs.len()).filter(|&j| pairs[j] > 0).collect();
    order.sort_unstable_by_key(|&j| (std::cmp::Reverse(pairs[j]), j));
    let by_count: i64 = order.iter().take(limits.max_experts.saturating_sub(1)).map(|&j| pairs[j]).sum();
    // Dantzig's bound of the knapsack: best ratio first, the last one in part.
    order.sort_unstable_by(|&a, &b| {
        let ratio = |j: usize, other: usize| i128::from(pairs[j]) * i128::from(graph.load(other));
        ratio(b, a).cmp(&ratio(a, b)).then(a.cmp(&b))
    });
    let (mut room, mut by_load) = (room as f64, 0.0);
    for j in order {
        let load = graph.load(j) as f64;
        let part = (room / load).min(1.0);
        by_load += pairs[j] as f64 * part;
        room -= load * part;
        if room <= 0.0 {
            break;
        }
    }
    by_load.min(by_count as f64)
}

/// `1/n` at integers `n >= 1`, linear between them.
fn reciprocal_interpolated(n: f64) -> f64 {
    let low = libm::floor(n).max(1.0);
    let part = n - low;
    (1.0 - part) / low + part / (low + 1.0)
}
