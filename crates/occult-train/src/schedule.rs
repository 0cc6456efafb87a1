//! What changes with the step: learning rate and pruning limit. Steps count from 0 here: the step that is about to be taken.

use serde::{Deserialize, Serialize};

use crate::error::{Result, TrainError};

/// How the rate falls after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// Not at all.
    Constant,
    /// By half a cosine.
    Cosine,
    /// In a straight line.
    Linear,
}

/// A learning rate per step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Highest rate.
    pub peak: f64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Steps of linear rise; the first step already has peak / warm_up.
    pub warm_up: u64,
    /// How it falls.
    pub decay: Decay,
    /// Rate at the end as a share of the peak.
    pub final_ratio: f64,
}

impl Schedule {
    /// Errors for values without a meaning.
    pub fn check(&self) -> Result<()> {
        if !(self.peak.is_finite() && self.peak > 0.0) {
            return Err(TrainError::request(format!("learning rate is {}, expected above 0", self.peak)));
        }
        if !(0.0..=1.0).contains(&self.final_ratio) {
            return Err(TrainError::request(format!("final ratio is {}, expected 0 to 1", self.final_ratio)));
        }
        if self.steps == 0 || self.warm_up > self.steps {
            let Self { steps, warm_up, .. } = self;
            return Err(TrainError::request(format!("{warm_up} steps of warm-up of {steps} steps")));
        }
        Ok(())
    }

    /// The rate of step `step`; after the last one it stays.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warm_up {
            return self.peak * (step + 1) as f64 / self.warm_up as f64;
        }
        // The last step has exactly the final rate.
        let length = self.steps.saturating_sub(self.warm_up + 1).max(1);
        let done = ((step - self.warm_up) as f64 / length as f64).min(1.0);
        let left = match self.decay {
            Decay::Constant => 1.0,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            Decay::Linear => 1.0 - done,
        };
        self.peak * (self.final_ratio + (1.0 - self.final_ratio) * left)
    }
}

/// The pruning limit per step: from `ranks` (no limit) down to `target`, in equal stretches over the first `fraction` of the run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LimitSchedule {
    /// W, number of ranks of the placement.
    pub ranks: usize,
    /// Most ranks of a token in the end.
    pub target: usize,
    /// Steps of the whole run.
    pub steps: u64,
    /// Share of the run after which the target is reached; 0 has it from the first step.
    pub fraction: f64,
}

impl LimitSchedule {
    /// Errors for a target outside 1..=ranks or a fraction outside 0..=1.
    pub fn check(&self) -> Result<()> {
        let Self { ranks, target, fraction, .. } = *self;
        if target == 0 || target > ranks {
            return Err(TrainError::request(format!("limit of {target} ranks, the placement has {ranks}")));
        }
        if !(0.0..=1.0).contains(&fraction) {
            return Err(TrainError::request(format!("annealing share is {fraction}, expected 0 to 1")));
        }
        Ok(())
    }

    /// The limit of step `step`.
    pub fn limit(&self, step: u64) -> usize {
        let stretch = self.steps as f64 * self.fraction;
        let falls = self.ranks.saturating_sub(self.target);
        if step as f64 >= stretch || falls == 0 {
            return self.target;
        }
        self.ranks - (step as f64 / stretch * falls as f64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(decay: Decay) -> Schedule {
        Schedule { peak: 2.0, steps: 105, warm_up: 4, decay, final_ratio: 0.1 }
    }

    #[test]
    fn rates_rise_fall_and_end_where_they_should() {
        let cosine = of(Decay::Cosine);
        assert_eq!((0..5).map(|s| cosine.rate(s)).collect::<Vec<_>>(), [0.5, 1.0, 1.5, 2.0, 2.0]);
        assert!((cosine.rate(54) - 1.1).abs() < 1e-12, "half way");
        assert!((cosine.rate(104) - 0.2).abs() < 1e-12);
        assert!((cosine.rate(1000) - 0.2).abs() < 1e-12);
        let linear = of(Decay::Linear);
        assert!((linear.rate(29) - 1.55).abs() < 1e-12, "a quarter: {}", linear.rate(29));
        assert!((linear.rate(104) - 0.2).abs() < 1e-12);
        assert_eq!(of(Decay::Constant).rate(104), 2.0);
        assert_eq!(Schedule { warm_up: 0, ..cosine }.rate(0), 2.0);
        // One step in all.
        assert_eq!(Schedule { warm_up: 0, steps: 1, ..cosine }.rate(0), 2.0);
    }

    #[test]
    fn values_without_a_meaning_are_refused() {
        let good = of(Decay::Linear);
        assert!(good.check().is_ok());
        for bad in [
            Schedule { peak: f64::NAN, ..good },
            Schedule { peak: 0.0, ..good },
            Schedule { final_ratio: 1.5, ..good },
            Schedule { warm_up: 106, ..good },
            Schedule { steps: 0, warm_up: 0, ..good },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_limit_falls_one_by_one() {
        let limit = LimitSchedule { ranks: 4, target: 2, steps: 100, fraction: 0.5 };
        assert_eq!([0, 24, 25, 49, 50, 99].map(|s| limit.limit(s)), [4, 4, 3, 3, 2, 2]);
        assert_eq!(LimitSchedule { fraction: 0.0, ..limit }.limit(0), 2);
        assert!(LimitSchedule { target: 5, ..limit }.check().is_err());
        assert!(LimitSchedule { target: 0, ..limit }.check().is_err());
        assert!(limit.check().is_ok());
    }
}
