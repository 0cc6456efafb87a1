//! One error type for every decision: what was being done, what was expected, what was found.
#![allow(missing_docs, reason = "the message of each variant names its fields")]

/// Why a plan could not be made. Rows and layers are zero-based; a `layer` is the index of the MoE layer in its
/// profile, added by whoever knows it ([`PlanError::in_layer`]).
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// An array has the wrong length for the shape it is said to have.
    #[error("{what}: expected {expected} values, found {found}")]
    Shape { what: &'static str, expected: usize, found: usize },
    /// An expert id is not in `0..num_experts`.
    #[error("row {row}: expert id {id} is out of range, there are {num_experts} experts")]
    ExpertOutOfRange { row: usize, id: i64, num_experts: usize },
    /// A token chose the same expert twice.
    #[error("row {row}: expert {id} appears twice")]
    DuplicateExpert { row: usize, id: u16 },
    /// A weight or score is NaN or infinite.
    #[error("row {row}: {what} is {value}, expected a finite number")]
    NotFinite { row: usize, what: &'static str, value: f32 },
    /// There is nothing to plan for.
    #[error("there are no tokens")]
    NoTokens,
    /// A number is outside what is possible.
    #[error("{what} is {found}, expected {expected}")]
    Range { what: &'static str, expected: String, found: String },
    /// The decision needs data that the routing does not carry.
    #[error("{what} needs {missing}, which this routing does not have")]
    Missing { what: &'static str, missing: &'static str },
    /// A placement is not a placement of these experts.
    #[error("placement: {0}")]
    Placement(String),
    /// No placement meets the limits.
    #[error("no placement found: {0}")]
    Infeasible(String),
    /// An error, with the layer it happened in.
    #[error("layer {layer}: {source}")]
    InLayer { layer: usize, source: Box<PlanError> },
}

impl PlanError {
    /// Names the layer an error happened in.
    #[must_use]
    pub fn in_layer(self, layer: usize) -> Self {
        PlanError::InLayer { layer, source: Box::new(self) }
    }

    /// Shorthand for [`PlanError::Range`].
    pub fn range(what: &'static str, expected: impl Into<String>, found: impl ToString) -> Self {
        PlanError::Range { what, expected: expected.into(), found: found.to_string() }
    }
}
