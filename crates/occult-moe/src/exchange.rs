//! Rows between ranks: dispatch and combine, forward and backward. The only caller of the communicator in a forward
//! or backward pass.
//!
//! A row travels along a *path* of one hop (straight to the rank) or two (to the rank of the same position on the
//! expert's node, and from there to the rank). Every hop is a [`RowPlan`] and what came of it; going back walks the
//! hops in reverse, and adds up the copies of each row where they were made.
//!
//! | pass | what | direction | carries |
//! |---|---|---|---|
//! | forward | `dispatch` | to the experts | rows, ids, weights (and before them counts, 8 bytes per peer) |
//! | forward | `combine` | back | rows |
//! | backward | `combine gradients` | to the experts | rows |
//! | backward | `dispatch gradients` | back | rows, gradients of weights |

use std::ops::Range;
use std::sync::Arc;

use occult_comm::{Buffer, Communicator, Exchange, Expect};
use occult_plan::{DispatchPlan, LayerPlacement, RowExperts, Topology};

use crate::error::{MoeError, Result, check_len};
use crate::row_plan::{NodeSlots, RowPlan, check_experts};
use crate::timers::{Phase, Timers};
use crate::wire::{COUNT_BYTES, message_bytes, pack, take_header, unpack};

/// Names under which a hop's messages are counted and reported.
#[derive(Debug)]
struct Names {
    counts: &'static str,
    dispatch: &'static str,
    combine: &'static str,
    combine_grad: &'static str,
    dispatch_grad: &'static str,
}

static STRAIGHT: Names = Names {
    counts: "moe counts",
    dispatch: "moe dispatch",
    combine: "moe combine",
    combine_grad: "moe combine gradients",
    dispatch_grad: "moe dispatch gradients",
};

static BETWEEN: Names = Names {
    counts: "moe counts between nodes",
    dispatch: "moe dispatch between nodes",
    combine: "moe combine between nodes",
    combine_grad: "moe combine gradients between nodes",
    dispatch_grad: "moe dispatch gradients between nodes",
};

static WITHIN: Names = Names {
    counts: "moe counts within the node",
    dispatch: "moe dispatch within the node",
    combine: "moe combine within the node",
    combine_grad: "moe combine gradients within the node",
    dispatch_grad: "moe dispatch gradients within the node",
};

/// The ranks that exchange rows with each other in a hop.
#[derive(Debug)]
struct Level {
    comm: Arc<dyn Communicator>,
    /// Rank of every group of a plan, ascending.
    peers: Vec<usize>,
    names: &'static Names,
}

/// What a row carries, for the whole path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// One row per (token, expert).
    PerExpert,
    /// One row per (token, rank), or with two levels per (token, node) and then per (token, rank).
    PerRank,
}

/// Moves the rows of one layer.
#[derive(Debug)]
pub struct Exchanger {
    rows: Rows,
    first: Arc<Level>,
    second: Option<(Arc<Level>, NodeSlots)>,
    timers: Arc<Timers>,
}

/// Rows and pairs that each peer sends, `[G]`.
pub type Counts = Vec<[u32; 2]>;

impl Exchanger {
    /// `two_level` needs a topology with nodes, and [`Rows::PerRank`].
    pub fn new(
        comm: Arc<dyn Communicator>,
        placement: &LayerPlacement,
        topology: Topology,
        rows: Rows,
        two_level: bool,
        timers: Arc<Timers>,
    ) -> Result<Self> {
        let (world, rank) = (comm.world_size(), comm.rank());
        check_len("ranks of the placement", world, placement.num_ranks())?;
        check_len("ranks of the topology", world, topology.num_ranks())?;
        for rank in 0..world {
            check_experts(placement.experts_of(rank as u16).len())?;
        }
        let level = |peers: Vec<usize>, names| Arc::new(Level { comm: Arc::clone(&comm), peers, names });
        if !two_level {
            return Ok(Self { rows, first: level((0..world).collect(), &STRAIGHT), second: None, timers });
        }
        if rows == Rows::PerExpert {
            return Err(MoeError::argument("two-level exchange", "one row per rank", "one row per expert"));
        }
        let per_node = topology.ranks_per_node();
        let position = rank % per_node;
        let between = (0..topology.num_nodes()).map(|node| node * per_node + position).collect();
        let node = rank - position;
        Ok(Self {
            rows,
            first: level(between, &BETWEEN),
            second: Some((
                level((node..node + per_node).collect(), &WITHIN),
                NodeSlots::new(placement, topology)?,
            )),
            timers,
        })
    }

