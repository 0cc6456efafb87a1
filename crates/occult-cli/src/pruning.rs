//! Collaboration pruning of whole profiles: one pass for the similarity table where it is needed, one for the rule.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use occult_formats::{Columns, FormatError, Profile};
use occult_model::ModelSpec;
use occult_plan::prune::{balance, best_mass_ranks_only};
use occult_plan::{
    Budget, HomeRanks, LayerPlacement, PlanError, PruneSpec, PruneStats, RouterRule, SimilarityAccumulator,
    SimilarityTable, Topology, TrafficMeter, prune,
};

use crate::args::PruneRule;
use crate::{parallel, setup};

/// What `--rule similarity` says without a table.
pub(crate) const NO_TABLE: &str =
    "--rule similarity compares experts by their router logits: give --similar-by PROFILE";

const CHUNK_ROWS: usize = 16_384;

impl PruneRule {
    pub(crate) const ALL: [Self; 4] = [Self::RouterScore, Self::Similarity, Self::BestMass, Self::LeastError];

    /// The rule of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|rule| rule.name() == name)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::RouterScore => "router-score",
            Self::Similarity => "similarity",
            Self::BestMass => "best-mass",
            Self::LeastError => "least-error",
        }
    }

    /// The rule with the table that it replaces experts by; `None` where it has to have one.
    pub(crate) fn with(self, table: Option<&Arc<SimilarityTable>>) -> Option<occult_moe::PruneRule> {
        Some(match self {
            Self::RouterScore => occult_moe::PruneRule::RouterScore,
            Self::Similarity => occult_moe::PruneRule::Similarity(Arc::clone(table?)),
            Self::BestMass => occult_moe::PruneRule::BestMass,
            Self::LeastError => occult_moe::PruneRule::LeastError,
        })
    }
}

/// How the layers of a profile are pruned.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How<'a> {
    pub(crate) rule: PruneRule,
    pub(crate) budget: Budget,
    pub(crate) router: &'a RouterRule,
}

impl<'a> How<'a> {
    /// As the planner wants it: `rule` is this one with the table that it may need.
    fn spec(self, rule: &'a occult_moe::PruneRule) -> PruneSpec<'a> {
        PruneSpec { rule: rule.rule(), budget: self.budget, router: self.router }
    }
}

/// What pruning did to one layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PrunedLayer {
    pub(crate) stats: PruneStats,
    /// Max/mean load after pruning; unknown when only ranks were chosen.
    pub(crate) load_max_over_mean: Option<f64>,
}

/// Squared cosines of the router-logit columns over all rows of a layer.
pub(crate) fn similarity(profile: &Profile, layer: usize) -> Result<SimilarityTable> {
    let mut sums = SimilarityAccumulator::new(profile.meta().num_experts);
    for_each_chunk(profile, layer, |routing| sums.add(routing))?;
    Ok(sums.finish())
}

/// The tables of all layers of a profile of this model: what `similarity` replaces by where a model runs.
pub(crate) fn similarity_tables(path: &Path, spec: &ModelSpec) -> Result<Vec<Arc<SimilarityTable>>> {
    let profile = profile_of(path, spec)?;
    let tables = parallel::map_ordered(profile.num_layers(), setup::threads(None), |layer| {
        require_scores(&profile, layer, PruneRule::Similarity)?;
        Ok::<_, anyhow::Error>(Arc::new(similarity(&profile, layer)?))
    })?;
    Ok(tables)
}

/// Opens a profile and checks that it is of a model of this shape.
pub(crate) fn profile_of(path: &Path, spec: &ModelSpec) -> Result<Profile> {
    let profile = setup::profile(path)?;
    let found = (profile.num_layers(), profile.meta().num_experts);
    let expected = (spec.num_moe_layers(), spec.moe.router.num_experts);
    if found != expected {
        let words = |(l, e): (usize, usize)| format!("{l} MoE layers of {e} experts");
        let message = format!("expected {}, found {}", words(expected), words(found));
        bail!("{}: a profile of another model: {message}", path.display());
    }
    Ok(profile)
}

