use candle_core::{D, Device, Result, Tensor};

use super::CrossEntropy;

/// The definition of [`cross_entropy`](super::cross_entropy()) in candle's own operations, for `logits` `[T, V]`. At
/// least one row must count.
///
/// # Errors
/// Those of candle.
pub fn cross_entropy(logits: &Tensor, targets: &[u32], options: CrossEntropy) -> Result<Tensor> {
    let counted: Vec<u32> =
        (0..targets.len() as u32).filter(|&row| Some(targets[row as usize]) != options.ignore).collect();
    let chosen: Vec<u32> = counted.iter().map(|&row| targets[row as usize]).collect();
    let n = counted.len();
    let logits = logits.index_select(&Tensor::from_vec(counted, n, &Device::Cpu)?, 0)?;
    let lse = logits.log_sum_exp(D::Minus1)?;
    let of_target = logits.gather(&Tensor::from_vec(chosen, (n, 1), &Device::Cpu)?, 1)?.squeeze(1)?;
    let loss = (&lse - of_target)?;
    if options.z_loss == 0.0 {
        // The square of a large sum would be infinite, and that times zero NaN.
        return loss.sum_all();
    }
    (loss + (lse.sqr()? * f64::from(options.z_loss))?)?.sum_all()
}
