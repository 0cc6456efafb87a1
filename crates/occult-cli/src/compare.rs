//! Several placements of one profile side by side: the data of a report.

use anyhow::{Context, Result};
use occult_formats::{Columns, PlacementFile, Profile};
use occult_plan::cost::{Cluster, Exchange, LayerShape, StepTime, predict};
use occult_plan::graph::subgraph_curve;
use occult_plan::placement::Method;
use occult_plan::prune::best_mass_ranks_only;
use occult_plan::{
    Budget, CoActivation, HomeRanks, LayerPlacement, LayerTraffic, PruneStats, RoutingBuf, Rule,
    SimilarityAccumulator, Topology, prune,
};

use crate::args::{Home, PruneRule, SearchArgs, ShapeArgs};
use crate::measuring::{self, LayerFigures};
use crate::placing::{LayerInput, Placer};
use crate::report::{self, Part, PruningBudget};
use crate::tokens::{self, Holdout, LayerTokens};
use crate::{parallel, progress, setup};

/// Caps that the frontier is drawn for, beside the one asked for.
const FRONTIER_CAPS: [f64; 5] = [1.05, 1.1, 1.25, 1.5, 2.0];
/// Heat maps are shown of so many layers, evenly spaced.
const SHOWN_LAYERS: usize = 3;
const SUBGRAPH_POINTS: usize = 41;
const METHODS: [Method; 5] = Method::ALL;

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
    pub(crate) data: report::ReportData,
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
    let placer = Placer::new(request.search, topology, None, profile.meta().num_experts)?;
    let holdout = Holdout::new(request.search.holdout, request.search.seed)?;
    let bar = progress::bar(profile.num_layers() as u64, "comparing layers");
    let threads = setup::threads(request.search.threads);
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
    let data = data(request, &placer, &layers)?;
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
        let placed = placer.place(method, &LayerInput::Tokens(&rows.train))?;
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
        let placed = placer.place(Method::Search, &LayerInput::Tokens(&rows.train))?;
        let figures =
            measuring::measure_rows(layer_id, &rows.eval, &placed.placement, topology, Home::Uniform)?;
        let copies = figures.summary.map_or(f64::NAN, |s| s.copies_per_token);
        frontier.push((copies, figures.load_max_over_mean()));
    }
    let mut pairs = CoActivation::new(rows.train.num_experts);
    pairs.add(&rows.train.view()?);
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
        let table = sums.finish();
        let router = setup::router_rule(request.profile.meta(), None);
        for name in PruneRule::ALL {
            let rule = match name {
                PruneRule::RouterScore => Rule::RouterScore,
                PruneRule::Similarity => Rule::Similarity(&table),
                PruneRule::BestMass => Rule::BestMass,
            };
            for &(shown, budget) in &budgets {
                let result = prune(&eval, placement, topology, rule, budget, &router)?;
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

fn data(request: &Request<'_>, placer: &Placer, layers: &[LayerResult]) -> Result<report::ReportData> {
    let (meta, topology) = (request.profile.meta(), request.topology);
    let row_bytes = request.shape.hidden as f64 * setup::dtype_bytes(&request.shape.dtype)?;
    let names: Vec<(String, String, String)> = METHODS
        .iter()
        .map(|m| (m.name().to_owned(), label(*m).to_owned(), explanation(*m).to_owned()))
        .chain(request.placements.iter().map(|(name, file)| {
            (name.clone(), name.clone(), format!("from a file, made by {}", file.meta.method))
        }))
        .collect();
    let methods: Vec<report::Method> =
        names.iter().enumerate().map(|(i, names)| method(names, i, layers, topology)).collect();
    let shown: Vec<usize> = shown_layers(layers.len());
    let uniform = layers[0].methods[0].figures.summary.and_then(|s| s.copies_uniform);
    let mut warnings = Vec::new();
    if layers.iter().any(|l| l.relaxed) {
        warnings.push(format!(
            "Some layers have an expert too hot for the load cap of {}: their least loaded placement was taken.",
            placer.options.load_cap
        ));
    }
    if request.search.holdout == 0.0 {
        warnings.push("Placements were measured on the rows they were made from.".to_owned());
    } else {
        warnings.push(format!(
            "The load cap of {} holds on the rows that the search saw; these figures are of other rows.",
            placer.options.load_cap
        ));
    }
    let max = |f: fn(&LayerResult) -> u64| layers.iter().map(f).max().unwrap_or(0);
    let predictions = predictions(request, &names, layers, &mut warnings)?;
    Ok(report::ReportData {
        format: report::FORMAT.to_owned(),
        title: request
            .title
            .map(str::to_owned)
            .or_else(|| meta.model.clone())
            .unwrap_or("Routing profile".into()),
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        profile: report::Profile {
            model: meta.model.clone().unwrap_or_else(|| "unnamed model".to_owned()),
            source: format!("{}: {}", meta.source.format, meta.source.files.join(", ")),
            tokens: max(|l| l.tokens),
            held_out_tokens: (request.search.holdout > 0.0).then(|| max(|l| l.eval_tokens)),
            layers: meta.layer_ids.clone(),
            num_experts: meta.num_experts as u32,
            top_k: meta.top_k.unwrap_or(0) as u32,
            domains: meta.domains.clone(),
            notices: request.notices.clone(),
        },
        setting: report::Setting {
            ranks: topology.num_ranks() as u32,
            nodes: topology.num_nodes() as u32,
            load_cap: Some(placer.options.load_cap),
            hidden_size: request.shape.hidden as u32,
            dtype: request.shape.dtype.clone(),
            row_bytes: row_bytes as u64,
            uniform_copies_per_token: uniform,
        },
        baseline: Method::Contiguous.name().to_owned(),
        chosen: Method::Search.name().to_owned(),
        frontier: Part::of(frontier(&methods, layers, placer)),
        methods,
        coactivation: Part::of(
            shown.iter().map(|&l| heat_map(meta.layer_ids[l], &names, &layers[l])).collect(),
        ),
        pruning: pruning(layers),
        predictions,
        subgraphs: Part::of(
            shown
                .iter()
                .map(|&l| {
                    let curve = subgraph_curve(&layers[l].pairs, SUBGRAPH_POINTS)?;
                    let points = curve.iter().map(|p| (p.threshold, p.num_subgraphs as u32)).collect();
                    Ok(report::SubgraphCurve { layer: meta.layer_ids[l], points })
                })
                .collect::<Result<Vec<_>>>()?,
        ),
        warnings,
    })
}

fn label(method: Method) -> &'static str {
    match method {
        Method::Contiguous => "Contiguous",
        Method::Random => "Random",
        Method::Greedy => "Greedy (Algorithm 1)",
        Method::Eplb => "EPLB (load only)",
        Method::Search => "Search (ours)",
    }
}

fn explanation(method: Method) -> &'static str {
    match method {
        Method::Contiguous => "Blocks of consecutive experts: what engines do by default.",
        Method::Random => "Equal random groups.",
        Method::Greedy => {
            "The paper's Algorithm 1: groups experts that are chosen together, looks at no load."
        }
        Method::Eplb => "DeepSeek's load balancer: evens out load, looks at no collaboration.",
        Method::Search => "Fewest ranks per token on the recorded expert sets, under a cap on load.",
    }
}

