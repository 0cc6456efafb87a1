//! What a configuration says about training.

use std::path::Path;

use super::config::CONFIG;
use super::keys::Keys;
use crate::error::Result;
use crate::spec::Family;

/// The auxiliary loss that keeps experts evenly used, as the family's released code defines it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BalanceLoss {
    /// Choices and probabilities of all layers together (OLMoE, Qwen-MoE, Mixtral).
    AllLayers,
    /// Every layer and sequence by itself, layers added (DeepSeek with `seq_aux`).
    Sequences,
    /// Every layer by itself, layers added (DeepSeek without).
    Layers,
}

/// Defaults for training a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainingDefaults {
    /// Which balance loss.
    pub balance: BalanceLoss,
    /// Its coefficient.
    pub balance_coefficient: f64,
    /// Standard deviation of random weights.
    pub initializer_range: f64,
}

impl TrainingDefaults {
    /// Reads config.json of a model directory. Values that are absent are those of the released configuration classes.
    pub fn read(dir: &Path) -> Result<Self> {
        let keys = Keys::read(&dir.join(CONFIG))?;
        let name = keys.str_opt("model_type")?.unwrap_or_default().to_owned();
        let family = Family::ALL.into_iter().find(|f| f.model_type() == name);
        let (balance, key, default) = match family {
            Some(Family::DeepSeek | Family::DeepSeekV2) => {
                let sequences = keys.bool("seq_aux", true)?;
                let kind = if sequences { BalanceLoss::Sequences } else { BalanceLoss::Layers };
                (kind, "aux_loss_alpha", 0.001)
            }
            Some(Family::Olmoe) => (BalanceLoss::AllLayers, "router_aux_loss_coef", 0.01),
            _ => (BalanceLoss::AllLayers, "router_aux_loss_coef", 0.001),
        };
        Ok(Self {
            balance,
            balance_coefficient: keys.f64_opt(key)?.unwrap_or(default),
            initializer_range: keys.f64_opt("initializer_range")?.unwrap_or(0.02),
        })
    }
}
