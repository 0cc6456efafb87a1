//! The routing profile: what a router decided, layer by layer, in one safetensors file.
//!
//! Letters: `T` rows, `K` top_k, `E` experts, `i` index of the MoE layer in the file (`meta.layer_ids[i]` is the layer's
//! number in the model).
//!
//! | tensor | type, shape | meaning |
//! |---|---|---|
//! | `layers.{i}.expert_ids` | U16 `[T, K]` | chosen experts, in the router's order where the source kept it |
//! | `layers.{i}.weights` | F32 `[T, K]`, optional | routing weights of the chosen experts |
//! | `layers.{i}.router_logits` | F32 `[T, E]`, optional | scores of all experts |
//! | `layers.{i}.occurrences` | U32 `[T]`, optional | tokens a row stands for |
//! | `layers.{i}.domains` | U16 `[T]`, optional | index into `meta.domains` |
//! | `layers.{i}.counts` | U64 or I64 `[E]` | tokens per expert; always, except where only an order is known |
//! | `layers.{i}.coactivation` | U64 `[E, E]`, optional | tokens per pair of experts, zero diagonal |
//! | `layers.{i}.collaborator_order` | U16 `[E, E-1]`, optional | other experts by descending co-activation |
//!
//! Metadata: `format` = [`FORMAT`], `meta` = [`ProfileMeta`] as JSON. Numbers of rows may differ between layers.

mod meta;
mod reader;
mod spool;
mod writer;

pub use meta::{ProfileMeta, RouterInfo, Scoring, Source};
pub use reader::{Chunk, Columns, LayerRows, Profile};
pub use writer::ProfileWriter;

/// Value of the metadata key `format`.
pub const FORMAT: &str = "occult.profile.v1";

/// The tensors that may belong to one layer, in the order in which they are laid out: widest elements first, so that every
/// tensor is aligned to its element size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Column {
    Counts,
    CoActivation,
    Weights,
    RouterLogits,
    Occurrences,
    ExpertIds,
    Domains,
    Order,
}

impl Column {
    const ALL: [Column; 8] = [
        Column::Counts,
        Column::CoActivation,
        Column::Weights,
        Column::RouterLogits,
        Column::Occurrences,
        Column::ExpertIds,
        Column::Domains,
        Column::Order,
    ];

    fn name(self) -> &'static str {
        match self {
            Column::Counts => "counts",
            Column::CoActivation => "coactivation",
            Column::Weights => "weights",
            Column::RouterLogits => "router_logits",
            Column::Occurrences => "occurrences",
            Column::ExpertIds => "expert_ids",
            Column::Domains => "domains",
            Column::Order => "collaborator_order",
        }
    }

    fn tensor(self, layer: usize) -> String {
        format!("layers.{layer}.{}", self.name())
    }

    fn dtype(self) -> &'static str {
        match self {
            Column::Counts | Column::CoActivation => "U64",
            Column::Weights | Column::RouterLogits => "F32",
            Column::Occurrences => "U32",
            Column::ExpertIds | Column::Domains | Column::Order => "U16",
        }
    }
}