fn measures(figures: &LayerFigures, lower_bound: Option<f64>) -> report::Measures {
    let s = figures.summary;
    report::Measures {
        copies_per_token: s.map(|s| s.copies_per_token),
        remote_copies_per_token: s.map(|s| s.remote_copies_per_token),
        node_copies_per_token: s.map(|s| s.node_copies_per_token),
        load_max_over_mean: figures.load_max_over_mean(),
        intra_fraction: figures.intra_fraction,
        lower_bound,
    }
}

fn method(
    (name, label, explanation): &(String, String, String),
    index: usize,
    layers: &[LayerResult],
    topology: Topology,
) -> report::Method {
    let w = topology.num_ranks();
    let of_method: Vec<&MethodLayer> = layers.iter().map(|l| &l.methods[index]).collect();
    let figures: Vec<LayerFigures> = of_method.iter().map(|m| m.figures.clone()).collect();
    let mean_bound = of_method.iter().map(|m| m.lower_bound).sum::<Option<f64>>();
    let intra = figures.iter().map(|f| f.intra_fraction).sum::<Option<f64>>();
    let n = layers.len() as f64;
    let load_per_rank = figures
        .iter()
        .map(|f| {
            let mean = f.load.iter().sum::<u64>() as f64 / w as f64;
            f.load.iter().map(|&l| l as f64 / mean).collect()
        })
        .collect();
    let pair = |from: usize, to: usize| {
        let rate = |t: &LayerTraffic| 1000.0 * t.rank_rows().get(from, to) / t.num_tokens() as f64;
        figures.iter().filter_map(|f| f.traffic.as_ref()).map(rate).sum::<f64>() / n
    };
    report::Method {
        name: name.clone(),
        label: label.clone(),
        explanation: explanation.clone(),
        layers: of_method.iter().map(|m| measures(&m.figures, m.lower_bound)).collect(),
        mean: report::Measures {
            copies_per_token: measuring::mean_of(&figures, |s| s.copies_per_token),
            remote_copies_per_token: measuring::mean_of(&figures, |s| s.remote_copies_per_token),
            node_copies_per_token: measuring::mean_of(&figures, |s| s.node_copies_per_token),
            load_max_over_mean: measuring::mean_load(&figures),
            intra_fraction: intra.map(|s| s / n),
            lower_bound: mean_bound.map(|s| s / n),
        },
        load_per_rank,
        rows_per_pair: (0..w).map(|from| (0..w).map(|to| pair(from, to)).collect()).collect(),
    }
}

