//! Names of the formats that can be imported.

use std::fmt;
use std::str::FromStr;

use crate::error::FormatError;

/// A format that [`crate::import()`] reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ImportFormat {
    /// safetensors with `expert_ids` `[tokens, layers, top_k]` and optional `weights`, `router_logits`, `domains`.
    Safetensors,
    /// The same arrays in a NumPy `.npz`.
    Npz,
    /// vLLM's `routed_experts` arrays, `.npy` `[tokens, layers, top_k]`.
    VllmRouted,
    /// SGLang expert distribution recorder dumps (`.pt`): stat, per_pass, per_token.
    SglangRecorder,
    /// SGLang's `routed_experts` of the HTTP interface (base64 in JSON).
    SglangHttp,
    /// SGLang's older statistics: `layer_id,expert_id,count` lines.
    SglangCsv,
    /// Megatron router trace, JSON lines of every rank.
    MegatronTrace,
    /// Megatron tokens-per-expert log, JSON lines of every rank.
    MegatronCounts,
    /// TensorRT-LLM expert statistics, a folder.
    TensorrtLlm,
    /// C2R co-activation or collaborator pickles.
    C2rPickle,
    /// C2R co-activation counts or collaborator lists as JSON.
    C2rJson,
    /// Load per layer and expert, as EPLB takes it: JSON, `.npy`, safetensors, CSV or text.
    EplbLoad,
    /// gpt-oss routing trace: `routes_u8.bin`, `gates_u8.bin`, `segments.csv`.
    GptOssTrace,
    /// Exact top-8 sets of OLMoE, CSV.
    OlmoeTrace,
    /// Exact expert pairs of Mixtral, CSV.
    MixtralTrace,
    /// Expert counts per model, domain and layer, JSON.
    ExpertCountsJson,
    /// mbolt's stream of routing records.
    Mbolt,
}

impl ImportFormat {
    /// All formats.
    pub const ALL: [ImportFormat; 17] = [
        ImportFormat::Safetensors,
        ImportFormat::Npz,
        ImportFormat::VllmRouted,
        ImportFormat::SglangRecorder,
        ImportFormat::SglangHttp,
        ImportFormat::SglangCsv,
        ImportFormat::MegatronTrace,
        ImportFormat::MegatronCounts,
        ImportFormat::TensorrtLlm,
        ImportFormat::C2rPickle,
        ImportFormat::C2rJson,
        ImportFormat::EplbLoad,
        ImportFormat::GptOssTrace,
        ImportFormat::OlmoeTrace,
        ImportFormat::MixtralTrace,
        ImportFormat::ExpertCountsJson,
        ImportFormat::Mbolt,
    ];

    /// The name used on the command line and in profiles.
    pub fn name(self) -> &'static str {
        match self {
            ImportFormat::Safetensors => "safetensors",
            ImportFormat::Npz => "npz",
            ImportFormat::VllmRouted => "vllm",
            ImportFormat::SglangRecorder => "sglang",
            ImportFormat::SglangHttp => "sglang-http",
            ImportFormat::SglangCsv => "sglang-csv",
            ImportFormat::MegatronTrace => "megatron",
            ImportFormat::MegatronCounts => "megatron-counts",
            ImportFormat::TensorrtLlm => "tensorrt-llm",
            ImportFormat::C2rPickle => "c2r-pickle",
            ImportFormat::C2rJson => "c2r-json",
            ImportFormat::EplbLoad => "eplb",
            ImportFormat::GptOssTrace => "gpt-oss-trace",
            ImportFormat::OlmoeTrace => "olmoe-trace",
            ImportFormat::MixtralTrace => "mixtral-trace",
            ImportFormat::ExpertCountsJson => "expert-counts",
            ImportFormat::Mbolt => "mbolt",
        }
    }
}

impl fmt::Display for ImportFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ImportFormat {
    type Err = FormatError;

    fn from_str(name: &str) -> Result<Self, FormatError> {
        Self::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|f| f.name()).collect();
            FormatError::Request(format!("there is no input format {name:?}; there are {}", names.join(", ")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_parse() {
        for format in ImportFormat::ALL {
            assert_eq!(format.name().parse::<ImportFormat>().unwrap(), format);
        }
        assert!("parquet".parse::<ImportFormat>().unwrap_err().to_string().contains("parquet"));
    }
}
