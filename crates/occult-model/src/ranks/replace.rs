//! Another placement for a model that runs.

use super::{Ranks, Spread};
use crate::batch::Batch;
use crate::decoder::{Decoder, Logits};
use crate::error::{ModelError, Result};
use crate::load::ModelFiles;

/// Largest difference of logits before and after, as a share of their range, that is taken for rounding.
pub const MAX_PLACEMENT_DIFFERENCE: f32 = 2e-4;

/// What the self-check found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Replaced {
    /// Largest difference of logits over all ranks, as a share of their range.
    pub logit_difference: f32,
    /// Tokens that were compared, of each rank.
    pub checked_tokens: usize,
}

impl Decoder {
    /// Moves experts to where `spread` says (collective): loads this rank's new experts beside the old ones, runs `tokens`
    /// through both, and takes the new ones on every rank, or on none. Without pruning the placement changes no
    /// logit beyond rounding. Library only: no command calls it.
    ///
    /// # Errors
    /// The new placement does not fit, weights cannot be read, or logits differ by more than
    /// [`MAX_PLACEMENT_DIFFERENCE`] on some rank. The model is then as it was on all of them.
    pub fn replace_placement(
        &mut self,
        files: &ModelFiles,
        spread: &Spread,
        tokens: &[u32],
    ) -> Result<Replaced> {
        let Some(ranks) = self.ranks.clone() else {
            return Err(ModelError::request("the experts of this model are not spread over ranks"));
        };
        let loaded = files.load_spread(&ranks, spread);
        agree(&ranks, "loading the new placement", loaded.as_ref().err())?;
        let next = loaded?;
        let compared = difference(self, &next, tokens);
        let compared =
            compared.and_then(|d| if d > MAX_PLACEMENT_DIFFERENCE { Err(differs(d)) } else { Ok(d) });
        agree(&ranks, "comparing the new placement", compared.as_ref().err())?;
        let all = ranks.gather("placement difference", &compared?.to_le_bytes())?;
        let values = all.iter().filter_map(|b| b.as_slice().try_into().ok().map(f32::from_le_bytes));
        *self = next;
        Ok(Replaced { logit_difference: values.fold(0.0, f32::max), checked_tokens: tokens.len() })
    }
}

fn differs(by: f32) -> ModelError {
    ModelError::request(format!(
        "logits differ by {by:.1e} of their range with the new placement, more than {MAX_PLACEMENT_DIFFERENCE:.0e}"
    ))
}

/// Everybody goes on, or nobody: an error of any rank becomes one of all.
fn agree(ranks: &Ranks, what: &'static str, error: Option<&ModelError>) -> Result<()> {
    let all = ranks.gather(what, error.map(ToString::to_string).unwrap_or_default().as_bytes())?;
    match all.iter().enumerate().find(|(_, message)| !message.is_empty()) {
        Some((rank, message)) => {
            let message = String::from_utf8_lossy(message);
            Err(ModelError::request(format!("{what}: rank {rank}: {message}; the old placement stays")))
        }
        None => Ok(()),
    }
}

fn difference(old: &Decoder, new: &Decoder, tokens: &[u32]) -> Result<f32> {
    let logits = |model: &Decoder| -> Result<Vec<f32>> {
        let logits = model.forward(&Batch::single(tokens)?, None, Logits::All, None)?;
        Ok(logits.flatten_all()?.to_vec1::<f32>()?)
    };
    Ok(logit_difference(&logits(old)?, &logits(new)?))
}

/// Largest difference of logits, as a share of the range of `old`: what is compared with [`MAX_PLACEMENT_DIFFERENCE`].
/// Infinite when any of either is NaN or infinite, or when they are not equally many.
pub fn logit_difference(old: &[f32], new: &[f32]) -> f32 {
    if old.len() != new.len() || old.iter().chain(new).any(|v| !v.is_finite()) {
        return f32::INFINITY;
    }
    let (low, high) = old.iter().fold((f32::MAX, f32::MIN), |(l, h), &v| (l.min(v), h.max(v)));
    // f64: neither a difference nor the range can overflow.
    let worst = old.iter().zip(new).map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs()).fold(0.0, f64::max);
    (worst / (f64::from(high) - f64::from(low)).max(f64::from(f32::MIN_POSITIVE))) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use occult_comm::{SoloComm, ThreadOptions, run_threads};

    #[test]
    fn one_ranks_error_is_everybodys() {
        let results = run_threads(3, &ThreadOptions::default(), |comm| {
            let ranks = Ranks::new(Arc::from(comm));
            let mine = ModelError::request("no such file");
            let error = (ranks.comm().rank() == 1).then_some(&mine);
            Ok::<_, ModelError>(agree(&ranks, "loading", error).expect_err("an error").to_string())
        });
        for message in results.all().expect("all end") {
            assert_eq!(message, "loading: rank 1: no such file; the old placement stays");
        }
        assert!(agree(&Ranks::new(Arc::new(SoloComm::new())), "loading", None).is_ok());
    }

    #[test]
    fn no_number_is_taken_for_rounding() {
        let old = [-1.0, 0.0, 3.0];
        assert_eq!(logit_difference(&old, &old), 0.0);
        assert_eq!(logit_difference(&old, &[-1.0, 1.0, 3.0]), 0.25);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(logit_difference(&old, &[-1.0, bad, 3.0]), f32::INFINITY);
            assert_eq!(logit_difference(&[-1.0, bad, 3.0], &old), f32::INFINITY);
            assert_eq!(logit_difference(&[bad; 2], &[bad; 2]), f32::INFINITY);
        }
        assert_eq!(logit_difference(&old, &[]), f32::INFINITY, "none to compare with");
        assert_eq!(logit_difference(&[f32::MIN, f32::MAX], &[f32::MAX, f32::MIN]), 1.0, "no overflow");
    }
}