    /// The rows of the first hop, of some consecutive tokens of the plan.
    pub fn rows(&self, plan: &DispatchPlan, tokens: Range<usize>) -> RowPlan {
        match (&self.second, self.rows) {
            (Some((_, slots)), _) => RowPlan::per_node(plan, tokens, slots),
            (None, Rows::PerRank) => RowPlan::dedup(plan, tokens),
            (None, Rows::PerExpert) => RowPlan::conventional(plan, tokens),
        }
    }

    /// Tells every peer how much it gets, for several dispatches at once; returns what each will bring, `[plans][G]`.
    pub fn exchange_counts(&self, plans: &[RowPlan]) -> Result<Vec<Counts>> {
        self.first.exchange_counts(plans, &self.timers)
    }

    /// Starts a dispatch whose counts were exchanged. `x` `[sources, D]`, `weights` of the plan's entries.
    pub fn start_dispatch(
        &self,
        plan: RowPlan,
        counts: Counts,
        x: &[f32],
        weights: &[f32],
        d: usize,
    ) -> Result<DispatchInFlight<'_>> {
        let hop = self.first.start_dispatch(plan, Incoming::Counted(counts), x, weights, d, &self.timers)?;
        Ok(DispatchInFlight { exchanger: self, hop, d })
    }

    /// Starts a dispatch without a round trip for counts: they travel in the message. `bounds`: the most rows and pairs
    /// that each peer can send. For small batches.
    pub fn start_dispatch_bounded(
        &self,
        plan: RowPlan,
        bounds: Counts,
        x: &[f32],
        weights: &[f32],
        d: usize,
    ) -> Result<DispatchInFlight<'_>> {
        let hop = self.first.start_dispatch(plan, Incoming::AtMost(bounds), x, weights, d, &self.timers)?;
        Ok(DispatchInFlight { exchanger: self, hop, d })
    }

    /// Ranks of the first hop, ascending.
    pub fn peers(&self) -> &[usize] {
        &self.first.peers
    }
}

/// A dispatch under way.
#[must_use = "a dispatch that is not waited for leaves its peers without their rows"]
#[derive(Debug)]
pub struct DispatchInFlight<'a> {
    exchanger: &'a Exchanger,
    hop: HopInFlight,
    d: usize,
}

impl DispatchInFlight<'_> {
    /// Waits. Returns the rows received `[R, D]`, sources ascending, and the handle for the way back.
    pub fn finish(self) -> Result<(Vec<f32>, DispatchHandle)> {
        let Self { exchanger, hop, d } = self;
        let timers = &exchanger.timers;
        let (mut x, first) = hop.finish(d, timers)?;
        let mut hops = vec![first];
        if let Some((level, slots)) = &exchanger.second {
            let received = &hops[0].received;
            let node = level.peers[0] / level.peers.len();
            let plan = timers.time(Phase::Plan, || RowPlan::within_node(received, node, slots))?;
            let counts = level.exchange_counts(std::slice::from_ref(&plan), timers)?.swap_remove(0);
            let hop =
                level.start_dispatch(plan, Incoming::Counted(counts), &x, received.weights(), d, timers)?;
            let (rows, second) = hop.finish(d, timers)?;
            x = rows;
            hops.push(second);
        }
        Ok((x, DispatchHandle(Arc::new(Path { hops, d, timers: Arc::clone(timers) }))))
    }
}

/// Knows the way back of the rows that a dispatch brought. [`DispatchHandle::start_combine`] consumes it.
#[must_use = "rows that were dispatched must be combined"]
#[derive(Debug)]
pub struct DispatchHandle(Arc<Path>);

impl DispatchHandle {
    /// Local experts and weights of the rows received.
    pub fn row_experts(&self) -> &RowExperts {
        self.0.row_experts()
    }

    /// For the backward pass.
    pub(crate) fn path(&self) -> Arc<Path> {
        Arc::clone(&self.0)
    }

