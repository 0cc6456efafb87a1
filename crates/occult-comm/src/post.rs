//! The seam between groups and transports: letters go out, letters lie in the mailbox.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use crate::Result;
use crate::letter::{Address, Letter};
use crate::mailbox::Mailbox;

/// A transport, as one rank sees it. Letters of one sender to one receiver arrive in the order in which they were sent.
pub(crate) trait Post: Send + Sync + Debug {
    /// World rank.
    fn rank(&self) -> usize;

    /// Longest wait.
    fn limit(&self) -> Duration;

    /// Sends a letter to another world rank. Never waits for the receiver.
    fn send(&self, to: usize, address: Address, letter: Letter) -> Result<()>;

    /// This rank's mailbox.
    fn mailbox(&self) -> &Mailbox;

    /// An operation has begun that nobody waits for yet: a transport may have to move its data meanwhile.
    fn opened(&self) {}

    /// An operation has ended.
    fn closed(&self) {}

    /// Moves data without waiting.
    fn progress(&self) -> Result<()>;

    /// Waits for a change of the mailbox since `seen`, not beyond the deadline; may return earlier. `round` counts the
    /// calls of one wait.
    fn pause(&self, seen: u64, round: u32, deadline: Instant);

    /// Whether the process has been asked to end.
    fn stopped(&self) -> bool {
        false
    }

    /// Tells every rank of the world that this one fails.
    fn abort(&self, reason: &str);

    /// What this rank is about to do or wait for, and the ranks it takes: said when it must end without a word of MPI.
    fn note(&self, _what: &str, _ranks: &dyn Fn() -> Vec<usize>) {}
}
