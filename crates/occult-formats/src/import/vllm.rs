//! vLLM's `routed_experts` (`--enable-return-routed-experts`), one `.npy` `[tokens, layers, top_k]` per request, several
//! requests as several files. The array has a row for every hidden layer; dense ones stay at one id and are left out.

use std::path::{Path, PathBuf};

use super::arrays::{About, TokenArrays};
use super::{ImportOptions, Sink, arrays};
use crate::error::Result;
use crate::npy::open_npy;

pub(crate) fn read(inputs: &[PathBuf], options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    arrays::read(inputs, options, sink, &open, true)
}

fn open(path: &Path) -> Result<TokenArrays> {
    let expert_ids = open_npy(path)?;
    Ok(TokenArrays { expert_ids, weights: None, router_logits: None, domains: None, about: About::default() })
}
