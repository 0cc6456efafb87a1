//! Softmax cross entropy of next-token prediction, from logits or fused with the output projection.

mod fused;
mod plain;
mod reference;
#[cfg(test)]
mod tests;

use candle_core::{Result, Tensor, bail};

pub use reference::cross_entropy as reference;

use super::simd::{max, scaled_exp, sum_exp};
use super::sink::GradSink;
use crate::Threads;

/// What counts, and how.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct CrossEntropy {
    /// Rows with this target are left out.
    pub ignore: Option<u32>,
    /// Factor on `log(sum of exp(logits))²`, which keeps logits from drifting; 0 for none.
    pub z_loss: f32,
}

/// A loss that is not yet a mean, so that several batches can be averaged by their counts.
#[derive(Debug, Clone)]
pub struct SummedLoss {
    /// Sum over the rows that count, a scalar f32; rows are added ascending, in f64.
    pub loss: Tensor,
    /// Rows that count.
    pub count: usize,
}

/// `sum over rows of lse - logits[target] + z_loss lse²` with `lse = log(sum of exp(logits))`.
///
/// `logits` `[.., V]` f32 with one of `targets` per row. Backward computes the softmax again from the kept `lse`.
///
/// # Errors
/// A target outside the vocabulary, another number of targets than rows, other dtypes or devices.
pub fn cross_entropy(
    threads: &Threads,
    logits: &Tensor,
    targets: &[u32],
    options: CrossEntropy,
) -> Result<SummedLoss> {
    let logits = logits.contiguous()?;
    let Some(&vocab) = logits.dims().last() else { bail!("cross-entropy: a scalar") };
    let targets = Targets::new(targets, logits.elem_count() / vocab.max(1), vocab, options)?;
    let count = targets.counted.len();
    let loss = logits.apply_op1(plain::Op::new(threads, targets))?;
    Ok(SummedLoss { loss, count })
}

/// [`cross_entropy`] of `hidden w_outᵀ` without ever holding all logits.
///
/// `hidden` `[.., D]` f32, `w_out` `[V, D]` as stored. Rows that are ignored cost nothing. Logits exist for some rows
/// at a time (32 MiB or 32 rows). Where gradients are wanted they are computed in the same pass, since the logits are
/// there: `[T, D]` and `[V, D]` are kept from forward to backward instead of multiplying once more.
///
/// # Errors
/// As [`cross_entropy`], and shapes that do not fit.
pub fn linear_cross_entropy(
    threads: &Threads,
    hidden: &Tensor,
    w_out: &Tensor,
    targets: &[u32],
    options: CrossEntropy,
) -> Result<SummedLoss> {
    fused::apply(threads, hidden, w_out, targets, options, None)
}

/// [`linear_cross_entropy`] whose weight gradient is added to `sink`.
///
/// # Errors
/// As [`linear_cross_entropy`].
pub fn linear_cross_entropy_into(
    threads: &Threads,
    hidden: &Tensor,
    w_out: &Tensor,
    targets: &[u32],
    options: CrossEntropy,
    sink: &GradSink,
) -> Result<SummedLoss> {
    fused::apply(threads, hidden, w_out, targets, options, Some(sink))
}

/// Targets that were checked.
struct Targets {
    /// Rows that count, ascending, with their targets.
    counted: Vec<(usize, usize)>,
    z_loss: f32,
}

impl Targets {
    fn new(targets: &[u32], rows: usize, vocab: usize, options: CrossEntropy) -> Result<Self> {
        if targets.len() != rows {
            bail!("cross-entropy: {} targets for {rows} rows", targets.len());
        }
        let counts = |&(_, target): &(usize, &u32)| Some(*target) != options.ignore;
        let counted: Vec<_> =
            targets.iter().enumerate().filter(counts).map(|(row, &target)| (row, target as usize)).collect();
        if let Some((row, target)) = counted.iter().find(|(_, target)| *target >= vocab) {
            bail!("cross-entropy: target {target} of row {row} in a vocabulary of {vocab}");
        }
        Ok(Self { counted, z_loss: options.z_loss })
    }

    /// Loss of a row, from its `lse`.
    fn loss(&self, logits: &[f32], target: usize, lse: f32) -> f64 {
        f64::from(lse) - f64::from(logits[target]) + f64::from(self.z_loss) * f64::from(lse).powi(2)
    }

    /// Logits of a row become the gradient of `factor * loss`.
    fn differentiate(&self, logits: &mut [f32], target: usize, lse: f32, factor: f32) {
        scaled_exp(logits, lse, factor * (1.0 + 2.0 * self.z_loss * lse));
        logits[target] -= factor;
    }
}

/// `log(sum of exp(row))`.
fn log_sum_exp(row: &[f32]) -> f32 {
    let max = max(row);
    max + sum_exp(row, max).ln()
}
