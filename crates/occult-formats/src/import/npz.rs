//! NumPy `.npz` (stored or deflated) with the arrays of [`super::safetensors`]; `num_experts`, `num_hidden_layers` as scalars
//! and `layer_ids` as a list.

use std::path::{Path, PathBuf};

use super::arrays::{About, TokenArrays};
use super::{ImportOptions, Sink, arrays};
use crate::MAX_LAYERS;
use crate::error::{FormatError, Result};
use crate::npy::Npz;

pub(crate) fn read(inputs: &[PathBuf], options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    arrays::read(inputs, options, sink, &open, false)
}

fn open(path: &Path) -> Result<TokenArrays> {
    let mut npz = Npz::open(path)?;
    let expert_ids = npz.array("expert_ids")?.ok_or_else(|| {
        let names = npz.members();
        let names: Vec<&str> = names.iter().map(String::as_str).take(5).collect();
        FormatError::bad(path, "", format!("has no array expert_ids (it has {})", names.join(", ")))
    })?;
    let single = |values: Vec<i64>| values.first().copied().filter(|_| values.len() == 1);
    let num_experts =
        match ints(&mut npz, path, "num_experts")? {
            Some(values) => Some(single(values).and_then(|v| usize::try_from(v).ok()).ok_or_else(|| {
                FormatError::bad(path, "array num_experts", "expected one positive number")
            })?),
            None => None,
        };
    let as_u32 = |name: &str, values: Vec<i64>| -> Result<Vec<u32>> {
        let bad = |v: i64| FormatError::bad(path, format!("array {name}"), format!("holds {v}"));
        values.into_iter().map(|v| u32::try_from(v).map_err(|_| bad(v))).collect()
    };
    let layer_ids = match ints(&mut npz, path, "layer_ids")? {
        Some(values) => Some(as_u32("layer_ids", values)?),
        None => None,
    };
    let num_hidden_layers = match ints(&mut npz, path, "num_hidden_layers")? {
        Some(values) => as_u32("num_hidden_layers", values)?.first().copied(),
        None => None,
    };
    Ok(TokenArrays {
        expert_ids,
        weights: npz.array("weights")?,
        router_logits: npz.array("router_logits")?,
        domains: npz.array("domains")?,
        about: About { num_experts, layer_ids, num_hidden_layers, model: None, domain_names: Vec::new() },
    })
}

/// A short integer array: a scalar or a list.
fn ints(npz: &mut Npz<'_>, path: &Path, name: &str) -> Result<Option<Vec<i64>>> {
    let Some(mut array) = npz.array(name)? else {
        return Ok(None);
    };
    let n = match array.shape[..] {
        [] => 1,
        [n] if n <= MAX_LAYERS => n,
        _ => {
            let message = format!("has shape {:?}, expected a number or a short list", array.shape);
            return Err(FormatError::bad(path, format!("array {name}"), message));
        }
    };
    let mut values = Vec::new();
    array.read_ints(n, &mut values)?;
    Ok(Some(values))
}
