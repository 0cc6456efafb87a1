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

mod back;
mod hop;

use std::ops::Range;
use std::sync::Arc;

use occult_comm::Communicator;
use occult_plan::{DispatchPlan, LayerPlacement, RowExperts, Topology};

pub use back::CombineInFlight;
pub(crate) use back::{BackInFlight, Returning};
pub(crate) use hop::AgainInFlight;
use hop::{BETWEEN, Back, Hop, HopInFlight, Incoming, Level, STRAIGHT, WITHIN};

use crate::error::{MoeError, Result, check_len};
use crate::row_plan::{NodeSlots, RowPlan, check_experts};
use crate::timers::{Phase, Timers};

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
        let mut x = Vec::new();
        let handle = self.finish_into(&mut x)?;
        Ok((x, handle))
    }

    /// [`finish`](Self::finish) that appends the rows to `x`.
    pub(crate) fn finish_into(self, x: &mut Vec<f32>) -> Result<DispatchHandle> {
        let Self { exchanger, hop, d } = self;
        let timers = &exchanger.timers;
        let start = x.len();
        let mut hops = vec![hop.finish(d, timers, x)?];
        if let Some((level, slots)) = &exchanger.second {
            let received = &hops[0].received;
            let node = level.peers[0] / level.peers.len();
            let plan = timers.time(Phase::Plan, || RowPlan::within_node(received, node, slots))?;
            let counts = level.exchange_counts(std::slice::from_ref(&plan), timers)?.swap_remove(0);
            let (rows, weights) = (&x[start..], received.weights());
            let hop = level.start_dispatch(plan, Incoming::Counted(counts), rows, weights, d, timers)?;
            x.truncate(start);
            hops.push(hop.finish(d, timers, x)?);
        }
        Ok(DispatchHandle(Arc::new(Path { hops, d, timers: Arc::clone(timers) })))
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
        Ok(CombineInFlight(BackInFlight::start(self.0, Back::Combine, y, None)?))
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
        let mut rows = Vec::new();
        self.finish_combine_backward(self.start_combine_backward(dy)?, &mut rows)?;
        Ok(rows)
    }

    pub(crate) fn start_combine_backward(&self, dy: &[f32]) -> Result<AgainInFlight> {
        check_len("gradient of combine's output", self.num_tokens() * self.d, dy.len())?;
        self.hops[0].start_again(dy, self.d, &self.timers)
    }

    /// Waits, and appends the gradients of the rows at the experts.
    pub(crate) fn finish_combine_backward(&self, started: AgainInFlight, rows: &mut Vec<f32>) -> Result<()> {
        let start = rows.len();
        started.finish(&self.timers, rows)?;
        for hop in &self.hops[1..] {
            let next = hop.start_again(&rows[start..], self.d, &self.timers)?;
            rows.truncate(start);
            next.finish(&self.timers, rows)?;
        }
        Ok(())
    }

    /// Backward of dispatch: gradients of the rows `[R, D]` and of the pairs' weights `[pairs]` at the experts, to those of
    /// the tokens `[T, D]` and of the routing weights `[T, K]`.
    pub(crate) fn dispatch_backward(
        self: &Arc<Self>,
        dx: &[f32],
        dw: &[f32],
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let mut rows = Vec::new();
        let weights = self.start_dispatch_backward(dx, dw)?.finish_into(&mut rows)?;
        Ok((rows, weights))
    }

    pub(crate) fn start_dispatch_backward(self: &Arc<Self>, dx: &[f32], dw: &[f32]) -> Result<BackInFlight> {
        BackInFlight::start(Arc::clone(self), Back::DispatchGrad, dx, Some(dw))
    }
}