    /// Starts to send the experts' outputs `[R, D]` back.
    pub fn start_combine(self, y: &[f32]) -> Result<CombineInFlight> {
        let hop = self.0.last().start_back(Back::Combine, y, None, self.0.d)?;
        Ok(CombineInFlight { path: self.0, hop })
    }
}

/// A combine under way.
#[must_use = "a combine that is not waited for leaves its peers without their rows"]
#[derive(Debug)]
pub struct CombineInFlight {
    path: Arc<Path>,
    hop: BackInFlight,
}

impl CombineInFlight {
    /// Waits, and adds up the copies of every token: `[T, D]`.
    pub fn finish(self) -> Result<Vec<f32>> {
        Ok(self.path.finish_back(Back::Combine, self.hop)?.0)
    }
}

/// The hops that rows took.
#[derive(Debug)]
pub(crate) struct Path {
    /// At least one.
    hops: Vec<Hop>,
    d: usize,
    timers: Arc<Timers>,
}

impl Path {
    fn last(&self) -> &Hop {
        &self.hops[self.hops.len() - 1]
    }

    pub(crate) fn row_experts(&self) -> &RowExperts {
        &self.last().received
    }

    pub(crate) fn num_tokens(&self) -> usize {
        self.hops[0].plan.num_sources()
    }

    pub(crate) fn timers(&self) -> &Timers {
        &self.timers
    }

    /// Backward of combine: gradients of the tokens' outputs `[T, D]` to the rows at the experts `[R, D]`.
    pub(crate) fn combine_backward(&self, dy: &[f32]) -> Result<Vec<f32>> {
        check_len("gradient of combine's output", self.num_tokens() * self.d, dy.len())?;
        let mut rows = None;
        for hop in &self.hops {
            rows = Some(hop.forward_again(rows.as_deref().unwrap_or(dy), self.d, &self.timers)?);
        }
        Ok(rows.unwrap_or_default())
    }

    /// Backward of dispatch: gradients of the rows `[R, D]` and of the pairs' weights `[pairs]` at the experts, to those of
    /// the tokens `[T, D]` and of the routing weights `[T, K]`.
    pub(crate) fn dispatch_backward(&self, dx: &[f32], dw: &[f32]) -> Result<(Vec<f32>, Vec<f32>)> {
        let hop = self.last().start_back(Back::DispatchGrad, dx, Some(dw), self.d)?;
        self.finish_back(Back::DispatchGrad, hop)
    }

    fn finish_back(&self, back: Back, mut hop: BackInFlight) -> Result<(Vec<f32>, Vec<f32>)> {
        for (i, at) in self.hops.iter().enumerate().rev() {
            let (rows, pairs) = at.finish_back(back, hop, self.d, &self.timers)?;
            let Some(next) = i.checked_sub(1).map(|i| &self.hops[i]) else { return Ok((rows, pairs)) };
            hop = next.start_back(back, &rows, (back == Back::DispatchGrad).then_some(&pairs), self.d)?;
        }
        Ok((Vec::new(), Vec::new()))
    }
}

/// Which exchange goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Back {
    Combine,
    DispatchGrad,
}

/// One hop that was taken.
#[derive(Debug)]
struct Hop {
    level: Arc<Level>,
    plan: RowPlan,
    /// Rows and pairs received from each peer.
    counts: Counts,
    received: RowExperts,
}

enum Incoming {
    Counted(Counts),
    AtMost(Counts),
}

#[derive(Debug)]
struct HopInFlight {
    level: Arc<Level>,
    plan: RowPlan,
    /// `None`: each message says.
    counts: Option<Counts>,
    exchange: Box<dyn Exchange>,
}

#[derive(Debug)]
struct BackInFlight(Box<dyn Exchange>);

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

    fn exchange_counts(&self, plans: &[RowPlan], timers: &Timers) -> Result<Vec<Counts>> {
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

    fn start_dispatch(
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
        let buffer = timers.time(Phase::Move, || {
            let mut buffer = Buffer::zeroed::<u8>(sizes.iter().sum());
            let mut rest: &mut [u8] = buffer.as_mut_slice();
            for (rows, &size) in plan.group_offsets.windows(2).zip(&sizes) {
                let (message, after) = rest.split_at_mut(size);
                pack(&plan, rows[0] as usize..rows[1] as usize, x, weights, d, header, message);
                rest = after;
            }
            buffer
        });
        let (expected, counts) = match incoming {
            Incoming::Counted(counts) => (bytes(&counts), Some(counts)),
            Incoming::AtMost(bounds) => (bytes(&bounds), None),
        };
        let exchange = self.start(self.names.dispatch, buffer, &sizes, expected, !header)?;
        Ok(HopInFlight { level: Arc::clone(self), plan, counts, exchange })
    }
}

