//! The seam: what every backend can do.

use std::fmt::Debug;
use std::time::Duration;

use crate::{Buffer, Result};

/// A rank's access to its group. Object safe. Every call but [`abort`](Self::abort) and the getters is collective: all
/// ranks of the group make it, in the same order. Every wait is bounded by [`limit`](Self::limit).
///
/// `what` names an operation; ranks that meet under different names fail with
/// [`CommError::Mismatch`](crate::CommError::Mismatch).
pub trait Communicator: Send + Sync + Debug {
    /// This rank's number in the group.
    fn rank(&self) -> usize;

    /// Number of ranks in the group.
    fn world_size(&self) -> usize {
        self.host_of_rank().len()
    }

    /// Host of every rank of the group: ranks with equal numbers share memory.
    fn host_of_rank(&self) -> &[usize];

    /// Number in the whole world of every rank of the group, ascending: what errors and counts speak of.
    fn world_ranks(&self) -> &[usize];

    /// Starts an all-to-all: `send_bytes[r]` consecutive bytes of `send` go to rank `r` of the group, ranks ascending.
    /// Does not wait; data move while the caller computes. Several may be under way.
    ///
    /// # Errors
    /// `Argument` when `send_bytes` does not sum to the length of `send`; `Peer` when another rank has failed.
    fn start_exchange(
        &self,
        what: &'static str,
        send: Buffer,
        send_bytes: &[usize],
        expect: Expect,
    ) -> Result<Box<dyn Exchange>>;

    /// [`start_exchange`](Self::start_exchange) and wait.
    ///
    /// # Errors
    /// Those of starting and of [`Exchange::wait`].
    fn exchange(
        &self,
        what: &'static str,
        send: Buffer,
        send_bytes: &[usize],
        expect: Expect,
    ) -> Result<Received> {
        self.start_exchange(what, send, send_bytes, expect)?.wait()
    }

    /// Element-wise sum over the ranks, `((v0 + v1) + v2) + ..` in rank order: the same bits on every rank.
    ///
    /// # Errors
    /// `Mismatch` when the lengths differ; `Peer`, `Timeout`.
    fn all_reduce_sum(&self, what: &'static str, values: &mut [f32]) -> Result<()>;

    /// [`all_reduce_sum`](Self::all_reduce_sum) in f64.
    ///
    /// # Errors
    /// Those of `all_reduce_sum`.
    fn all_reduce_sum_f64(&self, what: &'static str, values: &mut [f64]) -> Result<()>;

    /// Everybody's buffer, ranks ascending; lengths may differ.
    ///
    /// # Errors
    /// `Peer`, `Timeout`, `Mismatch`, `Memory`.
    fn all_gather(&self, what: &'static str, mine: Buffer) -> Result<Vec<Buffer>>;

    /// `root`'s buffer; the other ranks' is ignored.
    ///
    /// # Errors
    /// `Argument` when there is no such rank; `Peer`, `Timeout`, `Mismatch`, `Memory`.
    fn broadcast(&self, what: &'static str, root: usize, buffer: Buffer) -> Result<Buffer>;

    /// Returns when every rank has come.
    ///
    /// # Errors
    /// `Peer`, `Timeout`, `Mismatch`.
    fn barrier(&self, what: &'static str) -> Result<()>;

    /// The group of the ranks that give the same colour, in the order of their ranks here.
    ///
    /// # Errors
    /// `Peer`, `Timeout`, `Mismatch`.
    fn split(&self, what: &'static str, colour: usize) -> Result<Box<dyn Communicator>>;

    /// Tells all ranks of the world that this one fails and why: what they wait for, and every later call, fails with
    /// [`CommError::Peer`](crate::CommError::Peer). The first reason stands. Not collective.
    fn abort(&self, reason: &str);

    /// Longest time that one wait may take.
    fn limit(&self) -> Duration;
}

/// What an exchange should bring from each rank of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// Exactly so many bytes; anything else is a mismatch.
    Bytes(Vec<usize>),
    /// Up to so many bytes. One message per peer: no round of counts before it.
    AtMost(Vec<usize>),
}

/// An exchange under way. To drop it without waiting throws its data away.
#[must_use = "the data arrive in `wait`"]
pub trait Exchange: Send + Debug {
    /// Whether `wait` would return at once. Gives the transport a chance to move data.
    ///
    /// # Errors
    /// Those of `wait`; `Timeout` when the first call that found a part missing is longer ago than a wait may take.
    fn test(&mut self) -> Result<bool>;

    /// Waits for everybody's part.
    ///
    /// # Errors
    /// `Peer`, `Timeout`, `Stopped`, `Mismatch`, `Memory`, `Transport`.
    fn wait(self: Box<Self>) -> Result<Received>;
}

/// What an exchange brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// The parts of all ranks, ranks ascending, without gaps.
    pub buffer: Buffer,
    /// Length of each rank's part.
    pub bytes: Vec<usize>,
}

impl Received {
    /// The part of one rank.
    pub fn part(&self, rank: usize) -> &[u8] {
        let start: usize = self.bytes[..rank].iter().sum();
        &self.buffer.as_bytes()[start..start + self.bytes[rank]]
    }
}

macro_rules! forward {
    ($pointer:ty) => {
        impl<C: Communicator + ?Sized> Communicator for $pointer {
            fn rank(&self) -> usize {
                (**self).rank()
            }
            fn world_size(&self) -> usize {
                (**self).world_size()
            }
            fn host_of_rank(&self) -> &[usize] {
                (**self).host_of_rank()
            }
            fn world_ranks(&self) -> &[usize] {
                (**self).world_ranks()
            }
            fn start_exchange(
                &self,
                what: &'static str,
                send: Buffer,
                send_bytes: &[usize],
                expect: Expect,
            ) -> Result<Box<dyn Exchange>> {
                (**self).start_exchange(what, send, send_bytes, expect)
            }
            fn all_reduce_sum(&self, what: &'static str, values: &mut [f32]) -> Result<()> {
                (**self).all_reduce_sum(what, values)
            }
            fn all_reduce_sum_f64(&self, what: &'static str, values: &mut [f64]) -> Result<()> {
                (**self).all_reduce_sum_f64(what, values)
            }
            fn all_gather(&self, what: &'static str, mine: Buffer) -> Result<Vec<Buffer>> {
                (**self).all_gather(what, mine)
            }
            fn broadcast(&self, what: &'static str, root: usize, buffer: Buffer) -> Result<Buffer> {
                (**self).broadcast(what, root, buffer)
            }
            fn barrier(&self, what: &'static str) -> Result<()> {
                (**self).barrier(what)
            }
            fn split(&self, what: &'static str, colour: usize) -> Result<Box<dyn Communicator>> {
                (**self).split(what, colour)
            }
            fn abort(&self, reason: &str) {
                (**self).abort(reason);
            }
            fn limit(&self) -> Duration {
                (**self).limit()
            }
        }
    };
}

forward!(&C);
forward!(Box<C>);
forward!(std::sync::Arc<C>);
