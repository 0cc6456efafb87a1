//! One rank fails at each stage: every other rank fails soon, with an error that names it. Nobody hangs.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use common::{Case, run, tensor, var};
use occult_comm::{Buffer, CommError, Communicator, Exchange, Expect, RankError, Result, ThreadOptions};
use occult_kernels::Threads;
use occult_moe::{ExpertParallelLayer, ExpertTensors, LayerOptions, MoeError};
use occult_plan::{Rank, Topology};

const WORLD: usize = 4;
const CULPRIT: usize = 2;

/// A communicator in which the operation `at` goes wrong on one rank.
#[derive(Debug)]
struct Faulty {
    inner: Arc<dyn Communicator>,
    at: &'static str,
    how: How,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum How {
    /// The thread panics.
    Panic,
    /// The operation reports an error.
    Error,
    /// The message of the next rank grows by 64 bytes.
    Longer,
    /// The counts say one row more than there is.
    Lie,
}

impl Communicator for Faulty {
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn host_of_rank(&self) -> &[usize] {
        self.inner.host_of_rank()
    }
    fn world_ranks(&self) -> &[usize] {
        self.inner.world_ranks()
    }
    fn start_exchange(
        &self,
        what: &'static str,
        mut send: Buffer,
        send_bytes: &[usize],
        expect: Expect,
    ) -> Result<Box<dyn Exchange>> {
        let mut sizes = send_bytes.to_vec();
        if what == self.at && self.rank() == CULPRIT {
            match self.how {
                How::Panic => panic!("as asked"),
                How::Error => {
                    return Err(CommError::Transport { rank: CULPRIT, reason: "the cable was cut".into() });
                }
                How::Longer => {
                    let mut bytes = send.as_bytes().to_vec();
                    bytes.extend([0; 64]);
                    sizes[WORLD - 1] += 64;
                    send = Buffer::from_slice(&bytes);
                }
                How::Lie => send.as_mut_slice::<u32>()[0] += 1,
            }
        }
        self.inner.start_exchange(what, send, &sizes, expect)
    }
    fn all_reduce_sum(&self, what: &'static str, values: &mut [f32]) -> Result<()> {
        self.inner.all_reduce_sum(what, values)
    }
    fn all_reduce_sum_f64(&self, what: &'static str, values: &mut [f64]) -> Result<()> {
        self.inner.all_reduce_sum_f64(what, values)
    }
    fn all_gather(&self, what: &'static str, mine: Buffer) -> Result<Vec<Buffer>> {
        self.inner.all_gather(what, mine)
    }
    fn broadcast(&self, what: &'static str, root: usize, buffer: Buffer) -> Result<Buffer> {
        self.inner.broadcast(what, root, buffer)
    }
    fn barrier(&self, what: &'static str) -> Result<()> {
        self.inner.barrier(what)
    }
    fn split(&self, what: &'static str, colour: usize) -> Result<Box<dyn Communicator>> {
        self.inner.split(what, colour)
    }
    fn abort(&self, reason: &str) {
        self.inner.abort(reason);
    }
    fn limit(&self) -> Duration {
        self.inner.limit()
    }
}

/// Passes values on; its backward fails.
struct Broken;

impl CustomOp1 for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((s.clone(), l.shape().clone()))
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        candle_core::bail!("no gradient today")
    }
}

/// Where the culprit goes wrong outside of an exchange.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    Nowhere,
    Routing,
    Shared,
    Backward,
}

