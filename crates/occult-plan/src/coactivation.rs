//! Counts: tokens per expert, and tokens per pair of experts (the collaboration graph).

use crate::{PlanError, Result, Routing};

/// Tokens that chose each expert, `[E]`.
pub fn tokens_per_expert(routing: &Routing<'_>) -> Vec<u64> {
    let mut counts = vec![0; routing.num_experts()];
    for (ids, n) in routing.weighted_rows() {
        for &id in ids {
            counts[usize::from(id)] += n;
        }
    }
    counts
}

/// The collaboration graph: `pairs[i][j]` tokens chose both experts `i` and `j`; symmetric, zero diagonal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CoActivation {
    num_experts: usize,
    pairs: Vec<u64>,
}

impl CoActivation {
    /// No tokens yet.
    pub fn new(num_experts: usize) -> Self {
        Self { num_experts, pairs: vec![0; num_experts * num_experts] }
    }

    /// Of one table of tokens.
    pub fn of(routing: &Routing<'_>) -> Self {
        let mut graph = Self::new(routing.num_experts());
        graph.add(routing);
        graph
    }

    /// From counts `[E, E]` that exist already: symmetric, and what the diagonal holds is dropped.
    pub fn from_counts(num_experts: usize, mut pairs: Vec<u64>) -> Result<Self> {
        let (expected, found) = (num_experts * num_experts, pairs.len());
        if found != expected {
            return Err(PlanError::Shape { what: "co-activation [E, E]", expected, found });
        }
        for i in 0..num_experts {
            pairs[i * num_experts + i] = 0;
            for j in 0..i {
                let (a, b) = (pairs[i * num_experts + j], pairs[j * num_experts + i]);
                if a != b {
                    let (expected, found) = (format!("{b} as at [{j}, {i}]"), format!("{a} at [{i}, {j}]"));
                    return Err(PlanError::Range { what: "co-activation (symmetric)", expected, found });
                }
            }
        }
        Ok(Self { num_experts, pairs })
    }

    /// Adds the rows of one chunk of tokens.
    pub fn add(&mut self, routing: &Routing<'_>) {
        let e = self.num_experts;
        assert_eq!(e, routing.num_experts(), "co-activation of another number of experts");
        for (ids, n) in routing.weighted_rows() {
            for (i, &a) in ids.iter().enumerate() {
                for &b in &ids[i + 1..] {
                    let (a, b) = (usize::from(a), usize::from(b));
                    self.pairs[a * e + b] += n;
                    self.pairs[b * e + a] += n;
                }
            }
        }
    }

    /// `E`.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Tokens that chose both.
    pub fn get(&self, i: usize, j: usize) -> u64 {
        self.pairs[i * self.num_experts + j]
    }

    /// `[E]` counts of one expert with every other.
    pub fn row(&self, i: usize) -> &[u64] {
        &self.pairs[i * self.num_experts..(i + 1) * self.num_experts]
    }

    /// All counts, `[E, E]` row-major.
    pub fn as_slice(&self) -> &[u64] {
        &self.pairs
    }

    /// The largest count; the paper's `P` is `pairs / max`.
    pub fn max(&self) -> u64 {
        self.pairs.iter().copied().max().unwrap_or(0)
    }
}
