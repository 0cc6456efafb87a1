//! AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2), as PyTorch computes it:
//!
//! ```text
//!     p <- p (1 - lr wd)
//!     m <- m + (1 - beta1) (g - m)           v <- beta2 v + (1 - beta2) g^2
//!     p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//! ```
//!
//! All in f32, element by element: the result depends on no thread count and no slicing.

use crate::error::{Result, TrainError};

/// The constants of AdamW.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct AdamW {
    /// Decay of the mean.
    pub beta1: f64,
    /// Decay of the mean square.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// Decoupled decay, multiplied by the learning rate.
    pub weight_decay: f64,
}

/// Fewer weights than this are not worth a thread.
const SMALL: usize = 1 << 16;

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 }
    }
}

/// What is particular to one step of one parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepRates {
    /// Number of the step, from 1.
    pub step: u64,
    /// Learning rate.
    pub lr: f64,
    /// Whether weight decay applies.
    pub decays: bool,
    /// Gradients are multiplied by this first (clipping).
    pub gradient_scale: f32,
}

/// First and second moment of each weight of one parameter.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Moments {
    /// Decaying mean of the gradient.
    pub mean: Vec<f32>,
    /// Decaying mean of its square.
    pub square: Vec<f32>,
}

impl Moments {
    /// Zeros for `len` weights.
    pub fn new(len: usize) -> Self {
        Self { mean: vec![0.0; len], square: vec![0.0; len] }
    }
}

impl AdamW {
    /// Errors for constants outside their range.
    pub fn check(&self) -> Result<()> {
        let Self { beta1, beta2, eps, weight_decay } = *self;
        for (name, value, good) in [
            ("beta1", beta1, (0.0..1.0).contains(&beta1)),
            ("beta2", beta2, (0.0..1.0).contains(&beta2)),
            ("eps", eps, eps.is_finite() && eps > 0.0),
            ("weight decay", weight_decay, weight_decay.is_finite() && weight_decay >= 0.0),
        ] {
            if !good {
                return Err(TrainError::request(format!("AdamW: {name} is {value}")));
            }
        }
        Ok(())
    }

    /// [`step`](Self::step) by several threads, each a run of the weights. Changes no bit.
    pub fn step_on(
        &self,
        threads: usize,
        weights: &mut [f32],
        gradient: &[f32],
        moments: &mut Moments,
        rates: StepRates,
    ) -> Result<()> {
        let n = weights.len();
        let each = n.div_ceil(threads.max(1)).max(SMALL);
        if n <= each || [gradient.len(), moments.mean.len(), moments.square.len()] != [n; 3] {
            return self.step(weights, gradient, moments, rates);
        }
        let parts = weights.chunks_mut(each).zip(gradient.chunks(each));
        let parts = parts.zip(moments.mean.chunks_mut(each).zip(moments.square.chunks_mut(each)));
        std::thread::scope(|scope| {
            let mut parts = parts.map(|((w, g), (m, v))| move || self.apply(w, g, m, v, rates));
            let first = parts.next();
            parts.for_each(|part| {
                scope.spawn(part);
            });
            if let Some(mut part) = first {
                part();
            }
        });
        Ok(())
    }

    /// One step of the weights `[n]` with gradients `[n]`. Errors when lengths differ.
    pub fn step(
        &self,
        weights: &mut [f32],
        gradient: &[f32],
        moments: &mut Moments,
        rates: StepRates,
    ) -> Result<()> {
        let n = weights.len();
        if [gradient.len(), moments.mean.len(), moments.square.len()] != [n; 3] {
            let (g, m) = (gradient.len(), moments.mean.len());
            return Err(TrainError::request(format!("{n} weights, {g} gradients, {m} moments")));
        }
        self.apply(weights, gradient, &mut moments.mean, &mut moments.square, rates);
        Ok(())
    }