fn step(
    case: &Case,
    options: &LayerOptions,
    comm: Arc<dyn Communicator>,
    stage: Stage,
) -> Result<(), MoeError> {
    let (rank, d, f, e) = (comm.rank(), case.d, case.f, case.router.num_experts);
    let culprit = rank == CULPRIT;
    let rows = case.rows_of(rank);
    let n = case.placement.experts_of(rank as Rank).len();
    let x = var(&case.x[rows.start * d..rows.end * d], (rows.len(), d));
    let up = var(&case.local(rank, &case.w_up, 2 * f * d), (n, 2 * f, d));
    let down = var(&case.local(rank, &case.w_down, d * f), (n, d, f));
    let (router, placement) = (case.router.clone(), case.placement.clone());
    let layer = ExpertParallelLayer::new(comm, router, placement, options.clone(), Threads::new(1))?;
    let mut logits = x.matmul(&tensor(&case.w_router, (e, d)).t()?)?;
    if culprit && stage == Stage::Routing {
        logits = (logits * f64::NAN)?;
    }
    let mut shared = || match culprit && stage == Stage::Shared {
        true => Err(MoeError::Tensor(candle_core::Error::msg("no memory for the shared expert"))),
        false => Ok(x.zeros_like()?),
    };
    let experts = ExpertTensors { w_up: &up, w_down: &down, sinks: None };
    let (mut y, _) = layer.forward(&x, &logits, experts, None, Some(&mut shared))?;
    if culprit && stage == Stage::Backward {
        y = y.apply_op1(Broken)?;
    }
    y.sum_all()?.backward()?;
    Ok(())
}

fn outcome(nodes: usize, at: &'static str, how: How, stage: Stage) -> Vec<String> {
    let mut case = Case::random(7, WORLD, 9, 3, 4, 4);
    // Everybody has tokens, and everybody's tokens go everywhere.
    case.tokens = vec![5; WORLD];
    case.x = common::Rng(5).values(20 * case.d);
    let options = LayerOptions::new(Topology::new(WORLD, nodes).unwrap());
    let start = Instant::now();
    let results = run(WORLD, &ThreadOptions::default(), |inner| {
        step(&case, &options, Arc::new(Faulty { inner, at, how }), stage)
    });
    assert!(start.elapsed() < ThreadOptions::default().limit, "waited to the end");
    let message = |r: &std::result::Result<(), RankError<MoeError>>| {
        r.as_ref().map_or_else(ToString::to_string, |()| String::new())
    };
    results.results.iter().map(message).collect()
}

/// Every rank failed, and those that did not do it say who did.
fn assert_all_know(messages: &[String], what: &str) {
    for (rank, message) in messages.iter().enumerate() {
        assert!(!message.is_empty(), "{what}: rank {rank} did not notice");
        let names = message.contains(&format!("rank {CULPRIT}"));
        assert!(rank == CULPRIT || names, "{what}: rank {rank} says {message:?}");
    }
}

#[test]
fn without_a_fault_nobody_fails() {
    assert_eq!(outcome(1, "nowhere", How::Panic, Stage::Nowhere), [""; WORLD]);
    assert_eq!(outcome(2, "nowhere", How::Panic, Stage::Nowhere), [""; WORLD]);
}

#[test]
fn a_panic_or_an_error_in_any_exchange_reaches_everybody() {
    for at in ["moe counts", "moe dispatch", "moe combine", "moe combine gradients", "moe dispatch gradients"]
    {
        for how in [How::Panic, How::Error] {
            assert_all_know(&outcome(1, at, how, Stage::Nowhere), &format!("{how:?} in {at}"));
        }
    }
    for at in [
        "moe dispatch between nodes",
        "moe counts within the node",
        "moe dispatch within the node",
        "moe combine within the node",
        "moe combine between nodes",
        "moe combine gradients within the node",
        "moe dispatch gradients between nodes",
    ] {
        assert_all_know(&outcome(2, at, How::Error, Stage::Nowhere), at);
    }
}

#[test]
fn an_error_in_routing_shared_experts_or_backward_reaches_everybody() {
    for stage in [Stage::Routing, Stage::Shared, Stage::Backward] {
        assert_all_know(&outcome(1, "nowhere", How::Error, stage), &format!("{stage:?}"));
    }
}

#[test]
fn counts_and_messages_that_do_not_match_are_found() {
    for (at, how) in [
        ("moe counts", How::Lie),
        ("moe counts", How::Longer),
        ("moe dispatch", How::Longer),
        ("moe combine", How::Longer),
        ("moe dispatch gradients", How::Longer),
    ] {
        let messages = outcome(1, at, how, Stage::Nowhere);
        assert!(messages.iter().all(|m| !m.is_empty()), "{how:?} in {at}: {messages:?}");
        assert!(messages.iter().any(|m| m.contains(&CULPRIT.to_string())), "{how:?} in {at}: {messages:?}");
    }
}
