//! Several placements of one profile side by side: the data of a report.

mod data;
mod times;

use std::sync::Arc;

use anyhow::{Context, Result};
use occult_formats::{Columns, PlacementFile, Profile};
use occult_plan::placement::Method;
use occult_plan::prune::best_mass_ranks_only;
use occult_plan::{
    Budget, CoActivation, HomeRanks, LayerPlacement, LayerTraffic, PruneSpec, PruneStats, RoutingBuf,
    SimilarityAccumulator, Topology, prune,
};

use crate::args::{Home, PruneRule, SearchArgs, ShapeArgs};
use crate::measuring::{self, LayerFigures};
use crate::placing::{LayerInput, Placer};
use crate::report::{PruningBudget, ReportData};
use crate::tokens::{self, Holdout, LayerTokens};
use crate::{parallel, progress, setup};

/// Caps that the frontier is drawn for, beside the one asked for.
const FRONTIER_CAPS: [f64; 5] = [1.05, 1.1, 1.25, 1.5, 2.0];
/// Compared by copies and load: all but `apart`, which gives copies away for steps of a few tokens.
const METHODS: [Method; 5] =
    [Method::Contiguous, Method::Random, Method::Greedy, Method::Eplb, Method::Search];

/// What to compare.
pub(crate) struct Request<'a> {
    pub(crate) profile: &'a Profile,
    /// Placements to show beside the methods, with their names.
    pub(crate) placements: &'a [(String, PlacementFile)],
    pub(crate) topology: Topology,
    pub(crate) search: &'a SearchArgs,
    pub(crate) shape: &'a ShapeArgs,
    pub(crate) clusters: &'a [String],
    pub(crate) title: Option<&'a str>,
    pub(crate) notices: Vec<String>,
}

/// The comparison, and the placement that the search found.
pub(crate) struct Comparison {
    pub(crate) data: ReportData,
    pub(crate) placements: Vec<LayerPlacement>,
}

struct LayerResult {
    methods: Vec<MethodLayer>,
    frontier: Vec<(f64, f64)>,
    pruning: Vec<PrunedLayer>,
    pairs: CoActivation,
    tokens: u64,
    eval_tokens: u64,
    relaxed: bool,
}

/// A placement's names on the page.
struct Names {
    name: String,
    label: String,
    explanation: String,
}

struct MethodLayer {
    placement: LayerPlacement,
    figures: LayerFigures,
    lower_bound: Option<f64>,
}

/// One rule and budget on one layer, under the search's placement.
struct PrunedLayer {
    rule: PruneRule,
    budget: PruningBudget,
    stats: PruneStats,
    traffic: Option<LayerTraffic>,
}

/// Places, measures and prunes every layer. The profile must have token-level rows.
pub(crate) fn run(request: &Request<'_>) -> Result<Comparison> {
    let (profile, topology) = (request.profile, request.topology);
    let mut placer = Placer::new(request.search, topology, None, profile.meta().num_experts)?;
    let holdout = Holdout::new(request.search.holdout, request.search.seed)?;
    let bar = progress::bar(profile.num_layers() as u64, "comparing layers");
    let threads = setup::threads(request.search.threads);
    placer.share_time(profile.num_layers(), threads);
    let layers = parallel::map_ordered(profile.num_layers(), threads, |layer| {
        let path = profile.path().display();
        anyhow::ensure!(
            profile.num_rows(layer).is_some(),
            "{path}: layer {layer} has counts only: a comparison of placements needs token-level expert ids"
        );
        let rows = tokens::read(profile, layer, Columns::ALL, request.search.max_tokens, holdout)
            .and_then(|rows| compare_layer(request, &placer, layer, &rows))
            .with_context(|| format!("{path}: layer {layer}"))?;
        bar.inc(1);
        Ok(rows)
    });
    bar.finish_and_clear();
    let layers = layers?;
    let data = data::assemble(request, &placer, &layers)?;
    let chosen = METHODS.iter().position(|&m| m == Method::Search).expect("search is a method");
    let placements = layers.into_iter().map(|mut l| l.methods.swap_remove(chosen).placement).collect();
    Ok(Comparison { data, placements })
}

