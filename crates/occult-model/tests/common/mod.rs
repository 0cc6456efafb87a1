//! The tiny checkpoints in `fixtures/` and what transformers computes from them.
#![allow(unreachable_pub, reason = "a module of several test programs")]
#![allow(dead_code, reason = "every test file uses a part")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use occult_model::{Decoder, LoadOptions, ModelFiles};

/// All cases of `fixtures/make.py`.
pub const CASES: [&str; 14] = [
    "deepseek",
    "deepseek-norm-freq-linear",
    "deepseek_v2-groups-bf16",
    "deepseek_v2-lite",
    "mixtral-f16",
    "mixtral-window-fused",
    "olmoe",
    "olmoe-clip-norm-bf16",
    "qwen2_moe-fused",
    "qwen2_moe-norm-tied-window",
    "qwen2_moe-sharded-bf16",
    "qwen3_moe",
    "qwen3_moe-window-bias-fused-bf16",
    "qwen3_moe-yarn-tied",
];

/// Largest difference of logits, as a part of their range.
pub const LIMIT: f32 = 2e-4;

pub fn dir(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(case)
}

pub fn load(case: &str) -> Decoder {
    load_dir(&dir(case))
}

pub fn load_dir(dir: &Path) -> Decoder {
    ModelFiles::open(dir, LoadOptions::default()).and_then(|f| f.load()).unwrap_or_else(|e| panic!("{e}"))
}

pub struct Reference(HashMap<String, Tensor>);

impl Reference {
    pub fn of(case: &str) -> Self {
        Self(
            candle_core::safetensors::load(dir(case).join("reference.safetensors"), &Device::Cpu)
                .expect("reference"),
        )
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.0[name].to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1()).expect(name)
    }

    pub fn ints(&self, name: &str) -> Vec<i64> {
        self.0[name].flatten_all().and_then(|t| t.to_vec1()).expect(name)
    }

    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.0[name].dims().to_vec()
    }

    /// The input ids as sequences.
    pub fn sequences(&self) -> Vec<Vec<u32>> {
        let t = self.shape("input_ids")[1];
        self.ints("input_ids").chunks(t).map(|row| row.iter().map(|&id| id as u32).collect()).collect()
    }
}

pub fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().and_then(|t| t.to_vec1()).expect("f32 values")
}

/// Largest difference, as a part of the range of `want`.
pub fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let (mut low, mut high) = (f32::INFINITY, f32::NEG_INFINITY);
    let mut diff = 0f32;
    for (g, w) in got.iter().zip(want) {
        (low, high) = (low.min(*w), high.max(*w));
        assert!(g.is_finite(), "a logit is {g}");
        diff = diff.max((g - w).abs());
    }
    diff / (high - low)
}
