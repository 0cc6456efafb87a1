//! From floats to levels.

use half::bf16;

use super::error::{QuantError, Result};
use super::matrix::{Format, LEVELS, Layout, PANEL_ROWS, QuantisedBuf, ZERO_POINT};
use super::reference::SMALLEST;
use crate::threads::{SendPtr, Threads};

/// How far quantised weights are from the original ones.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ErrorStats {
    /// Sum of the squares of the errors.
    pub squared_error: f64,
    /// Sum of the squares of the weights.
    pub squared: f64,
    /// Largest error.
    pub max_error: f32,
    /// Largest weight, absolute.
    pub max: f32,
}

impl ErrorStats {
    /// Root of the mean squared error over that of the weights; 0 for weights that are all zero.
    pub fn relative_rms(&self) -> f64 {
        if self.squared == 0.0 { 0.0 } else { (self.squared_error / self.squared).sqrt() }
    }

    /// Both together.
    pub fn merge(&mut self, other: &Self) {
        self.squared_error += other.squared_error;
        self.squared += other.squared;
        self.max_error = self.max_error.max(other.max_error);
        self.max = self.max.max(other.max);
    }

    fn add(&mut self, weight: f32, restored: f32) {
        let error = weight - restored;
        self.squared_error += f64::from(error) * f64::from(error);
        self.squared += f64::from(weight) * f64::from(weight);
        self.max_error = self.max_error.max(error.abs());
        self.max = self.max.max(weight.abs());
    }
}

