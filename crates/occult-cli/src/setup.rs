//! Typed arguments become what commands work with: open files, topologies, clusters, threads.

use std::path::Path;

use anyhow::{Context, Result, bail};
use occult_formats::{PlacementFile, Profile, ProfileMeta};
use occult_plan::cost::Cluster;
use occult_plan::{RouterRule, Scoring, Topology};

use crate::args::{ClusterArgs, TopologyArgs};
use crate::exit::Usage;

/// Opens a profile.
pub(crate) fn profile(path: &Path) -> Result<Profile> {
    Ok(Profile::open(path)?)
}

/// Reads a placement and checks that it is for the profile's model.
pub(crate) fn placement(path: &Path, profile: &ProfileMeta) -> Result<PlacementFile> {
    let file = PlacementFile::read(path)?;
    file.check_against(profile).with_context(|| path.display().to_string())?;
    Ok(file)
}

/// Ranks and nodes.
pub(crate) fn topology(args: &TopologyArgs) -> Result<Topology> {
    Topology::new(args.ranks, args.nodes).map_err(|e| Usage(e.to_string()).into())
}

/// The cluster to predict times for, cut to the topology of the placement.
pub(crate) fn cluster(args: &ClusterArgs, topology: Topology) -> Result<Option<Cluster>> {
    let Some(name) = &args.cluster else { return Ok(None) };
    let cluster = occult_formats::cluster::preset_or_file(name)?;
    Ok(Some(cluster.resized(topology).with_context(|| format!("cluster {name}"))?))
}

/// Worker threads: what was asked for, or the cores there are.
pub(crate) fn threads(asked: Option<usize>) -> usize {
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).max(1)
}

/// The model's own rule from logits to weights: what the profile says, or the command line.
pub(crate) fn router_rule(meta: &ProfileMeta, norm_topk_prob: Option<bool>) -> RouterRule {
    let known = meta.router.as_ref();
    let norm = norm_topk_prob.or(known.map(|r| r.norm_topk_prob)).unwrap_or(false);
    let scoring = match known.map(|r| r.scoring) {
        Some(occult_formats::Scoring::Sigmoid) => Scoring::Sigmoid,
        _ => Scoring::Softmax,
    };
    RouterRule { scoring, ..RouterRule::softmax(norm) }
}

/// Bytes per element of a type name.
pub(crate) fn dtype_bytes(name: &str) -> Result<f64> {
    Ok(match name {
        "f32" => 4.0,
        "bf16" | "f16" => 2.0,
        "fp8" | "int8" => 1.0,
        other => bail!("element type {other} is not known, expected one of f32, bf16, f16, fp8, int8"),
    })
}
