//! One hop: messages between the ranks of one level, there and back.

use std::ops::Range;
use std::sync::Arc;

use occult_comm::{Buffer, Communicator, Exchange, Expect};
use occult_plan::RowExperts;

use super::Counts;
use crate::error::{Result, check_len};
use crate::room;
use crate::row_plan::RowPlan;
use crate::timers::{Phase, Timers};
use crate::wire::{COUNT_BYTES, message_bytes, pack, take_header, unpack};

/// Names under which a hop's messages are counted and reported.
#[derive(Debug)]
pub(super) struct Names {
    counts: &'static str,
    dispatch: &'static str,
    combine: &'static str,
    combine_grad: &'static str,
    dispatch_grad: &'static str,
}

pub(super) static STRAIGHT: Names = Names {
    counts: "moe counts",
    dispatch: "moe dispatch",
    combine: "moe combine",
    combine_grad: "moe combine gradients",
    dispatch_grad: "moe dispatch gradients",
};

pub(super) static BETWEEN: Names = Names {
    counts: "moe counts between nodes",
    dispatch: "moe dispatch between nodes",
    combine: "moe combine between nodes",
    combine_grad: "moe combine gradients between nodes",
    dispatch_grad: "moe dispatch gradients between nodes",
};

pub(super) static WITHIN: Names = Names {
    counts: "moe counts within the node",
    dispatch: "moe dispatch within the node",
    combine: "moe combine within the node",
    combine_grad: "moe combine gradients within the node",
    dispatch_grad: "moe dispatch gradients within the node",
};

/// The ranks that exchange rows with each other in a hop.
#[derive(Debug)]
pub(super) struct Level {
    pub(super) comm: Arc<dyn Communicator>,
    /// Rank of every group of a plan, ascending.
    pub(super) peers: Vec<usize>,
    pub(super) names: &'static Names,
}

/// Which exchange goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Back {
    Combine,
    DispatchGrad,
}

/// One hop that was taken.
#[derive(Debug)]
pub(super) struct Hop {
    level: Arc<Level>,
    pub(super) plan: RowPlan,
    /// Rows and pairs received from each peer.
    counts: Counts,
    pub(super) received: RowExperts,
}

pub(super) enum Incoming {
    Counted(Counts),
    AtMost(Counts),
}

#[derive(Debug)]
pub(super) struct HopInFlight {
    level: Arc<Level>,
    plan: RowPlan,
    /// `None`: each message says.
    counts: Option<Counts>,
    exchange: Box<dyn Exchange>,
}

#[derive(Debug)]
pub(super) struct HopBackInFlight(Box<dyn Exchange>);

#[derive(Debug)]
pub(crate) struct AgainInFlight(Box<dyn Exchange>);

impl AgainInFlight {
    /// Waits, and appends the values at the rows received, `[R, D]`.
    pub(super) fn finish(self, timers: &Timers, rows: &mut Vec<f32>) -> Result<()> {
        let arrived = timers.time(Phase::Wire, || self.0.wait())?;
        let values: &[f32] = arrived.buffer.as_slice();
        timers.time(Phase::Move, || {
            room::reserve("gradients that arrived", rows, values.len())?;
            rows.extend_from_slice(values);
            Ok(())
        })
    }
}

impl Level {
    /// Starts an exchange between the peers; `sizes` and `expected` by peer.
    fn start(
        &self,
        what: &'static str,
        buffer: Buffer,
        sizes: &[usize],
        expected: Vec<usize>,
        exact: bool,
    ) -> Result<Box<dyn Exchange>> {
        let spread = |by_peer: &[usize]| {
            let mut by_rank = vec![0; self.comm.world_size()];
            for (&peer, &n) in self.peers.iter().zip(by_peer) {
                by_rank[peer] = n;
            }
            by_rank
        };
        let recv = spread(&expected);
        let recv = if exact { Expect::Bytes(recv) } else { Expect::AtMost(recv) };
        Ok(self.comm.start_exchange(what, buffer, &spread(sizes), recv)?)
    }

