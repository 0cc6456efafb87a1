//! What a profile says about itself.

use serde::{Deserialize, Serialize};

use crate::{MAX_EXPERTS, MAX_LAYERS};

/// Description of a profile, stored as JSON in its header.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct ProfileMeta {
    /// `E`, the routed experts of a layer.
    pub num_experts: usize,
    /// `K`; unknown for sources that hold only counts.
    #[serde(default)]
    pub top_k: Option<usize>,
    /// The model's number of every MoE layer in the file, ascending; its length is the number of layers in the file.
    pub layer_ids: Vec<u32>,
    /// Hidden layers of the model, dense ones included (expert maps of some engines have a row for each).
    #[serde(default)]
    pub num_hidden_layers: Option<u32>,
    /// Name of the model.
    #[serde(default)]
    pub model: Option<String>,
    /// Where the data come from.
    #[serde(default)]
    pub source: Source,
    /// Names that the `domains` column indexes; empty when unknown.
    #[serde(default)]
    pub domains: Vec<String>,
    /// How the router turns logits into weights, when known.
    #[serde(default)]
    pub router: Option<RouterInfo>,
}

/// Where a profile comes from and what was done to it.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct Source {
    /// Name of the input format ([`crate::ImportFormat`]).
    pub format: String,
    /// File names, without their folders.
    pub files: Vec<String>,
    /// What was done on the way: ids mapped back, padding dropped ...
    #[serde(default)]
    pub notes: Vec<String>,
}

/// How a router turns its logits into weights.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct RouterInfo {
    /// Whether the weights of the chosen experts are renormalised to sum to one.
    pub norm_topk_prob: bool,
    /// Routing groups of a group-limited router.
    #[serde(default)]
    pub num_groups: Option<usize>,
    /// Groups a token may use.
    #[serde(default)]
    pub topk_groups: Option<usize>,
    /// The scoring function.
    #[serde(default)]
    pub scoring: Scoring,
}

/// From logits to scores.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Scoring {
    /// Softmax over the experts.
    #[default]
    Softmax,
    /// Sigmoid of each logit.
    Sigmoid,
}

impl ProfileMeta {
    /// `L`, MoE layers in the file.
    pub fn num_layers(&self) -> usize {
        self.layer_ids.len()
    }

    /// What is impossible in this description, if anything: the message without a file name.
    pub(crate) fn problem(&self) -> Option<String> {
        let e = self.num_experts;
        if e == 0 || e > MAX_EXPERTS {
            return Some(format!("num_experts is {e}, expected 1 to {MAX_EXPERTS}"));
        }
        if let Some(k) = self.top_k
            && (k == 0 || k > e)
        {
            return Some(format!("top_k is {k}, expected 1 to {e} (the number of experts)"));
        }
        let layers = self.layer_ids.len();
        if layers == 0 || layers > MAX_LAYERS {
            return Some(format!("there are {layers} MoE layers, expected 1 to {MAX_LAYERS}"));
        }
        if !self.layer_ids.is_sorted_by(|a, b| a < b) {
            return Some(format!("layer_ids {:?} do not ascend", self.layer_ids));
        }
        if let (Some(hidden), Some(&last)) = (self.num_hidden_layers, self.layer_ids.last())
            && last >= hidden
        {
            return Some(format!("there is a layer {last}, but num_hidden_layers is {hidden}"));
        }
        if let Some(groups) = self.router.as_ref().and_then(|r| r.num_groups)
            && (groups == 0 || !e.is_multiple_of(groups))
        {
            return Some(format!("num_groups is {groups}, which does not divide {e} experts"));
        }
        if self.domains.len() > usize::from(u16::MAX) {
            return Some(format!("there are {} domains, at most 65535 are possible", self.domains.len()));
        }
        // The writer holds one co-activation table per layer.
        let table_bytes = 8 * (e as u64) * (e as u64) * layers as u64;
        if table_bytes > 8 << 30 {
            return Some(format!(
                "co-activation of {layers} layers of {e} experts would take {table_bytes} bytes"
            ));
        }
        None
    }
}
