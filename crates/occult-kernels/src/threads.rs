//! The thread budget of one rank: a pool of its own, never a global one.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

use crate::core::isa::{InstructionSet, Isa};

/// The cores one rank may use. A clone shares the same workers; they end with the last clone.
///
/// Workers wait for work by looking for some hundred microseconds, soon offering the core to others, and then
/// sleeping. A call takes whichever workers come in
/// time and never waits for one that sleeps through it, so a short call costs little. Two threads that share a
/// `Threads` take turns; a call from inside a task runs on that task's thread.
#[derive(Clone)]
pub struct Threads {
    owner: Arc<Owner>,
    isa: &'static Isa,
}

struct Owner {
    pool: Arc<Pool>,
    workers: Vec<JoinHandle<()>>,
}

/// State of [`Pool::state`]: number of the job, whether workers may still enter it, how many are inside.
const GENERATION: u64 = 1 << 32;
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;
/// Looks at the state before a waiting thread sleeps: some ten microseconds.
const LOOKS: u32 = if cfg!(miri) { 1 } else { 3000 };
/// Looks after those, each of which first offers the core to others: some hundred microseconds. The pauses between the
/// operations of a decoding step are that long, and waking a sleeper costs as much as a short operation.
const OFFERS: u32 = if cfg!(miri) { 1 } else { 300 };

/// Waits a little before look number `look`; false when it is time to sleep.
fn linger(look: u32) -> bool {
    if look < LOOKS {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
    look < LOOKS + OFFERS
}

struct Pool {
    state: AtomicU64,
    /// The job of the present generation; written while nobody is inside, read only by workers that entered.
    job: UnsafeCell<Option<Job>>,
    next_task: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    turn: Mutex<()>,
    sleepers: Vec<Sleeper>,
    quit: AtomicBool,
}

struct Sleeper {
    asleep: AtomicBool,
    thread: Mutex<Option<Thread>>,
}

struct Job {
    task: *const (dyn Fn(usize) + Sync),
    num_tasks: usize,
    caller: Thread,
}

// SAFETY: `job` is the only field that is not Sync by itself. It is written by the thread that holds `turn` while the
// state is closed with nobody inside, and read by workers between entering an open state and leaving it; `state` is
// changed with acquire-release order around both. The closure it points to is Sync and outlives the job (see `run`).
unsafe impl Sync for Pool {}
// SAFETY: as above; the raw pointer in `job` is only followed while the closure is alive.
unsafe impl Send for Pool {}

thread_local! {
    static INSIDE_TASK: Cell<bool> = const { Cell::new(false) };
}

impl Threads {
    /// A budget of `count` threads, the calling one included; 0 counts as 1, which starts no thread.
    ///
    /// When the system refuses to start a thread the budget is smaller ([`Threads::count`]).
    #[must_use]
    pub fn new(count: usize) -> Self {
        let wanted = count.saturating_sub(1);
        let sleepers = (0..wanted)
            .map(|_| Sleeper { asleep: AtomicBool::new(false), thread: Mutex::new(None) })
            .collect();
        let pool = Arc::new(Pool {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next_task: AtomicUsize::new(0),
            panic: Mutex::new(None),
            turn: Mutex::new(()),
            sleepers,
            quit: AtomicBool::new(false),
        });
        let mut workers = Vec::with_capacity(wanted);
        for index in 0..wanted {
            let shared = Arc::clone(&pool);
            let name = format!("occult-worker-{}", index + 1);
            match std::thread::Builder::new().name(name).spawn(move || shared.work(index)) {
                Ok(handle) => {
                    *lock(&pool.sleepers[index].thread) = Some(handle.thread().clone());
                    workers.push(handle);
                }
                Err(_) => break,
            }
        }
        Self { owner: Arc::new(Owner { pool, workers }), isa: Isa::best() }
    }

    /// The same workers, with kernels of another instruction set than the fastest. `None` where the processor does not
    /// have it.
    #[must_use]
    pub fn with_instruction_set(&self, set: InstructionSet) -> Option<Self> {
        Some(Self { owner: Arc::clone(&self.owner), isa: Isa::get(set)? })
    }

    /// The instruction set of the kernels.
    #[must_use]
    pub fn instruction_set(&self) -> InstructionSet {
        self.isa.set
    }

    pub(crate) fn isa(&self) -> &'static Isa {
        self.isa
    }

    /// Threads of this budget, the calling one included.
    #[must_use]
    pub fn count(&self) -> usize {
        self.owner.workers.len() + 1
    }

    /// Calls `task` once for each number below `num_tasks`, spread over the threads, and returns when all are done.
    /// Tasks are handed out in ascending order to whoever is free.
    ///
    /// # Panics
    /// When a task panics, with its message, after all threads have stopped.
    pub fn for_each(&self, num_tasks: usize, task: impl Fn(usize) + Sync) {
        if num_tasks <= 1 || self.owner.workers.is_empty() || INSIDE_TASK.get() {
            (0..num_tasks).for_each(task);
            return;
        }
        self.owner.pool.run(num_tasks, &task);
    }

    /// Splits `data` into chunks of `chunk_len` (the last may be shorter) and calls `task(index, chunk)` for each.
    ///
    /// # Panics
    /// When a task panics. A `chunk_len` of 0 counts as 1.
    pub fn for_each_chunk<T: Send>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let (len, chunk_len) = (data.len(), chunk_len.max(1));
        let base = SendPtr(data.as_mut_ptr());
        self.for_each(len.div_ceil(chunk_len), |index| {
            let start = index * chunk_len;
            let size = chunk_len.min(len - start);
            // SAFETY: chunks of different indices do not overlap, each index is handed out once, and `data` is
            // borrowed mutably until `for_each` returns.
            let chunk = unsafe { std::slice::from_raw_parts_mut(base.get().add(start), size) };
            task(index, chunk);
        });
    }
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Threads")
            .field("count", &self.count())
            .field("instruction_set", &self.instruction_set())
            .finish()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.pool.quit.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its tasks; there is nothing to learn from it.
            let _ = worker.join();
        }
    }
}

