//! Counts what crosses: any communicator, with bytes and rows per peer and operation.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::group::reduce_bytes;
use crate::{Buffer, Communicator, Exchange, Expect, Received, Result};

/// A communicator that counts. Counts payload: what the caller moves, no envelopes. A call is counted when it has
/// succeeded (an exchange: what it sends when started, what it receives when waited for).
#[derive(Debug)]
pub struct Metered<C> {
    inner: C,
    meter: Arc<Meter>,
}

impl<C: Communicator> Metered<C> {
    /// Counts what goes through `inner`, and through the groups split from it.
    pub fn new(inner: C) -> Self {
        let world = inner.world_ranks();
        let num_ranks = world.last().map_or(0, |last| last + 1);
        let mut host_of_rank = vec![usize::MAX; num_ranks];
        for (&rank, &host) in world.iter().zip(inner.host_of_rank()) {
            host_of_rank[rank] = host;
        }
        let meter = Meter { rank: world[inner.rank()], host_of_rank, state: Mutex::default() };
        Self { inner, meter: Arc::new(meter) }
    }

    /// The counts; shared, so that they can be read when the communicator has been given away.
    pub fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.meter)
    }

    fn count(&self, what: &'static str, sent: &[usize], received: &[usize]) {
        self.meter.count(what, 1, self.inner.world_ranks(), sent, received);
    }

    fn count_reduce(&self, what: &'static str, len: usize, value_bytes: usize) {
        let (num_ranks, me) = (self.inner.world_size(), self.inner.rank());
        let sent = reduce_bytes(len, value_bytes, num_ranks, me);
        // What goes to a peer and what comes from it are the same by construction: its chunk and this rank's.
        self.count(what, &sent, &sent);
    }
}

/// Counts of one rank.
#[derive(Debug)]
pub struct Meter {
    rank: usize,
    host_of_rank: Vec<usize>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    operations: BTreeMap<&'static str, Counts>,
    row_bytes: BTreeMap<&'static str, usize>,
}

/// Counts of one operation, or of several together. Peers are world ranks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Collective calls.
    pub calls: u64,
    /// Payload bytes sent, by receiver.
    pub sent_bytes: Vec<u64>,
    /// Payload bytes received, by sender.
    pub received_bytes: Vec<u64>,
    /// Bytes of one row, where a size was given.
    pub row_bytes: Option<usize>,
}

/// The same quantity by how far it went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reach {
    /// Own rank: never on a wire.
    pub local: u64,
    /// Other ranks of the same host.
    pub same_host: u64,
    /// Ranks of other hosts.
    pub other_host: u64,
}

impl Reach {
    /// Everything that left its rank.
    pub fn wire(&self) -> u64 {
        self.same_host + self.other_host
    }
}

/// Counts at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// World rank that counted.
    pub rank: usize,
    /// Host of every world rank (`usize::MAX` where unknown).
    pub host_of_rank: Vec<usize>,
    /// By name of the operation.
    pub operations: BTreeMap<&'static str, Counts>,
}

impl Meter {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how many bytes one row of an operation has: its counts then are in rows, too.
    pub fn set_row_bytes(&self, what: &'static str, row_bytes: usize) {
        let mut state = self.lock();
        state.row_bytes.insert(what, row_bytes);
        if let Some(counts) = state.operations.get_mut(what) {
            counts.row_bytes = Some(row_bytes);
        }
    }

    /// The counts so far.
    pub fn snapshot(&self) -> Snapshot {
        let operations = self.lock().operations.clone();
        Snapshot { rank: self.rank, host_of_rank: self.host_of_rank.clone(), operations }
    }

    /// The counts so far, and from zero again. Sizes of rows stay.
    pub fn reset(&self) -> Snapshot {
        let operations = std::mem::take(&mut self.lock().operations);
        Snapshot { rank: self.rank, host_of_rank: self.host_of_rank.clone(), operations }
    }

    fn count(&self, what: &'static str, calls: u64, world: &[usize], sent: &[usize], received: &[usize]) {
        let mut state = self.lock();
        let row_bytes = state.row_bytes.get(what).copied();
        let num_ranks = self.host_of_rank.len();
        let counts = state.operations.entry(what).or_insert_with(|| Counts {
            calls: 0,
            sent_bytes: vec![0; num_ranks],
            received_bytes: vec![0; num_ranks],
            row_bytes,
        });
        counts.calls += calls;
        for (bytes, add) in [(&mut counts.sent_bytes, sent), (&mut counts.received_bytes, received)] {
            for (&peer, &add) in world.iter().zip(add) {
                bytes[peer] += add as u64;
            }
        }
    }
}

impl Counts {
    /// Whole rows sent, by receiver, where the size of a row is known.
    pub fn sent_rows(&self) -> Option<Vec<u64>> {
        self.rows(&self.sent_bytes)
    }

