//! A rank's letters that have arrived and were not yet taken, and the failure of the world if there is one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::letter::{Address, GroupId, Letter};

/// A rank has failed; nothing that needs it can succeed any more.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    /// World rank.
    pub(crate) rank: usize,
    pub(crate) reason: String,
}

#[derive(Debug, Default)]
struct State {
    letters: BTreeMap<Address, Letter>,
    /// Letters that nobody will take: their exchange was dropped.
    unwanted: BTreeSet<Address>,
    closed_groups: BTreeSet<GroupId>,
    failure: Option<Failure>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    state: Mutex<State>,
    changed: Condvar,
    /// Counts deliveries and failures: a waiter can look without taking the lock.
    version: AtomicU64,
}

/// Looks at the version before a waiter goes to sleep, each with a spin hint: a few microseconds, about what it costs
/// to be woken. More would take the core from the rank that is awaited when ranks outnumber cores.
const SPINS: u32 = 200;

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held; were it so, the maps would still be maps.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn announce(&self, state: MutexGuard<'_, State>) {
        self.version.fetch_add(1, Ordering::Release);
        drop(state);
        self.changed.notify_all();
    }

    pub(crate) fn deliver(&self, address: Address, letter: Letter) {
        let mut state = self.lock();
        if !state.closed_groups.contains(&address.group) && !state.unwanted.remove(&address) {
            state.letters.insert(address, letter);
            self.announce(state);
        }
    }

    /// Takes the letter with this address; or says which later operation its sender has already come to, if any.
    pub(crate) fn take(&self, address: Address) -> Taken {
        let mut state = self.lock();
        if let Some(letter) = state.letters.remove(&address) {
            return Taken::Letter(letter);
        }
        let last = Address { operation: u64::MAX, ..address };
        match state.letters.range(address..=last).next() {
            Some((at, letter)) => Taken::Later {
                operation: at.operation,
                name: format!("`{}` ({})", letter.what, letter.kind.name()),
            },
            None => Taken::Nothing,
        }
    }

    /// Throws the letter away, now or when it comes.
    pub(crate) fn refuse(&self, address: Address) {
        let mut state = self.lock();
        if state.letters.remove(&address).is_none() {
            state.unwanted.insert(address);
        }
    }

    /// Throws away what has come and will come for a group.
    pub(crate) fn close(&self, group: GroupId) {
        let mut state = self.lock();
        state.closed_groups.insert(group);
        state.letters.retain(|address, _| address.group != group);
        state.unwanted.retain(|address| address.group != group);
    }

    /// Records the first failure.
    pub(crate) fn fail(&self, failure: Failure) {
        let mut state = self.lock();
        state.failure.get_or_insert(failure);
        self.announce(state);
    }

    pub(crate) fn failure(&self) -> Option<Failure> {
        self.lock().failure.clone()
    }

    /// A number that changes with every delivery.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Returns when the version is no longer `seen`, or at the deadline.
    pub(crate) fn wait_change(&self, seen: u64, deadline: Instant) {
        for _ in 0..SPINS {
            if self.version() != seen {
                return;
            }
            std::hint::spin_loop();
        }
        let mut state = self.lock();
        // The version changes under the lock only: no delivery can slip between this look and the sleep.
        while self.version() == seen {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// What was under an address.
#[derive(Debug)]
pub(crate) enum Taken {
    Letter(Letter),
    /// Letters of one sender arrive in order, so this one will never come.
    Later {
        operation: u64,
        name: String,
    },
    Nothing,
}
