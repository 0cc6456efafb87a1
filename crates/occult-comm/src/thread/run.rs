//! Starts the ranks, and makes the failure of one the failure of all.

use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::ThreadPost;
use crate::Communicator;
use crate::group::{Group, GroupComm};
use crate::mailbox::Mailbox;
use crate::post::Post;

/// How rank threads run.
#[derive(Debug, Clone)]
pub struct ThreadOptions {
    /// Longest wait of one operation.
    pub limit: Duration,
    /// Host of every rank; one host for all when `None`. Lets one machine try what several would do.
    pub host_of_rank: Option<Vec<usize>>,
    /// Stack of a rank's thread, in bytes.
    pub stack_bytes: usize,
}

impl Default for ThreadOptions {
    /// A minute, one host, 8 MiB.
    fn default() -> Self {
        Self { limit: Duration::from_secs(60), host_of_rank: None, stack_bytes: 8 << 20 }
    }
}

/// How a rank ended when it did not end well.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RankError<E> {
    /// Its body returned this error.
    #[error("{0}")]
    Failed(E),
    /// Its body panicked with this message.
    #[error("panicked: {0}")]
    Panicked(String),
    /// It never ran.
    #[error("not started: {0}")]
    NotStarted(String),
}

/// What every rank returned.
#[derive(Debug)]
pub struct RankResults<R, E> {
    /// By rank.
    pub results: Vec<Result<R, RankError<E>>>,
    /// The rank that failed first: the cause; the others' errors tell of it.
    pub first_failure: Option<usize>,
}

impl<R, E> RankResults<R, E> {
    /// Every rank's value.
    ///
    /// # Errors
    /// The rank that failed first, and how.
    pub fn all(self) -> Result<Vec<R>, (usize, RankError<E>)> {
        let mut values = Vec::with_capacity(self.results.len());
        let mut other = None;
        for (rank, result) in self.results.into_iter().enumerate() {
            match result {
                Ok(value) => values.push(value),
                Err(error) if self.first_failure == Some(rank) => return Err((rank, error)),
                Err(error) => other = other.or(Some((rank, error))),
            }
        }
        other.map_or(Ok(values), Err)
    }
}

/// Runs `body` once per rank, each in a thread of its own, and waits for all of them. A rank that returns an error or
/// panics makes the operations of all others fail with [`CommError::Peer`](crate::CommError::Peer); so does one that
/// returns while others still need it.
///
/// ```
/// use occult_comm::{CommError, ThreadOptions, run_threads};
/// let sums = run_threads(3, &ThreadOptions::default(), |comm| {
///     let mut values = [comm.rank() as f32 + 1.0];
///     comm.all_reduce_sum("sum", &mut values)?;
///     Ok::<_, CommError>(values[0])
/// });
/// assert_eq!(sums.all().unwrap(), [6.0; 3]);
/// ```
pub fn run_threads<R, E, F>(num_ranks: usize, options: &ThreadOptions, body: F) -> RankResults<R, E>
where
    F: Fn(Box<dyn Communicator>) -> Result<R, E> + Sync,
    R: Send,
    E: Display + Send,
{
    let hosts = options.host_of_rank.clone().unwrap_or_else(|| vec![0; num_ranks]);
    if hosts.len() != num_ranks {
        let reason = format!("hosts for {} ranks, not {num_ranks}", hosts.len());
        let results = (0..num_ranks).map(|_| Err(RankError::NotStarted(reason.clone()))).collect();
        return RankResults { results, first_failure: None };
    }
    let mailboxes: Arc<[Mailbox]> = (0..num_ranks).map(|_| Mailbox::default()).collect();
    let failure = Arc::new(Mutex::new(None));
    // All posts exist before any thread runs, so that a thread that cannot be started can be reported by its own.
    let posts: Vec<Arc<ThreadPost>> = (0..num_ranks)
        .map(|rank| {
            let (mailboxes, failure) = (Arc::clone(&mailboxes), Arc::clone(&failure));
            Arc::new(ThreadPost { rank, mailboxes, failure, limit: options.limit })
        })
        .collect();
    let run = |post: &Arc<ThreadPost>| {
        // Kept until the outcome is known: the goodbye of a rank that fails must not come before its reason.
        let world = Group::world(Arc::clone(post) as Arc<dyn Post>, hosts.clone());
        let comm = Box::new(GroupComm(Arc::clone(&world)));
        match catch_unwind(AssertUnwindSafe(|| body(comm))) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => {
                post.abort(&error.to_string());
                Err(RankError::Failed(error))
            }
            Err(panic) => {
                let message = panic_message(&*panic);
                post.abort(&format!("panicked: {message}"));
                Err(RankError::Panicked(message))
            }
        }
    };
    let results = std::thread::scope(|scope| {
        let handles: Vec<_> = posts
            .iter()
            .map(|post| {
                let thread = std::thread::Builder::new()
                    .name(format!("rank-{}", post.rank))
                    .stack_size(options.stack_bytes)
                    .spawn_scoped(scope, || run(post));
                thread.map_err(|error| {
                    post.abort(&format!("its thread could not be started: {error}"));
                    RankError::NotStarted(error.to_string())
                })
            })
            .collect();
        let join = |handle: std::thread::ScopedJoinHandle<'_, _>| {
            handle.join().unwrap_or_else(|panic| Err(RankError::Panicked(panic_message(&*panic))))
        };
        handles.into_iter().map(|handle| handle.and_then(join)).collect()
    });
    let first_failure =
        failure.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|failure| failure.rank);
    RankResults { results, first_failure }
}

/// The text of a panic.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
