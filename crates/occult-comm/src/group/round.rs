//! One operation of a group under way: letters out, letters in.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Group;
use crate::letter::{Kind, Letter, Payload, cut_name};
use crate::mailbox::Taken;
use crate::{Buffer, CommError, Exchange, Expect, Received, Result};

/// How long a rank that finds a peer gone still waits for the reason: the peer's goodbye can overtake its complaint,
/// which is written after its communicators have been dropped.
const REASON_GRACE: Duration = Duration::from_millis(200);

/// Whose letters a round brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sources {
    All,
    Only(usize),
}

/// An operation whose own letters are sent and whose incoming letters are being collected.
#[derive(Debug)]
pub(super) struct Round {
    group: Arc<Group>,
    operation: u64,
    kind: Kind,
    what: &'static str,
    expect: Expect,
    sources: Sources,
    /// What has come, by rank of the group; this rank's own part is there from the start.
    parts: Vec<Option<Payload>>,
    /// Since the first look of a caller who looks instead of waiting.
    polled: Option<Patience>,
}

/// How long a wait still goes on.
#[derive(Debug, Clone, Copy)]
struct Patience {
    deadline: Instant,
    /// World rank of a peer that has left without its part.
    left: Option<usize>,
}

impl Patience {
    fn new(limit: Duration) -> Self {
        Self { deadline: Instant::now() + limit, left: None }
    }
}

impl Round {
    /// Sends `out[r]` to rank `r` of the group (nothing at all when `out` is empty) and expects letters from `sources`.
    pub(super) fn start(
        group: &Arc<Group>,
        kind: Kind,
        what: &'static str,
        mut out: Vec<Payload>,
        sources: Sources,
        expect: Expect,
    ) -> Result<Self> {
        if let Some(failure) = group.post.mailbox().failure() {
            return Err(CommError::Peer { what, rank: failure.rank, reason: failure.reason });
        }
        let num_ranks = group.members.len();
        // Numbers are given and letters sent under one lock, so that every receiver sees them in the same order.
        let mut next = group.next_operation.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let operation = *next;
        *next += 1;
        let mut round = Self {
            group: Arc::clone(group),
            operation,
            kind,
            what,
            expect,
            sources,
            parts: vec![None; num_ranks],
            polled: None,
        };
        group.post.opened();
        if !out.is_empty() {
            let own = std::mem::replace(&mut out[group.me], Payload::Empty);
            round.accept(group.me, own)?;
            // Every rank starts with its neighbour, so that not all begin with rank 0.
            for step in 1..num_ranks {
                let to = (group.me + step) % num_ranks;
                let payload = std::mem::replace(&mut out[to], Payload::Empty);
                let letter = Letter { kind, what: Cow::Borrowed(what), payload };
                group.post.send(group.members[to], group.address(group.me, operation), letter)?;
            }
        }
        drop(next);
        Ok(round)
    }

    fn wanted(&self, from: usize) -> bool {
        match self.sources {
            Sources::All => true,
            Sources::Only(only) => from == only,
        }
    }

    /// World ranks whose part has not come.
    fn missing_ranks(&self) -> Vec<usize> {
        let missing = (0..self.parts.len()).filter(|&from| self.wanted(from) && self.parts[from].is_none());
        missing.map(|from| self.group.members[from]).collect()
    }

    fn mismatch(&self, from: usize, expected: String, found: String) -> CommError {
        let members = &self.group.members;
        CommError::Mismatch {
            what: self.what,
            rank: members[self.group.me],
            peer: members[from],
            expected,
            found,
        }
    }

    fn accept(&mut self, from: usize, payload: Payload) -> Result<()> {
        let found = payload.len_bytes();
        match &self.expect {
            Expect::Bytes(bytes) if found != bytes[from] => {
                Err(self.mismatch(from, format!("{} bytes", bytes[from]), format!("{found} bytes")))
            }
            Expect::AtMost(bytes) if found > bytes[from] => {
                Err(self.mismatch(from, format!("at most {} bytes", bytes[from]), format!("{found} bytes")))
            }
            _ => {
                self.parts[from] = Some(payload);
                Ok(())
            }
        }
    }

    fn open(&mut self, from: usize, letter: Letter) -> Result<()> {
        if letter.kind == self.kind && cut_name(&letter.what) == cut_name(self.what) {
            return self.accept(from, letter.payload);
        }
        let own = format!("`{}` ({})", self.what, self.kind.name());
        let theirs = format!("`{}` ({})", letter.what, letter.kind.name());
        let operation = self.operation;
        Err(self.mismatch(from, format!("{own} as operation {operation}"), theirs))
    }

