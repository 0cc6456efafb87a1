//! One process's end of the wire: the engine behind a lock, polled by who waits and by a helper when nobody does.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use super::engine::Engine;
use super::last_words::LastWords;
use super::wire::WireResult;
use crate::letter::{Address, Letter};
use crate::mailbox::{Failure, Mailbox};
use crate::post::Post;
use crate::{CommError, Result};

/// Polls of a wait that only yield, before it begins to sleep: messages of a few microseconds are met awake.
const AWAKE_ROUNDS: u32 = 30;
/// First and longest sleep between polls. The kernel adds about 60 us, and some 20 us of a core: what costs is waking up.
const SLEEPS: (Duration, Duration) = (Duration::from_micros(5), Duration::from_millis(1));
/// Longest sleep on a fast wire: what it brings must not pile up.
const FAST_SLEEP: Duration = Duration::from_micros(300);
/// Messages finished at one look from which on the wire is fast: at some 60 KiB each.
const MANY: usize = 4;
/// How often the helper polls while data move that nobody waits for: at first, and at least. It takes its time from the cores
/// that the rank computes with, so a look that finds nothing doubles the pause, and one that finds many messages halves it.
const HELPER_PERIODS: (Duration, Duration) = (Duration::from_micros(400), Duration::from_micros(3200));
/// How long the helper stays awake after the last activity.
const HELPER_LINGER: Duration = Duration::from_millis(50);
/// How long a rank waits to learn which other one an error of MPI is about.
const REASON_GRACE: Duration = Duration::from_millis(100);
/// How long a failing rank itself pushes the news out.
const ABORT_PUSH: Duration = Duration::from_millis(200);

/// See the module.
#[derive(Debug)]
pub(super) struct MpiPost {
    rank: usize,
    limit: Duration,
    /// `None` when MPI is finished.
    engine: Mutex<Option<Engine>>,
    mailbox: Mailbox,
    /// Operations begun and not ended.
    open: AtomicUsize,
    /// Calls of `pause` under way: who waits polls himself.
    waiting: AtomicUsize,
    busy: AtomicBool,
    /// Messages that the last look finished.
    finished: AtomicUsize,
    helper: OnceLock<Thread>,
    helper_asleep: AtomicBool,
    stop: AtomicBool,
    words: LastWords,
    /// A process has ended: MPI may hold for ever what needs it.
    ended: AtomicBool,
}

