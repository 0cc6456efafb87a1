//! `occult permute`

use std::path::Path;

use anyhow::{Context, Result, bail};
use occult_formats::{LIMIT_FILE, LimitFile, PlacementFile, read_similarity, write_similarity};
use occult_model::{LoadOptions, MAX_LOGIT_DIFFERENCE, ModelError, ModelFiles, PermuteReport};
use occult_plan::{ExpertId, Placement, PlanError};
use serde_json::json;

use crate::model_args::PermuteArgs;
use crate::output::{print, print_json};
use crate::{inputs, model, progress};

pub(super) fn run(args: &PermuteArgs) -> Result<()> {
    let file = PlacementFile::read(&args.placement)?;
    if LimitFile::read_bias(&args.model)?.is_some() {
        bail!(
            "{}: has a bias on its routers' choices, which no other engine uses and a reordered checkpoint would lose",
            args.model.join(LIMIT_FILE).display()
        );
    }
    let files = ModelFiles::open(&args.model, LoadOptions::default())?;
    let meta = model::profile_meta(files.spec(), model::name(&args.model));
    file.check_against(&meta).with_context(|| args.placement.display().to_string())?;
    let sample = args.ids.as_deref().map(inputs::ids).transpose()?;
    if let (Some(path), Some(sequences)) = (&args.ids, &sample) {
        let (spec, first) = (files.spec(), &sequences[..1]);
        model::check_ids(first, spec, spec.context_len).with_context(|| path.display().to_string())?;
    }
    let sample = sample.as_ref().and_then(|s| s.first()).map(Vec::as_slice);
    let bar = progress::bytes("logits before");
    bar.enable_steady_tick(std::time::Duration::from_secs(1));
    let mut follow = progress::follow(&bar);
    let mut progress = |done, total| {
        bar.set_message(if done < total { "writing" } else { "logits after" });
        follow(done, total);
    };
    let mut beside = |dir: &Path, orders: &[Vec<ExpertId>]| {
        renumber_limit(dir, orders).map_err(|e| ModelError::Request(format!("{e:#}")))
    };
    let report =
        occult_model::permute(&args.model, &file.placement, &args.output, sample, &mut progress, &mut beside);
    bar.finish_and_clear();
    let PermuteReport { checked_tokens, logit_difference, routing_changes, .. } = report?;
    if args.json {
        return print_json(&json!({
            "output": args.output,
            "checked_tokens": checked_tokens,
            "logit_difference": logit_difference,
            "logit_difference_limit": MAX_LOGIT_DIFFERENCE,
            "routing_changes": routing_changes,
        }));
    }
    print(&format!(
        "{}: on {checked_tokens} tokens logits differ by {logit_difference:.1e} of their range (limit {MAX_LOGIT_DIFFERENCE:.0e}); \
         {routing_changes} router choices changed\n",
        args.output.display()
    ))
}

/// The limit that a model was tuned with speaks of its experts: its placement, and what replaces what, get the new ids.
fn renumber_limit(dir: &Path, orders: &[Vec<ExpertId>]) -> Result<()> {
    let Some((limit, mut file)) = LimitFile::read(dir)? else { return Ok(()) };
    let (topology, layers) = (file.placement.topology(), file.placement.layers().iter().zip(orders));
    let layers =
        layers.map(|(layer, order)| layer.renumbered(order)).collect::<Result<Vec<_>, PlanError>>()?;
    file.placement = Placement::new(topology, layers)?;
    if let Some(name) = &limit.placement {
        file.write(&dir.join(name))?;
    }
    if let Some(name) = &limit.similarity {
        let tables = read_similarity(&dir.join(name), orders.len(), file.placement.num_experts())?;
        let tables = tables.iter().zip(orders).map(|(table, order)| table.renumbered(order));
        write_similarity(&dir.join(name), &tables.collect::<Result<Vec<_>, PlanError>>()?)?;
    }
    Ok(())
}