impl Pool {
    fn run<'a>(&self, num_tasks: usize, task: &'a (dyn Fn(usize) + Sync + 'a)) {
        let turn = lock(&self.turn);
        // SAFETY: only the lifetime changes. The pointer is followed by workers inside the job, and this function
        // does not return, nor unwind, before it has closed the job and seen the last worker leave.
        let task: *const (dyn Fn(usize) + Sync + 'static) = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + 'a), *const (dyn Fn(usize) + Sync)>(task)
        };
        // SAFETY: this thread holds `turn` and the state is closed and empty: nobody reads the job.
        unsafe { *self.job.get() = Some(Job { task, num_tasks, caller: std::thread::current() }) };
        self.next_task.store(0, Ordering::Relaxed);
        let generation = self.state.load(Ordering::Relaxed) & !(GENERATION - 1);
        self.state.store(generation.wrapping_add(GENERATION) | OPEN, Ordering::SeqCst);
        for sleeper in self.sleepers.iter().take(num_tasks - 1) {
            if sleeper.asleep.load(Ordering::SeqCst)
                && let Some(thread) = lock(&sleeper.thread).as_ref()
            {
                thread.unpark();
            }
        }
        // SAFETY: the closure is borrowed by the caller of this function.
        self.work_on(unsafe { &*task }, num_tasks);
        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0;
        while self.state.load(Ordering::Acquire) & INSIDE != 0 {
            if linger(looks) {
                looks += 1;
            } else {
                std::thread::park();
            }
        }
        let panic = lock(&self.panic).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Takes tasks until there are none.
    fn work_on(&self, task: &(dyn Fn(usize) + Sync), num_tasks: usize) {
        INSIDE_TASK.set(true);
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let index = self.next_task.fetch_add(1, Ordering::Relaxed);
                if index >= num_tasks {
                    break;
                }
                task(index);
            }
        }));
        INSIDE_TASK.set(false);
        if let Err(panic) = result {
            self.next_task.store(num_tasks, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(panic);
        }
    }

    /// The life of a worker.
    fn work(&self, index: usize) {
        let mut last = 0;
        let mut looks = 0;
        while !self.quit.load(Ordering::SeqCst) {
            if self.try_enter(&mut last) {
                // SAFETY: this worker is inside an open job: it is written, and not replaced before the worker leaves.
                let job = unsafe { (*self.job.get()).as_ref() };
                let caller = job.map(|job| {
                    // SAFETY: `run` keeps the closure alive until the last worker has left.
                    self.work_on(unsafe { &*job.task }, job.num_tasks);
                    job.caller.clone()
                });
                // Closed and this was the last one inside: the caller may be asleep.
                let before = self.state.fetch_sub(1, Ordering::AcqRel);
                if let Some(caller) = caller.filter(|_| before & (OPEN | INSIDE) == 1) {
                    caller.unpark();
                }
                looks = 0;
            } else if linger(looks) {
                looks += 1;
            } else {
                let asleep = &self.sleepers[index].asleep;
                asleep.store(true, Ordering::SeqCst);
                // A job, or the end, that came before `asleep` was visible does not wake this worker: look again.
                let state = self.state.load(Ordering::SeqCst);
                let news = state & OPEN != 0 && state / GENERATION != last;
                if !news && !self.quit.load(Ordering::SeqCst) {
                    std::thread::park();
                }
                asleep.store(false, Ordering::SeqCst);
                looks = 0;
            }
        }
    }

    /// Enters the present job if it is open and not the one this worker came from.
    fn try_enter(&self, last: &mut u64) -> bool {
        let mut state = self.state.load(Ordering::SeqCst);
        while state & OPEN != 0 && state / GENERATION != *last {
            match self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    *last = state / GENERATION;
                    return true;
                }
                Err(now) => state = now,
            }
        }
        false
    }
}

