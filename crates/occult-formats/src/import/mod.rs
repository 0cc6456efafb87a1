//! Routing records and expert statistics of other engines, into a routing profile.
//!
//! Every format is one file here with one function `read(inputs, options, sink)`: it looks at its inputs, calls
//! `Sink::begin` once it knows the layout, and then appends rows chunk by chunk (or sets counts). Several inputs of
//! one kind are concatenated, rows after rows.

mod arrays;
mod c2r_json;
mod c2r_pickle;
mod count_csv;
mod detect;
mod eplb_load;
mod expert_counts;
mod format;
mod gpt_oss_trace;
mod lines;
mod mbolt;
mod megatron_counts;
mod megatron_trace;
mod npz;
mod safetensors;
mod set_csv;
mod sglang;
mod sglang_http;
mod sink;
mod tensorrt_llm;
mod vllm;
mod warnings;

use std::path::{Path, PathBuf};

use crate::error::{FormatError, Result};
use crate::profile::{ProfileMeta, Scoring};

pub use detect::detect;
pub use format::ImportFormat;
pub(crate) use sink::{At, Layout, RowBlock, Sink};

/// What the inputs do not say themselves, and what to do with them. All optional.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// The format; found out from the files' contents when not given.
    pub format: Option<ImportFormat>,
    /// `E`. Needed where the files do not say it; an error where they say something else.
    pub num_experts: Option<usize>,
    /// `K`, for sources that hold only counts.
    pub top_k: Option<usize>,
    /// Name of the model, for the profile's description.
    pub model: Option<String>,
    /// Hidden layers of the model, dense ones included.
    pub num_hidden_layers: Option<u32>,
    /// The model's numbers of the MoE layers in the files, ascending, where the files do not say them.
    pub layer_ids: Option<Vec<u32>>,
    /// Whether the router renormalises the weights of the chosen experts.
    pub norm_topk_prob: Option<bool>,
    /// Routing groups of a group-limited router.
    pub num_groups: Option<usize>,
    /// Groups a token may use.
    pub topk_groups: Option<usize>,
    /// The router's scoring function.
    pub scoring: Option<Scoring>,
    /// Which part to read of a file that holds several (a model of `expert_counts.json`, `base` or `topt_2` of a C2R file).
    pub section: Option<String>,
}

/// What an import made.
#[derive(Debug, Clone)]
pub struct ImportSummary {
    /// The format that was read.
    pub format: ImportFormat,
    /// The profile's description.
    pub meta: ProfileMeta,
    /// Rows per layer; `None` where only counts exist.
    pub rows: Vec<Option<u64>>,
    /// What the reader should know: what could not be read, and which figures cannot be computed from this profile.
    pub warnings: Vec<String>,
}

/// Reads `inputs` (files or folders, all of one format) and writes a profile to `output`. `progress` is called with
/// (bytes of input read, bytes of input in all). On an error nothing is left at `output`.
pub fn import(
    inputs: &[PathBuf],
    options: &ImportOptions,
    output: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ImportSummary> {
    if inputs.is_empty() {
        return Err(FormatError::Request("there is nothing to import: name at least one file".to_owned()));
    }
    let format = match options.format {
        Some(format) => format,
        None => detect_all(inputs)?,
    };
    let mut sink = Sink::new(format, inputs, options, output, progress);
    read(format, inputs, options, &mut sink)?;
    sink.finish()
}

fn detect_all(inputs: &[PathBuf]) -> Result<ImportFormat> {
    let mut first: Option<(ImportFormat, &Path)> = None;
    for input in inputs {
        let Some(found) = detect(input)? else {
            let names: Vec<String> = ImportFormat::ALL.iter().map(ToString::to_string).collect();
            let message =
                format!("its format is not recognised; name it if it is one of {}", names.join(", "));
            return Err(FormatError::bad(input, "", message));
        };
        match first {
            None => first = Some((found, input)),
            Some((format, _)) if format == found => {}
            Some((format, other)) => {
                let message =
                    format!("is {found}, but {} is {format}: import them one by one", other.display());
                return Err(FormatError::bad(input, "", message));
            }
        }
    }
    first
        .map(|(format, _)| format)
        .ok_or_else(|| FormatError::Request("there is nothing to import".to_owned()))
}

fn read(
    format: ImportFormat,
    inputs: &[PathBuf],
    options: &ImportOptions,
    sink: &mut Sink<'_>,
) -> Result<()> {
    match format {
        ImportFormat::Safetensors => safetensors::read(inputs, options, sink),
        ImportFormat::Npz => npz::read(inputs, options, sink),
        ImportFormat::VllmRouted => vllm::read(inputs, options, sink),
        ImportFormat::SglangRecorder => sglang::read(inputs, options, sink),
        ImportFormat::SglangHttp => sglang_http::read(inputs, options, sink),
        ImportFormat::SglangCsv => count_csv::read(inputs, options, sink),
        ImportFormat::MegatronTrace => megatron_trace::read(inputs, options, sink),
        ImportFormat::MegatronCounts => megatron_counts::read(inputs, options, sink),
        ImportFormat::TensorrtLlm => tensorrt_llm::read(inputs, options, sink),
        ImportFormat::C2rPickle => c2r_pickle::read(inputs, options, sink),
        ImportFormat::C2rJson => c2r_json::read(inputs, options, sink),
        ImportFormat::EplbLoad => eplb_load::read(inputs, options, sink),
        ImportFormat::GptOssTrace => gpt_oss_trace::read(inputs, options, sink),
        ImportFormat::OlmoeTrace => set_csv::read(inputs, options, sink, &set_csv::OLMOE),
        ImportFormat::MixtralTrace => set_csv::read(inputs, options, sink, &set_csv::MIXTRAL),
        ImportFormat::ExpertCountsJson => expert_counts::read(inputs, options, sink),
        ImportFormat::Mbolt => mbolt::read(inputs, options, sink),
    }
}
