//! Rotary position embedding.

use candle_core::{Device, Tensor};
use occult_kernels::ops::{self, RopeStyle};

use crate::error::Result;
use crate::spec::{RopeScaling, RopeSpec};

/// The frequencies of a model.
#[derive(Debug, Clone)]
pub(crate) struct Rope {
    /// `[dim / 2]`
    inv_freq: Vec<f32>,
    /// Factor on cos and sin.
    factor: f32,
    interleaved: bool,
}

/// cos and sin of the positions of one batch, `[B, T, dim / 2]` each.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
}

impl Rope {
    pub(crate) fn new(spec: &RopeSpec) -> Self {
        let half = spec.dim / 2;
        // In f32, as the released code computes them.
        let wavelength = |i: usize| (spec.theta as f32).powf((2 * i) as f32 / spec.dim as f32);
        let mut inv_freq: Vec<f32> = (0..half).map(|i| 1.0 / wavelength(i)).collect();
        let mut scale = 1.0;
        match &spec.scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => inv_freq.iter_mut().for_each(|f| *f /= *factor as f32),
            RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => {
                scale = *attention_factor as f32;
                let (low, high) = yarn_ramp(spec, *original_context, (*beta_fast, *beta_slow), *truncate);
                for (i, f) in inv_freq.iter_mut().enumerate() {
                    let ramp = ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
                    let keep = 1.0 - ramp;
                    *f = 1.0 / (*factor as f32 * wavelength(i)) * (1.0 - keep) + *f * keep;
                }
            }
        }
        Self { inv_freq, factor: scale, interleaved: spec.interleaved }
    }

    /// For the positions `[B, T]` of a batch, row after row.
    pub(crate) fn at(&self, positions: &[usize], batch: usize) -> Result<Rotation> {
        let angles = || positions.iter().flat_map(|&p| self.inv_freq.iter().map(move |f| p as f32 * f));
        let shape = (batch, positions.len() / batch.max(1), self.inv_freq.len());
        let cos: Vec<f32> = angles().map(|a| a.cos() * self.factor).collect();
        let sin: Vec<f32> = angles().map(|a| a.sin() * self.factor).collect();
        Ok(Rotation {
            cos: Tensor::from_vec(cos, shape, &Device::Cpu)?,
            sin: Tensor::from_vec(sin, shape, &Device::Cpu)?,
            interleaved: self.interleaved,
        })
    }
}

/// Dimensions between which frequencies go from kept to divided.
fn yarn_ramp(spec: &RopeSpec, context: usize, (fast, slow): (f64, f64), truncate: bool) -> (f32, f32) {
    let dim = spec.dim as f64;
    // The dimension whose wavelength fits `rotations` times into the original context.
    let at = |rotations: f64| {
        dim * (context as f64 / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * spec.theta.ln())
    };
    let (mut low, mut high) = (at(fast), at(slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0) as f32, high.min(dim - 1.0) as f32);
    if low == high {
        high += 0.001; // the released code's guard against a ramp of no width
    }
    (low, high)
}

impl Rotation {
    /// Rotates `x` `[B, h, T, dim]`, which may be a view.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let style = if self.interleaved { RopeStyle::Interleaved } else { RopeStyle::HalfSplit };
        Ok(ops::rope(x, &self.cos, &self.sin, style)?)
    }
}