    pub(super) fn exchange_counts(&self, plans: &[RowPlan], timers: &Timers) -> Result<Vec<Counts>> {
        let by_plan: Vec<Counts> = plans.iter().map(RowPlan::counts).collect();
        let mut values = Vec::with_capacity(self.peers.len() * plans.len() * 2);
        for peer in 0..self.peers.len() {
            values.extend(by_plan.iter().flat_map(|counts| counts[peer]));
        }
        let sizes = vec![plans.len() * COUNT_BYTES; self.peers.len()];
        let exchange =
            self.start(self.names.counts, Buffer::from_slice(&values), &sizes, sizes.clone(), true)?;
        let received = timers.time(Phase::Wire, || exchange.wait())?;
        let values: &[u32] = received.buffer.as_slice();
        let of = |plan: usize, peer: usize| {
            let at = (peer * plans.len() + plan) * 2;
            [values[at], values[at + 1]]
        };
        Ok((0..plans.len()).map(|plan| (0..self.peers.len()).map(|peer| of(plan, peer)).collect()).collect())
    }

    pub(super) fn start_dispatch(
        self: &Arc<Self>,
        plan: RowPlan,
        incoming: Incoming,
        x: &[f32],
        weights: &[f32],
        d: usize,
        timers: &Timers,
    ) -> Result<HopInFlight> {
        check_len("rows to dispatch", plan.num_sources() * d, x.len())?;
        check_len("weights to dispatch", plan.num_pairs(), weights.len())?;
        let header = matches!(incoming, Incoming::AtMost(_));
        let extra = if header { COUNT_BYTES } else { 0 };
        let bytes = |counts: &Counts| counts.iter().map(|&c| message_bytes(c, d) + extra).collect::<Vec<_>>();
        let sizes = bytes(&plan.counts());
        let buffer = timers.time(Phase::Move, || -> Result<_> {
            let mut buffer = Buffer::try_zeroed::<u8>(sizes.iter().sum())?;
            let mut rest: &mut [u8] = buffer.as_mut_slice();
            for (rows, &size) in plan.group_offsets.windows(2).zip(&sizes) {
                let (message, after) = rest.split_at_mut(size);
                pack(&plan, rows[0] as usize..rows[1] as usize, x, weights, d, header, message);
                rest = after;
            }
            Ok(buffer)
        })?;
        let (expected, counts) = match incoming {
            Incoming::Counted(counts) => (bytes(&counts), Some(counts)),
            Incoming::AtMost(bounds) => (bytes(&bounds), None),
        };
        let exchange = self.start(self.names.dispatch, buffer, &sizes, expected, !header)?;
        Ok(HopInFlight { level: Arc::clone(self), plan, counts, exchange })
    }
}

impl HopInFlight {
    /// Waits, and appends the rows received to `x`.
    pub(super) fn finish(self, d: usize, timers: &Timers, x: &mut Vec<f32>) -> Result<Hop> {
        let Self { level, plan, counts, exchange } = self;
        let arrived = timers.time(Phase::Wire, || exchange.wait())?;
        timers.time(Phase::Move, || {
            let mut rest: &[u8] = arrived.buffer.as_slice();
            let mut all_counts = Counts::with_capacity(level.peers.len());
            let total: usize = counts.iter().flatten().map(|&[rows, _]| rows as usize).sum();
            room::reserve("rows that arrived", x, total * d)?;
            let mut received = RowExperts::new();
            for (i, &peer) in level.peers.iter().enumerate() {
                let (message, after) = rest.split_at(arrived.bytes[peer]);
                rest = after;
                let (of, message) = match &counts {
                    Some(counts) => (counts[i], message),
                    None => take_header(message, peer, d)?,
                };
                unpack(message, peer, of, d, x, &mut received)?;
                all_counts.push(of);
            }
            Ok(Hop { level: Arc::clone(&level), plan, counts: all_counts, received })
        })
    }
}

impl Hop {
    /// Where each peer's part of a table begins and ends, in rows (0) or pairs (1).
    fn parts(counts: &[[u32; 2]], which: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        counts.iter().scan(0, move |end, c| {
            let start = *end;
            *end += c[which] as usize;
            Some(start..*end)
        })
    }

