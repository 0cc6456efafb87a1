//! Ranks as processes of an MPI program.
//!
//! Needs `MPI_THREAD_SERIALIZED`: MPI is called by the rank's threads and by a helper, one at a time. Only point-to-point
//! messages on `MPI_COMM_WORLD` are used, which must not be used otherwise. Nothing blocks inside MPI: waits poll with a
//! short, growing sleep and a deadline.

mod engine;
mod envelope;
mod last_words;
mod lifeline;
mod post;
mod universe;
mod wire;

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::group::{Group, GroupComm};
use crate::post::Post;
use crate::thread::panic_message;
use crate::{Buffer, Communicator, RankError, Result};
use lifeline::{Contact, Lifeline};
use post::{Helper, MpiPost};
use universe::Universe;

/// Whether MPI was started in this process.
static STARTED: AtomicBool = AtomicBool::new(false);
/// This rank and its longest wait, when [`run_mpi`] has left MPI as it was at its end.
static NOT_ENDED: OnceLock<(usize, Duration)> = OnceLock::new();
/// Whether the process of rank 0 has ended after all ranks were done.
static RANK_0_ENDED: AtomicBool = AtomicBool::new(false);
/// Whether this process would notice that.
static RANK_0_WATCHED: AtomicBool = AtomicBool::new(false);
/// Longest wait for MPI to end the program.
const ABORT_LIMIT: Duration = Duration::from_secs(5);

/// How the ranks of an MPI program run.
#[derive(Debug, Clone)]
pub struct MpiOptions {
    /// Longest wait of one operation, and of starting MPI. A call of MPI that takes longer ends the process.
    pub limit: Duration,
}

impl Default for MpiOptions {
    /// A minute.
    fn default() -> Self {
        Self { limit: Duration::from_secs(60) }
    }
}

/// Runs `body` as this process's rank, between the start and the end of MPI. Once per process.
///
/// When `body` fails, the other ranks are told, and MPI is left as it is: report the error and call [`leave_mpi`].
/// SIGTERM makes waits fail with [`CommError::Stopped`](crate::CommError::Stopped); a rank that computes notices it at
/// its next wait.
/// Ranks share a host when they share the name of the machine and the network name space.
///
/// # Errors
/// What `body` returned; its panic; that MPI could not be started, or that the ranks did not all come to the end. Call [`end_mpi`]
/// before the program ends.
pub fn run_mpi<R, E, F>(options: &MpiOptions, body: F) -> Result<R, RankError<E>>
where
    F: FnOnce(Box<dyn Communicator>) -> Result<R, E>,
    E: Display,
{
    let not_started = |reason: &str| RankError::NotStarted(reason.to_owned());
    let universe = Universe::start(options.limit).map_err(|reason| not_started(&reason))?;
    STARTED.store(true, Ordering::Release);
    let Universe { rank, num_ranks, .. } = universe;
    let start = || -> Result<_, String> {
        wire::return_errors()?;
        let post = Arc::new(MpiPost::new(rank, num_ranks, options.limit, stop_flag())?);
        let helper = Helper::start(&post).map_err(|error| error.to_string())?;
        let speaking = Arc::clone(&post);
        let speaker = std::thread::Builder::new().name("mpi-stop".into());
        speaker.spawn(move || speaking.speak_when_held()).map_err(|error| error.to_string())?;
        Ok((post, helper))
    };
    let (post, helper) = start().map_err(|reason| not_started(&reason))?;
    let fail = |error: RankError<E>| {
        post.abort(&error.to_string());
        error
    };
    let over = Arc::new(AtomicBool::new(false));
    let hosts =
        meet(&post, num_ranks, &over).map_err(|error| fail(RankError::NotStarted(error.to_string())))?;
    let several_hosts = hosts.iter().any(|&host| host > 0);
    let world = Group::world(Arc::clone(&post) as Arc<dyn Post>, hosts);
    let comm = GroupComm(Arc::clone(&world));
    let value = match catch_unwind(AssertUnwindSafe(|| body(Box::new(comm.clone())))) {
        Ok(Ok(value)) => value,
        Ok(Err(error)) => return Err(fail(RankError::Failed(error))),
        Err(panic) => return Err(fail(RankError::Panicked(panic_message(&*panic)))),
    };
    let end = || -> Result<()> {
        comm.barrier("end of the program")?;
        over.store(true, Ordering::Relaxed);
        // Whatever was sent to this rank has come. Nothing may follow: nobody would receive it.
        world.say_no_goodbye();
        drop(comm);
        drop(helper);
        post.finish()
    };
    end().map_err(|error| fail(RankError::NotEnded(error.to_string())))?;
    if several_hosts && universe::hangs_at_its_end(&mpi::environment::library_version().unwrap_or_default()) {
        let _ = NOT_ENDED.set((rank, options.limit));
    } else if !universe.end(options.limit) {
        let reason = format!("ending MPI took more than {} s", options.limit.as_secs_f64());
        return Err(RankError::NotEnded(reason));
    }
    Ok(value)
}

