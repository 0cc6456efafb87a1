//! What a rank was doing, said when it must end without an answer of MPI.

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::error::list;
use crate::mailbox::{Failure, Mailbox};

/// How often a thread looks whether all is lost, and how long it then leaves the word to others. Open MPI's launcher kills a
/// process a second after it has told it to end.
const PERIOD: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_millis(400);

/// See the module.
#[derive(Debug)]
pub(super) struct LastWords {
    rank: usize,
    /// Set when the launcher asks the process to end.
    stopped: Arc<AtomicBool>,
    /// Operation and ranks of the last call that may not come back from MPI.
    doing: Mutex<(String, Vec<usize>)>,
    /// Calls of MPI begun and ended: odd inside of one.
    calls: AtomicU64,
    /// Why this rank fails, from when its user is about to be told.
    reason: OnceLock<String>,
}

impl LastWords {
    pub(super) fn new(rank: usize, stopped: Arc<AtomicBool>) -> Self {
        Self { rank, stopped, doing: Mutex::default(), calls: AtomicU64::new(0), reason: OnceLock::new() }
    }

    pub(super) fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    fn doing(&self) -> MutexGuard<'_, (String, Vec<usize>)> {
        self.doing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn note(&self, what: &str, ranks: Vec<usize>) {
        let mut doing = self.doing();
        doing.0.clear();
        doing.0.push_str(what);
        doing.1 = ranks;
    }

    /// As [`note`](Self::note), for one rank more of an operation that sends to several.
    pub(super) fn note_sending(&self, what: &str, to: usize) {
        let mut doing = self.doing();
        if doing.0 != what {
            what.clone_into(&mut doing.0);
            doing.1.clear();
        }
        if !doing.1.contains(&to) {
            doing.1.push(to);
        }
    }

    /// Notes why this rank fails: from now on its user has the word.
    pub(super) fn fail(&self, reason: &str) {
        let _ = self.reason.set(reason.to_owned());
    }

    /// A call of MPI, of which only one runs at a time.
    pub(super) fn calling<T>(&self, call: impl FnOnce() -> T) -> T {
        self.calls.fetch_add(1, Ordering::Release);
        let done = call();
        self.calls.fetch_add(1, Ordering::Release);
        done
    }

    /// MPI's words about a failure, after what this rank was doing with whom: MPI does not say.
    pub(super) fn explain(&self, words: &str, failure: Option<Failure>) -> String {
        let words = words.lines().map(str::trim).collect::<Vec<_>>().join(" ");
        let words = failure.map_or(words.clone(), |failure| format!("{}: {words}", named(&failure)));
        let doing = self.doing();
        match doing.0.as_str() {
            "" => words,
            what => format!("`{what}` with rank {}: {words}", list(&doing.1)),
        }
    }

    /// Whether MPI has been called and has not answered.
    fn in_call(&self) -> bool {
        !self.calls.load(Ordering::Acquire).is_multiple_of(2)
    }

    /// Says at once what this rank is doing if MPI has been called meanwhile: Open MPI may end the process without a word.
    pub(super) fn speak_if_held(&self, failure: &Failure) {
        if self.in_call() {
            self.say(Some(failure));
        }
    }

    /// Ends the process, saying what it was doing, when a call of MPI does not come back: because a rank has died (Open MPI holds
    /// calls for ever then), or for longer than `limit`; or when the launcher is about to kill it. Runs in a thread of its own,
    /// as long as the process.
    pub(super) fn speak_when_held(&self, mailbox: &Mailbox, limit: Duration) -> ! {
        let mut watch = Watch { call: (0, Instant::now()), stopped: None };
        loop {
            std::thread::sleep(PERIOD);
            let failure = mailbox.failure();
            if self.is_lost(&mut watch, failure.is_some(), limit, Instant::now()) {
                self.say(failure.as_ref());
                std::process::abort();
            }
        }
    }