fn shown_layers(n: usize) -> Vec<usize> {
    let mut shown: Vec<usize> = (0..SHOWN_LAYERS).map(|i| i * (n - 1) / (SHOWN_LAYERS - 1)).collect();
    shown.dedup();
    shown
}

fn heat_map(layer: u32, names: &[(String, String, String)], result: &LayerResult) -> report::CoActivationMap {
    let max = result.pairs.max().max(1) as f32;
    let order = |(names, method): (&(String, String, String), &MethodLayer)| {
        let placement = &method.placement;
        let mut experts = Vec::new();
        let mut rank_offsets = vec![0];
        for r in 0..placement.num_ranks() {
            experts.extend_from_slice(placement.experts_of(r as u16));
            rank_offsets.push(experts.len() as u32);
        }
        report::ExpertOrder { method: names.0.clone(), experts, rank_offsets }
    };
    report::CoActivationMap {
        layer,
        p: result.pairs.as_slice().iter().map(|&n| n as f32 / max).collect(),
        orders: names.iter().zip(&result.methods).map(order).collect(),
    }
}

fn frontier(
    methods: &[report::Method],
    layers: &[LayerResult],
    placer: &Placer,
) -> Vec<report::FrontierPoint> {
    let n = layers.len() as f64;
    let mut points: Vec<report::FrontierPoint> = methods
        .iter()
        .filter_map(|m| {
            Some(report::FrontierPoint {
                method: m.name.clone(),
                label: m.label.clone(),
                load_cap: (m.name == Method::Search.name()).then_some(placer.options.load_cap),
                copies_per_token: m.mean.copies_per_token?,
                load_max_over_mean: m.mean.load_max_over_mean,
            })
        })
        .collect();
    for (i, &cap) in FRONTIER_CAPS.iter().enumerate().filter(|(_, cap)| **cap != placer.options.load_cap) {
        points.push(report::FrontierPoint {
            method: Method::Search.name().to_owned(),
            label: format!("Search, cap {cap}"),
            load_cap: Some(cap),
            copies_per_token: layers.iter().map(|l| l.frontier[i].0).sum::<f64>() / n,
            load_max_over_mean: layers.iter().map(|l| l.frontier[i].1).sum::<f64>() / n,
        });
    }
    points
}