impl HopInFlight {
    fn finish(self, d: usize, timers: &Timers) -> Result<(Vec<f32>, Hop)> {
        let Self { level, plan, counts, exchange } = self;
        let arrived = timers.time(Phase::Wire, || exchange.wait())?;
        timers.time(Phase::Move, || {
            let mut rest: &[u8] = arrived.buffer.as_slice();
            let mut all_counts = Counts::with_capacity(level.peers.len());
            let total: usize = counts.iter().flatten().map(|&[rows, _]| rows as usize).sum();
            let (mut x, mut received) = (Vec::with_capacity(total * d), RowExperts::new());
            for (i, &peer) in level.peers.iter().enumerate() {
                let (message, after) = rest.split_at(arrived.bytes[peer]);
                rest = after;
                let (of, message) = match &counts {
                    Some(counts) => (counts[i], message),
                    None => take_header(message, peer, d)?,
                };
                unpack(message, peer, of, d, &mut x, &mut received)?;
                all_counts.push(of);
            }
            Ok((x, Hop { level: Arc::clone(&level), plan, counts: all_counts, received }))
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

    /// Other values `[sources, D]` along the way that the rows took, `[R, D]`.
    fn forward_again(&self, values: &[f32], d: usize, timers: &Timers) -> Result<Vec<f32>> {
        let bytes = |counts: &[[u32; 2]]| counts.iter().map(|c| c[0] as usize * d * 4).collect::<Vec<_>>();
        let buffer = timers.time(Phase::Move, || {
            let mut buffer = Buffer::zeroed::<f32>(self.plan.num_rows() * d);
            let rows: &mut [f32] = buffer.as_mut_slice();
            for (row, &source) in self.plan.row_source.iter().enumerate() {
                rows[row * d..][..d].copy_from_slice(&values[source as usize * d..][..d]);
            }
            buffer
        });
        let (sizes, expected) = (bytes(&self.plan.counts()), bytes(&self.counts));
        let exchange = self.level.start(self.level.names.combine_grad, buffer, &sizes, expected, true)?;
        let arrived = timers.time(Phase::Wire, || exchange.wait())?;
        Ok(timers.time(Phase::Move, || arrived.buffer.as_slice::<f32>().to_vec()))
    }

    /// Starts to send `rows` `[R, D]`, and a value per pair, to where the rows came from.
    fn start_back(&self, back: Back, rows: &[f32], pairs: Option<&[f32]>, d: usize) -> Result<BackInFlight> {
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
            None => Buffer::from_slice(rows),
            Some(pairs) => {
                let mut buffer = Buffer::zeroed::<f32>(sizes.iter().sum());
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
        Ok(BackInFlight(self.level.start(what, buffer, &bytes(sizes), bytes(expected), true)?))
    }

    /// Waits, and merges: rows by source `[sources, D]`, values of pairs by the source's pairs.
    fn finish_back(
        &self,
        back: Back,
        hop: BackInFlight,
        d: usize,
        timers: &Timers,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let arrived = timers.time(Phase::Wire, || hop.0.wait())?;
        let values: &[f32] = arrived.buffer.as_slice();
        Ok(timers.time(Phase::Move, || {
            if back == Back::Combine {
                return (self.plan.merge(values, d), Vec::new());
            }
            let mut rows = Vec::with_capacity(self.plan.num_rows() * d);
            let mut pairs = Vec::with_capacity(self.plan.num_pairs());
            let mut rest = values;
            for [r, p] in self.plan.counts() {
                let (of, after) = rest.split_at(r as usize * d);
                rows.extend_from_slice(of);
                let (of, after) = after.split_at(p as usize);
                pairs.extend_from_slice(of);
                rest = after;
            }
            (self.plan.merge(&rows, d), self.plan.to_entries(&pairs))
        }))
    }
}