    /// Whether the process cannot go on: one look, at `now`.
    fn is_lost(&self, watch: &mut Watch, failed: bool, limit: Duration, now: Instant) -> bool {
        let calls = self.calls.load(Ordering::Relaxed);
        if calls.is_multiple_of(2) || calls != watch.call.0 {
            watch.call = (calls, now);
        }
        if self.stopped() {
            watch.stopped.get_or_insert(now);
        }
        let told = self.reason.get().is_some();
        // Behind a rank that is silent a call may hang with no failure known, and with it whoever looks at deadlines.
        let patience = if failed || told { PATIENCE } else { limit.max(PATIENCE) };
        let held = now.duration_since(watch.call.1) > patience;
        let killed = !told && watch.stopped.is_some_and(|at| now.duration_since(at) > PATIENCE);
        held || killed
    }

    fn say(&self, failure: Option<&Failure>) {
        let doing = self.doing();
        let (rank, what, with) = (self.rank, &doing.0, list(&doing.1));
        let words = match (self.reason.get(), failure) {
            (Some(reason), _) => format!("rank {rank}: {reason}; MPI does not return\n"),
            (None, Some(failure)) => {
                format!("rank {rank}: {} while `{what}` with rank {with} was under way\n", named(failure))
            }
            (None, None) if self.stopped() => {
                format!("rank {rank}: told to stop while `{what}` with rank {with} was under way\n")
            }
            (None, None) => format!("rank {rank}: `{what}` with rank {with}: MPI does not return\n"),
        };
        // One write: what MPI and other ranks print does not come between.
        let _ = std::io::stderr().write_all(words.as_bytes());
    }
}

/// What was seen so far by the thread that looks for calls that do not come back.
struct Watch {
    /// The count of calls, and since when it stands.
    call: (u64, Instant),
    /// When the process was first seen to be asked to end.
    stopped: Option<Instant>,
}

fn named(failure: &Failure) -> String {
    format!("rank {} failed: {}", failure.rank, failure.reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);
    const MOMENT: Duration = Duration::from_millis(1);

    /// Whether the process is lost so long after a first look in which nothing was.
    fn lost_after(words: &LastWords, failed: bool, limit: Duration, time: Duration) -> bool {
        let begin = Instant::now();
        let mut watch = Watch { call: (0, begin), stopped: None };
        assert!(!words.is_lost(&mut watch, failed, limit, begin));
        words.is_lost(&mut watch, failed, limit, begin + time)
    }

    #[test]
    fn a_call_may_take_as_long_as_a_wait() {
        let words = LastWords::new(0, Arc::default());
        words.calling(|| {
            assert!(!lost_after(&words, false, LIMIT, LIMIT));
            assert!(lost_after(&words, false, LIMIT, LIMIT + MOMENT));
            // MPI may take a moment however short the limit.
            assert!(!lost_after(&words, false, MOMENT, PATIENCE));
        });
        // Nothing is held between calls.
        assert!(!lost_after(&words, false, LIMIT, 2 * LIMIT));
    }

    #[test]
    fn every_call_has_its_own_time() {
        let words = LastWords::new(0, Arc::default());
        let begin = Instant::now();
        let mut watch = Watch { call: (0, begin), stopped: None };
        words.calling(|| assert!(!words.is_lost(&mut watch, false, LIMIT, begin)));
        words.calling(|| {
            assert!(!words.is_lost(&mut watch, false, LIMIT, begin + LIMIT + MOMENT));
            assert!(words.is_lost(&mut watch, false, LIMIT, begin + 2 * LIMIT + 2 * MOMENT));
        });
    }

    #[test]
    fn a_call_after_a_failure_is_soon_given_up() {
        let words = LastWords::new(0, Arc::default());
        words.calling(|| assert!(lost_after(&words, true, LIMIT, PATIENCE + MOMENT)));
        words.fail("made up");
        words.calling(|| assert!(lost_after(&words, false, LIMIT, PATIENCE + MOMENT)));
        assert!(!lost_after(&words, true, LIMIT, LIMIT));
    }

    #[test]
    fn a_stopped_process_ends_unless_its_user_has_the_word() {
        let words = LastWords::new(0, Arc::new(AtomicBool::new(true)));
        assert!(lost_after(&words, false, LIMIT, PATIENCE + MOMENT));
        words.fail("made up");
        assert!(!lost_after(&words, false, LIMIT, PATIENCE + MOMENT));
    }
}
