//! Ranks as processes of an MPI program.
//!
//! Needs `MPI_THREAD_SERIALIZED`: MPI is called by the rank's threads and by a helper, one at a time. Only point-to-point
//! messages on `MPI_COMM_WORLD` are used, which must not be used otherwise. Nothing blocks inside MPI: waits poll with a
//! short, growing sleep and a deadline. The two calls that MPI offers no immediate form of, initialising and
//! finalising, are watched: a process stuck in them ends itself.

mod engine;
mod envelope;
mod post;
mod wire;

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use mpi::Threading;
use mpi::topology::Communicator as _;

use crate::group::{Group, GroupComm};
use crate::post::Post;
use crate::thread::panic_message;
use crate::{Buffer, Communicator, RankError, Result};
use post::{Helper, MpiPost};

/// How the ranks of an MPI program run.
#[derive(Debug, Clone)]
pub struct MpiOptions {
    /// Longest wait of one operation, and of starting and ending MPI.
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
/// What `body` returned; its panic; or that MPI could not be started or ended.
pub fn run_mpi<R, E, F>(options: &MpiOptions, body: F) -> Result<R, RankError<E>>
where
    F: FnOnce(Box<dyn Communicator>) -> Result<R, E>,
    E: Display,
{
    let watch = Watch::start("starting MPI", options.limit);
    let not_started = |reason: &str| RankError::NotStarted(reason.to_owned());
    let (universe, threading) = mpi::initialize_with_threading(Threading::Serialized)
        .ok_or_else(|| not_started("MPI was started before"))?;
    // From here on MPI is finalised only where everybody agrees: finalising waits for all ranks.
    let universe = std::mem::ManuallyDrop::new(universe);
    drop(watch);
    if !matches!(threading, Threading::Serialized | Threading::Multiple) {
        return Err(not_started("MPI does not offer MPI_THREAD_SERIALIZED"));
    }
    let rank = usize::try_from(universe.world().rank()).unwrap_or(0);
    let num_ranks = usize::try_from(universe.world().size()).unwrap_or(1);
    let start = || -> Result<_, String> {
        wire::return_errors()?;
        let post = Arc::new(MpiPost::new(rank, num_ranks, options.limit, stop_flag())?);
        let helper = Helper::start(&post).map_err(|error| error.to_string())?;
        let speaking = Arc::clone(&post);
        let speaker = std::thread::Builder::new().name("mpi-stop".into());
        speaker.spawn(move || speaking.speak_when_stopped()).map_err(|error| error.to_string())?;
        Ok((post, helper))
    };
    let (post, helper) = start().map_err(|reason| not_started(&reason))?;
    let fail = |error: RankError<E>| {
        post.abort(&error.to_string());
        error
    };
    let hosts = hosts(&post, num_ranks).map_err(|error| fail(RankError::NotStarted(error.to_string())))?;
    let world = Group::world(Arc::clone(&post) as Arc<dyn Post>, hosts);
    let comm = GroupComm(Arc::clone(&world));
    let value = match catch_unwind(AssertUnwindSafe(|| body(Box::new(comm.clone())))) {
        Ok(Ok(value)) => value,
        Ok(Err(error)) => return Err(fail(RankError::Failed(error))),
        Err(panic) => return Err(fail(RankError::Panicked(panic_message(&*panic)))),
    };
    let end = || -> Result<()> {
        comm.barrier("end of the program")?;
        // Whatever was sent to this rank has come. Nothing may follow: nobody would receive it.
        world.say_no_goodbye();
        drop(comm);
        drop(helper);
        post.finish()
    };
    end().map_err(|error| fail(RankError::NotEnded(error.to_string())))?;
    let _watch = Watch::start("ending MPI", options.limit);
    drop(std::mem::ManuallyDrop::into_inner(universe));
    Ok(value)
}

/// Ends this process, and with it the MPI program, after a failure. The other ranks get `grace` to report theirs: they
/// have been told, or find out at their deadlines.
pub fn leave_mpi(code: i32, grace: Duration) -> ! {
    std::thread::sleep(grace);
    let _watch = Watch::start("aborting MPI", Duration::from_secs(5));
    wire::abort_world(code);
    std::process::exit(code)
}

/// A flag that SIGTERM sets. Launchers send it to the survivors when a rank dies, and kill them a second later: time
/// to say what they were waiting for. A second signal ends the process at once.
fn stop_flag() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let term = signal_hook::consts::SIGTERM;
    // Where signals cannot be caught the process simply ends.
    let _ = signal_hook::flag::register_conditional_shutdown(term, 128 + term, Arc::clone(&flag));
    let _ = signal_hook::flag::register(term, Arc::clone(&flag));
    flag
}

/// Number of the host of every rank: hosts are numbered as they first appear.
fn hosts(post: &Arc<MpiPost>, num_ranks: usize) -> Result<Vec<usize>> {
    let name = mpi::environment::processor_name().unwrap_or_default();
    // Hosts emulated on one machine differ in their network only. Where there is no such file, the name decides.
    let network = std::fs::read_link("/proc/self/ns/net").unwrap_or_default();
    let own = format!("{name} {}", network.display());
    let group = Group::before_world(Arc::clone(post) as Arc<dyn Post>, num_ranks);
    let names = GroupComm(group).all_gather("hosts", Buffer::try_from_slice(own.as_bytes())?)?;
    Ok(names.iter().map(|name| names.iter().position(|other| other == name).unwrap_or(0)).collect())
}

/// Ends the process when it is not dropped in time.
struct Watch(#[expect(dead_code, reason = "its end is the signal")] Option<Sender<()>>);

impl Watch {
    fn start(doing: &'static str, limit: Duration) -> Self {
        let (sender, receiver) = channel::<()>();
        let watch = move || {
            if receiver.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{doing} took more than {} s: giving up", limit.as_secs_f64());
                // Not `exit`: handlers of the MPI library could wait as well.
                std::process::abort();
            }
        };
        let thread = std::thread::Builder::new().name("mpi-watch".into()).spawn(watch);
        Self(thread.is_ok().then_some(sender))
    }
}
