//! The placement of a run: kept with its checkpoints, so that a run that goes on on other ranks still counts and limits by it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use occult_comm::Communicator;
use occult_formats::{PlacementFile, PlacementMeta};
use occult_model::ModelSpec;
use occult_moe::{PruneRule, topology_of};
use occult_plan::Placement;
use occult_train::model::ExpertRanks;
use occult_train::random::hash_bytes;

use crate::train_args::TrainArgs;

/// Said in a placement that nobody asked for.
const EQUAL_RUNS: &str = "equal runs over the ranks that training began on";

/// Where a run keeps it.
pub(super) fn kept(training: &Path) -> PathBuf {
    training.join("placement.json")
}

/// Whether it is what training takes where none is given.
pub(super) fn is_equal_runs(file: &PlacementFile) -> bool {
    file.meta.notes.iter().any(|n| n == EQUAL_RUNS)
}

/// The placement that has taken its place in the course of the run.
pub(super) fn searched(first: &PlacementFile, ranks: &ExpertRanks) -> Result<PlacementFile> {
    let meta = PlacementMeta {
        layer_ids: first.meta.layer_ids.clone(),
        num_hidden_layers: first.meta.num_hidden_layers,
        model: first.meta.model.clone(),
        method: "search while training".into(),
        ..PlacementMeta::default()
    };
    Ok(PlacementFile::new(meta, Placement::new(ranks.topology(), ranks.layers().to_vec())?)?)
}

/// Which rank holds which expert and what the ranks weigh, in words: the same for the same tables.
pub(super) fn identity(file: &PlacementFile) -> String {
    let (topology, layers) = (file.placement.topology(), file.placement.layers());
    let (ranks, nodes) = (topology.num_ranks(), topology.num_nodes());
    let tables: Vec<Vec<_>> =
        layers.iter().map(|l| (0..ranks).map(|r| l.experts_of(r as u16).to_vec()).collect()).collect();
    let weights: Vec<&[f32]> = layers.iter().filter_map(|l| l.rank_weights()).collect();
    let weights = if weights.is_empty() { String::new() } else { format!("{weights:?}") };
    let hash = hash_bytes(format!("{tables:?}{weights}").as_bytes());
    format!("{hash:016x} ({ranks} ranks, {nodes} nodes)")
}

/// The placement of the options, that of the run that goes on, or equal runs over the ranks, with the ranks that compute.
pub(super) fn ranks(
    args: &TrainArgs,
    model: &str,
    spec: &ModelSpec,
    training: &Path,
    comm: Arc<dyn Communicator>,
) -> Result<(ExpertRanks, PlacementFile)> {
    let layers = spec.moe_layers().count();
    // Similarity gets its tables from the caller.
    let rule = args.rule.with(None).unwrap_or(PruneRule::BestMass);
    let kept = kept(training);
    let path = match &args.placement {
        Some(path) => Some(path.clone()),
        None => (args.resume && kept.is_file()).then_some(kept),
    };
    let file = match path {
        None => {
            let equal = ExpertRanks::contiguous(comm.clone(), layers, spec.moe.router.num_experts)?;
            let meta = PlacementMeta {
                layer_ids: spec.moe_layers().map(|l| l as u32).collect(),
                num_hidden_layers: Some(spec.layers.len() as u32),
                method: "contiguous".into(),
                notes: vec![EQUAL_RUNS.into()],
                ..PlacementMeta::default()
            };
            PlacementFile::new(meta, Placement::new(equal.topology(), equal.layers().to_vec())?)?
        }
        Some(path) => {
            let file = PlacementFile::read(&path)?;
            file.check_against(&crate::model::profile_meta(spec, String::new()))
                .with_context(|| format!("{}: is for another model", path.display()))?;
            if let Some(other) = file.meta.model.as_deref().filter(|m| *m != model)
                && comm.rank() == 0
            {
                eprintln!(
                    "occult: {}: was made for the model {other:?}, this one is called {model:?}; another model of the \
                     same shape has other experts that work together",
                    path.display()
                );
            }
            file
        }
    };
    let placement = &file.placement;
    if args.replace_placement.is_some() && placement.has_rank_weights() {
        bail!(
            "--replace-placement: the placement has weights of its ranks (`occult prune --balance`), another one would have none"
        );
    }
    let overlap = args.overlap.over(topology_of(&*comm)?)?;
    let ranks = ExpertRanks::placed(comm, placement.topology(), placement.layers().to_vec(), rule)?;
    let promised = file.meta.figures.as_ref().and_then(|f| f.get("copies_per_token")?.as_f64());
    let budget = args.adaptive.budget(ranks.topology().num_ranks());
    let ranks = ranks.with_budget(budget).with_promised_copies(promised).with_overlap(overlap);
    if let Some(max) = args.max_ranks {
        let num_ranks = ranks.topology().num_ranks();
        if max > num_ranks {
            bail!("--max-ranks is {max}, the placement has {num_ranks} ranks");
        }
        ranks.check_limit(max, &spec.moe.router).context("--max-ranks")?;
    }
    Ok((ranks, file))
}
