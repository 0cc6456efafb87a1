//! `occult report`

use std::path::Path;

use anyhow::{Context, Result};
use occult_formats::write_atomic;

use crate::args::ReportArgs;
use crate::compare::{self, Request};
use crate::output::print;
use crate::report::{self, ReportData};
use crate::setup;
use crate::training::read_for_report;

pub(super) fn run(args: &ReportArgs) -> Result<()> {
    let topology = setup::topology(&args.topology)?;
    let profile = setup::profile(&args.profile)?;
    let mut placements = Vec::new();
    for path in &args.placements {
        let file = setup::placement(path, profile.meta())?;
        anyhow::ensure!(
            file.placement.topology() == topology,
            "{} is for {} ranks on {} nodes, the report for {} on {}",
            path.display(),
            file.placement.topology().num_ranks(),
            file.placement.topology().num_nodes(),
            topology.num_ranks(),
            topology.num_nodes()
        );
        placements.push((path.file_stem().unwrap_or_default().to_string_lossy().into_owned(), file));
    }
    // Before the search: a log that cannot be read is no reason to wait.
    let training = args.training.as_deref().map(read_for_report).transpose()?;
    let mut comparison = compare::run(&Request {
        profile: &profile,
        placements: &placements,
        topology,
        search: &args.search,
        shape: &args.shape,
        clusters: &args.clusters,
        title: args.title.as_deref(),
        notices: Vec::new(),
    })?;
    comparison.data.training = training;
    if let Some(path) = &args.data {
        write_data(path, &comparison.data)?;
    }
    write_page(&args.output, &comparison.data)?;
    print(&format!("{}\n", args.output.display()))
}

/// Writes the data file of a report.
pub(super) fn write_data(path: &Path, data: &ReportData) -> Result<()> {
    let text = data.to_json()?;
    Ok(write_atomic(path, text.as_bytes())?)
}

/// Renders a report.
pub(super) fn write_page(path: &Path, data: &ReportData) -> Result<()> {
    data.check().context("the report's data")?;
    Ok(write_atomic(path, report::render(data).as_bytes())?)
}
