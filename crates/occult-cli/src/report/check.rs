//! Reading a data file and checking that its parts fit together, so that the page never draws a lie.

use super::data::{CoActivationMap, FORMAT, Method, ReportData, Training};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;

impl ReportData {
    /// Reads and checks a data file. The error names the field, or the line and column of broken JSON.
    pub fn from_json(text: &str) -> Result<Self> {
        let data: Self = serde_json::from_str(text).context("reading report data")?;
        data.check()?;
        Ok(data)
    }

    /// The data file; the same data gives the same bytes. Fails on what [`ReportData::check`] refuses.
    pub fn to_json(&self) -> Result<String> {
        self.check()?;
        serde_json::to_string(self).context("writing report data")
    }

    /// Shapes, names that refer to each other, finite numbers.
    pub fn check(&self) -> Result<()> {
        ensure!(self.format == FORMAT, "report data: expected format {FORMAT:?}, found {:?}", self.format);
        let setting = &self.setting;
        ensure!(setting.ranks > 0, "report data: setting.ranks is 0");
        ensure!(
            setting.nodes > 0 && setting.ranks.is_multiple_of(setting.nodes),
            "report data: setting.nodes is {}, expected a divisor of {} ranks",
            setting.nodes,
            setting.ranks
        );
        let names: BTreeSet<&str> = self.methods.iter().map(|m| m.name.as_str()).collect();
        ensure!(names.len() == self.methods.len(), "report data: two methods have the same name");
        for (what, name) in [("baseline", &self.baseline), ("chosen", &self.chosen)] {
            ensure!(
                names.contains(name.as_str()),
                "report data: {what} names {name:?}, which is not a method"
            );
        }
        for method in &self.methods {
            self.check_method(method).with_context(|| format!("report data: method {:?}", method.name))?;
        }
        for map in &self.coactivation.items {
            self.check_map(map, &names)
                .with_context(|| format!("report data: co-activation of layer {}", map.layer))?;
        }
        if let Some(training) = &self.training {
            check_training(training).context("report data: training")?;
        }
        self.check_lists(&names)
    }

    fn check_method(&self, method: &Method) -> Result<()> {
        let (layers, ranks) = (self.profile.layers.len(), self.setting.ranks as usize);
        same("layers", layers, method.layers.len())?;
        same("load_per_rank", layers, method.load_per_rank.len())?;
        for (row, load) in method.load_per_rank.iter().enumerate() {
            same(&format!("load_per_rank[{row}]"), ranks, load.len())?;
            finite(&format!("load_per_rank[{row}]"), load.iter().copied())?;
        }
        if !method.rows_per_pair.is_empty() {
            same("rows_per_pair", ranks, method.rows_per_pair.len())?;
        }
        for (row, rows) in method.rows_per_pair.iter().enumerate() {
            same(&format!("rows_per_pair[{row}]"), ranks, rows.len())?;
            finite(&format!("rows_per_pair[{row}]"), rows.iter().copied())?;
        }
        for (what, m) in std::iter::once(("mean".to_owned(), &method.mean))
            .chain(method.layers.iter().enumerate().map(|(i, m)| (format!("layers[{i}]"), m)))
        {
            let optional = [
                m.copies_per_token,
                m.remote_copies_per_token,
                m.node_copies_per_token,
                m.intra_fraction,
                m.lower_bound,
            ];
            finite(&what, optional.into_iter().flatten().chain([m.load_max_over_mean]))?;
        }
        Ok(())
    }

    fn check_map(&self, map: &CoActivationMap, names: &BTreeSet<&str>) -> Result<()> {
        let experts = self.profile.num_experts as usize;
        ensure!(self.profile.layers.contains(&map.layer), "this layer is not in profile.layers");
        same("p", experts * experts, map.p.len())?;
        finite("p", map.p.iter().map(|&v| f64::from(v)))?;
        for order in &map.orders {
            let name = &order.method;
            ensure!(names.contains(name.as_str()), "an order names {name:?}, which is not a method");
            same(
                &format!("rank_offsets of {name:?}"),
                self.setting.ranks as usize + 1,
                order.rank_offsets.len(),
            )?;
            let ascending = order.rank_offsets.is_sorted()
                && order.rank_offsets.first() == Some(&0)
                && order.rank_offsets.last().is_some_and(|&last| last as usize == order.experts.len());
            ensure!(ascending, "rank_offsets of {name:?} do not ascend from 0 to {}", order.experts.len());
            if let Some(id) = order.experts.iter().find(|&&id| usize::from(id) >= experts) {
                bail!("order of {name:?} has expert {id}, there are {experts} experts");
            }
        }
        Ok(())
    }

    fn check_lists(&self, names: &BTreeSet<&str>) -> Result<()> {
        let setting = &self.setting;
        finite("setting", setting.load_cap.into_iter().chain(setting.uniform_copies_per_token))?;
        for (i, point) in self.frontier.items.iter().enumerate() {
            finite(
                &format!("frontier[{i}]"),
                [point.copies_per_token, point.load_max_over_mean].into_iter().chain(point.load_cap),
            )?;
        }
        for (i, row) in self.pruning.items.iter().enumerate() {
            known(&format!("pruning[{i}]"), &row.method, names)?;
            let figures = [row.copies_per_token, row.retained_mass, row.replaced_fraction];
            finite(&format!("pruning[{i}]"), figures.into_iter().chain(row.load_max_over_mean))?;
        }
        for (i, p) in self.predictions.items.iter().enumerate() {
            known(&format!("predictions[{i}]"), &p.method, names)?;
            let seconds = [p.dispatch_seconds, p.compute_seconds, p.combine_seconds, p.total_seconds];
            finite(&format!("predictions[{i}]"), seconds)?;
        }
        for (i, curve) in self.subgraphs.items.iter().enumerate() {
            finite(&format!("subgraphs[{i}]"), curve.points.iter().map(|point| point.0))?;
        }
        Ok(())
    }
}

fn check_training(training: &Training) -> Result<()> {
    let points = &training.points;
    ensure!(!points.is_empty(), "no points");
    ensure!(points.is_sorted_by(|a, b| a.step < b.step), "points: steps do not ascend");
    for p in points {
        let what = format!("step {}", p.step);
        if !p.held_out.is_empty() {
            same(&format!("held_out of {what}"), training.domains.len(), p.held_out.len())?;
        }
        let figures =
            [p.loss, p.copies_per_token, p.copies_unlimited, p.drift, p.load_max_over_mean, p.balancedness];
        finite(&what, figures.into_iter().chain(p.held_out.iter().copied()).flatten())?;
    }
    Ok(())
}

fn same(what: &str, expected: usize, found: usize) -> Result<()> {
    ensure!(expected == found, "{what}: expected {expected} values, found {found}");
    Ok(())
}

fn finite(what: &str, values: impl IntoIterator<Item = f64>) -> Result<()> {
    match values.into_iter().find(|value| !value.is_finite()) {
        Some(value) => bail!("{what}: found {value}, expected a finite number"),
        None => Ok(()),
    }
}

fn known(what: &str, method: &str, names: &BTreeSet<&str>) -> Result<()> {
    ensure!(names.contains(method), "report data: {what} names {method:?}, which is not a method");
    Ok(())
}
