//! `occult place`

use anyhow::{Context, Result};
use occult_formats::{Columns, PlacementFile, PlacementMeta, Profile};
use occult_plan::placement::Method;
use occult_plan::placement::search::SearchOutcome;
use occult_plan::{LayerPlacement, Placement, Topology};
use serde_json::{Value, json};

use crate::args::{Home, PlaceArgs};
use crate::domains::{self, DomainFigures};
use crate::measuring::{self, COUNTS_ONLY, LayerFigures};
use crate::output::{figure, print, print_json};
use crate::placing::{LayerInput, Placer};
use crate::tokens::{self, Holdout};
use crate::{parallel, progress, setup};

struct LayerResult {
    placement: LayerPlacement,
    search: Option<SearchOutcome>,
    figures: LayerFigures,
    domains: Vec<DomainFigures>,
    train_tokens: u64,
    seconds: f64,
}

pub(super) fn run(args: &PlaceArgs) -> Result<()> {
    let topology = setup::topology(&args.topology)?;
    let profile = setup::profile(&args.profile)?;
    let cluster = setup::cluster(&args.cluster, topology)?;
    let meta = profile.meta();
    let threads = setup::threads(args.search.threads);
    let mut placer = Placer::new(&args.search, topology, cluster.as_ref(), meta.num_experts)?;
    placer.share_time(profile.num_layers(), threads);
    let holdout = Holdout::new(args.search.holdout, args.search.seed)?;
    let bar = progress::bar(profile.num_layers() as u64, "placing layers");
    let results = parallel::map_ordered(profile.num_layers(), threads, |layer| {
        let result = place_layer(&profile, layer, &placer, args, holdout)
            .with_context(|| format!("{}: layer {layer}", args.profile.display()))?;
        bar.inc(1);
        Ok(result)
    });
    bar.finish_and_clear();
    let results = results?;

    let warnings = warnings(args, &profile, &placer, &results);
    let layers: Vec<LayerFigures> = results.iter().map(|r| r.figures.clone()).collect();
    let mean = measuring::mean_json(&layers, mean_search(&results))?;
    if let Some(output) = &args.output {
        let table = Placement::new(topology, results.iter().map(|r| r.placement.clone()).collect())?;
        let placement_meta = PlacementMeta {
            layer_ids: meta.layer_ids.clone(),
            num_hidden_layers: meta.num_hidden_layers,
            model: meta.model.clone(),
            method: args.method.name().to_owned(),
            seed: matches!(args.method, Method::Random | Method::Search | Method::Apart)
                .then_some(args.search.seed),
            load_cap: (args.method == Method::Search).then_some(placer.options.load_cap),
            profile: args.profile.file_name().map(|n| n.to_string_lossy().into_owned()),
            figures: mean.as_object().cloned(),
            notes: warnings.clone(),
        };
        PlacementFile::new(placement_meta, table)?.write(output)?;
    }
    if args.json {
        let layers_json = results
            .iter()
            .zip(&layers)
            .map(|(r, f)| f.json(layer_json(f.layer_id, r, placer.options.load_cap)));
        return print_json(&json!({
            "profile": args.profile,
            "output": args.output,
            "method": args.method.name(),
            "ranks": topology.num_ranks(),
            "nodes": topology.num_nodes(),
            "seed": args.search.seed,
            "holdout": args.search.holdout,
            "load_cap": (args.method == Method::Search).then_some(placer.options.load_cap),
            "warnings": warnings,
            "layers": layers_json.collect::<Result<Vec<_>>>()?,
            "mean": mean,
            "domains": domains::mean_json(&profile.meta().domains, results.iter().map(|r| r.domains.as_slice())),
        }));
    }
    warnings.iter().for_each(|w| eprintln!("warning: {w}"));
    print(&text(args, &placer, &results, &layers, topology))
}

fn place_layer(
    profile: &Profile,
    layer: usize,
    placer: &Placer,
    args: &PlaceArgs,
    holdout: Holdout,
) -> Result<LayerResult> {
    let layer_id = profile.meta().layer_ids[layer];
    if profile.num_rows(layer).is_none() {
        let (counts, pairs) = (profile.counts(layer)?, profile.coactivation(layer)?);
        let input = LayerInput::Counts { counts: &counts, coactivation: pairs.as_ref() };
        let placed = placer.place(args.method, layer, &input)?;
        let figures = LayerFigures::of_counts(layer_id, &placed.placement, &counts, pairs.as_ref());
        return Ok(LayerResult {
            placement: placed.placement,
            search: None,
            figures,
            domains: Vec::new(),
            train_tokens: 0,
            seconds: placed.seconds,
        });
    }
    let columns = Columns { domains: true, ..Columns::IDS };
    let rows = tokens::read(profile, layer, columns, args.search.max_tokens, holdout)?;
    let placed = placer.place(args.method, layer, &LayerInput::Tokens(&rows.train))?;
    let figures =
        measuring::measure_rows(layer_id, &rows.eval, &placed.placement, placer.topology, Home::Uniform)?;
    let domains = match &rows.eval_domains {
        Some(of_row) => domains::measure(&rows.eval, of_row, &placed.placement, placer.topology)?,
        None => Vec::new(),
    };
    let train_tokens = rows.train.view()?.weighted_rows().map(|(_, n)| n).sum();
    let result = LayerResult {
        placement: placed.placement,
        search: placed.search,
        figures,
        domains,
        train_tokens,
        seconds: placed.seconds,
    };
    Ok(result)
}