    /// Starts to send other values `[sources, D]` along the way that the rows took.
    pub(super) fn start_again(&self, values: &[f32], d: usize, timers: &Timers) -> Result<AgainInFlight> {
        let bytes = |counts: &[[u32; 2]]| counts.iter().map(|c| c[0] as usize * d * 4).collect::<Vec<_>>();
        let buffer = timers.time(Phase::Move, || -> Result<_> {
            let mut buffer = Buffer::try_zeroed::<f32>(self.plan.num_rows() * d)?;
            let rows: &mut [f32] = buffer.as_mut_slice();
            for (row, &source) in self.plan.row_source.iter().enumerate() {
                rows[row * d..][..d].copy_from_slice(&values[source as usize * d..][..d]);
            }
            Ok(buffer)
        })?;
        let (sizes, expected) = (bytes(&self.plan.counts()), bytes(&self.counts));
        let what = self.level.names.combine_grad;
        Ok(AgainInFlight(self.level.start(what, buffer, &sizes, expected, true)?))
    }

    /// Starts to send `rows` `[R, D]`, and a value per pair, to where the rows came from.
    pub(super) fn start_back(
        &self,
        back: Back,
        rows: &[f32],
        pairs: Option<&[f32]>,
        d: usize,
    ) -> Result<HopBackInFlight> {
        let num_rows = self.received.num_rows();
        check_len("rows to send back", num_rows * d, rows.len())?;
        if let Some(pairs) = pairs {
            check_len("weight gradients to send back", self.received.num_pairs(), pairs.len())?;
        }
        let with = usize::from(pairs.is_some());
        let elements = |counts: &[[u32; 2]]| -> Vec<usize> {
            counts.iter().map(|c| c[0] as usize * d + c[1] as usize * with).collect()
        };
        let (sizes, expected) = (elements(&self.counts), elements(&self.plan.counts()));
        let buffer = match pairs {
            None => Buffer::try_from_slice(rows)?,
            Some(pairs) => {
                let mut buffer = Buffer::try_zeroed::<f32>(sizes.iter().sum())?;
                let mut rest: &mut [f32] = buffer.as_mut_slice();
                for (r, p) in Self::parts(&self.counts, 0).zip(Self::parts(&self.counts, 1)) {
                    for part in [&rows[r.start * d..r.end * d], &pairs[p]] {
                        let (head, after) = rest.split_at_mut(part.len());
                        head.copy_from_slice(part);
                        rest = after;
                    }
                }
                buffer
            }
        };
        let names = self.level.names;
        let what = if back == Back::Combine { names.combine } else { names.dispatch_grad };
        let bytes = |elements: Vec<usize>| elements.into_iter().map(|n| n * 4).collect::<Vec<_>>();
        Ok(HopBackInFlight(self.level.start(what, buffer, &bytes(sizes), bytes(expected), true)?))
    }

    /// Waits, and merges: appends rows by source `[sources, D]`; returns values of pairs by the source's pairs.
    pub(super) fn finish_back(
        &self,
        back: Back,
        hop: HopBackInFlight,
        d: usize,
        timers: &Timers,
        out: &mut Vec<f32>,
    ) -> Result<Vec<f32>> {
        let arrived = timers.time(Phase::Wire, || hop.0.wait())?;
        let values: &[f32] = arrived.buffer.as_slice();
        timers.time(Phase::Move, || {
            if back == Back::Combine {
                self.plan.merge(values, d, out)?;
                return Ok(Vec::new());
            }
            let mut rows = room::empty("gradients that returned", self.plan.num_rows() * d)?;
            let mut pairs = Vec::with_capacity(self.plan.num_pairs());
            let mut rest = values;
            for [r, p] in self.plan.counts() {
                let (of, after) = rest.split_at(r as usize * d);
                rows.extend_from_slice(of);
                let (of, after) = after.split_at(p as usize);
                pairs.extend_from_slice(of);
                rest = after;
            }
            self.plan.merge(&rows, d, out)?;
            room::give(rows);
            Ok(self.plan.to_entries(&pairs))
        })
    }
}
