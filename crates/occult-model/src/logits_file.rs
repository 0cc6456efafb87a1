//! Token ids in, logits and router choices out: files for comparison with other programs.

use std::path::Path;

use candle_core::{Device, Tensor};

use crate::decoder::Decoder;
use crate::error::{ModelError, Result};
use crate::generate::all_logits;
use crate::hf::read_json;
use crate::moe::RoutingRecord;

/// Reads sequences of token ids: a JSON list of lists, or the tensor `input_ids` `[batch, len]` (integers) of a safetensors
/// file.
pub fn read_ids(path: &Path) -> Result<Vec<Vec<u32>>> {
    let sequences: Vec<Vec<u32>> = if path.extension().is_some_and(|e| e == "safetensors") {
        let bad = |message: String| ModelError::bad(path, "tensor input_ids", message);
        let bytes = std::fs::read(path).map_err(|e| ModelError::io("read", path, e))?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
            .map_err(|e| ModelError::bad(path, "", e.to_string()))?;
        let ids = tensors.get("input_ids").ok_or_else(|| bad("is missing".into()))?;
        let rows = ids.to_dtype(candle_core::DType::I64).and_then(|t| t.to_vec2::<i64>());
        let rows = rows.map_err(|e| bad(format!("expected integers [batch, len]: {e}")))?;
        let id = |id: i64| u32::try_from(id).map_err(|_| bad(format!("holds {id}, which is no token id")));
        rows.into_iter().map(|row| row.into_iter().map(id).collect()).collect::<Result<_>>()?
    } else {
        read_json(path)?
    };
    if sequences.is_empty() || sequences.iter().any(Vec::is_empty) {
        return Err(ModelError::bad(path, "", "has no sequences, or one without ids"));
    }
    Ok(sequences)
}

/// Computes the logits of every position and writes a safetensors file: `logits` `[batch, len, V]` f32 and `expert_ids`
/// `[MoE layers, batch, len, K]` i64. Behind the end of a shorter sequence logits are 0 and ids -1.
pub fn write_logits(model: &Decoder, sequences: &[Vec<u32>], path: &Path) -> Result<()> {
    let spec = model.spec();
    let (b, t) = (sequences.len(), sequences.iter().map(Vec::len).max().unwrap_or(0));
    let (v, k, layers) = (spec.vocab_size, spec.moe.router.top_k, spec.num_moe_layers());
    let mut logits = vec![0f32; b * t * v];
    let mut expert_ids = vec![-1i64; layers * b * t * k];
    for (row, ids) in sequences.iter().enumerate() {
        let mut done = vec![0; layers];
        let mut observe = |r: &RoutingRecord<'_>| {
            let start = ((r.moe_layer * b + row) * t + done[r.moe_layer]) * k;
            for (to, &from) in expert_ids[start..].iter_mut().zip(&r.routing.expert_ids) {
                *to = i64::from(from);
            }
            done[r.moe_layer] += r.routing.num_tokens();
            Ok(())
        };
        all_logits(model, ids, Some(&mut observe), &mut |first, chunk| {
            logits[(row * t + first) * v..][..chunk.len()].copy_from_slice(chunk);
            Ok(())
        })?;
    }
    let tensors = std::collections::HashMap::from([
        ("logits", Tensor::from_vec(logits, (b, t, v), &Device::Cpu)?),
        ("expert_ids", Tensor::from_vec(expert_ids, (layers, b, t, k), &Device::Cpu)?),
    ]);
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary =
        tempfile::NamedTempFile::new_in(parent).map_err(|e| ModelError::io("make a file in", parent, e))?;
    candle_core::safetensors::save(&tensors, temporary.path())?;
    temporary.persist(path).map_err(|e| ModelError::io("write", path, e.error))?;
    Ok(())
}