    fn apply(
        &self,
        weights: &mut [f32],
        gradient: &[f32],
        mean: &mut [f32],
        square: &mut [f32],
        rates: StepRates,
    ) {
        let StepRates { step, lr, decays, gradient_scale } = rates;
        let exponent = i32::try_from(step.max(1)).unwrap_or(i32::MAX);
        let (correct1, correct2) = (1.0 - self.beta1.powi(exponent), 1.0 - self.beta2.powi(exponent));
        let keep = if decays { (1.0 - lr * self.weight_decay) as f32 } else { 1.0 };
        let (new1, beta2, new2) = ((1.0 - self.beta1) as f32, self.beta2 as f32, (1.0 - self.beta2) as f32);
        let (rate, root2, eps) = ((lr / correct1) as f32, correct2.sqrt() as f32, self.eps as f32);
        let pairs = weights.iter_mut().zip(gradient).zip(mean.iter_mut().zip(square.iter_mut()));
        for ((w, &g), (m, v)) in pairs {
            let g = g * gradient_scale;
            *m += new1 * (g - *m);
            *v = beta2 * *v + new2 * (g * g);
            *w = keep * *w - rate * (*m / (v.sqrt() / root2 + eps));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize)]
    struct Golden {
        config: AdamW,
        rates: Vec<f64>,
        start: Vec<f32>,
        gradients: Vec<Vec<f32>>,
        weights: Vec<Vec<f32>>,
        mean: Vec<f32>,
        square: Vec<f32>,
    }

    fn rates(lr: f64, decays: bool, gradient_scale: f32, step: u64) -> StepRates {
        StepRates { step, lr, decays, gradient_scale }
    }

    fn close(found: &[f32], expected: &[f32]) {
        for (i, (a, b)) in found.iter().zip(expected).enumerate() {
            assert!((a - b).abs() <= 2e-6 * b.abs() + 1e-12, "element {i}: {a}, expected {b}");
        }
    }

    #[test]
    fn it_is_the_adamw_of_pytorch() {
        let golden: Golden = serde_json::from_str(include_str!("../../tests/golden/adamw.json")).unwrap();
        let mut weights = golden.start.clone();
        let mut moments = Moments::new(weights.len());
        for (t, gradient) in golden.gradients.iter().enumerate() {
            let step = t as u64 + 1;
            golden
                .config
                .step(&mut weights, gradient, &mut moments, rates(golden.rates[t], true, 1.0, step))
                .unwrap();
            close(&weights, &golden.weights[t]);
        }
        close(&moments.mean, &golden.mean);
        close(&moments.square, &golden.square);
    }

    #[test]
    fn slicing_changes_no_bit() {
        let value = |i: usize| crate::random::unit(crate::random::mix(i as u64)) as f32 - 0.5;
        let start: Vec<f32> = (0..103).map(value).collect();
        let gradient: Vec<f32> = (200..303).map(value).collect();
        let step = |cut: usize| {
            let mut w = start.clone();
            let (left, right) = w.split_at_mut(cut);
            for (w, g) in [(left, &gradient[..cut]), (right, &gradient[cut..])] {
                let mut moments = Moments::new(w.len());
                AdamW::default().step(w, g, &mut moments, rates(0.1, true, 0.7, 1)).unwrap();
            }
            w
        };
        let whole = step(0);
        assert!((1..103).all(|cut| step(cut) == whole));
        assert_ne!(whole, start);
    }

    #[test]
    fn decay_is_optional_and_lengths_are_checked() {
        let mut w = [2.0f32];
        let config = AdamW { weight_decay: 0.5, ..AdamW::default() };
        config.step(&mut w, &[0.0], &mut Moments::new(1), rates(0.1, false, 1.0, 1)).unwrap();
        assert_eq!(w, [2.0]);
        config.step(&mut w, &[0.0], &mut Moments::new(1), rates(0.1, true, 1.0, 1)).unwrap();
        assert_eq!(w, [1.9]);
        let failed = config.step(&mut w, &[0.0, 1.0], &mut Moments::new(1), rates(0.1, true, 1.0, 1));
        assert_eq!(failed.unwrap_err().to_string(), "1 weights, 2 gradients, 1 moments");
        assert!(AdamW { beta2: 1.0, ..config }.check().is_err());
        assert!(AdamW { eps: 0.0, ..config }.check().is_err());
        assert!(config.check().is_ok());
    }
}
