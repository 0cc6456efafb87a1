//! Rows on their way back: one part, and the parts of a pass in order.

use std::sync::Arc;

use super::Path;
use super::hop::{Back, HopBackInFlight};
use crate::error::Result;

/// A combine under way.
#[must_use = "a combine that is not waited for leaves its peers without their rows"]
#[derive(Debug)]
pub struct CombineInFlight(pub(super) BackInFlight);

impl CombineInFlight {
    /// Waits, and adds up the copies of every token: `[T, D]`.
    pub fn finish(self) -> Result<Vec<f32>> {
        let mut y = Vec::new();
        self.0.finish_into(&mut y)?;
        Ok(y)
    }
}

/// Rows on their way back.
#[derive(Debug)]
pub(crate) struct BackInFlight {
    path: Arc<Path>,
    back: Back,
    /// The hop that they are on.
    at: usize,
    hop: HopBackInFlight,
}

impl BackInFlight {
    pub(super) fn start(path: Arc<Path>, back: Back, rows: &[f32], pairs: Option<&[f32]>) -> Result<Self> {
        let at = path.hops.len() - 1;
        let hop = path.hops[at].start_back(back, rows, pairs, path.d)?;
        Ok(Self { path, back, at, hop })
    }

    /// Takes what has come to this rank for ranks of other nodes, once all of it has, and sends it on. Nothing on one level.
    fn pass_on(mut self) -> Result<Self> {
        while self.at > 0 {
            let (hops, d, timers) = (&self.path.hops, self.path.d, &self.path.timers);
            let mut rows = Vec::new();
            let pairs = hops[self.at].finish_back(self.back, self.hop, d, timers, &mut rows)?;
            let with = (self.back == Back::DispatchGrad).then_some(&pairs[..]);
            self.at -= 1;
            self.hop = hops[self.at].start_back(self.back, &rows, with, d)?;
        }
        Ok(self)
    }

    /// Waits, and appends rows by source; returns values of pairs by the source's pairs.
    pub(crate) fn finish_into(self, rows: &mut Vec<f32>) -> Result<Vec<f32>> {
        let Self { path, back, hop, .. } = self.pass_on()?;
        path.hops[0].finish_back(back, hop, path.d, &path.timers, rows)
    }
}

/// Parts on their way back, in order.
#[derive(Debug, Default)]
pub(crate) struct Returning(Vec<BackInFlight>);

impl Returning {
    pub(crate) fn push(&mut self, part: BackInFlight) {
        self.0.push(part);
    }

    pub(crate) fn push_combine(&mut self, part: CombineInFlight) {
        self.0.push(part.0);
    }

    /// On two levels sends the last part on from node to node, which waits until all ranks of this node have sent theirs. The
    /// time for it: when they have begun with the next part, and this one's rows can travel while that is computed.
    pub(crate) fn pass_on(&mut self) -> Result<()> {
        if let Some(last) = self.0.pop() {
            self.0.push(last.pass_on()?);
        }
        Ok(())
    }
}

impl IntoIterator for Returning {
    type Item = BackInFlight;
    type IntoIter = std::vec::IntoIter<BackInFlight>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}