    /// Takes what has come. Returns whether everything is there; `gone` is set when a peer has left for good.
    fn collect(&mut self, gone: &mut Option<usize>) -> Result<bool> {
        let group = Arc::clone(&self.group);
        let mailbox = group.post.mailbox();
        // Read before the letters: what a failed rank sent before it failed is taken in any case.
        let failure = mailbox.failure();
        let mut complete = true;
        for from in 0..self.parts.len() {
            if !self.wanted(from) || self.parts[from].is_some() {
                continue;
            }
            match mailbox.take(group.address(from, self.operation)) {
                Taken::Letter(letter) => self.open(from, letter)?,
                Taken::Nothing => complete = false,
                Taken::Later { operation: u64::MAX, .. } => {
                    complete = false;
                    *gone = Some(group.members[from]);
                }
                Taken::Later { operation, name } => {
                    let own =
                        format!("`{}` ({}) as operation {}", self.what, self.kind.name(), self.operation);
                    return Err(self.mismatch(from, own, format!("{name} as operation {operation}")));
                }
            }
        }
        match failure {
            Some(failure) if !complete => {
                Err(CommError::Peer { what: self.what, rank: failure.rank, reason: failure.reason })
            }
            _ => Ok(complete),
        }
    }

    /// Looks once at what has come. Returns whether that is everything; an error when the rest is not worth waiting for.
    fn look(&mut self, patience: &mut Patience) -> Result<bool> {
        let group = Arc::clone(&self.group);
        let post = &group.post;
        post.note(self.what, &|| self.missing_ranks());
        post.progress()?;
        let mut gone = None;
        if self.collect(&mut gone)? {
            return Ok(true);
        }
        if post.stopped() {
            let waiting_for = self.missing_ranks();
            return Err(CommError::Stopped { what: self.what, rank: post.rank(), waiting_for });
        }
        let now = Instant::now();
        if patience.left.is_none() && gone.is_some() {
            patience.left = gone;
            patience.deadline = patience.deadline.min(now + REASON_GRACE);
        }
        if now < patience.deadline {
            return Ok(false);
        }
        Err(match patience.left {
            Some(rank) => CommError::Peer {
                what: self.what,
                rank,
                reason: "it has left the group without taking part".into(),
            },
            None => CommError::Timeout {
                what: self.what,
                rank: post.rank(),
                waiting_for: self.missing_ranks(),
                after: post.limit(),
            },
        })
    }

    /// Looks once for a caller who does not wait, but no longer than a wait would.
    fn poll(&mut self) -> Result<bool> {
        let mut patience = self.polled.unwrap_or_else(|| Patience::new(self.group.post.limit()));
        let complete = self.look(&mut patience);
        self.polled = Some(patience);
        complete
    }

    /// Waits for every part: payloads by rank of the group (empty where nothing was to come).
    pub(super) fn wait(mut self) -> Result<Vec<Payload>> {
        let group = Arc::clone(&self.group);
        let mut patience = Patience::new(group.post.limit());
        for round in 0.. {
            let seen = group.post.mailbox().version();
            if self.look(&mut patience)? {
                break;
            }
            group.post.pause(seen, round, patience.deadline);
        }
        Ok(self.parts.iter_mut().map(|part| part.take().unwrap_or(Payload::Empty)).collect())
    }
}

impl Drop for Round {
    fn drop(&mut self) {
        self.group.post.closed();
        let mailbox = self.group.post.mailbox();
        for from in 0..self.parts.len() {
            if self.wanted(from) && self.parts[from].is_none() && from != self.group.me {
                mailbox.refuse(self.group.address(from, self.operation));
            }
        }
    }
}

/// A user's exchange: a round whose parts are put together at the end.
#[derive(Debug)]
pub(super) struct GroupExchange(pub(super) Round);

impl Exchange for GroupExchange {
    fn test(&mut self) -> Result<bool> {
        self.0.poll()
    }

    fn wait(self: Box<Self>) -> Result<Received> {
        let mut parts = self.0.wait()?;
        let bytes = parts.iter().map(Payload::len_bytes).collect();
        let mut filled =
            parts.iter().enumerate().filter(|(_, part)| part.len_bytes() > 0).map(|(from, _)| from);
        let buffer = match (filled.next(), filled.next()) {
            (None, _) => Buffer::empty(),
            // From one rank only: nothing to put together, and often nothing to copy.
            (Some(from), None) => parts.swap_remove(from).into_buffer()?,
            _ => Buffer::concat(&parts.iter().map(Payload::as_bytes).collect::<Vec<_>>())?,
        };
        Ok(Received { buffer, bytes })
    }
}
