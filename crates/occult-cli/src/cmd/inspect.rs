//! `occult inspect`

use std::path::Path;

use anyhow::Result;
use occult_model::hf::{ExpertLayout, ParameterCounts};
use occult_model::spec::AttentionSpec;
use occult_model::{LoadOptions, ModelFiles};
use serde_json::{Value, json};

use crate::args::InspectArgs;
use crate::output::{bytes, object, print, print_json};

pub(super) fn run(args: &InspectArgs) -> Result<()> {
    if args.file.join("config.json").is_file() {
        return model(&args.file, args.json);
    }
    let description = occult_formats::describe(&args.file)?;
    if args.json {
        return print_json(&object(&description, serde_json::json!({ "file": args.file }))?);
    }
    print(&description.to_string())
}

/// A model directory. The headers of the weights are checked against the configuration; weights are not read.
fn model(dir: &Path, as_json: bool) -> Result<()> {
    let files = ModelFiles::open(dir, LoadOptions::default())?;
    let (spec, checkpoint, router) = (files.spec(), files.checkpoint(), files.spec().moe.router);
    let counts = ParameterCounts::of(spec);
    let attention = match &spec.attention {
        AttentionSpec::Grouped(a) => {
            format!("{} heads of {}, {} key/value heads", a.num_heads, a.head_dim, a.num_kv_heads)
        }
        AttentionSpec::Latent(a) => format!("latent, {} heads, rank {}", a.num_heads, a.kv_rank),
    };
    let layout = match files.names().layout {
        ExpertLayout::PerExpert => "per-expert",
        ExpertLayout::Fused => "fused",
    };
    let mut facts = vec![
        ("family", json!(spec.family.model_type())),
        ("layers", json!(spec.layers.len())),
        ("moe_layers", json!(spec.num_moe_layers())),
        ("experts", json!(router.num_experts)),
        ("top_k", json!(router.top_k)),
        ("norm_topk_prob", json!(router.norm_topk)),
        ("hidden_size", json!(spec.hidden_size)),
        ("expert_size", json!(spec.moe.expert_size)),
        ("vocab_size", json!(spec.vocab_size)),
        ("context", json!(spec.context_len)),
        ("attention", json!(attention)),
        ("parameters", json!(counts.total)),
        ("active_parameters", json!(counts.active)),
        ("weight_bytes", json!(checkpoint.total_bytes())),
        ("weight_files", json!(checkpoint.num_shards())),
        ("expert_layout", json!(layout)),
        ("tokenizer", json!(dir.join("tokenizer.json").is_file())),
    ];
    if let Some(shared) = spec.moe.shared {
        facts.push(("shared_expert_size", json!(shared.size)));
    }
    if let Some(groups) = router.groups {
        facts.push(("routing_groups", json!(groups.num_groups)));
        facts.push(("groups_per_token", json!(groups.top_groups)));
    }
    if let Some(window) = spec.layers.iter().find_map(|l| l.sliding_window) {
        facts.push(("sliding_window", json!(window)));
    }
    if as_json {
        let mut all = serde_json::Map::from_iter([
            ("file".to_owned(), json!(dir)),
            ("kind".to_owned(), json!("model")),
        ]);
        all.extend(facts.into_iter().map(|(name, value)| (name.to_owned(), value)));
        return print_json(&Value::Object(all));
    }
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut text = format!("{}: model directory\n", dir.display());
    for (name, value) in facts {
        let value = match (&value, value.as_f64()) {
            (_, Some(n)) if name == "weight_bytes" => bytes(n),
            (Value::String(s), _) => s.clone(),
            _ => value.to_string(),
        };
        text.push_str(&format!("  {:width$}  {value}\n", name.replace('_', " ")));
    }
    print(&text)
}
