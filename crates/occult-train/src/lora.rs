//! Low-rank adaptation (Hu et al., "LoRA"): W' = W + scale B A with A [r, in], B [out, r], and PEFT's names for them.

use serde_json::{Value, json};

use crate::error::{Result, TrainError};
use crate::random::{hash_bytes, key, mix, unit};

/// Rank and scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lora {
    /// r.
    pub rank: usize,
    /// The update is multiplied by alpha / r, or alpha / sqrt(r) when `rank_stabilised`.
    pub alpha: f64,
    /// Kalajdzievski's scaling ("rsLoRA").
    pub rank_stabilised: bool,
}

/// The two matrices of one linear layer, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraPair {
    /// A [r, in].
    pub a: Vec<f32>,
    /// B [out, r].
    pub b: Vec<f32>,
}

impl Lora {
    /// What B A is multiplied by.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rank_stabilised { rank.sqrt() } else { rank }
    }

    /// Matrices of a layer [out, in] whose product is zero: A uniform in +-1 / sqrt(in) (PyTorch's Kaiming uniform with
    /// a = sqrt 5, as PEFT), B zero. A function of seed and name. Errors for a rank of 0 or above the layer's sides.
    pub fn init(&self, name: &str, out: usize, inputs: usize, seed: u64) -> Result<LoraPair> {
        if self.rank == 0 || self.rank > out.min(inputs) {
            let rank = self.rank;
            return Err(TrainError::request(format!(
                "LoRA rank {rank} for {name} of shape [{out}, {inputs}]"
            )));
        }
        let key = key(&[seed, hash_bytes(name.as_bytes())]);
        let bound = 1.0 / (inputs as f64).sqrt();
        let a =
            (0..self.rank * inputs).map(|i| ((2.0 * unit(mix(key ^ mix(i as u64))) - 1.0) * bound) as f32);
        Ok(LoraPair { a: a.collect(), b: vec![0.0; out * self.rank] })
    }

    /// Adds scale B A to W [out, in]. Sums over r ascending in f64. Errors when shapes do not fit.
    pub fn merge(&self, weight: &mut [f32], inputs: usize, pair: &LoraPair) -> Result<()> {
        let rank = self.rank;
        let out = weight.len().checked_div(inputs).unwrap_or(0);
        if rank == 0
            || out * inputs != weight.len()
            || pair.a.len() != rank * inputs
            || pair.b.len() != out * rank
        {
            let (w, a, b) = (weight.len(), pair.a.len(), pair.b.len());
            let message =
                format!("LoRA of rank {rank}: {w} weights with {inputs} inputs, A has {a}, B has {b} values");
            return Err(TrainError::request(message));
        }
        let scale = self.scale();
        for (row, b) in weight.chunks_exact_mut(inputs).zip(pair.b.chunks_exact(rank)) {
            for (i, w) in row.iter_mut().enumerate() {
                let sum: f64 = (0..rank).map(|r| f64::from(b[r]) * f64::from(pair.a[r * inputs + i])).sum();
                *w += (scale * sum) as f32;
            }
        }
        Ok(())
    }

    /// PEFT's `adapter_config.json`. `target_modules` are the last parts of module names, such as "q_proj".
    pub fn adapter_config(&self, base_model: &str, target_modules: &[&str]) -> Value {
        json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
            "r": self.rank, "lora_alpha": self.alpha, "use_rslora": self.rank_stabilised, "lora_dropout": 0.0,
            "bias": "none", "fan_in_fan_out": false, "init_lora_weights": true, "inference_mode": true,
            "target_modules": target_modules,
        })
    }
}

/// The names of A and B in PEFT's `adapter_model.safetensors` for a weight such as
/// `model.layers.0.self_attn.q_proj.weight`.
pub fn adapter_names(weight: &str) -> [String; 2] {
    let module = weight.strip_suffix(".weight").unwrap_or(weight);
    ["A", "B"].map(|m| format!("base_model.model.{module}.lora_{m}.weight"))
}

/// The weight that an adapter's name belongs to, and whether it is B. `None` for a name of another kind.
pub fn weight_name(adapter: &str) -> Option<(String, bool)> {
    let module = adapter.strip_prefix("base_model.model.")?;
    let (module, is_b) = match module.strip_suffix(".lora_A.weight") {
        Some(module) => (module, false),
        None => (module.strip_suffix(".lora_B.weight")?, true),
    };
    Some((format!("{module}.weight"), is_b))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LORA: Lora = Lora { rank: 2, alpha: 4.0, rank_stabilised: false };

    #[test]
    fn a_fresh_pair_changes_nothing_and_is_a_function_of_its_name() {
        let pair = LORA.init("q", 6, 16, 1).unwrap();
        let mut w: Vec<f32> = (0..96).map(|i| i as f32).collect();
        LORA.merge(&mut w, 16, &pair).unwrap();
        assert!(w.iter().zip(0..).all(|(w, i)| *w == i as f32));
        assert!(pair.a.iter().all(|a| a.abs() <= 0.25) && pair.a.iter().any(|a| a.abs() > 0.15));
        assert_eq!(pair, LORA.init("q", 6, 16, 1).unwrap());
        assert_ne!(pair.a, LORA.init("k", 6, 16, 1).unwrap().a);
        assert_ne!(pair.a, LORA.init("q", 6, 16, 2).unwrap().a);
        assert!(LORA.init("q", 1, 16, 1).is_err());
    }

    #[test]
    fn merging_adds_the_scaled_product() {
        // A = [[1, 2, 3], [0, 1, 0]], B = [[1, 0], [2, -1]]: B A = [[1, 2, 3], [2, 3, 6]], scale 2.
        let pair = LoraPair { a: vec![1., 2., 3., 0., 1., 0.], b: vec![1., 0., 2., -1.] };
        let mut w = vec![1.0; 6];
        LORA.merge(&mut w, 3, &pair).unwrap();
        assert_eq!(w, [3., 5., 7., 5., 7., 13.]);
        assert!(LORA.merge(&mut w, 2, &pair).is_err());
        assert!(LORA.merge(&mut w, 0, &pair).is_err());
        assert_eq!(Lora { rank: 4, alpha: 8.0, rank_stabilised: true }.scale(), 4.0);
    }

    #[test]
    fn names_are_those_of_peft() {
        let weight = "model.layers.3.mlp.experts.7.up_proj.weight";
        let [a, b] = adapter_names(weight);
        assert_eq!(a, "base_model.model.model.layers.3.mlp.experts.7.up_proj.lora_A.weight");
        assert_eq!(weight_name(&a), Some((weight.into(), false)));
        assert_eq!(weight_name(&b), Some((weight.into(), true)));
        assert_eq!(weight_name("base_model.model.lm_head.weight"), None);
        assert_eq!(weight_name(weight), None);
        let config = LORA.adapter_config("base", &["q_proj", "v_proj"]);
        assert_eq!((config["r"].as_u64(), config["target_modules"][1].as_str()), (Some(2), Some("v_proj")));
    }
}
