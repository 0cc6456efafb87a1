//! One rank fails at each stage: every other rank fails soon, with an error that names it. Nobody hangs.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use common::{Case, rank, run, var};
use occult_comm::{Buffer, CommError, Communicator, Exchange, Expect, RankError, Result, ThreadOptions};
use occult_kernels::Threads;
use occult_moe::{
    ExpertParallelLayer, ExpertTensors, LayerOptions, MoeError, Overlap, Step, all_reduce_gradients,
};
use occult_plan::{Rank, Topology};

const WORLD: usize = 4;
const CULPRIT: usize = 2;

/// A communicator in which the operation `at` goes wrong on one rank.
#[derive(Debug)]
struct Faulty {
    inner: Arc<dyn Communicator>,
    at: &'static str,
    how: How,
    /// Exchanges that each rank has started.
    started: Arc<[AtomicUsize; WORLD]>,
}

impl Faulty {
    /// An operation that is not an exchange.
    fn enter(&self, what: &str) -> Result<()> {
        match self.how {
            _ if what != self.at || self.rank() != CULPRIT => Ok(()),
            How::Panic => panic!("as asked"),
            _ => Err(CommError::Transport { rank: CULPRIT, reason: "the cable was cut".into() }),
        }
    }

    /// Waits until everybody else has started this exchange, too.
    fn wait_for_others(&self, number: usize) {
        let start = Instant::now();
        let others = (0..WORLD).filter(|&rank| rank != CULPRIT);
        for rank in others {
            while self.started[rank].load(Ordering::SeqCst) < number {
                assert!(start.elapsed() < self.limit(), "rank {rank} starts nothing");
                std::thread::yield_now();
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum How {
    /// Every exchange is started after all others have started it.
    Late,
    /// The thread panics.
    Panic,
    /// The operation reports an error.
    Error,
    /// The message of the next rank grows by 64 bytes.
    Longer,
    /// The counts say so many rows more than there are.
    Lie(u32),
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
        let number = self.started[self.rank()].fetch_add(1, Ordering::SeqCst) + 1;
        if self.how == How::Late && self.rank() == CULPRIT {
            self.wait_for_others(number);
        }
        if what == self.at && self.rank() == CULPRIT {
            match self.how {
                How::Panic | How::Error => self.enter(what)?,
                How::Late => {}
                How::Longer => {
                    let mut bytes = send.as_bytes().to_vec();
                    bytes.extend([0; 64]);
                    sizes[WORLD - 1] += 64;
                    send = Buffer::from_slice(&bytes);
                }
                How::Lie(rows) => send.as_mut_slice::<u32>()[0] += rows,
            }
        }
        self.inner.start_exchange(what, send, &sizes, expect)
    }
    fn all_reduce_sum(&self, what: &'static str, values: &mut [f32]) -> Result<()> {
        self.enter(what)?;
        self.inner.all_reduce_sum(what, values)
    }
    fn all_reduce_sum_f64(&self, what: &'static str, values: &mut [f64]) -> Result<()> {
        self.enter(what)?;
        self.inner.all_reduce_sum_f64(what, values)
    }
    fn all_gather(&self, what: &'static str, mine: Buffer) -> Result<Vec<Buffer>> {
        self.enter(what)?;
        self.inner.all_gather(what, mine)
    }
    fn broadcast(&self, what: &'static str, root: usize, buffer: Buffer) -> Result<Buffer> {
        self.enter(what)?;
        self.inner.broadcast(what, root, buffer)
    }
    fn barrier(&self, what: &'static str) -> Result<()> {
        self.enter(what)?;
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
    let w_router = var(&case.w_router, (e, d));
    let rows = case.rows_of(rank);
    let n = case.placement.experts_of(rank as Rank).len();
    let x = var(&case.x[rows.start * d..rows.end * d], (rows.len(), d));
    let up = var(&case.local(rank, &case.w_up, 2 * f * d), (n, 2 * f, d));
    let down = var(&case.local(rank, &case.w_down, d * f), (n, d, f));
    let (router, placement) = (case.router.clone(), case.placement.clone());
    let layer = ExpertParallelLayer::new(comm, router, placement, options.clone(), Threads::new(1))?;
    let mut logits = x.matmul(&w_router.t()?)?;
    if culprit && stage == Stage::Routing {
        logits = (logits * f64::NAN)?;
    }
    let mut shared = || match culprit && stage == Stage::Shared {
        true => Err(MoeError::Tensor(candle_core::Error::msg("no memory for the shared expert"))),
        false => Ok(x.zeros_like()?),
    };
    let experts = ExpertTensors { w_up: &up, w_down: &down, sinks: None };
    let tokens = Step::agree(&**layer.comm(), rows.len())?;
    let (mut y, _) = layer.forward(&x, &logits, experts, Some(&tokens), Some(&mut shared))?;
    if culprit && stage == Stage::Backward {
        y = y.apply_op1(Broken)?;
    }
    let mut grads = y.sum_all()?.backward()?;
    all_reduce_gradients(&**layer.comm(), &[&w_router], &mut grads, 1.0)?;
    // The next step would find out; a rank that needs nobody any more would not.
    layer.comm().barrier("end of the step")?;
    Ok(())
}

/// Everybody has tokens, and everybody's tokens go everywhere.
fn case() -> Case {
    let mut case = Case::random(7, WORLD, 9, 3, 4, 4);
    case.tokens = vec![5; WORLD];
    case.x = common::Rng(5).values(20 * case.d);
    case.dy = common::Rng(6).values(20 * case.d);
    case
}

fn outcome_of(overlap: Overlap, nodes: usize, at: &'static str, how: How, stage: Stage) -> Vec<String> {
    let case = case();
    let mut options = LayerOptions::new(Topology::new(WORLD, nodes).unwrap());
    options.overlap = overlap;
    let (start, started) = (Instant::now(), Arc::default());
    let results = run(WORLD, &ThreadOptions::default(), |inner| {
        let faulty = Faulty { inner, at, how, started: Arc::clone(&started) };
        step(&case, &options, Arc::new(faulty), stage)
    });
    assert!(start.elapsed() < ThreadOptions::default().limit, "waited to the end");
    let message = |r: &std::result::Result<(), RankError<MoeError>>| {
        r.as_ref().map_or_else(ToString::to_string, |()| String::new())
    };
    results.results.iter().map(message).collect()
}

fn outcome(nodes: usize, at: &'static str, how: How, stage: Stage) -> Vec<String> {
    outcome_of(Overlap::Off, nodes, at, how, stage)
}

/// Every rank failed, and those that did not do it say who did, and in which operation they learned of it.
fn assert_all_know(messages: &[String], what: &str) {
    for (rank, message) in messages.iter().enumerate() {
        assert!(!message.is_empty(), "{what}: rank {rank} did not notice");
        let names = message.contains(&format!("rank {CULPRIT}")) && message.contains("(seen in `");
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
            for overlap in [Overlap::Off, Overlap::Chunks(2)] {
                let messages = outcome_of(overlap, 1, at, how, Stage::Nowhere);
                assert_all_know(&messages, &format!("{how:?} in {at}"));
            }
        }
    }
    for at in [
        "moe counts between nodes",
        "moe dispatch between nodes",
        "moe counts within the node",
        "moe dispatch within the node",
        "moe combine within the node",
        "moe combine between nodes",
        "moe combine gradients between nodes",
        "moe combine gradients within the node",
        "moe dispatch gradients within the node",
        "moe dispatch gradients between nodes",
    ] {
        for how in [How::Panic, How::Error] {
            assert_all_know(&outcome(2, at, how, Stage::Nowhere), &format!("{how:?} in {at}"));
        }
    }
}

#[test]
fn a_panic_or_an_error_beside_the_exchanges_reaches_everybody() {
    for at in ["moe tokens of a step", "gradients of replicated parameters", "end of the step"] {
        for how in [How::Panic, How::Error] {
            assert_all_know(&outcome(1, at, how, Stage::Nowhere), &format!("{how:?} in {at}"));
        }
    }
    for stage in [Stage::Routing, Stage::Shared, Stage::Backward] {
        assert_all_know(&outcome(1, "nowhere", How::Error, stage), &format!("{stage:?}"));
    }
}

#[test]
fn counts_and_messages_that_do_not_match_are_found() {
    for (at, how) in [
        ("moe counts", How::Lie(1)),
        // More than any memory holds.
        ("moe counts", How::Lie(u32::MAX / 2)),
        ("moe counts", How::Longer),
        ("moe dispatch", How::Longer),
        ("moe combine", How::Longer),
        ("moe dispatch gradients", How::Longer),
    ] {
        let messages = outcome(1, at, how, Stage::Nowhere);
        let names = |m: &String| m.contains(&format!("rank {CULPRIT}")) && m.contains("`moe ");
        for (rank, message) in messages.iter().enumerate() {
            let knows = if rank == CULPRIT { !message.is_empty() } else { names(message) };
            assert!(knows, "{how:?} in {at}: rank {rank} says {message:?}");
        }
    }
}

/// A slow rank costs time and nothing else.
#[test]
fn a_rank_that_is_always_last_changes_nothing() {
    let case = case();
    for overlap in [Overlap::Off, Overlap::Chunks(3)] {
        let options = LayerOptions { overlap, ..LayerOptions::new(Topology::flat(WORLD).unwrap()) };
        let outcome = |how| {
            let started = Arc::default();
            let results = run(WORLD, &ThreadOptions::default(), |inner| {
                let (at, started) = ("nowhere", Arc::clone(&started));
                rank(&case, &options, Arc::new(Faulty { inner, at, how, started }))
            });
            let counts: Vec<_> = started.iter().map(|n: &AtomicUsize| n.load(Ordering::SeqCst)).collect();
            (results.all().unwrap(), counts)
        };
        let (late, counts) = outcome(How::Late);
        assert!(counts[CULPRIT] >= 5 && counts.iter().all(|&n| n == counts[CULPRIT]), "{counts:?}");
        assert_eq!(late, outcome(How::Error).0);
    }
}