fn compare_layer(
    request: &Request<'_>,
    placer: &Placer,
    layer: usize,
    rows: &LayerTokens,
) -> Result<LayerResult> {
    let (topology, layer_id) = (request.topology, request.profile.meta().layer_ids[layer]);
    let measure = |placement: LayerPlacement, lower_bound| {
        let figures = measuring::measure_rows(layer_id, &rows.eval, &placement, topology, Home::Uniform)?;
        anyhow::Ok(MethodLayer { placement, figures, lower_bound })
    };
    let mut methods = Vec::new();
    let mut relaxed = false;
    for method in METHODS {
        let placed = placer.place(method, layer, &LayerInput::Tokens(&rows.train))?;
        let bound = placed.search.as_ref().map(|s| s.copies_lower_bound);
        relaxed |= placed.search.is_some_and(|s| s.load_max_over_mean > placer.options.load_cap + 1e-9);
        methods.push(measure(placed.placement, bound)?);
    }
    let search = methods.last().expect("search is the last method").placement.clone();
    for (_, file) in request.placements {
        methods.push(measure(file.placement.layers()[layer].clone(), None)?);
    }
    let mut frontier = Vec::new();
    for cap in FRONTIER_CAPS {
        let mut placer = placer.clone();
        placer.options.load_cap = cap;
        placer.options.relax_cap = true;
        placer.options.restarts = Some(placer.options.restarts.unwrap_or(2).min(2));
        let placed = placer.place(Method::Search, layer, &LayerInput::Tokens(&rows.train))?;
        let figures =
            measuring::measure_rows(layer_id, &rows.eval, &placed.placement, topology, Home::Uniform)?;
        let copies = figures.summary.map_or(f64::NAN, |s| s.copies_per_token);
        frontier.push((copies, figures.load_max_over_mean()));
    }
    let pairs = CoActivation::of(&rows.train.view()?);
    let count = |rows: &RoutingBuf| anyhow::Ok(rows.view()?.weighted_rows().map(|(_, n)| n).sum::<u64>());
    let eval_tokens = count(&rows.eval)?;
    let tokens = if request.search.holdout > 0.0 { eval_tokens + count(&rows.train)? } else { eval_tokens };
    let pruning = prune_layer(request, rows, &search, topology)?;
    Ok(LayerResult { methods, frontier, pruning, pairs, tokens, eval_tokens, relaxed })
}

/// Every rule at every limit below the number of ranks; where only weights are known, the ranks that best-mass chooses.
fn prune_layer(
    request: &Request<'_>,
    rows: &LayerTokens,
    placement: &LayerPlacement,
    topology: Topology,
) -> Result<Vec<PrunedLayer>> {
    let eval = rows.eval.view()?;
    let budgets: Vec<(PruningBudget, Budget)> = (1..topology.num_ranks().min(5))
        .map(|m| (PruningBudget::MaxRanks(m as u32), Budget::Fixed { max_ranks: m }))
        .chain([0.8, 0.9].map(|share| {
            (PruningBudget::MassShare(share), Budget::Adaptive { max_ranks: topology.num_ranks(), share })
        }))
        .collect();
    let mut pruned = Vec::new();
    if rows.eval.scores.is_some() {
        let mut sums = SimilarityAccumulator::new(rows.train.num_experts);
        sums.add(&rows.train.view()?)?;
        let table = Arc::new(sums.finish());
        let router = setup::router_rule(request.profile.meta(), None);
        for name in PruneRule::ALL {
            let rule = name.with(Some(&table)).context("the similarity rule has no table")?;
            for &(shown, budget) in &budgets {
                let spec = PruneSpec { rule: rule.rule(), budget, router: &router };
                let result = prune(&eval, placement, topology, spec)?;
                let traffic =
                    LayerTraffic::measure(placement, topology, HomeRanks::Uniform, &result.routing.view()?)?;
                pruned.push(PrunedLayer {
                    rule: name,
                    budget: shown,
                    stats: result.stats,
                    traffic: Some(traffic),
                });
            }
        }
    } else if rows.eval.weights.is_some() {
        for &(shown, budget) in &budgets {
            let stats = best_mass_ranks_only(&eval, placement, topology, budget)?;
            pruned.push(PrunedLayer { rule: PruneRule::BestMass, budget: shown, stats, traffic: None });
        }
    }
    Ok(pruned)
}
