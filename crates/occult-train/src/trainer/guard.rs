//! Noticing that a run has diverged.

use serde::{Deserialize, Serialize};

/// Stops a run whose loss is far above what it was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    /// A loss above this multiple of the median of recent losses is a divergence. At least 1; infinite never stops.
    pub factor: f64,
    /// How many losses are remembered; nothing is judged until half of them are there.
    pub window: usize,
    /// How many steps in a row may be skipped for gradients that are not finite.
    pub max_skipped: u32,
}

impl Default for Guard {
    fn default() -> Self {
        Self { factor: 3.0, window: 50, max_skipped: 3 }
    }
}

impl Guard {
    /// Why a loss means divergence; otherwise remembers it in `recent`.
    pub fn judge(&self, loss: f64, recent: &mut Vec<f64>) -> Option<String> {
        if !loss.is_finite() {
            return Some(format!("the loss is {loss}"));
        }
        let mut sorted = recent.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        if let Some(&median) = sorted.get(sorted.len() / 2)
            && sorted.len() * 2 >= self.window
            && loss > self.factor * median
        {
            let factor = self.factor;
            return Some(format!(
                "the loss is {loss:.4}, more than {factor} times the recent median {median:.4}"
            ));
        }
        recent.push(loss);
        if recent.len() > self.window.max(1) {
            recent.remove(0);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_are_noticed_once_there_is_a_past() {
        let guard = Guard { factor: 2.0, window: 8, max_skipped: 0 };
        let mut recent = vec![];
        for loss in [1.0, 9.0, 1.0, 1.2, 1.9, 1.1, 0.9, 1.0, 1.0] {
            assert_eq!(guard.judge(loss, &mut recent), None, "{loss}");
        }
        assert_eq!(recent.len(), 8);
        let reason = guard.judge(2.5, &mut recent).unwrap();
        assert_eq!(reason, "the loss is 2.5000, more than 2 times the recent median 1.1000");
        assert!(guard.judge(f64::NAN, &mut recent).is_some());
        assert!(guard.judge(f64::INFINITY, &mut recent).is_some());
        assert_eq!(recent.len(), 8, "a bad loss is not remembered");
    }
}
