//! The router's decision for the tokens of one layer.

use crate::{ExpertId, PlanError, Result};

/// A checked, borrowed view of one layer's routing for `T` rows: what every planning function takes.
///
/// A row is a token, or a distinct set of experts that stands for `occurrences[row]` tokens. Rows hold `K` distinct
/// expert ids in the router's order (descending score) where the source kept it.
#[derive(Debug, Clone, Copy)]
pub struct Routing<'a> {
    num_experts: usize,
    top_k: usize,
    expert_ids: &'a [ExpertId],
    weights: Option<&'a [f32]>,
    scores: Option<&'a [f32]>,
    occurrences: Option<&'a [u32]>,
}

impl<'a> Routing<'a> {
    /// `expert_ids`: `[T, top_k]` row-major, every id in `0..num_experts` and no id twice in a row.
    pub fn new(num_experts: usize, top_k: usize, expert_ids: &'a [ExpertId]) -> Result<Self> {
        if num_experts == 0 || num_experts > usize::from(ExpertId::MAX) {
            return Err(PlanError::range("number of experts", "1 to 65535", num_experts));
        }
        if top_k == 0 || top_k > num_experts {
            return Err(PlanError::range(
                "top_k",
                format!("1 to {num_experts} (the number of experts)"),
                top_k,
            ));
        }
        if !expert_ids.len().is_multiple_of(top_k) {
            let expected = expert_ids.len().next_multiple_of(top_k);
            return Err(PlanError::Shape {
                what: "expert_ids [T, top_k]",
                expected,
                found: expert_ids.len(),
            });
        }
        for (row, ids) in expert_ids.chunks_exact(top_k).enumerate() {
            for (i, &id) in ids.iter().enumerate() {
                if usize::from(id) >= num_experts {
                    return Err(PlanError::ExpertOutOfRange { row, id: i64::from(id), num_experts });
                }
                if ids[..i].contains(&id) {
                    return Err(PlanError::DuplicateExpert { row, id });
                }
            }
        }
        Ok(Self { num_experts, top_k, expert_ids, weights: None, scores: None, occurrences: None })
    }

    /// Adds the routing weights of the chosen experts, `[T, top_k]`, finite.
    pub fn with_weights(mut self, weights: &'a [f32]) -> Result<Self> {
        check_finite("weights [T, top_k]", weights, self.num_tokens(), self.top_k)?;
        self.weights = Some(weights);
        Ok(self)
    }

    /// Adds the router's scores of all experts, `[T, num_experts]`, finite: router logits or any increasing function of
    /// them. A planning function says which of the two it needs.
    pub fn with_scores(mut self, scores: &'a [f32]) -> Result<Self> {
        check_finite("scores [T, num_experts]", scores, self.num_tokens(), self.num_experts)?;
        self.scores = Some(scores);
        Ok(self)
    }

    /// Adds the number of tokens each row stands for, `[T]`.
    pub fn with_occurrences(mut self, occurrences: &'a [u32]) -> Result<Self> {
        let (expected, found) = (self.num_tokens(), occurrences.len());
        if found != expected {
            return Err(PlanError::Shape { what: "occurrences [T]", expected, found });
        }
        self.occurrences = Some(occurrences);
        Ok(self)
    }

    /// `E`.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// `K`.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// `T`, the number of rows.
    pub fn num_tokens(&self) -> usize {
        self.expert_ids.len() / self.top_k
    }

    /// All ids, `[T, K]`.
    pub fn expert_ids(&self) -> &'a [ExpertId] {
        self.expert_ids
    }

    /// All weights, `[T, K]`.
    pub fn weights(&self) -> Option<&'a [f32]> {
        self.weights
    }

    /// All scores, `[T, E]`.
    pub fn scores(&self) -> Option<&'a [f32]> {
        self.scores
    }

    /// Tokens per row, `[T]`, where rows stand for several.
    pub fn occurrences_slice(&self) -> Option<&'a [u32]> {
        self.occurrences
    }

    /// The ids of each row.
    pub fn rows(&self) -> std::slice::ChunksExact<'a, ExpertId> {
        self.expert_ids.chunks_exact(self.top_k)
    }

    /// Number of tokens that a row stands for.
    pub fn occurrences(&self, row: usize) -> u64 {
        self.occurrences.map_or(1, |o| u64::from(o[row]))
    }

    /// Each row with the number of tokens it stands for.
    pub fn weighted_rows(&self) -> impl Iterator<Item = (&'a [ExpertId], u64)> + use<'a> {
        let this = *self;
        self.rows().enumerate().map(move |(row, ids)| (ids, this.occurrences(row)))
    }
}

fn check_finite(what: &'static str, values: &[f32], rows: usize, columns: usize) -> Result<()> {
    if values.len() != rows * columns {
        return Err(PlanError::Shape { what, expected: rows * columns, found: values.len() });
    }
    match values.iter().position(|v| !v.is_finite()) {
        Some(i) => Err(PlanError::NotFinite { row: i / columns, what, value: values[i] }),
        None => Ok(()),
    }
}

/// Owned routing of one layer: what a file reader or a pruning rule returns. [`RoutingBuf::view`] checks and borrows it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RoutingBuf {
    /// `E`.
    pub num_experts: usize,
    /// `K`.
    pub top_k: usize,
    /// `[T, K]`.
    pub expert_ids: Vec<ExpertId>,
    /// `[T, K]`.
    pub weights: Option<Vec<f32>>,
    /// `[T, E]`.
    pub scores: Option<Vec<f32>>,
    /// `[T]`.
    pub occurrences: Option<Vec<u32>>,
}

impl RoutingBuf {
    /// The checked view.
    pub fn view(&self) -> Result<Routing<'_>> {
        let mut view = Routing::new(self.num_experts, self.top_k, &self.expert_ids)?;
        if let Some(weights) = &self.weights {
            view = view.with_weights(weights)?;
        }
        if let Some(scores) = &self.scores {
            view = view.with_scores(scores)?;
        }
        if let Some(occurrences) = &self.occurrences {
            view = view.with_occurrences(occurrences)?;
        }
        Ok(view)
    }

    /// `T`.
    pub fn num_tokens(&self) -> usize {
        self.expert_ids.len().checked_div(self.top_k).unwrap_or(0)
    }
}
