//! Rows of a layer, split into those that a placement is made from and those that it is measured on.

use anyhow::{Result, bail};
use occult_formats::{Columns, LayerRows, Profile};
use occult_plan::RoutingBuf;

/// Rows that lie together are split together, so that a prompt is rarely on both sides.
const BLOCK_ROWS: u64 = 64;

/// Which rows are held out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Holdout {
    /// Share of the rows, 0 to below 1.
    pub(crate) share: f64,
    pub(crate) seed: u64,
}

impl Holdout {
    pub(crate) fn new(share: f64, seed: u64) -> Result<Self> {
        if !(0.0..1.0).contains(&share) {
            bail!("--holdout is {share}, expected a share from 0 to below 1");
        }
        Ok(Self { share, seed })
    }

    /// Whether a row of the file is held out: by a hash of its block and the seed (SplitMix64's finaliser).
    fn holds(&self, source_row: usize) -> bool {
        let mut x =
            (source_row as u64 / BLOCK_ROWS).wrapping_add(self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64 <= self.share && self.share > 0.0
    }
}

/// Rows of one layer in memory.
#[derive(Debug, Clone)]
pub(crate) struct LayerTokens {
    /// What a placement may look at.
    pub(crate) train: RoutingBuf,
    /// What it is measured on: the held-out rows, or the same rows when none are held out.
    pub(crate) eval: RoutingBuf,
    /// Domain of each `eval` row.
    pub(crate) eval_domains: Option<Vec<u16>>,
}

/// Reads up to `max_rows` evenly spaced rows of a layer and splits them.
pub(crate) fn read(
    profile: &Profile,
    layer: usize,
    columns: Columns,
    max_rows: usize,
    holdout: Holdout,
) -> Result<LayerTokens> {
    let rows = profile.read_rows(layer, columns, max_rows)?;
    if holdout.share == 0.0 {
        let LayerRows { routing, domains, .. } = rows;
        return Ok(LayerTokens { train: routing.clone(), eval: routing, eval_domains: domains });
    }
    let held: Vec<bool> = (0..rows.routing.num_tokens()).map(|i| holdout.holds(rows.source_row(i))).collect();
    let side = |wanted: bool| select(&rows.routing, |i| held[i] == wanted);
    let (train, eval) = (side(false), side(true));
    if train.num_tokens() == 0 || eval.num_tokens() == 0 {
        bail!(
            "{} rows are too few to hold out a share of {} of them (rows are held out in blocks of {BLOCK_ROWS})",
            held.len(),
            holdout.share
        );
    }
    let eval_domains =
        rows.domains.map(|d| d.into_iter().zip(&held).filter_map(|(d, &h)| h.then_some(d)).collect());
    Ok(LayerTokens { train, eval, eval_domains })
}

/// The rows for which `keep` is true.
pub(crate) fn select(rows: &RoutingBuf, keep: impl Fn(usize) -> bool) -> RoutingBuf {
    fn pick<T: Copy>(values: &[T], width: usize, keep: &impl Fn(usize) -> bool) -> Vec<T> {
        let kept = values.chunks_exact(width).enumerate().filter(|(i, _)| keep(*i));
        kept.flat_map(|(_, row)| row.iter().copied()).collect()
    }
    RoutingBuf {
        num_experts: rows.num_experts,
        top_k: rows.top_k,
        expert_ids: pick(&rows.expert_ids, rows.top_k, &keep),
        weights: rows.weights.as_ref().map(|w| pick(w, rows.top_k, &keep)),
        scores: rows.scores.as_ref().map(|s| pick(s, rows.num_experts, &keep)),
        occurrences: rows.occurrences.as_ref().map(|o| pick(o, 1, &keep)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holdout_takes_about_its_share_in_whole_blocks_and_depends_on_the_seed() {
        let held = |seed| Vec::from_iter((0..64_000).map(|r| Holdout { share: 0.3, seed }.holds(r)));
        let (a, b) = (held(0), held(1));
        let share = a.iter().filter(|&&h| h).count() as f64 / a.len() as f64;
        assert!((share - 0.3).abs() < 0.05, "{share}");
        assert!(a.chunks(64).all(|block| block.iter().all(|&h| h == block[0])));
        assert_ne!(a, b);
        assert!(Holdout::new(1.0, 0).is_err() && Holdout::new(f64::NAN, 0).is_err());
    }
}
