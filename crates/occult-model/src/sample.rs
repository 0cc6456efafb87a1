//! From logits to the next token.

use rand_core::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;

use crate::error::{ModelError, Result};

/// How a token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 chooses the largest logit, the lowest id among equals.
    pub temperature: f32,
    /// Tokens are drawn from this many of the most probable ones; 0 is all.
    pub top_k: usize,
    /// Of those, from the smallest set of the most probable ones whose probabilities reach this sum; 1 is all.
    pub top_p: f32,
    /// Where the random numbers start.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// Draws tokens; the same seed and logits give the same tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    rng: Pcg64Mcg,
}

impl Sampler {
    /// Errors when the temperature is negative or no number, or `top_p` is not in (0, 1].
    pub fn new(sampling: Sampling) -> Result<Self> {
        let Sampling { temperature, top_p, seed, .. } = sampling;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(ModelError::request(format!("temperature is {temperature}, expected 0 or more")));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(ModelError::request(format!("top_p is {top_p}, expected more than 0 and at most 1")));
        }
        Ok(Self { sampling, rng: Pcg64Mcg::seed_from_u64(seed) })
    }

    /// The next token for logits `[V]`.
    pub fn next(&mut self, logits: &[f32]) -> Result<u32> {
        if let Some(at) = logits.iter().position(|l| l.is_nan()) {
            return Err(ModelError::request(format!("the logit of token {at} is NaN")));
        }
        let Some(best) = argmax(logits) else { return Err(ModelError::request("there are no logits")) };
        if self.sampling.temperature == 0.0 {
            return Ok(best as u32);
        }
        let max = logits[best];
        let temperature = f64::from(self.sampling.temperature);
        let weight = |l: f32| (f64::from(l - max) / temperature).exp();
        let mut tokens: Vec<(f64, u32)> = logits.iter().zip(0..).map(|(&l, id)| (weight(l), id)).collect();
        let few = self.sampling.top_k > 0 && self.sampling.top_k < tokens.len();
        if few || self.sampling.top_p < 1.0 {
            tokens.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        }
        if few {
            tokens.truncate(self.sampling.top_k);
        }
        let mut total: f64 = tokens.iter().map(|t| t.0).sum();
        if self.sampling.top_p < 1.0 {
            let limit = f64::from(self.sampling.top_p) * total;
            let mut sum = 0.0;
            let mut kept = 0;
            while kept < tokens.len() && (kept == 0 || sum < limit) {
                sum += tokens[kept].0;
                kept += 1;
            }
            tokens.truncate(kept);
            total = tokens.iter().map(|t| t.0).sum();
        }
        // 53 bits: uniform in [0, 1).
        let mut left = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        for &(weight, id) in &tokens {
            left -= weight;
            if left < 0.0 {
                return Ok(id);
            }
        }
        Ok(tokens.last().map_or(best as u32, |t| t.1))
    }
}

/// Position of the largest value, the first among equals.
pub(crate) fn argmax(values: &[f32]) -> Option<usize> {
    let first = |best: Option<usize>, i: usize| match best {
        Some(b) if values[b] >= values[i] => Some(b),
        _ => Some(i),
    };
    (0..values.len()).fold(None, first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(sampling: Sampling, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(sampling).expect("sampling");
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.next(logits).expect("token") as usize] += 1;
        }
        counts
    }

    #[test]
    fn no_temperature_takes_the_first_of_the_largest() {
        assert_eq!(counts(Sampling::default(), &[0.0, 2.0, -1.0, 2.0], 5), [0, 5, 0, 0]);
    }

    #[test]
    fn frequencies_follow_the_tempered_probabilities() {
        let logits = [1.0f32, 0.0, -1.0];
        let sampling = Sampling { temperature: 0.5, seed: 7, ..Sampling::default() };
        let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / 0.5).exp()).collect();
        let total: f64 = weights.iter().sum();
        let draws = 20_000;
        for (count, weight) in counts(sampling, &logits, draws).iter().zip(&weights) {
            // Five standard deviations of a binomial count; the seed is fixed.
            let p = weight / total;
            let deviation = (draws as f64 * p * (1.0 - p)).sqrt();
            assert!((*count as f64 - draws as f64 * p).abs() < 5.0 * deviation);
        }
    }

    #[test]
    fn top_k_and_top_p_keep_the_most_probable_tokens() {
        // Probabilities 0.5, 0.3, 0.2.
        let logits = [0.2f32.ln(), 0.5f32.ln(), 0.3f32.ln()];
        let kept = |top_k, top_p| {
            let drawn = counts(Sampling { temperature: 1.0, top_k, top_p, seed: 1 }, &logits, 500);
            drawn.iter().map(|&c| c > 0).collect::<Vec<_>>()
        };
        assert_eq!(kept(0, 0.4), [false, true, false]);
        assert_eq!(kept(0, 0.7), [false, true, true]);
        assert_eq!(kept(0, 1.0), [true, true, true]);
        assert_eq!(kept(1, 1.0), [false, true, false]);
        assert_eq!(kept(2, 1.0), [false, true, true]);
        // The share is one of the two that are left: 0.5 of 0.8 is more than 0.6.
        assert_eq!(kept(2, 0.6), [false, true, false]);
        assert_eq!(kept(9, 1.0), [true, true, true]);
    }

    #[test]
    fn impossible_settings_are_refused() {
        let one = Sampling::default();
        for (bad, word) in [
            (Sampling { temperature: -1.0, ..one }, "temperature"),
            (Sampling { temperature: f32::NAN, ..one }, "temperature"),
            (Sampling { top_p: 0.0, ..one }, "top_p"),
            (Sampling { top_p: 1.5, ..one }, "top_p"),
        ] {
            assert!(Sampler::new(bad).expect_err("refused").to_string().contains(word));
        }
    }
}
