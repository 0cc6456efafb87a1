//! The definitions: what every kernel must compute, to the bit.

use super::error::{QuantError, Result, check_len};
use super::ffn::QuantisedExpert;
use super::matrix::{Format, LEVELS, Quantised, ZERO_POINT};
use super::silu;
use crate::SparseRows;

/// Level of the weight at `(row, col)`; `col` may lie in the padding.
pub fn level(w: &Quantised<'_>, row: usize, col: usize) -> i32 {
    let (byte, shift) = w.layout().place(row, col);
    let code = w.data()[byte] >> shift;
    let byte = match w.layout().format() {
        Format::Q8 => code,
        Format::Q4 => LEVELS[usize::from(code & 15)],
    };
    i32::from(byte) - ZERO_POINT
}

/// Scale of a row in a group of columns.
pub fn scale(w: &Quantised<'_>, row: usize, group: usize) -> f32 {
    w.scales()[w.layout().scale_place(row, group)].to_f32()
}

/// The weight at `(row, col)`.
pub fn weight(w: &Quantised<'_>, row: usize, col: usize) -> f32 {
    level(w, row, col) as f32 * scale(w, row, col / w.layout().group())
}

/// The weights of a row as f32, `out` `[K]`.
pub fn dequantise_row(w: &Quantised<'_>, row: usize, out: &mut [f32]) {
    for (col, out) in out.iter_mut().enumerate() {
        *out = weight(w, row, col);
    }
}

/// All weights as f32, `[N, K]`.
pub fn dequantise(w: &Quantised<'_>) -> Vec<f32> {
    let (n, k) = (w.layout().rows(), w.layout().cols());
    let mut out = vec![0.0; n * k];
    if k > 0 {
        out.chunks_exact_mut(k).enumerate().for_each(|(row, out)| dequantise_row(w, row, out));
    }
    out
}

/// Groups whose largest magnitude is below this count as zero: the inverse of their scale would overflow.
pub const SMALLEST: f32 = 1.0e-30;

/// One group of activations in 8 bits: levels -127..=127 and the scale. `level = x * (127 / max|x|)`, rounded to nearest,
/// ties to even; scale `max|x| * (1 / 127)`. A group with a NaN or an infinity has the scale NaN, so that every product
/// with it is NaN.
pub fn quantise_group(x: &[f32]) -> (Vec<i8>, f32) {
    if x.iter().any(|v| !v.is_finite()) {
        return (vec![0; x.len()], f32::NAN);
    }
    let max = x.iter().fold(0f32, |m, v| m.max(v.abs()));
    if max < SMALLEST {
        return (vec![0; x.len()], 0.0);
    }
    let inverse = 127.0 / max;
    (x.iter().map(|v| (v * inverse).round_ties_even() as i8).collect(), max * (1.0 / 127.0))
}

/// `out = x Wᵀ` with quantised activations: `x` `[M, K]`, `w` `[N, K]`, `out` `[M, N]`. For every output the groups are
/// added in ascending order, `sum = fma(dot, x_scale * w_scale, sum)`, where `dot` is the exact integer product.
pub fn linear(x: &[f32], w: &Quantised<'_>, m: usize, out: &mut [f32]) -> Result<()> {
    let layout = w.layout();
    let (n, k, group) = (layout.rows(), layout.cols(), layout.group());
    check_len("x", x.len(), m * k)?;
    check_len("out", out.len(), m * n)?;
    out.fill(0.0);
    for i in 0..m {
        for (g, part) in x[i * k..][..k].chunks(group).enumerate() {
            let (q, x_scale) = quantise_group(part);
            for j in 0..n {
                let dot: i32 = (0..q.len()).map(|c| i32::from(q[c]) * level(w, j, g * group + c)).sum();
                let sum = &mut out[i * n + j];
                *sum = (dot as f32).mul_add(x_scale * scale(w, j, g), *sum);
            }
        }
    }
    Ok(())
}

/// `silu(g) * u`, with the exponential that all kernels share: within 1e-6 of the exact value.
pub fn swiglu(g: f32, u: f32) -> f32 {
    silu::swiglu_one(g, u)
}

/// `y[r] += weight * down(silu(gate(x[r])) * up(x[r]))`, experts ascending, from zero: `x` and `y` `[R, D]`, `row_weights`
/// `[N]`. The products are those of [`linear`], the activation that of [`swiglu`].
pub fn expert_ffn(
    rows: &SparseRows,
    x: &[f32],
    experts: &[QuantisedExpert<'_>],
    row_weights: &[f32],
    y: &mut [f32],
) -> Result<()> {
    if rows.num_experts() != experts.len() {
        let message = format!("{} experts for the rows of {}", experts.len(), rows.num_experts());
        return Err(QuantError::Shape(message));
    }
    check_len("row_weights", row_weights.len(), rows.num_expanded())?;
    y.fill(0.0);
    for (i, expert) in experts.iter().enumerate() {
        let (d, f) = (expert.gate.layout().cols(), expert.gate.layout().rows());
        check_len("x", x.len(), rows.num_rows() * d)?;
        check_len("y", y.len(), rows.num_rows() * d)?;
        let (mut gate, mut up, mut out) = (vec![0.0; f], vec![0.0; f], vec![0.0; d]);
        for n in rows.expanded_of(i) {
            let row = rows.row_idx()[n] as usize * d;
            linear(&x[row..][..d], &expert.gate, 1, &mut gate)?;
            linear(&x[row..][..d], &expert.up, 1, &mut up)?;
            let hidden: Vec<f32> = gate.iter().zip(&up).map(|(&g, &u)| swiglu(g, u)).collect();
            linear(&hidden, &expert.down, 1, &mut out)?;
            for (y, value) in y[row..][..d].iter_mut().zip(&out) {
                *y += row_weights[n] * value;
            }
        }
    }
    Ok(())
}
