//! `occult demo`: the pipeline on bundled real routing.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use occult_formats::{ImportFormat, ImportOptions, PlacementFile, PlacementMeta, Profile, write_atomic};
use occult_plan::Placement;

use crate::args::{DemoArgs, SearchArgs, ShapeArgs};
use crate::compare::{self, Request};
use crate::output::{Table, figure, print, seconds};
use crate::report::{PruningBudget, ReportData};
use crate::{bundled, placing, progress, setup};

const NOTICE: &str =
    "Routing of gpt-oss-20b: an extract of AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting, Apache-2.0.";
/// gpt-oss-20b: hidden size and expert intermediate size (its config.json).
const SHAPE: (usize, usize) = (2880, 2880);

pub(super) fn run(args: &DemoArgs) -> Result<()> {
    let start = Instant::now();
    let topology = setup::topology(&args.topology)?;
    let dir = &args.out_dir;
    let profile_path = dir.join("profile.safetensors");
    import(dir, &profile_path)?;
    let profile = Profile::open(&profile_path)?;

    let search = SearchArgs { holdout: 0.5, ..search_defaults() };
    let (hidden, ffn) = SHAPE;
    let shape = ShapeArgs { hidden, ffn, dtype: "bf16".to_owned(), step_tokens: 16_384 };
    let comparison = compare::run(&Request {
        profile: &profile,
        placements: &[],
        topology,
        search: &search,
        shape: &shape,
        clusters: &["8xa6000-pcie".to_owned(), "8xh100-nvlink".to_owned()],
        title: Some("gpt-oss-20b on bundled routing"),
        notices: vec![NOTICE.to_owned()],
    })?;
    let placement_path = dir.join("placement.json");
    let meta = PlacementMeta {
        layer_ids: profile.meta().layer_ids.clone(),
        num_hidden_layers: profile.meta().num_hidden_layers,
        model: profile.meta().model.clone(),
        method: "search".to_owned(),
        seed: Some(search.seed),
        load_cap: Some(placing::DEFAULT_LOAD_CAP),
        profile: Some("profile.safetensors".to_owned()),
        ..PlacementMeta::default()
    };
    PlacementFile::new(meta, Placement::new(topology, comparison.placements)?)?.write(&placement_path)?;
    let report_path = dir.join("report.html");
    super::report::write_data(&dir.join("report.json"), &comparison.data)?;
    super::report::write_page(&report_path, &comparison.data)?;
    if args.json {
        return print(&(comparison.data.to_json()? + "\n"));
    }
    print(&summary(&comparison.data, dir, &report_path))?;
    eprintln!("done in {}", seconds(start.elapsed().as_secs_f64()));
    Ok(())
}

fn import(dir: &Path, profile: &Path) -> Result<()> {
    let trace = dir.join("trace");
    std::fs::create_dir_all(&trace).with_context(|| format!("cannot make the folder {}", trace.display()))?;
    for (name, bytes) in bundled::FILES {
        write_atomic(&trace.join(name), bytes)?;
    }
    let options = ImportOptions {
        format: Some(ImportFormat::GptOssTrace),
        model: Some("gpt-oss-20b".to_owned()),
        ..ImportOptions::default()
    };
    let bar = progress::bytes("importing");
    let imported = occult_formats::import(&[trace], &options, profile, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    imported?;
    Ok(())
}

/// What the command line would give without options.
fn search_defaults() -> SearchArgs {
    SearchArgs {
        load_cap: None,
        replicas: 0,
        equal: false,
        max_experts_per_rank: None,
        keep_groups: None,
        rank_cost: None,
        node_cost: None,
        time_limit: None,
        restarts: None,
        seed: 0,
        max_tokens: 200_000,
        holdout: 0.0,
        threads: None,
    }
}

/// The table of the demo, for somebody who has never heard of any of this.
fn summary(data: &ReportData, dir: &Path, report: &Path) -> String {
    let (p, s) = (&data.profile, &data.setting);
    let mut text = format!(
        "{}: {} MoE layers of {} experts, each token uses {}. {} ranks (devices) share the experts.\n\
         Placed on one half of {} recorded tokens, measured on the other:\n\n",
        p.model,
        p.layers.len(),
        p.num_experts,
        p.top_k,
        s.ranks,
        p.tokens
    );
    let mut table =
        Table::new(["", "devices a token visits", "copies sent", "busiest device", "step on 8xA6000"]);
    let step = |label: &str| {
        let first = data.predictions.items.first()?;
        let found = data.predictions.items.iter().find(|x| x.cluster == first.cluster && x.label == label);
        Some(seconds(found?.total_seconds))
    };
    let conventional = data.methods.iter().find(|m| m.name == data.baseline);
    if let Some(m) = conventional {
        let remote = f64::from(p.top_k) * f64::from(s.ranks - 1) / f64::from(s.ranks);
        table.row([
            "one copy per expert (conventional)".to_owned(),
            figure(m.mean.copies_per_token, 2),
            format!("{remote:.2}"),
            format!("{:.2} x mean", m.mean.load_max_over_mean),
            step("Conventional: one row per expert").unwrap_or("-".to_owned()),
        ]);
    }
    for m in &data.methods {
        table.row([
            format!("one copy per device, {}", m.label),
            figure(m.mean.copies_per_token, 2),
            figure(m.mean.remote_copies_per_token, 2),
            format!("{:.2} x mean", m.mean.load_max_over_mean),
            step(&m.label).unwrap_or("-".to_owned()),
        ]);
    }
    for row in &data.pruning.items {
        if let PruningBudget::MaxRanks(ranks @ 1..=2) = row.budget {
            let remote = row.copies_per_token * f64::from(s.ranks - 1) / f64::from(s.ranks);
            table.row([
                format!("  + at most {ranks} device(s): keeps {:.0} % of weight", 100.0 * row.retained_mass),
                format!("{:.2}", row.copies_per_token),
                format!("{remote:.2}"),
                figure(row.load_max_over_mean, 2),
                "-".to_owned(),
            ]);
        }
    }
    text.push_str(&table.render());
    text.push_str(
        "\nResults are exact except under the last lines, which limit the devices of a token (collaboration pruning; the model\n\
         is then fine-tuned with the limit). Step times are predicted, not measured.\n",
    );
    text.push_str(&format!(
        "\nOpen {} in a browser. The profile and the placement are beside it in {}.\n",
        report.display(),
        dir.display()
    ));
    text
}