fn warnings(args: &PlaceArgs, profile: &Profile, placer: &Placer, results: &[LayerResult]) -> Vec<String> {
    let mut warnings = Vec::new();
    if results.iter().any(|r| r.figures.summary.is_none()) {
        warnings.push(COUNTS_ONLY.to_owned());
    }
    let relaxed: Vec<String> = results
        .iter()
        .filter(|r| r.search.as_ref().is_some_and(|s| s.load_max_over_mean > placer.options.load_cap + 1e-9))
        .map(|r| {
            format!("{} ({:.3})", r.figures.layer_id, r.search.as_ref().map_or(0.0, |s| s.load_max_over_mean))
        })
        .collect();
    if !relaxed.is_empty() {
        warnings.push(format!(
            "the default load cap of {} cannot be met on layers {}: their least loaded placement was taken; --replicas can help",
            placer.options.load_cap,
            relaxed.join(", ")
        ));
    }
    let rows = (0..profile.num_layers()).filter_map(|l| profile.num_rows(l)).max().unwrap_or(0);
    if rows > args.search.max_tokens {
        warnings.push(format!(
            "{} of up to {rows} rows per layer were used, evenly spaced: --max-tokens reads more",
            args.search.max_tokens
        ));
    }
    let experts = profile.meta().num_experts;
    let added = |r: &LayerResult| r.placement.num_slots() - experts;
    if let (Method::Search, Some(least)) = (args.method, results.iter().map(added).min())
        && least < args.search.replicas
    {
        warnings.push(format!(
            "some layers got only {least} of {} replicas: no further one was found to help under the load cap",
            args.search.replicas
        ));
    }
    let read = |r: &LayerResult| r.train_tokens > 0 && args.search.holdout == 0.0;
    if args.method == Method::Search && results.iter().any(read) {
        warnings.push(
            "measured on the rows it was made from: --holdout 0.5 tells how it does on others".to_owned(),
        );
    }
    let layers: Vec<LayerFigures> = results.iter().map(|r| r.figures.clone()).collect();
    if let Some(copies) = measuring::mean_of(&layers, |s| s.copies_per_token) {
        let of_layers = results.iter().map(|r| r.domains.as_slice());
        let all = (copies, measuring::mean_load(&layers));
        warnings.extend(domains::disagreement(&profile.meta().domains, of_layers, all));
    }
    warnings
}

/// How far above the lower bound a searched layer is at most. The bound is one for placements without replicas under the
/// cap, so it says nothing about others.
fn gap(result: &LayerResult, load_cap: f64) -> Option<f64> {
    let search = result.search.as_ref()?;
    let bounded = !result.placement.has_replicas() && search.load_max_over_mean <= load_cap + 1e-9;
    bounded.then(|| search.copies_per_token / search.copies_lower_bound - 1.0)
}

fn layer_json(layer_id: u32, result: &LayerResult, load_cap: f64) -> Value {
    let experts: Vec<usize> =
        (0..result.placement.num_ranks()).map(|r| result.placement.experts_of(r as u16).len()).collect();
    let mut value = json!({ "layer": layer_id, "experts_per_rank": experts, "seconds": result.seconds });
    if let Some(s) = &result.search {
        value["search"] = json!({
            "copies_per_token": s.copies_per_token,
            "node_copies_per_token": s.node_copies_per_token,
            "load_max_over_mean": s.load_max_over_mean,
            "copies_lower_bound": s.copies_lower_bound,
            "node_copies_lower_bound": s.node_copies_lower_bound,
            "gap": gap(result, load_cap),
            "restart_copies_per_token": s.restart_copies,
            "distinct_sets": s.num_sets,
        });
    }
    value
}

fn mean_search(results: &[LayerResult]) -> Value {
    let n = results.len() as f64;
    let mean = |f: fn(&SearchOutcome) -> f64| {
        results.iter().map(|r| r.search.as_ref().map(f)).sum::<Option<f64>>().map(|s| s / n)
    };
    match mean(|s| s.copies_lower_bound) {
        Some(bound) => json!({ "search": {
            "copies_per_token": mean(|s| s.copies_per_token),
            "load_max_over_mean": mean(|s| s.load_max_over_mean),
            "copies_lower_bound": bound,
        }}),
        None => json!({}),
    }
}

