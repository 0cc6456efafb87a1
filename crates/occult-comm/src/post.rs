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

    /// Moves data without waiting.
    fn progress(&self) -> Result<()>;

    /// Waits for a change of the mailbox since `seen`, not beyond the deadline; may return earlier. `round` counts the
    /// calls of one wait.
    fn pause(&self, seen: u64, round: u32, deadline: Instant);

    /// Tells every rank of the world that this one fails.
    fn abort(&self, reason: &str);
}