fn pruning(layers: &[LayerResult]) -> Part<report::PruningRow> {
    let rows: Vec<report::PruningRow> = (0..layers[0].pruning.len())
        .map(|i| {
            let mut stats = PruneStats::default();
            layers.iter().for_each(|l| stats.merge(&l.pruning[i].stats));
            let load = layers
                .iter()
                .map(|l| l.pruning[i].traffic.as_ref().map(|t| t.summary().load_max_over_mean))
                .sum::<Option<f64>>();
            let PrunedLayer { rule, budget, .. } = &layers[0].pruning[i];
            report::PruningRow {
                method: Method::Search.name().to_owned(),
                rule: rule.name().to_owned(),
                budget: *budget,
                copies_per_token: stats.copies_per_token_after(),
                retained_mass: stats.retained_mass(),
                replaced_fraction: stats.replaced_experts as f64 / stats.pairs.max(1) as f64,
                load_max_over_mean: load.map(|s| s / layers.len() as f64),
            }
        })
        .collect();
    if rows.is_empty() {
        Part::missing("Pruning needs router weights or scores, and this profile has neither.")
    } else {
        Part::of(rows)
    }
}

/// All layers of one step: the conventional exchange under the contiguous placement, every placement with one copy per
/// rank (per node and rank where there are nodes), and the pruned routing where it is known.
fn predictions(
    request: &Request<'_>,
    names: &[(String, String, String)],
    layers: &[LayerResult],
    warnings: &mut Vec<String>,
) -> Result<Part<report::Prediction>> {
    let shape =
        LayerShape::gated(request.shape.hidden, request.shape.ffn, setup::dtype_bytes(&request.shape.dtype)?);
    let ours = if request.topology.num_nodes() > 1 { Exchange::PerNode } else { Exchange::PerRank };
    let mut items = Vec::new();
    for name in request.clusters {
        let cluster = match occult_formats::cluster::preset_or_file(name)?.resized(request.topology) {
            Ok(cluster) => cluster,
            Err(error) => {
                warnings.push(format!("No times for cluster {name}: {error}."));
                continue;
            }
        };
        let mut add = |method: &str,
                       label: String,
                       exchange: Exchange,
                       traffic: &dyn Fn(&LayerResult) -> Option<LayerTraffic>| {
            let steps: Option<Vec<LayerTraffic>> = layers.iter().map(traffic).collect();
            let Some(steps) = steps else { return Ok(()) };
            let steps: Vec<StepTime> = steps
                .iter()
                .map(|t| predict(&cluster, &shape, t, exchange, Some(request.shape.step_tokens)))
                .collect::<Result<_, _>>()?;
            items.push(prediction(&cluster, method, label, &steps));
            anyhow::Ok(())
        };
        let of = |i: usize| move |l: &LayerResult| l.methods[i].figures.traffic.clone();
        add(&names[0].0, "Conventional: one row per expert".to_owned(), Exchange::PerExpert, &of(0))?;
        for (i, (method, label, _)) in names.iter().enumerate() {
            add(method, label.clone(), ours, &of(i))?;
        }
        for (i, pruned) in layers[0].pruning.iter().enumerate() {
            if let (PruneRule::BestMass, PruningBudget::MaxRanks(m @ 1..=2)) = (pruned.rule, pruned.budget) {
                let label = format!("Search, pruned to {m} rank{}", if m == 1 { "" } else { "s" });
                add(Method::Search.name(), label, ours, &|l| l.pruning[i].traffic.clone())?;
            }
        }
    }
    Ok(if items.is_empty() { Part::missing("No cluster to predict times for.") } else { Part::of(items) })
}

fn prediction(cluster: &Cluster, method: &str, label: String, steps: &[StepTime]) -> report::Prediction {
    let sum = |part: fn(&StepTime) -> f64| steps.iter().map(part).sum();
    report::Prediction {
        cluster: cluster.name.clone(),
        method: method.to_owned(),
        label,
        dispatch_seconds: sum(|s| s.forward.dispatch.seconds),
        compute_seconds: sum(|s| s.forward.compute_s),
        combine_seconds: sum(|s| s.forward.combine.seconds),
        total_seconds: sum(|s| s.forward.total_s),
    }
}
