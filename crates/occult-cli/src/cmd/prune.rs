//! `occult prune`

use anyhow::{Result, bail};
use occult_plan::{Budget, Placement, Topology};
use serde_json::json;

use crate::args::{PruneArgs, PruneRule};
use crate::exit::Usage;
use crate::output::{Table, figure, print, print_json};
use crate::pruning::{self, How, PrunedLayer};
use crate::{parallel, progress, setup};

pub(super) fn run(args: &PruneArgs) -> Result<()> {
    if args.ranks_only && args.rule != PruneRule::BestMass {
        let rule = args.rule.name();
        bail!(Usage(format!("--ranks-only works with --rule best-mass only: {rule} needs all scores")));
    }
    if args.balance.is_some() && !matches!(args.rule, PruneRule::BestMass | PruneRule::LeastError) {
        let rule = args.rule.name();
        bail!(Usage(format!("--balance works with --rule best-mass and least-error, not with {rule}")));
    }
    let profile = setup::profile(&args.profile)?;
    let mut file = setup::placement(&args.placement, profile.meta())?;
    let topology = file.placement.topology();
    let budget = args.adaptive.budget(args.max_ranks);
    let router = setup::router_rule(profile.meta(), args.norm_topk_prob);
    let how = How { rule: args.rule, budget, router: &router };
    let threads = setup::threads(args.threads);
    let prune = |placement: &Placement| {
        let bar = progress::bar(profile.num_layers() as u64, "layers");
        let layers = parallel::map_ordered(profile.num_layers(), threads, |layer| {
            let placement = &placement.layers()[layer];
            let pruned = if args.ranks_only {
                pruning::choose_ranks(&profile, layer, placement, topology, budget)
            } else {
                pruning::prune_layer(&profile, layer, placement, topology, how)
            };
            bar.inc(1);
            pruned
        });
        bar.finish_and_clear();
        layers
    };
    let mut layers = prune(&file.placement)?;
    let mut before = None;
    if let (Some(load_cap), Some(output)) = (args.balance, &args.output) {
        let bar = progress::bar(profile.num_layers() as u64, "layers balanced");
        let balanced = parallel::map_ordered(profile.num_layers(), threads, |layer| {
            let placement = &file.placement.layers()[layer];
            let within = (load_cap, args.max_tokens);
            let balanced = pruning::balance_layer(&profile, layer, placement, topology, how, within);
            bar.inc(1);
            balanced
        });
        bar.finish_and_clear();
        file.placement = Placement::new(topology, balanced?)?;
        before = Some(mean(&layers));
        layers = prune(&file.placement)?;
        let (rule, limit) = (args.rule.name(), limit(budget));
        let note = format!("weights of the ranks: load cap {load_cap} when pruned by {rule} to {limit}");
        file.meta.notes.push(note);
        file.write(output)?;
    }
    let ids = &profile.meta().layer_ids;
    if args.json {
        let layers_json: Vec<_> =
            ids.iter().zip(&layers).map(|(&id, l)| figures_json(id.into(), l, topology)).collect();
        return print_json(&json!({
            "profile": args.profile,
            "placement": args.placement,
            "rule": args.rule.name(),
            "max_ranks": args.max_ranks,
            "keep_mass": if let Budget::Adaptive { share, .. } = budget { Some(share) } else { None },
            "max_error": if let Budget::Bounded { error, .. } = budget { Some(error) } else { None },
            "ranks_only": args.ranks_only,
            "balance": args.balance,
            "without_balance": before.map(|b| figures_json(serde_json::Value::Null, &b, topology)),
            "layers": layers_json,
            "mean": figures_json(serde_json::Value::Null, &mean(&layers), topology),
        }));
    }
    let mut table = Table::new([
        "layer",
        "copies before",
        "after",
        "retained mass",
        "replaced experts",
        "tokens changed",
        "load max/mean",
    ]);
    let named = ids.iter().map(u32::to_string).zip(layers.iter().copied());
    for (name, layer) in named.chain([("mean".to_owned(), mean(&layers))]) {
        let s = &layer.stats;
        table.row([
            name,
            format!("{:.3}", s.copies_per_token_before()),
            format!("{:.3}", s.copies_per_token_after()),
            format!("{:.2} %", 100.0 * s.retained_mass()),
            format!("{:.2} %", 100.0 * s.replaced_experts as f64 / s.pairs.max(1) as f64),
            format!("{:.2} %", 100.0 * s.touched_tokens as f64 / s.tokens.max(1) as f64),
            figure(layer.load_max_over_mean, 3),
        ]);
    }
    let written = match (&before, &args.output) {
        (Some(before), Some(output)) => format!(
            "\nWritten to {}, with weights of the ranks. Without them: load {}, retained mass {:.2} %\n",
            output.display(),
            figure(before.load_max_over_mean, 3),
            100.0 * before.stats.retained_mass()
        ),
        _ => String::new(),
    };
    print(&format!(
        "Pruned by {} to {}, {} ranks:\n\n{}{written}",
        args.rule.name(),
        limit(budget),
        topology.num_ranks(),
        table.render()
    ))
}

fn limit(budget: Budget) -> String {
    match budget {
        Budget::Adaptive { max_ranks, share } => {
            format!("the fewest ranks, at most {max_ranks}, that keep {share} of the routing mass")
        }
        Budget::Bounded { max_ranks, error } => {
            format!("the fewest ranks, at most {max_ranks}, that lose at most {error} of routing weight")
        }
        Budget::Fixed { max_ranks } => format!("at most {max_ranks} ranks per token"),
    }
}

fn mean(layers: &[PrunedLayer]) -> PrunedLayer {
    PrunedLayer { stats: pruning::total(layers), load_max_over_mean: pruning::mean_load(layers) }
}

fn figures_json(layer: serde_json::Value, pruned: &PrunedLayer, topology: Topology) -> serde_json::Value {
    let s = &pruned.stats;
    // A token lives on any rank with equal probability, as in `traffic`.
    let away = (topology.num_ranks() - 1) as f64 / topology.num_ranks() as f64;
    json!({
        "layer": layer,
        "tokens": s.tokens,
        "copies_per_token_before": s.copies_per_token_before(),
        "copies_per_token": s.copies_per_token_after(),
        "remote_copies_per_token": s.copies_per_token_after() * away,
        "retained_mass": s.retained_mass(),
        "relative_mass": s.relative_mass(),
        "replaced_experts": s.replaced_experts,
        "replaced_fraction": s.replaced_experts as f64 / s.pairs.max(1) as f64,
        "touched_tokens": s.touched_tokens,
        "extended_tokens": s.extended_tokens,
        "load_max_over_mean": pruned.load_max_over_mean,
    })
}
