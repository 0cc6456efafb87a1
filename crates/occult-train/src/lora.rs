//! Low-rank adaptation (Hu et al., "LoRA"): W' = W + scale B A with A [r, in], B [out, r].

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
}

#[cfg(test)]
mod tests {
    use super::*;

    const LORA: Lora = Lora { rank: 2, alpha: 4.0, rank_stabilised: false };

    #[test]
    fn a_fresh_pair_changes_nothing_and_is_a_function_of_its_name() {
        let pair = LORA.init("q", 6, 16, 1).unwrap();
        assert_eq!(pair.b, vec![0.0; 6 * LORA.rank]);
        assert!(pair.a.iter().all(|a| a.abs() <= 0.25) && pair.a.iter().any(|a| a.abs() > 0.15));
        assert_eq!(pair, LORA.init("q", 6, 16, 1).unwrap());
        assert_ne!(pair.a, LORA.init("k", 6, 16, 1).unwrap().a);
        assert_ne!(pair.a, LORA.init("q", 6, 16, 2).unwrap().a);
        assert!(LORA.init("q", 1, 16, 1).is_err());
    }

    #[test]
    fn the_scale_is_that_of_the_rank_or_of_its_root() {
        assert_eq!(LORA.scale(), 2.0);
        assert_eq!(Lora { rank: 4, alpha: 8.0, rank_stabilised: true }.scale(), 4.0);
    }
}
