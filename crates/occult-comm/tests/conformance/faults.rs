//! What every backend must say when one rank goes wrong: all others fail, naming that rank and the operation.

use std::sync::mpsc::channel;
use std::time::Duration;

use occult_comm::{Buffer, CommError, Communicator, Expect};

/// A named way to go wrong. In all of them the last rank is the culprit.
pub(crate) struct Fault {
    pub(crate) name: &'static str,
    /// Whether only the deadline reveals it.
    pub(crate) silent: bool,
    pub(crate) run: fn(&dyn Communicator, bool) -> Result<(), CommError>,
}

/// The name of the operation in which the others must find out.
pub(crate) const WHAT: &str = "row exchange";

/// All of them; the second argument of `run` says whether this rank is the culprit.
pub(crate) const FAULTS: &[Fault] = &[
    Fault { name: "error", silent: false, run: error },
    Fault { name: "panic", silent: false, run: panic },
    Fault { name: "abort", silent: false, run: abort },
    Fault { name: "memory", silent: false, run: memory },
    Fault { name: "error-with-groups", silent: false, run: error_with_groups },
    Fault { name: "counts", silent: false, run: counts },
    Fault { name: "more-than-the-bound", silent: false, run: more_than_the_bound },
    Fault { name: "order", silent: false, run: order },
    Fault { name: "skipped", silent: false, run: skipped },
    Fault { name: "name", silent: false, run: name },
    Fault { name: "lengths", silent: false, run: lengths },
    Fault { name: "long-lengths", silent: false, run: long_lengths },
    Fault { name: "early-leave", silent: false, run: early_leave },
    Fault { name: "absence", silent: true, run: absence },
    Fault { name: "polled-early-leave", silent: false, run: polled_early_leave },
    Fault { name: "polled-absence", silent: true, run: polled_absence },
];

/// Whether an error of a rank other than the culprit says what it must.
pub(crate) fn names_the_culprit(error: &str, culprit: usize) -> bool {
    error.contains(&format!("rank {culprit}")) && error.contains(WHAT)
}

/// One message of 100 bytes to everybody.
fn exchange(comm: &dyn Communicator) -> Result<(), CommError> {
    let bytes = vec![100; comm.world_size()];
    let buffer = Buffer::zeroed::<u8>(100 * comm.world_size());
    comm.exchange(WHAT, buffer, &bytes, Expect::Bytes(bytes.clone())).map(drop)
}

fn error(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    exchange(comm)?;
    if culprit {
        return Err(CommError::Transport { rank: comm.rank(), reason: "made up".into() });
    }
    exchange(comm)
}

fn panic(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    exchange(comm)?;
    assert!(!culprit, "meant to panic");
    exchange(comm)
}

fn abort(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    if culprit {
        comm.abort("has had enough");
    }
    // The culprit's own calls fail, too.
    exchange(comm)
}

fn memory(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    if culprit {
        Buffer::try_zeroed::<u8>(isize::MAX as usize / 2)?;
    }
    exchange(comm)
}

fn error_with_groups(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    // A rank that is slow to leave the split sees the fault there: both operations have the name that must be told.
    let group = comm.split(WHAT, 0)?;
    if culprit {
        // The group is left before the error is known.
        return Err(CommError::Transport { rank: comm.rank(), reason: "made up".into() });
    }
    exchange(&*group)
}

fn counts(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    let num_ranks = comm.world_size();
    let sent = if culprit { 101 } else { 100 };
    let buffer = Buffer::zeroed::<u8>(sent * num_ranks);
    // The culprit expects its own part as it sends it.
    let mut expected = vec![100; num_ranks];
    expected[comm.rank()] = sent;
    comm.exchange(WHAT, buffer, &vec![sent; num_ranks], Expect::Bytes(expected))?;
    exchange(comm)
}

fn more_than_the_bound(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    let num_ranks = comm.world_size();
    let sent = if culprit { 100_001 } else { 100 };
    let buffer = Buffer::zeroed::<u8>(sent * num_ranks);
    let mut bounds = vec![100_000; num_ranks];
    bounds[comm.rank()] = sent;
    comm.exchange(WHAT, buffer, &vec![sent; num_ranks], Expect::AtMost(bounds))?;
    exchange(comm)
}

fn order(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    if culprit {
        comm.barrier("a barrier too early")?;
    }
    exchange(comm)?;
    comm.barrier("a barrier")
}

fn skipped(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    // Who is not the root sends nothing in a broadcast: the others see the culprit's next operation only.
    let root = comm.world_size() - 1;
    if culprit {
        return comm.barrier("beyond the broadcast");
    }
    comm.broadcast(WHAT, root, Buffer::empty()).map(drop)
}

fn name(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    if culprit { comm.barrier("another name") } else { comm.barrier(WHAT) }
}

fn lengths(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    comm.all_reduce_sum(WHAT, &mut vec![0.0; if culprit { 11 } else { 10 }])
}

fn long_lengths(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    comm.all_reduce_sum(WHAT, &mut vec![0.0; if culprit { 100_001 } else { 100_000 }])
}

fn early_leave(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    if culprit {
        return Ok(());
    }
    exchange(comm)
}

fn absence(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    if culprit {
        stay_away(comm);
    }
    exchange(comm)
}

/// Neither comes nor leaves until the others have given up.
pub(crate) fn stay_away(comm: &dyn Communicator) {
    let (_alive, never) = channel::<()>();
    let _ = never.recv_timeout(comm.limit() + Duration::from_millis(500));
}

/// As `exchange`, never waiting. `begun` comes between its start and the first look.
pub(crate) fn poll(
    comm: &dyn Communicator,
    begun: impl FnOnce() -> Result<(), CommError>,
) -> Result<(), CommError> {
    let bytes = vec![100; comm.world_size()];
    let buffer = Buffer::zeroed::<u8>(100 * comm.world_size());
    let mut exchange = comm.start_exchange(WHAT, buffer, &bytes, Expect::Bytes(bytes.clone()))?;
    begun()?;
    while !exchange.test()? {
        std::thread::yield_now();
    }
    exchange.wait().map(drop)
}

fn polled_early_leave(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    if culprit { Ok(()) } else { poll(comm, || Ok(())) }
}

fn polled_absence(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    if culprit {
        stay_away(comm);
    }
    poll(comm, || Ok(()))
}
