//! Noticing that a run has diverged.

use serde::{Deserialize, Serialize};

/// Stops a run whose loss is far above what it was.
///
/// Three things are a divergence: one loss above `factor` times the recent median; a short stretch whose mean is more than
/// ln(`factor`) above that of the best one so far (its perplexity is `factor` times the best); a short stretch that is worse
/// than guessing evenly, and worse than the first step was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    /// At least 1; infinite never stops for losses that are numbers.
    pub factor: f64,
    /// How many losses are remembered; a single one is not judged until half of them are there.
    pub window: usize,
    /// Losses of a short stretch; judged from half of it on.
    pub short: usize,
    /// The loss of guessing evenly, ln V, where it is known.
    pub uniform: Option<f64>,
    /// How many steps in a row may be skipped for gradients that are not finite.
    pub max_skipped: u32,
}

impl Default for Guard {
    fn default() -> Self {
        Self { factor: 3.0, window: 50, short: 16, uniform: None, max_skipped: 3 }
    }
}

/// What the guard remembers.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Losses {
    /// That of the first step.
    pub first: Option<f64>,
    /// Recent ones, oldest first.
    pub recent: Vec<f64>,
    /// The least mean of a short stretch so far.
    pub best: Option<f64>,
}

impl Losses {
    /// Mean of the last `n`, or of as many as there are.
    fn mean(&self, n: usize) -> Option<f64> {
        let last = &self.recent[self.recent.len().saturating_sub(n)..];
        (!last.is_empty()).then(|| last.iter().sum::<f64>() / last.len() as f64)
    }
}

impl Guard {
    /// Why a loss means divergence; it is remembered in `losses` unless it alone is the reason.
    pub fn judge(&self, loss: f64, losses: &mut Losses) -> Option<String> {
        if !loss.is_finite() {
            return Some(format!("the loss is {loss}"));
        }
        let mut sorted = losses.recent.clone();
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
        losses.first.get_or_insert(loss);
        losses.recent.push(loss);
        if losses.recent.len() > self.window.max(1) {
            losses.recent.remove(0);
        }
        let mean = losses.mean(self.short)?;
        let n = losses.recent.len().min(self.short);
        if n * 2 >= self.short
            && let Some(reason) = self.risen(mean, losses, 1.0)
        {
            return Some(format!("the mean loss of the last {n} steps is {mean:.4}, {reason}"));
        }
        // The first few losses can be low by luck.
        if n * 4 >= self.short {
            losses.best = Some(losses.best.map_or(mean, |best| best.min(mean)));
        }
        None
    }

    /// What a mean has risen above, by that share of what a divergence is.
    fn risen(&self, mean: f64, losses: &Losses, share: f64) -> Option<String> {
        let allowed = share * self.factor.ln();
        if let Some(best) = losses.best.filter(|best| mean > best + allowed) {
            return Some(format!("more than {allowed:.2} above the best so far, {best:.4}"));
        }
        if !allowed.is_finite() {
            return None;
        }
        let (uniform, first) = (self.uniform?, losses.first?);
        (mean > uniform.max(first) + 0.5 * share).then(|| {
            format!("worse than guessing evenly ({uniform:.4}) and than the first step ({first:.4})")
        })
    }

    /// Whether the last few losses show nothing of a rise: a checkpoint of such a moment is one to go back to.
    pub fn is_calm(&self, losses: &Losses) -> bool {
        losses.mean(self.short.div_ceil(4)).is_none_or(|mean| self.risen(mean, losses, 0.25).is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_are_noticed_once_there_is_a_past() {
        let guard = Guard { factor: 2.0, window: 8, ..Guard::default() };
        let mut losses = Losses::default();
        for loss in [1.0, 9.0, 1.0, 1.2, 1.9, 1.1, 0.9, 1.0, 1.0] {
            assert_eq!(guard.judge(loss, &mut losses), None, "{loss}");
        }
        assert_eq!(losses.recent.len(), 8);
        let reason = guard.judge(2.5, &mut losses).unwrap();
        assert_eq!(reason, "the loss is 2.5000, more than 2 times the recent median 1.1000");
        assert!(guard.judge(f64::NAN, &mut losses).is_some());
        assert!(guard.judge(f64::INFINITY, &mut losses).is_some());
        assert_eq!(losses.recent.len(), 8, "a bad loss is not remembered");
    }

    #[test]
    fn what_is_remembered_comes_back_to_the_bit() {
        let recent: Vec<f64> = (1..2000).map(|i| 7.8 + (f64::from(i) * 0.7).sin() / 9.0).collect();
        let losses = Losses { first: recent.first().copied(), best: recent.last().copied(), recent };
        let text = serde_json::to_string(&losses).unwrap();
        assert_eq!(serde_json::from_str::<Losses>(&text).unwrap(), losses);
    }

    /// The step, counted from 1, at which a run of these losses stops, and the last calm one before it.
    fn stops(guard: &Guard, run: impl IntoIterator<Item = f64>) -> (Option<usize>, usize) {
        let (mut losses, mut calm) = (Losses::default(), 0);
        for (step, loss) in (1..).zip(run) {
            if guard.judge(loss, &mut losses).is_some() {
                return (Some(step), calm);
            }
            if guard.is_calm(&losses) {
                calm = step;
            }
        }
        (None, calm)
    }

    #[test]
    fn a_rise_that_stays_is_noticed_early_and_one_that_passes_is_not() {
        let guard = Guard { uniform: Some(9.0), ..Guard::default() };
        let falling = |n: usize| (0..n).map(|i| 9.0 - 0.1 * i as f64);
        // From 7.1 to a plateau far below three times that.
        let (stop, calm) = stops(&guard, falling(20).chain([11.0; 50]));
        assert!(stop.is_some_and(|s| (21..32).contains(&s)), "{stop:?}");
        assert_eq!(calm, 20, "the last step before the rise");
        // At once, so that nothing is better than the plateau.
        let (stop, calm) = stops(&guard, [9.0].into_iter().chain([10.5; 50]));
        assert_eq!((stop, calm), (Some(8), 1));
        // A spike that heals, noise, and a fall to a third.
        assert_eq!(stops(&guard, falling(20).chain([11.0, 9.0]).chain([7.2; 40])).0, None);
        assert_eq!(stops(&guard, (0..500).map(|i| 5.0 + [0.5, -0.4, 0.3, -0.6][i % 4])).0, None);
        assert_eq!(stops(&guard, falling(60)).0, None);
        // A tuned model that is worse than guessing from the start may become better.
        assert_eq!(stops(&guard, [14.0; 30]).0, None);
        let never = Guard { factor: f64::INFINITY, ..guard };
        assert_eq!(stops(&never, falling(20).chain([30.0; 50])).0, None);
    }
}
