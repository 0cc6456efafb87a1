//! Real routing that comes with the program: gpt-oss-20b, see `data/gpt-oss-20b/NOTICE`.

use anyhow::Result;
use occult_plan::RoutingBuf;

use crate::exit::Usage;

/// The files, as `occult import` reads them.
pub(crate) const FILES: [(&str, &[u8]); 4] = [
    ("routes_u8.bin", ROUTES),
    ("gates_u8.bin", GATES),
    ("segments.csv", include_bytes!("../data/gpt-oss-20b/segments.csv")),
    ("NOTICE", include_bytes!("../data/gpt-oss-20b/NOTICE")),
];
const ROUTES: &[u8] = include_bytes!("../data/gpt-oss-20b/routes_u8.bin");
const GATES: &[u8] = include_bytes!("../data/gpt-oss-20b/gates_u8.bin");

/// MoE layers.
pub(crate) const LAYERS: usize = 24;
const EXPERTS: usize = 32;
const TOP_K: usize = 4;

/// All tokens of one layer, with weights.
pub(crate) fn layer(layer: usize) -> Result<RoutingBuf> {
    if layer >= LAYERS {
        return Err(Usage(format!("layer {layer} of the bundled routing, which has {LAYERS}")).into());
    }
    let of_layer = |bytes: &'static [u8]| {
        bytes.chunks_exact(LAYERS * TOP_K).flat_map(move |row| &row[layer * TOP_K..(layer + 1) * TOP_K])
    };
    Ok(RoutingBuf {
        num_experts: EXPERTS,
        top_k: TOP_K,
        expert_ids: of_layer(ROUTES).map(|&id| id.into()).collect(),
        weights: Some(of_layer(GATES).map(|&gate| f32::from(gate) / 255.0).collect()),
        ..RoutingBuf::default()
    })
}
