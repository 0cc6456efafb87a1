//! Ranks as threads of one process: letters go straight into the receiver's mailbox. See `thread.md`.

mod run;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::Result;
use crate::letter::{Address, Letter};
use crate::mailbox::{Failure, Mailbox};
use crate::post::Post;

pub use run::{RankError, RankResults, ThreadOptions, run_threads};

/// One rank's view of the shared mailboxes.
#[derive(Debug)]
struct ThreadPost {
    rank: usize,
    mailboxes: Arc<[Mailbox]>,
    /// The first failure of the world: all mailboxes get this one, or ranks would blame the messenger.
    failure: Arc<Mutex<Option<Failure>>>,
    limit: Duration,
}

impl Post for ThreadPost {
    fn rank(&self) -> usize {
        self.rank
    }

    fn limit(&self) -> Duration {
        self.limit
    }

    fn send(&self, to: usize, address: Address, letter: Letter) -> Result<()> {
        self.mailboxes[to].deliver(address, letter);
        Ok(())
    }

    fn mailbox(&self) -> &Mailbox {
        &self.mailboxes[self.rank]
    }

    fn progress(&self) -> Result<()> {
        Ok(())
    }

    fn pause(&self, seen: u64, _: u32, deadline: Instant) {
        self.mailbox().wait_change(seen, deadline);
    }

    fn abort(&self, reason: &str) {
        let mut first = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        let failure = first.get_or_insert_with(|| Failure { rank: self.rank, reason: reason.to_owned() });
        for mailbox in &*self.mailboxes {
            mailbox.fail(failure.clone());
        }
    }
}
