//! Names of the formats that can be exported.

use std::fmt;
use std::str::FromStr;

use crate::error::FormatError;

/// A format that [`super::export()`] writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExportFormat {
    /// SGLang's `--init-expert-location`: `physical_to_logical_map`, a row for each hidden layer.
    Sglang,
    /// vLLM: physical to logical, a list for each MoE layer.
    Vllm,
    /// vllm-ascend and MindIE: experts of each device of each MoE layer.
    VllmAscend,
    /// TensorRT-LLM's `moe_load_balancer.yaml`.
    TensorrtLlm,
    /// The three tables of DeepSeek's EPLB as JSON.
    Eplb,
    /// A new order of the experts, for permuting a checkpoint.
    Permutation,
}

impl ExportFormat {
    /// All formats.
    pub const ALL: [ExportFormat; 6] = [
        ExportFormat::Sglang,
        ExportFormat::Vllm,
        ExportFormat::VllmAscend,
        ExportFormat::TensorrtLlm,
        ExportFormat::Eplb,
        ExportFormat::Permutation,
    ];

    /// The name used on the command line.
    pub fn name(self) -> &'static str {
        match self {
            ExportFormat::Sglang => "sglang",
            ExportFormat::Vllm => "vllm",
            ExportFormat::VllmAscend => "vllm-ascend",
            ExportFormat::TensorrtLlm => "tensorrt-llm",
            ExportFormat::Eplb => "eplb",
            ExportFormat::Permutation => "permutation",
        }
    }
}

impl fmt::Display for ExportFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ExportFormat {
    type Err = FormatError;

    fn from_str(name: &str) -> Result<Self, FormatError> {
        Self::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|f| f.name()).collect();
            FormatError::Request(format!(
                "there is no export format {name:?}; there are {}",
                names.join(", ")
            ))
        })
    }
}