/// The last call of a program, with its exit code: ends it where [`run_mpi`] could not end MPI, and does nothing otherwise. That is
/// MPICH before 4.2 over UCX between hosts, which hangs when it is ended. Ranks other than 0 then wait for the end of rank 0: where
/// they would not notice it, no longer than [`MpiOptions::limit`].
pub fn end_mpi(code: i32) {
    match NOT_ENDED.get() {
        None => {}
        Some((0, _)) => leave_mpi(code, Duration::ZERO),
        // They have no more to do than to be ended by rank 0, which may still write its results.
        Some(&(_, limit)) => {
            wait_for(&RANK_0_ENDED, &RANK_0_WATCHED, limit);
            std::process::exit(code)
        }
    }
}

/// Returns when the flag is set; `false` when that takes more than `limit` and is not `coming`.
fn wait_for(flag: &AtomicBool, coming: &AtomicBool, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while !flag.load(Ordering::Acquire) {
        if !coming.load(Ordering::Acquire) && Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(100).min(limit));
    }
    true
}

/// Ends this process, and with it the MPI program, after a failure. The other ranks get `grace` to report theirs: they
/// have been told, or find out at their deadlines.
pub fn leave_mpi(code: i32, grace: Duration) -> ! {
    if STARTED.load(Ordering::Acquire) {
        std::thread::sleep(grace);
        // It may hang as well.
        let _ = std::thread::Builder::new().spawn(|| {
            std::thread::sleep(ABORT_LIMIT);
            std::process::abort();
        });
        wire::abort_world(code);
    }
    // Not `exit`: handlers of an MPI library that is stuck could wait as well.
    std::process::abort()
}

/// A flag that SIGTERM sets. Launchers send it to the survivors when a rank dies (some twice), and kill them a second later:
/// time to say what they were waiting for. Where signals cannot be caught the process simply ends.
fn stop_flag() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let _ = signal_hook::flag::register(signal_hook::consts::SIGTERM, Arc::clone(&flag));
    flag
}

/// Ranks tell each other where they are. Returns the number of the host of every rank (hosts are numbered as they first appear).
/// Until `over`, the end of any process is a failure from now on.
fn meet(post: &Arc<MpiPost>, num_ranks: usize, over: &Arc<AtomicBool>) -> Result<Vec<usize>> {
    let name = mpi::environment::processor_name().unwrap_or_default();
    // Hosts emulated on one machine differ in their network only. Where there is no such file, the name decides.
    let network = std::fs::read_link("/proc/self/ns/net").unwrap_or_default();
    // Without lifelines the deadlines of waits remain.
    let line = Lifeline::open().ok();
    let contact = line.as_ref().and_then(|line| line.contact().ok());
    let own = format!("{name} {}\n{}", network.display(), contact.map_or_else(String::new, |c| c.encode()));
    let group = Group::before_world(Arc::clone(post) as Arc<dyn Post>, num_ranks);
    let cards = GroupComm(group).all_gather("meeting", Buffer::try_from_slice(own.as_bytes())?)?;
    let cards: Vec<_> =
        cards.iter().map(|card| String::from_utf8_lossy(card.as_bytes()).into_owned()).collect();
    let cards: Vec<_> = cards.iter().map(|card| card.split_once('\n').unwrap_or((card, ""))).collect();
    let others = cards.iter().enumerate().filter(|&(rank, _)| rank != post.rank());
    let others = others.filter_map(|(rank, (_, contact))| Some((rank, Contact::decode(contact)?))).collect();
    if let Some(line) = line {
        let (post, over) = (Arc::clone(post), Arc::clone(over));
        let others: Vec<_> = others;
        RANK_0_WATCHED.store(others.iter().any(|&(rank, _)| rank == 0), Ordering::Release);
        let held = line.hold(others, move |rank, ended| {
            if ended && !over.load(Ordering::Relaxed) {
                post.ended(rank);
            }
            if rank == 0 {
                RANK_0_ENDED.store(ended, Ordering::Release);
                RANK_0_WATCHED.store(false, Ordering::Release);
            }
        });
        if held.is_err() {
            RANK_0_WATCHED.store(false, Ordering::Release);
        }
    }
    Ok(cards.iter().map(|(host, _)| cards.iter().position(|(other, _)| other == host).unwrap_or(0)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_waited_for_no_longer_than_the_limit() {
        let (yes, no) = (AtomicBool::new(true), AtomicBool::new(false));
        assert!(wait_for(&yes, &no, Duration::from_secs(3600)));
        assert!(!wait_for(&no, &no, Duration::ZERO));
    }

    #[test]
    fn a_flag_that_will_be_set_is_waited_for() {
        let (flag, coming) = (AtomicBool::new(false), AtomicBool::new(true));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| wait_for(&flag, &coming, Duration::ZERO));
            flag.store(true, Ordering::Release);
            assert!(waiter.join().expect("no panic"));
        });
    }
}
