//! Expert counts as JSON: `{model: {domain: {layer: [counts]}}}`. Domains are added up.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use super::{ImportOptions, Layout, Sink};
use crate::MAX_LAYERS;
use crate::error::{FormatError, Result};

type Domains = BTreeMap<String, BTreeMap<String, Vec<u64>>>;

/// The models in the order of the file: the first is the one that is read when none is named.
struct Models(Vec<(String, Domains)>);

impl<'de> Deserialize<'de> for Models {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Models;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object {model: {domain: {layer: [counts]}}}")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Models, A::Error> {
                let mut models = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    models.push(entry);
                }
                Ok(Models(models))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

pub(crate) fn read(inputs: &[PathBuf], options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    let [path] = inputs else {
        return Err(FormatError::Request(format!(
            "expected one file of expert counts, found {}",
            inputs.len()
        )));
    };
    let Models(models) = crate::io::read_json(path)?;
    let names: Vec<String> = models.iter().map(|(name, _)| name.clone()).collect();
    let chosen = match &options.section {
        Some(section) => models.into_iter().find(|(name, _)| name == section),
        None => models.into_iter().next(),
    };
    let Some((model, domains)) = chosen else {
        let message = format!("has no model {:?}; it has {}", options.section, names.join(", "));
        return Err(FormatError::bad(path, "", message));
    };
    let mut layers: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    for (domain, by_layer) in &domains {
        for (layer, counts) in by_layer {
            let place = format!("{model}, {domain}, layer {layer}");
            let bad = |message: String| FormatError::bad(path, &place, message);
            let id: u32 = layer.parse().map_err(|_| bad("is not a layer number".to_owned()))?;
            let sum = layers.entry(id).or_insert_with(|| vec![0; counts.len()]);
            if sum.len() != counts.len() {
                return Err(bad(format!("has {} experts, another domain has {}", counts.len(), sum.len())));
            }
            for (a, &b) in sum.iter_mut().zip(counts) {
                *a = a.checked_add(b).ok_or_else(|| bad("the counts are too large".to_owned()))?;
            }
        }
    }
    let num_experts = layers.values().next().map_or(0, Vec::len);
    if let Some((layer, counts)) = layers.iter().find(|(_, c)| c.len() != num_experts) {
        let message = format!("has {} experts, another layer has {num_experts}", counts.len());
        return Err(FormatError::bad(path, format!("{model}, layer {layer}"), message));
    }
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        let message = format!("{model} has {} layers, expected 1 to {MAX_LAYERS}", layers.len());
        return Err(FormatError::bad(path, "", message));
    }
    if names.len() > 1 && options.section.is_none() {
        sink.warn(format!("the file holds {}: {model} was read", names.join(", ")));
    }
    let summed: Vec<&str> = domains.keys().map(String::as_str).collect();
    sink.note(format!("counts of the domains {} were added up", summed.join(", ")));
    let layer_ids = layers.keys().copied().collect();
    sink.begin(Layout {
        num_experts,
        top_k: options.top_k,
        layer_ids,
        model: Some(model),
        ..Layout::default()
    })?;
    for (layer, counts) in layers.into_values().enumerate() {
        sink.set_counts(path, layer, counts, None)?;
    }
    sink.progress(1, 1);
    Ok(())
}
