//! generation_config.json: the ids that begin and end a text, and how the authors sample.

use std::path::Path;

use super::config::CONFIG;
use super::keys::{Keys, MAX_SIZE};
use crate::error::Result;

/// Defaults that come with a model. Values of `generation_config.json` go before those of `config.json`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Begin of text.
    pub bos_id: Option<u32>,
    /// Any of these ends a text.
    pub eos_ids: Vec<u32>,
    /// Whether the authors sample; they take the largest logit otherwise.
    pub do_sample: bool,
    /// Their temperature.
    pub temperature: Option<f32>,
    /// From how many tokens they draw; `Some(0)` and `None` are all.
    pub top_k: Option<usize>,
    /// Their nucleus.
    pub top_p: Option<f32>,
}

impl GenerationDefaults {
    /// Reads both files of a model directory.
    pub fn read(dir: &Path) -> Result<Self> {
        let config = Keys::read(&dir.join(CONFIG))?;
        let path = dir.join("generation_config.json");
        let own = if path.is_file() { Some(Keys::read(&path)?) } else { None };
        let ids = |key: &str| -> Result<Vec<u32>> {
            match &own {
                Some(keys) if keys.get(key).is_some() => keys.ids(key),
                _ => config.ids(key),
            }
        };
        let mut defaults = Self {
            bos_id: ids("bos_token_id")?.first().copied(),
            eos_ids: ids("eos_token_id")?,
            ..Self::default()
        };
        if let Some(keys) = &own {
            defaults.do_sample = keys.bool("do_sample", false)?;
            defaults.temperature = keys.f64_opt("temperature")?.map(|t| t as f32);
            defaults.top_k = keys.usize_opt("top_k", 0, MAX_SIZE)?;
            defaults.top_p = keys.f64_opt("top_p")?.map(|p| p as f32);
        }
        Ok(defaults)
    }
}