/// Calls `work` as if it were a task: calls of [`Threads`] inside it run on this thread.
#[cfg(all(test, feature = "candle"))]
pub(crate) fn alone<R>(work: impl FnOnce() -> R) -> R {
    struct Leave(bool);
    impl Drop for Leave {
        fn drop(&mut self) {
            INSIDE_TASK.set(self.0);
        }
    }
    let _leave = Leave(INSIDE_TASK.replace(true));
    work()
}

/// A mutex whose data stay meaningful after a panic.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pointer that tasks on several threads may follow, each to its own part.
#[derive(Debug)]
pub(crate) struct SendPtr<T>(pub(crate) *mut T);

impl<T> Clone for SendPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for SendPtr<T> {}

impl<T> SendPtr<T> {
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

/// A slice that tasks only read, as a pointer.
pub(crate) fn input<T>(slice: &[T]) -> SendPtr<T> {
    SendPtr(slice.as_ptr().cast_mut())
}

// SAFETY: following the pointer is unsafe, and whoever does it answers for the parts being disjoint.
unsafe impl<T: Send> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SendPtr<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for count in [0, 1, 2, 4] {
            let threads = Threads::new(count);
            assert_eq!(threads.count(), count.max(1));
            for num_tasks in [0, 1, 2, 3, 17] {
                let seen: Vec<AtomicUsize> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
                threads.for_each(num_tasks, |task| {
                    seen[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(seen.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn many_short_calls() {
        let threads = Threads::new(3);
        let sum = AtomicUsize::new(0);
        let calls = if cfg!(miri) { 20 } else { 2000 };
        for _ in 0..calls {
            threads.for_each(5, |task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
        }
        assert_eq!(sum.into_inner(), 10 * calls);
    }

    #[test]
    fn chunks_cover_the_slice() {
        let threads = Threads::new(2);
        let mut data = vec![0_u32; 10];
        threads.for_each_chunk(&mut data, 4, |index, chunk| {
            chunk.iter_mut().for_each(|value| *value += 1 + index as u32);
        });
        assert_eq!(data, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]);
    }

    #[test]
    fn a_call_inside_a_task_and_calls_from_two_threads() {
        let threads = Threads::new(2);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let (threads, sum) = (threads.clone(), &sum);
                scope.spawn(move || {
                    threads.for_each(3, |_| {
                        threads.for_each(4, |_| {
                            sum.fetch_add(1, Ordering::Relaxed);
                        });
                    });
                });
            }
        });
        assert_eq!(sum.into_inner(), 24);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let threads = Threads::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| {
            threads.for_each(8, |task| assert_ne!(task, 5, "task five"));
        }));
        assert!(result.is_err());
        let sum = AtomicUsize::new(0);
        threads.for_each(8, |task| {
            sum.fetch_add(task, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 28);
    }
}
