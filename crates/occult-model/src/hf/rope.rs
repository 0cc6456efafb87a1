//! The rotary part of config.json: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.

use super::keys::{Keys, MAX_SIZE};
use crate::error::Result;
use crate::spec::{Family, RopeScaling, RopeSpec};

/// `0.1 * mscale * ln(scale) + 1` for a stretched context, 1 otherwise.
pub(super) fn mscale(scale: f64, mscale: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * mscale * scale.ln() + 1.0 }
}

/// `dim` is the rotated width.
pub(super) fn rope(keys: &Keys, family: Family, dim: usize) -> Result<RopeSpec> {
    if !dim.is_multiple_of(2) {
        return Err(keys.bad("head_dim", format!("the rotated width is {dim}, expected an even number")));
    }
    let default = if family == Family::Mixtral { 1e6 } else { 1e4 };
    let theta = keys.positive("rope_theta", Some(default))?;
    let interleaved = family == Family::DeepSeekV2;
    let block = match keys.object("rope_parameters")? {
        Some(block) => Some(block),
        None => keys.object("rope_scaling")?,
    };
    for holder in [Some(keys), block.as_ref()].into_iter().flatten() {
        if let Some(part) = holder.f64_opt("partial_rotary_factor")?
            && part != 1.0
        {
            return Err(holder.unsupported("partial_rotary_factor", part, "1"));
        }
    }
    let Some(block) = block else {
        return Ok(RopeSpec { dim, theta, interleaved, scaling: RopeScaling::None });
    };
    let theta = block.positive("rope_theta", Some(theta))?;
    let key = if block.get("rope_type").is_some() { "rope_type" } else { "type" };
    let scaling = match block.str_opt(key)?.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: block.positive("factor", None)? },
        "yarn" => yarn(keys, &block)?,
        other => return Err(block.unsupported(key, other, "default, linear, yarn")),
    };
    Ok(RopeSpec { dim, theta, interleaved, scaling })
}

fn yarn(keys: &Keys, block: &Keys) -> Result<RopeScaling> {
    let context = keys.usize("max_position_embeddings", 1 << 30)?;
    let original_context =
        block.usize_opt("original_max_position_embeddings", 1, MAX_SIZE)?.unwrap_or(context);
    let factor = block.positive("factor", Some(context as f64 / original_context as f64))?;
    let (fast, slow) =
        (block.f64_opt("mscale")?.unwrap_or(0.0), block.f64_opt("mscale_all_dim")?.unwrap_or(0.0));
    let attention_factor = match block.f64_opt("attention_factor")? {
        Some(given) => given,
        None if fast != 0.0 && slow != 0.0 => mscale(factor, fast) / mscale(factor, slow),
        None => mscale(factor, 1.0),
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_context,
        beta_fast: block.positive("beta_fast", Some(32.0))?,
        beta_slow: block.positive("beta_slow", Some(1.0))?,
        attention_factor,
        truncate: block.bool("truncate", true)?,
    })
}
