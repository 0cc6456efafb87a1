//! Placements for other engines, and their expert maps back into placements.
//!
//! Engines number *physical* experts (slots): with `R` slots on `W` ranks, slot `p` lives on rank `p / (R / W)`, so every
//! rank has the same number of slots. A placement with uneven ranks fills the free slots with replicas of the hottest
//! experts, which needs their counts ([`ExportOptions::counts`]).
//!
//! One file here per format, each with `write` and, where it is an expert map, `read`.

mod ascend;
mod eplb;
mod format;
mod maps;
mod permutation;
mod physical;
mod sglang;
mod slots;
mod tensorrt_llm;
mod vllm;

use crate::PlacementFile;
use crate::error::Result;

pub use format::ExportFormat;
pub use maps::{MapOptions, detect_map, import_placement};

/// What an export needs beyond the placement. All optional.
#[derive(Debug, Clone, Default)]
pub struct ExportOptions {
    /// Tokens per expert `[layers][E]`: which experts are hot. Needed where ranks hold different numbers of experts.
    pub counts: Option<Vec<Vec<u64>>>,
    /// Slots on every rank; the most that any rank needs when not given.
    pub slots_per_rank: Option<usize>,
    /// Hidden layers of the model, where the placement does not say it.
    pub num_hidden_layers: Option<u32>,
    /// Routing groups of a group-limited router: a permutation must keep them whole.
    pub num_groups: Option<usize>,
    /// TensorRT-LLM: layers it may rebalance per iteration; 0 keeps the placement as it is.
    pub layer_updates_per_iter: u32,
}

/// An expert map for an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// Contents of the file.
    pub text: String,
    /// How to use it, and what was added to the placement.
    pub notes: Vec<String>,
}

/// Writes a placement in the format of another engine.
pub fn export(file: &PlacementFile, format: ExportFormat, options: &ExportOptions) -> Result<Exported> {
    let mut exported = match format {
        ExportFormat::Sglang => sglang::write(file, options),
        ExportFormat::Vllm => vllm::write(file, options),
        ExportFormat::VllmAscend => ascend::write(file, options),
        ExportFormat::TensorrtLlm => tensorrt_llm::write(file, options),
        ExportFormat::Eplb => eplb::write(file, options),
        ExportFormat::Permutation => permutation::write(file, options),
    }?;
    if file.placement.has_rank_weights() {
        let note = "weights of the ranks, by which pruning chooses a token's ranks, have no place in this format and are left out";
        exported.notes.push(note.to_owned());
    }
    Ok(exported)
}