/// Prunes every row of a layer. The similarity table is computed where the rule needs it.
pub(crate) fn prune_layer(
    profile: &Profile,
    layer: usize,
    placement: &LayerPlacement,
    topology: Topology,
    how: How<'_>,
) -> Result<PrunedLayer> {
    require_scores(profile, layer, how.rule)?;
    let table = match how.rule {
        PruneRule::Similarity => Some(Arc::new(similarity(profile, layer)?)),
        _ => None,
    };
    let rule = how.rule.with(table.as_ref()).context("the similarity rule has no table")?;
    let mut stats = PruneStats::default();
    let mut meter = TrafficMeter::new(placement, topology, HomeRanks::Uniform)?;
    for_each_chunk(profile, layer, |routing| {
        let pruned = prune(routing, placement, topology, how.spec(&rule))?;
        stats.merge(&pruned.stats);
        meter.add(&pruned.routing.view()?)
    })?;
    let load = meter.finish().map_err(|e| e.in_layer(layer))?.summary().load_max_over_mean;
    Ok(PrunedLayer { stats, load_max_over_mean: Some(load) })
}

/// The placement of a layer with weights of its ranks under which pruning keeps to `load_cap`, from up to `max_tokens` rows.
pub(crate) fn balance_layer(
    profile: &Profile,
    layer: usize,
    placement: &LayerPlacement,
    topology: Topology,
    how: How<'_>,
    (load_cap, max_tokens): (f64, usize),
) -> Result<LayerPlacement> {
    require_scores(profile, layer, how.rule)?;
    let rule = how.rule.with(None).context("--balance works with --rule best-mass and least-error")?;
    let columns = Columns { weights: false, scores: true, domains: false };
    let rows = profile.read_rows(layer, columns, max_tokens)?.routing;
    let balanced = balance(&rows.view()?, placement, topology, how.spec(&rule), load_cap);
    Ok(balanced.map_err(|e| e.in_layer(layer))?.placement)
}

/// The ranks that best-mass would choose, from weights alone.
pub(crate) fn choose_ranks(
    profile: &Profile,
    layer: usize,
    placement: &LayerPlacement,
    topology: Topology,
    budget: Budget,
) -> Result<PrunedLayer> {
    if !profile.has_weights(layer) {
        bail!(
            "{}: layer {layer}: choosing ranks needs the weights of the chosen experts, and this profile has none",
            profile.path().display()
        );
    }
    let mut stats = PruneStats::default();
    for_each_chunk(profile, layer, |routing| {
        stats.merge(&best_mass_ranks_only(routing, placement, topology, budget)?);
        Ok(())
    })?;
    Ok(PrunedLayer { stats, load_max_over_mean: None })
}

fn require_scores(profile: &Profile, layer: usize, rule: PruneRule) -> Result<()> {
    if profile.has_scores(layer) {
        return Ok(());
    }
    let path = profile.path().display();
    if profile.num_rows(layer).is_none() {
        bail!("{path}: layer {layer}: pruning needs token-level routing, and this profile has counts only");
    }
    let hint = match (rule, profile.has_weights(layer)) {
        (PruneRule::BestMass, true) => "; --ranks-only tells what best-mass would keep, without them",
        _ => "",
    };
    Err(anyhow!(
        "{path}: layer {layer}: pruning by {} needs `router_logits` [tokens, experts], the router's scores of all experts, \
         which this profile does not have (only the chosen experts){hint}",
        rule.name()
    ))
}

fn for_each_chunk(
    profile: &Profile,
    layer: usize,
    mut each: impl FnMut(&occult_plan::Routing<'_>) -> Result<(), PlanError>,
) -> Result<()> {
    let columns = Columns { weights: true, scores: true, domains: false };
    profile.for_each_chunk(layer, columns, CHUNK_ROWS, &mut |chunk| {
        each(&chunk.routing).map_err(|e| FormatError::plan(profile.path(), layer, chunk.first_row, e))
    })?;
    Ok(())
}

/// Sums over layers (of equal tokens: means per token).
pub(crate) fn total(layers: &[PrunedLayer]) -> PruneStats {
    let mut total = PruneStats::default();
    layers.iter().for_each(|l| total.merge(&l.stats));
    total
}

/// Mean of max/mean load over layers.
pub(crate) fn mean_load(layers: &[PrunedLayer]) -> Option<f64> {
    let sum = layers.iter().map(|l| l.load_max_over_mean).sum::<Option<f64>>();
    sum.map(|s| s / layers.len().max(1) as f64)
}