fn text(
    args: &PlaceArgs,
    placer: &Placer,
    results: &[LayerResult],
    layers: &[LayerFigures],
    topology: Topology,
) -> String {
    let on = if args.search.holdout > 0.0 { "held-out rows" } else { "the profile's rows" };
    let mut text = format!(
        "{} on {} ranks ({} nodes), measured on {on}:\n\n{}",
        args.method,
        topology.num_ranks(),
        topology.num_nodes(),
        measuring::table(layers, topology.num_nodes() > 1)
    );
    if let Some(first) = results.iter().find_map(|r| r.search.as_ref()) {
        let mean = |f: fn(&SearchOutcome) -> f64| {
            results.iter().filter_map(|r| r.search.as_ref()).map(f).sum::<f64>() / results.len() as f64
        };
        let (found, bound) = (mean(|s| s.copies_per_token), mean(|s| s.copies_lower_bound));
        let bounded = results.iter().all(|r| gap(r, placer.options.load_cap).is_some());
        let gap = |found: f64, bound: f64| match found / bound - 1.0 {
            // Replicas, or a cap that had to be left, can go below it.
            below if below < -1e-9 => " (below it)".to_owned(),
            above if bounded => format!(" (gap at most {:.1} %)", 100.0 * above.max(0.0)),
            _ => String::new(),
        };
        text.push_str(&format!(
            "\nOn the rows it searched: {found:.3} copies per token; no placement without replicas under this cap has fewer than \
             {bound:.3}{}.\n",
            gap(found, bound)
        ));
        if topology.num_nodes() > 1 {
            let (found, bound) = (mean(|s| s.node_copies_per_token), mean(|s| s.node_copies_lower_bound));
            text.push_str(&format!(
                "Nodes per token: {found:.3}, not fewer than {bound:.3}{}.\n",
                gap(found, bound)
            ));
        }
        let spread = mean(|s| {
            let worst = s.restart_copies.iter().copied().fold(0.0, f64::max);
            let best = s.restart_copies.iter().copied().fold(f64::INFINITY, f64::min);
            if worst > 0.0 { worst / best - 1.0 } else { 0.0 }
        });
        // With replicas the restarts are of several problems: their spread tells nothing.
        if first.restart_copies.len() > 1 && args.search.replicas == 0 {
            text.push_str(&format!(
                "Its {} restarts per layer differ by {:.1} % from best to worst.\n",
                first.restart_copies.len(),
                100.0 * spread
            ));
        }
    }
    if args.explain {
        text.push_str(&explain(args, placer, results, topology));
    }
    match &args.output {
        Some(path) => text.push_str(&format!("\nWritten to {}\n", path.display())),
        None => text.push_str("\nNot saved: give -o PLACEMENT to keep it.\n"),
    }
    text
}

/// The objective and the limits of the first layer, with their numbers.
fn explain(args: &PlaceArgs, placer: &Placer, results: &[LayerResult], topology: Topology) -> String {
    let result = &results[0];
    let (summary, options) = (result.figures.summary, &placer.options);
    let get = |f: fn(&occult_plan::TrafficSummary) -> f64| figure(summary.as_ref().map(f), 3);
    let w = topology.num_ranks();
    let mut lines = vec![format!("How layer {} comes about ({}):", result.figures.layer_id, args.method)];
    let total: u64 = result.figures.load.iter().sum();
    let max = result.figures.load.iter().max().copied().unwrap_or(0);
    if args.method == Method::Search {
        let [rank_cost, node_cost] = [options.rank_cost, options.node_cost];
        if topology.num_nodes() > 1 {
            let cost = summary.map(|s| rank_cost * s.copies_per_token + node_cost * s.node_copies_per_token);
            lines.push(format!(
                "cost per token = rank_cost x ranks visited + node_cost x nodes visited = {rank_cost} x {} + {node_cost} x {} = {}",
                get(|s| s.copies_per_token),
                get(|s| s.node_copies_per_token),
                figure(cost, 3)
            ));
        } else {
            lines.push(format!("cost per token = ranks visited = {}", get(|s| s.copies_per_token)));
        }
        if let Some(s) = &result.search {
            let per_rank = result.train_tokens as f64 / w as f64;
            let k = summary.map_or(0.0, |s| s.conventional_copies_per_token);
            lines.push(format!(
                "searched {} distinct expert sets of {} tokens; load of a rank at most cap x tokens x K / W = {} x {} x {k} / {w} = {:.0} \
                 pairs, found {:.3} of the mean",
                s.num_sets,
                result.train_tokens,
                options.load_cap,
                result.train_tokens,
                options.load_cap * per_rank * k,
                s.load_max_over_mean
            ));
            lines.push(format!(
                "lower bound = sum over experts of load x phi(mean companions + 1) / tokens = {:.3}; found {:.3}",
                s.copies_lower_bound, s.copies_per_token
            ));
        }
    }
    lines.push(format!(
        "measured: load max/mean = {max} x {w} / {total} = {:.3}; remote copies = C_T x (W - 1) / W = {} x {} / {w} = {}",
        result.figures.load_max_over_mean(),
        get(|s| s.copies_per_token),
        w - 1,
        get(|s| s.remote_copies_per_token)
    ));
    format!("\n{}\n", lines.join("\n  "))
}