    /// Whole rows received, by sender, where the size of a row is known.
    pub fn received_rows(&self) -> Option<Vec<u64>> {
        self.rows(&self.received_bytes)
    }

    fn rows(&self, bytes: &[u64]) -> Option<Vec<u64>> {
        let row_bytes = self.row_bytes.filter(|&row_bytes| row_bytes > 0)? as u64;
        Some(bytes.iter().map(|bytes| bytes / row_bytes).collect())
    }
}

impl Snapshot {
    /// Bytes sent in one operation (zero for one that never ran).
    pub fn sent(&self, what: &str) -> Reach {
        self.operations.get(what).map_or_else(Reach::default, |counts| self.reach(&counts.sent_bytes))
    }

    /// Bytes received in one operation (zero for one that never ran).
    pub fn received(&self, what: &str) -> Reach {
        self.operations.get(what).map_or_else(Reach::default, |counts| self.reach(&counts.received_bytes))
    }

    /// Bytes sent in all operations.
    pub fn sent_total(&self) -> Reach {
        self.operations.keys().map(|what| self.sent(what)).fold(Reach::default(), |sum, reach| Reach {
            local: sum.local + reach.local,
            same_host: sum.same_host + reach.same_host,
            other_host: sum.other_host + reach.other_host,
        })
    }

    /// Divides a quantity per peer by distance.
    pub fn reach(&self, by_peer: &[u64]) -> Reach {
        let mut reach = Reach::default();
        for (peer, &amount) in by_peer.iter().enumerate() {
            if peer == self.rank {
                reach.local += amount;
            } else if self.host_of_rank[peer] == self.host_of_rank[self.rank] {
                reach.same_host += amount;
            } else {
                reach.other_host += amount;
            }
        }
        reach
    }
}

impl<C: Communicator> Communicator for Metered<C> {
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
        send: Buffer,
        send_bytes: &[usize],
        expect: Expect,
    ) -> Result<Box<dyn Exchange>> {
        let inner = self.inner.start_exchange(what, send, send_bytes, expect)?;
        self.count(what, send_bytes, &[]);
        let world = self.inner.world_ranks().to_vec();
        Ok(Box::new(MeteredExchange { inner, what, world, meter: self.meter() }))
    }

    fn all_reduce_sum(&self, what: &'static str, values: &mut [f32]) -> Result<()> {
        self.inner.all_reduce_sum(what, values)?;
        self.count_reduce(what, values.len(), size_of::<f32>());
        Ok(())
    }

    fn all_reduce_sum_f64(&self, what: &'static str, values: &mut [f64]) -> Result<()> {
        self.inner.all_reduce_sum_f64(what, values)?;
        self.count_reduce(what, values.len(), size_of::<f64>());
        Ok(())
    }

    fn all_gather(&self, what: &'static str, mine: Buffer) -> Result<Vec<Buffer>> {
        let sent = vec![mine.len_bytes(); self.inner.world_size()];
        let all = self.inner.all_gather(what, mine)?;
        self.count(what, &sent, &all.iter().map(Buffer::len_bytes).collect::<Vec<_>>());
        Ok(all)
    }

    fn broadcast(&self, what: &'static str, root: usize, buffer: Buffer) -> Result<Buffer> {
        let buffer = self.inner.broadcast(what, root, buffer)?;
        let (num_ranks, bytes) = (self.inner.world_size(), buffer.len_bytes());
        let mut received = vec![0; num_ranks];
        received[root] = bytes;
        let sent = if self.inner.rank() == root { vec![bytes; num_ranks] } else { vec![0; num_ranks] };
        self.count(what, &sent, &received);
        Ok(buffer)
    }

    fn barrier(&self, what: &'static str) -> Result<()> {
        self.inner.barrier(what)?;
        self.count(what, &[], &[]);
        Ok(())
    }

    fn split(&self, what: &'static str, colour: usize) -> Result<Box<dyn Communicator>> {
        let inner = self.inner.split(what, colour)?;
        Ok(Box::new(Metered { inner, meter: self.meter() }))
    }

    fn abort(&self, reason: &str) {
        self.inner.abort(reason);
    }

    fn limit(&self) -> Duration {
        self.inner.limit()
    }
}

#[derive(Debug)]
struct MeteredExchange {
    inner: Box<dyn Exchange>,
    what: &'static str,
    world: Vec<usize>,
    meter: Arc<Meter>,
}

impl Exchange for MeteredExchange {
    fn test(&mut self) -> Result<bool> {
        self.inner.test()
    }

    fn wait(self: Box<Self>) -> Result<Received> {
        let received = self.inner.wait()?;
        self.meter.count(self.what, 0, &self.world, &[], &received.bytes);
        Ok(received)
    }
}
