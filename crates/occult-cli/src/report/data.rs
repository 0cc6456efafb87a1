//! The data file of a report: everything that the page shows, computed by the command that wrote it.
//!
//! # Letters
//! `L` profiled layers in the order of [`Profile::layers`], `W` ranks, `E` experts. A *method* is one placement of all
//! layers; other parts of the file name it by [`Method::name`].
//!
//! A figure that the profile does not allow (for example copies per token where only counts exist) is `None`; a whole
//! part that could not be computed is [`Part::missing`] with the reason, and the page shows that reason.

use serde::{Deserialize, Serialize};

/// Value of [`ReportData::format`].
pub const FORMAT: &str = "occult.report.v1";

/// One report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReportData {
    /// Always [`FORMAT`].
    pub format: String,
    /// Heading of the page, for example the model's name.
    pub title: String,
    /// Version of the program that computed the figures.
    pub tool_version: String,
    /// What was recorded.
    pub profile: Profile,
    /// What it was placed on.
    pub setting: Setting,
    /// Name of the method that the others are compared with (the conventional one).
    pub baseline: String,
    /// Name of the method that the headline is about.
    pub chosen: String,
    /// The placements that were compared, in the order of the table.
    pub methods: Vec<Method>,
    /// Heat maps of a few layers.
    pub coactivation: Part<CoActivationMap>,
    /// Copies against load, one point per placement (a method under several load caps gives a curve).
    pub frontier: Part<FrontierPoint>,
    /// Collaboration pruning.
    pub pruning: Part<PruningRow>,
    /// Predicted step times.
    pub predictions: Part<Prediction>,
    /// Connected sub-graphs of the collaboration graph (the paper's figure 3).
    pub subgraphs: Part<SubgraphCurve>,
    /// The run that trained the model, where the reader asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<Training>,
    /// What the reader should know before believing a figure.
    pub warnings: Vec<String>,
}

/// A list of results, or the reason why there are none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part<T> {
    /// The results.
    pub items: Vec<T>,
    /// A sentence for the reader when `items` is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl<T> Part<T> {
    /// Results.
    pub fn of(items: Vec<T>) -> Self {
        Self { items, reason: None }
    }

    /// No results, and why: one sentence, shown on the page.
    pub fn missing(reason: impl Into<String>) -> Self {
        Self { items: Vec::new(), reason: Some(reason.into()) }
    }
}

/// What was recorded, and from where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Name of the model.
    pub model: String,
    /// Where the routing came from (a file, a data set).
    pub source: String,
    /// Tokens whose routing was recorded.
    pub tokens: u64,
    /// Of these, the tokens that the figures were measured on and no placement has seen; `None` when all were used for both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out_tokens: Option<u64>,
    /// Ids of the profiled MoE layers `[L]`, as the model numbers them.
    pub layers: Vec<u32>,
    /// `E`.
    pub num_experts: u32,
    /// `K`.
    pub top_k: u32,
    /// Names of the text domains, if known.
    #[serde(default)]
    pub domains: Vec<String>,
    /// Notices and licences of the data, one per entry.
    #[serde(default)]
    pub notices: Vec<String>,
}

/// What the experts were placed on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// `W`.
    pub ranks: u32,
    /// Nodes (hosts); a divisor of `ranks`.
    pub nodes: u32,
    /// Hard cap on max/mean load that the search obeyed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_cap: Option<f64>,
    /// Width of a token's row.
    pub hidden_size: u32,
    /// Name of the element type of a row, for example `bf16`.
    pub dtype: String,
    /// Bytes of one row: hidden size x bytes per element.
    pub row_bytes: u64,
    /// Copies per token if a router chose experts uniformly and independently.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uniform_copies_per_token: Option<f64>,
}

/// One placement of all layers and what it costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Method {
    /// Short unique name: `contiguous`, `random`, `greedy`, `eplb`, `search`.
    pub name: String,
    /// Name for people.
    pub label: String,
    /// One line: what it does.
    pub explanation: String,
    /// Per layer `[L]`.
    pub layers: Vec<Measures>,
    /// Mean over the layers.
    pub mean: Measures,
    /// `[L][W]` load of each rank as a fraction of its layer's mean load (1 = even).
    pub load_per_rank: Vec<Vec<f64>>,
    /// `[W][W]` rows sent from rank (row) to rank (column) per 1,000 tokens, mean over layers. The diagonal is what stays
    /// at home. Empty when it cannot be computed.
    #[serde(default)]
    pub rows_per_pair: Vec<Vec<f64>>,
}

