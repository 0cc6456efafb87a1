//! `occult.similarity` in a model directory, a safetensors file by another name (engines take every `*.safetensors` for weights): the
//! tables that the pruning rule `similarity` replaces experts by.
//!
//! One tensor `layers.N.similarity` `[E, E]` f32 per MoE layer, counted from 0.

use std::borrow::Borrow;
use std::path::Path;

use occult_plan::SimilarityTable;
use safetensors::tensor::{Dtype, TensorView};

use crate::array::DType;
use crate::error::{FormatError, Result};
use crate::placement_file::write_atomic;
use crate::tensors::TensorFile;
use crate::{MAX_EXPERTS, MAX_LAYERS};

fn name(layer: usize) -> String {
    format!("layers.{layer}.similarity")
}

/// Writes one table per MoE layer.
pub fn write_similarity<T: Borrow<SimilarityTable>>(path: &Path, tables: &[T]) -> Result<()> {
    let values: Vec<(Vec<usize>, Vec<u8>)> = tables
        .iter()
        .map(Borrow::borrow)
        .map(|t| (vec![t.num_experts(); 2], t.as_slice().iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let failed = |e: safetensors::SafeTensorError| FormatError::bad(path, "", e.to_string());
    let views = values.iter().enumerate().map(|(layer, (shape, bytes))| {
        Ok((name(layer), TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(failed)?))
    });
    let bytes = safetensors::serialize(views.collect::<Result<Vec<_>>>()?, None).map_err(failed)?;
    write_atomic(path, &bytes)
}

/// Reads the tables of a model with so many MoE layers and experts.
pub fn read_similarity(path: &Path, num_layers: usize, num_experts: usize) -> Result<Vec<SimilarityTable>> {
    if num_layers > MAX_LAYERS || num_experts > MAX_EXPERTS {
        return Err(FormatError::Request(format!("{num_layers} layers of {num_experts} experts")));
    }
    let file = TensorFile::open(path)?;
    if file.tensors.len() != num_layers {
        let message = format!("has {} tables, expected one for {num_layers} MoE layers", file.tensors.len());
        return Err(FormatError::bad(path, "", message));
    }
    let read = |layer: usize| {
        let name = name(layer);
        let bad = |message: String| FormatError::bad(path, format!("tensor {name}"), message);
        let span = file.tensors.get(&name).ok_or_else(|| bad("is missing".into()))?;
        if span.dtype != DType::F32 || span.shape != [num_experts; 2] {
            let message =
                format!("is {:?} {:?}, expected F32 [{num_experts}, {num_experts}]", span.dtype, span.shape);
            return Err(bad(message));
        }
        let bytes = file.read_all(span)?;
        let values = bytes.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
        SimilarityTable::from_values(num_experts, values).map_err(|e| bad(e.to_string()))
    };
    (0..num_layers).map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_come_back_and_others_are_refused() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("occult.similarity");
        let table = |v: f32| SimilarityTable::from_values(2, vec![1.0, v, v, 1.0]).expect("table");
        let tables = vec![table(0.25), table(0.5)];
        write_similarity(&path, &tables).expect("written");
        assert_eq!(read_similarity(&path, 2, 2).expect("read"), tables);
        for (layers, experts, message) in [
            (3, 2, "expected one for 3 MoE layers"),
            (2, 3, "tensor layers.0.similarity: is F32 [2, 2], expected"),
        ] {
            let error = read_similarity(&path, layers, experts).expect_err("refused").to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