/// Quantises a matrix whose row `r` is written by `fill(r, row)` into `row` `[K]`.
///
/// [`Format::Q8`]: the scale is the largest magnitude of a group over 127, rounded to bf16. [`Format::Q4`]: of 24 scales
/// around the largest weight over the first level, both signs, the one with the least squared error is taken after a
/// least-squares fit. The result does not depend on the number of threads.
///
/// # Errors
/// When a weight is NaN or infinite, with its place (the first one in row-major order of the first panel that has one).
pub fn quantise(
    threads: &Threads,
    layout: Layout,
    fill: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<(QuantisedBuf, ErrorStats)> {
    let zero = if layout.format() == Format::Q8 { 128 } else { 0x88 };
    let mut data = vec![zero; layout.panels() * layout.panel_bytes()];
    let mut scales = vec![bf16::ZERO; layout.panels() * layout.panel_scales()];
    let mut results = vec![Ok(ErrorStats::default()); layout.panels()];
    let (data_at, scales_at) = (SendPtr(data.as_mut_ptr()), SendPtr(scales.as_mut_ptr()));
    threads.for_each_chunk(&mut results, 1, |p, result| {
        let (bytes, values) = (layout.panel_bytes(), layout.panel_scales());
        // SAFETY: the bytes and scales of panel `p`, which this task alone writes; the vectors outlive the call.
        let (data, scales) = unsafe {
            (
                std::slice::from_raw_parts_mut(data_at.get().add(p * bytes), bytes),
                std::slice::from_raw_parts_mut(scales_at.get().add(p * values), values),
            )
        };
        result[0] = panel(&layout, p, data, scales, &fill);
    });
    let mut stats = ErrorStats::default();
    for result in results {
        stats.merge(&result?);
    }
    Ok((QuantisedBuf { layout, data, scales }, stats))
}

fn panel(
    layout: &Layout,
    p: usize,
    data: &mut [u8],
    scales: &mut [bf16],
    fill: &(impl Fn(usize, &mut [f32]) + Sync),
) -> Result<ErrorStats> {
    let mut stats = ErrorStats::default();
    let mut row = vec![0.0; layout.cols()];
    let mut codes = vec![0; layout.group()];
    let one = Layout::new(layout.format(), layout.group(), PANEL_ROWS, layout.cols())?;
    for r in 0..PANEL_ROWS.min(layout.rows() - p * PANEL_ROWS) {
        fill(p * PANEL_ROWS + r, &mut row);
        if let Some(col) = row.iter().position(|v| !v.is_finite()) {
            return Err(QuantError::NotFinite { row: p * PANEL_ROWS + r, col, value: row[col] });
        }
        for (g, weights) in row.chunks(layout.group()).enumerate() {
            let codes = &mut codes[..weights.len()];
            let scale = match layout.format() {
                Format::Q8 => group_q8(weights, codes),
                Format::Q4 => group_q4(weights, codes),
            };
            scales[one.scale_place(r, g)] = scale;
            for (c, (&code, &weight)) in codes.iter().zip(weights).enumerate() {
                let (at, shift) = one.place(r, g * layout.group() + c);
                let mask = if layout.format() == Format::Q8 { 255 } else { 15u8 << shift };
                data[at] = data[at] & !mask | code << shift;
                let byte = if layout.format() == Format::Q8 { code } else { LEVELS[usize::from(code)] };
                stats.add(weight, (i32::from(byte) - ZERO_POINT) as f32 * scale.to_f32());
            }
        }
    }
    Ok(stats)
}

/// The weight of largest magnitude, 0 where all are too small to have a scale.
fn extreme(weights: &[f32]) -> f32 {
    let extreme = weights.iter().fold(0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    if extreme.abs() < SMALLEST { 0.0 } else { extreme }
}

fn group_q8(weights: &[f32], codes: &mut [u8]) -> bf16 {
    let scale = bf16::from_f32(extreme(weights).abs() / 127.0);
    let inverse = if scale == bf16::ZERO { 0.0 } else { 1.0 / scale.to_f32() };
    for (code, w) in codes.iter_mut().zip(weights) {
        *code = ((w * inverse).round_ties_even().clamp(-127.0, 127.0) as i32 + ZERO_POINT) as u8;
    }
    scale
}

/// Level of a code.
fn level(code: usize) -> f32 {
    f32::from(LEVELS[code]) - ZERO_POINT as f32
}

/// The nearest level to `v`: one step up for every middle between two levels that `v` is beyond.
#[inline(always)]
fn nearest(v: f32) -> f32 {
    let mut at = level(0);
    for c in 0..15 {
        at += if v > (level(c) + level(c + 1)) * 0.5 { level(c + 1) - level(c) } else { 0.0 };
    }
    at
}

/// `Σ level * weight` and `Σ level²` with the nearest levels at a scale of `1 / inverse`.
#[inline(always)]
fn fit(weights: &[f32], inverse: f32) -> (f32, f32) {
    weights.iter().fold((0.0, 0.0), |(cross, square), &w| {
        let c = nearest(w * inverse);
        (cross + c * w, square + c * c)
    })
}

fn squared_error(weights: &[f32], scale: f32) -> f32 {
    weights.iter().map(|w| w - scale * nearest(w / scale)).map(|e| e * e).sum()
}

fn group_q4(weights: &[f32], codes: &mut [u8]) -> bf16 {
    codes.fill(8); // level 0
    let extreme = extreme(weights);
    if extreme == 0.0 {
        return bf16::ZERO;
    }
    // Weights of any magnitude, without overflow in the squares.
    let unit: Vec<f32> = weights.iter().map(|w| w / extreme).collect();
    let mut best = (f32::INFINITY, bf16::ZERO, 1.0);
    for step in 0..12 {
        for sign in [1.0, -1.0] {
            let first = sign * (0.85 + 0.04 * step as f32) / level(0);
            let (cross, square) = fit(&unit, 1.0 / first);
            for scale in [first, cross / square] {
                let stored = bf16::from_f32(scale * extreme);
                let error = squared_error(&unit, stored.to_f32() / extreme);
                if error < best.0 {
                    best = (error, stored, stored.to_f32() / extreme);
                }
            }
        }
    }
    for (code, w) in codes.iter_mut().zip(&unit) {
        let nearest = nearest(w / best.2);
        *code = (0..16).position(|c| level(c) == nearest).unwrap_or(8) as u8;
    }
    best.1
}