/// The measures of one layer, or their mean over the layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measures {
    /// `C_T`: mean number of distinct ranks a token visits.
    pub copies_per_token: Option<f64>,
    /// Copies that leave the token's home rank.
    pub remote_copies_per_token: Option<f64>,
    /// Mean number of distinct nodes a token visits.
    pub node_copies_per_token: Option<f64>,
    /// Largest load of a rank divided by the mean load.
    pub load_max_over_mean: f64,
    /// Share of co-active pairs (an expert not paired with itself) that live on one rank, 0 to 1.
    pub intra_fraction: Option<f64>,
    /// No placement can have fewer copies per token.
    pub lower_bound: Option<f64>,
}

/// Co-activation of one layer, and the order of experts under some methods.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoActivationMap {
    /// One of [`Profile::layers`].
    pub layer: u32,
    /// `[E, E]` row-major, by expert id: co-activation divided by its largest value, 0 to 1. Not scaled further.
    pub p: Vec<f32>,
    /// Orders to look at it in.
    pub orders: Vec<ExpertOrder>,
}

/// The experts of one layer, rank after rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertOrder {
    /// [`Method::name`].
    pub method: String,
    /// Expert ids; rank `r` holds `experts[rank_offsets[r]..rank_offsets[r + 1]]`. Replicas appear more than once.
    pub experts: Vec<u16>,
    /// `[W + 1]`, from 0 to `experts.len()`.
    pub rank_offsets: Vec<u32>,
}

/// One placement in the plane of copies and load (means over layers).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrontierPoint {
    /// Which method; it need not be in [`ReportData::methods`]. Several points of one method are joined by a line.
    pub method: String,
    /// Name for people.
    pub label: String,
    /// Load cap that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_cap: Option<f64>,
    /// `C_T`.
    pub copies_per_token: f64,
    /// Max/mean load.
    pub load_max_over_mean: f64,
}

/// How far a token may travel.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PruningBudget {
    /// Every token visits at most this many ranks.
    MaxRanks(u32),
    /// A token visits the fewest ranks that keep this share of its routing mass, 0 to 1.
    MassShare(f64),
}

/// Collaboration pruning by one rule under one budget (means over layers).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PruningRow {
    /// [`Method::name`] of the placement.
    pub method: String,
    /// `router-score`, `similarity`, `best-mass`, ...
    pub rule: String,
    /// The limit.
    pub budget: PruningBudget,
    /// `C_T` after pruning.
    pub copies_per_token: f64,
    /// Share of the routing mass of the original top-k that is kept, 0 to 1.
    pub retained_mass: f64,
    /// Share of (token, expert) pairs whose expert was replaced, 0 to 1.
    pub replaced_fraction: f64,
    /// Max/mean load after pruning; unknown when only ranks were chosen.
    pub load_max_over_mean: Option<f64>,
}

/// Predicted time of all MoE layers in one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prediction {
    /// Cluster preset, for example `8xA6000 PCIe`.
    pub cluster: String,
    /// [`Method::name`] of the placement: its colour and place.
    pub method: String,
    /// Name for people, for example `Search, pruned to 2 ranks`.
    pub label: String,
    /// Seconds in the all-to-all towards the experts.
    pub dispatch_seconds: f64,
    /// Seconds in the experts.
    pub compute_seconds: f64,
    /// Seconds in the all-to-all back.
    pub combine_seconds: f64,
    /// Seconds in all; less than the sum where parts overlap.
    pub total_seconds: f64,
}

/// A training run, from its log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Steps taken.
    pub steps: u64,
    /// Tokens that were inputs.
    pub tokens: u64,
    /// Names of the sets of held-out text, in the order of [`TrainingPoint::held_out`].
    pub domains: Vec<String>,
    /// Steps in order; of a long run every point is the mean of several steps.
    pub points: Vec<TrainingPoint>,
}

/// One step, or the means of the steps since the point before. A figure that was not measured is absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingPoint {
    /// The last of its steps, from 1.
    pub step: u64,
    /// Mean cross-entropy per learned target, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// The same of held-out text, as last measured: of each of [`Training::domains`], or nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held_out: Vec<Option<f64>>,
    /// `C_T`: ranks a token visited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copies_per_token: Option<f64>,
    /// Ranks a token would have visited without the limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copies_unlimited: Option<f64>,
    /// The latter over its value at the first step, or over what the placement promised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drift: Option<f64>,
    /// Rows of the busiest rank over the mean of ranks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_max_over_mean: Option<f64>,
    /// Mean over maximum of the experts' tokens, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balancedness: Option<f64>,
    /// Most ranks of a token in the last of its steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// Connected sub-graphs of one layer's collaboration graph when weak edges are cut.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubgraphCurve {
    /// One of [`Profile::layers`].
    pub layer: u32,
    /// `(threshold, sub-graphs)`: how many connected sub-graphs remain when edges with `P` below the threshold are cut.
    /// Thresholds ascending.
    pub points: Vec<(f64, u32)>,
}