impl MpiPost {
    pub(super) fn new(
        rank: usize,
        num_ranks: usize,
        limit: Duration,
        stopped: Arc<AtomicBool>,
    ) -> WireResult<Self> {
        Ok(Self {
            rank,
            limit,
            engine: Mutex::new(Some(Engine::new(rank, num_ranks)?)),
            mailbox: Mailbox::default(),
            open: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            busy: AtomicBool::new(false),
            finished: AtomicUsize::new(0),
            helper: OnceLock::new(),
            helper_asleep: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            words: LastWords::new(rank, stopped),
            ended: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Engine>> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_engine<T>(&self, act: impl FnOnce(&mut Engine) -> WireResult<T>) -> Result<T> {
        let mut engine = self.lock();
        let done = match engine.as_mut() {
            // Open MPI may end the process, or never return, when it sends to a rank that is dead.
            _ if self.ended.load(Ordering::Acquire) => Err("MPI is not called any more".to_owned()),
            Some(engine) => {
                let done = self.words.calling(|| act(engine));
                self.busy.store(engine.is_busy(), Ordering::Relaxed);
                done
            }
            None => Err("MPI is finished".to_owned()),
        };
        drop(engine);
        done.map_err(|reason| {
            let reason = self.words.explain(&reason, self.failure_behind());
            CommError::Transport { rank: self.rank, reason }
        })
    }

    /// The failure that an error of MPI comes from: often it is known a moment later.
    fn failure_behind(&self) -> Option<Failure> {
        let deadline = Instant::now() + REASON_GRACE;
        loop {
            let failure = self.mailbox.failure();
            if failure.is_some() || Instant::now() >= deadline {
                return failure;
            }
            std::thread::sleep(FAST_SLEEP);
        }
    }

    fn is_active(&self) -> bool {
        self.open.load(Ordering::Relaxed) > 0 || self.busy.load(Ordering::Relaxed)
    }

    fn wake_helper(&self) {
        if self.helper_asleep.swap(false, Ordering::AcqRel)
            && let Some(helper) = self.helper.get()
        {
            helper.unpark();
        }
    }

    /// Moves data while the rank computes: MPI moves only inside its calls. Runs in a thread of its own until
    /// [`stop`](Self::stop).
    pub(super) fn help(&self) {
        let _ = self.helper.set(std::thread::current());
        let mut last_active = Instant::now();
        let mut period = HELPER_PERIODS.0;
        while !self.stop.load(Ordering::Acquire) {
            if self.is_active() {
                last_active = Instant::now();
                // Who waits polls himself.
                let finished = match self.waiting.load(Ordering::Relaxed) {
                    0 => self.with_engine(|engine| engine.progress(&self.mailbox)),
                    _ => Ok(0),
                };
                match finished {
                    Ok(0) => period = (2 * period).min(HELPER_PERIODS.1),
                    Ok(MANY..) => period = (period / 2).max(HELPER_PERIODS.0),
                    Ok(_) => {}
                    Err(error) => {
                        self.mailbox.fail(Failure { rank: self.rank, reason: error.to_string() });
                    }
                }
            } else if last_active.elapsed() > HELPER_LINGER {
                self.helper_asleep.store(true, Ordering::Release);
                // What began between the look above and this line has not seen the flag: look once more.
                if !self.is_active() && !self.stop.load(Ordering::Acquire) {
                    std::thread::park_timeout(Duration::from_secs(1));
                }
                self.helper_asleep.store(false, Ordering::Release);
                last_active = Instant::now();
                period = HELPER_PERIODS.0;
            }
            std::thread::sleep(period);
        }
    }

    /// See [`LastWords::speak_when_held`].
    pub(super) fn speak_when_held(&self) -> ! {
        self.words.speak_when_held(&self.mailbox, self.limit)
    }

    /// The process of another rank has ended.
    pub(super) fn ended(&self, rank: usize) {
        let failure = Failure { rank, reason: "its process has ended".into() };
        self.mailbox.fail(failure.clone());
        if !self.ended.swap(true, Ordering::Release) {
            self.words.speak_if_held(&failure);
        }
    }

    /// Ends the helper.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake_helper();
    }

    /// Waits until `done` or the deadline, polling.
    fn poll_until(
        &self,
        limit: Duration,
        mut done: impl FnMut(&mut Engine) -> WireResult<bool>,
    ) -> Result<bool> {
        let deadline = Instant::now() + limit;
        for round in 0.. {
            if self.with_engine(&mut done)? {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            nap(round, FAST_SLEEP, deadline);
        }
        Ok(false)
    }

    /// Lets the last messages go and closes the wire: afterwards MPI may be finalised.
    pub(super) fn finish(&self) -> Result<()> {
        let sent = self.poll_until(self.limit, |engine| {
            engine.progress(&self.mailbox)?;
            Ok(!engine.is_sending())
        })?;
        self.with_engine(Engine::cancel_listening)?;
        let closed = self.poll_until(self.limit, Engine::stop_listening)?;
        *self.lock() = None;
        if sent && closed {
            return Ok(());
        }
        let reason = format!("messages could not be delivered within {} s", self.limit.as_secs_f64());
        Err(CommError::Transport { rank: self.rank, reason })
    }
}

impl Post for MpiPost {
    fn rank(&self) -> usize {
        self.rank
    }

    fn limit(&self) -> Duration {
        self.limit
    }

    fn send(&self, to: usize, address: Address, letter: Letter) -> Result<()> {
        self.words.note_sending(&letter.what, to);
        self.with_engine(|engine| engine.send(to, address, letter))?;
        self.wake_helper();
        Ok(())
    }

    fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    fn opened(&self) {
        self.open.fetch_add(1, Ordering::Relaxed);
    }

    fn closed(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }

    fn progress(&self) -> Result<()> {
        match self.with_engine(|engine| engine.progress(&self.mailbox)) {
            Ok(finished) => self.finished.store(finished, Ordering::Relaxed),
            // The mailbox knows who failed.
            Err(_) if self.mailbox.failure().is_some() => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn pause(&self, seen: u64, round: u32, deadline: Instant) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        if self.mailbox.version() == seen {
            let longest = if self.finished.load(Ordering::Relaxed) >= MANY { FAST_SLEEP } else { SLEEPS.1 };
            nap(round, longest, deadline);
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    fn stopped(&self) -> bool {
        self.words.stopped()
    }

    fn note(&self, what: &str, ranks: &dyn Fn() -> Vec<usize>) {
        self.words.note(what, ranks());
    }

    fn abort(&self, reason: &str) {
        // A rank that fails because another one did passes that one's name on.
        let own = Failure { rank: self.rank, reason: reason.to_owned() };
        let failure = self.mailbox.failure().unwrap_or(own);
        self.mailbox.fail(failure.clone());
        self.words.fail(reason);
        if self.stopped() {
            // The launcher ends all ranks; a message to one that is dead might never return.
            return;
        }
        // Best effort: those who cannot be told find out at their deadline.
        let _ = self.with_engine(|engine| engine.send_failure(&failure));
        let _ = self.poll_until(ABORT_PUSH, |engine| {
            engine.progress(&self.mailbox)?;
            Ok(!engine.is_sending())
        });
        self.wake_helper();
    }
}

/// The pause after the `round`th look of a wait: yields at first, then sleeps longer and longer, up to `longest`.
fn nap(round: u32, longest: Duration, deadline: Instant) {
    let Some(sleeps) = round.checked_sub(AWAKE_ROUNDS) else {
        return std::thread::yield_now();
    };
    let grown = SLEEPS.0 * (1 << (sleeps / 8).min(10));
    std::thread::sleep(grown.min(longest).min(deadline.saturating_duration_since(Instant::now())));
}

/// Keeps the helper's thread and ends it when dropped: it may be in a call of MPI, which ends within the limit or the process does.
#[derive(Debug)]
pub(super) struct Helper {
    post: Arc<MpiPost>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Helper {
    pub(super) fn start(post: &Arc<MpiPost>) -> std::io::Result<Self> {
        let working = Arc::clone(post);
        let thread = std::thread::Builder::new().name("mpi-helper".into()).spawn(move || working.help())?;
        Ok(Self { post: Arc::clone(post), thread: Some(thread) })
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.post.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
