//! The ranks of a command: threads of this process, or the processes of an MPI program.

use std::fmt;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};
use occult_comm::{Communicator, RankError, ThreadOptions, run_threads};

use crate::exit::{Usage, message};

/// What ranks are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum CommKind {
    /// Threads of this process
    #[default]
    Thread,
    /// Processes started by mpirun (needs a build with `--features mpi`)
    Mpi,
}

/// How many ranks there are and how they talk.
#[derive(Debug, Clone, Args)]
pub(crate) struct WorldArgs {
    /// Ranks that share the experts [default: 1, or the processes of mpirun]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    ranks: Option<u16>,
    /// What ranks are
    #[arg(long, value_name = "KIND", default_value = "thread")]
    comm: CommKind,
    /// Longest wait of a rank for the others, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, value_parser = seconds)]
    timeout: f64,
}

impl Default for WorldArgs {
    fn default() -> Self {
        Self { ranks: None, comm: CommKind::Thread, timeout: 60.0 }
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if !(0.001..=1e6).contains(&value) {
        return Err("expected 0.001 to 1000000 seconds".to_owned());
    }
    Ok(value)
}

impl WorldArgs {
    /// Whether more than one rank may take part: asked before the world exists, when MPI has not said its size.
    pub(crate) fn is_parallel(&self) -> bool {
        self.comm == CommKind::Mpi || self.ranks.is_some_and(|n| n > 1)
    }

    /// `--ranks`, where the user gave it.
    pub(crate) fn ranks(&self) -> Option<usize> {
        self.ranks.map(usize::from)
    }

    /// So many ranks where the user gave no number; MPI has its own.
    pub(crate) fn or_ranks(&self, ranks: Option<usize>) -> Self {
        let ranks = ranks.filter(|_| !self.is_mpi()).and_then(|n| u16::try_from(n).ok());
        Self { ranks: self.ranks.or(ranks), ..self.clone() }
    }

    /// Whether ranks are processes, of which every one runs the whole command.
    pub(crate) fn is_mpi(&self) -> bool {
        self.comm == CommKind::Mpi
    }

    fn limit(&self) -> Duration {
        Duration::from_secs_f64(self.timeout)
    }
}

/// An error with its causes, as other ranks are told of it.
struct Cause(anyhow::Error);

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&message(&self.0))
    }
}

fn cause(rank: usize, error: RankError<Cause>) -> anyhow::Error {
    match error {
        RankError::Failed(Cause(error)) => error.context(format!("rank {rank}")),
        other => anyhow!("rank {rank}: {other}"),
    }
}

/// Runs `work` once per rank, all at the same time: its calls of the communicator are collective. Returns what rank 0
/// returned in the process that holds it, `None` in other processes of an MPI program.
///
/// # Errors
/// That of the rank that failed first (threads), of this process's rank (MPI: it is printed, and the whole program ended,
/// before this function returns); that there is no MPI, or another number of processes than `--ranks`.
pub(crate) fn run_world<T: Send>(
    args: &WorldArgs,
    work: impl Fn(Box<dyn Communicator>) -> Result<T> + Sync,
) -> Result<Option<T>> {
    match args.comm {
        CommKind::Thread => over_threads(args, work).map(Some),
        CommKind::Mpi => over_mpi(args, work),
    }
}

/// The error of an option that means something only with several ranks.
pub(crate) fn needs_ranks(option: &str) -> anyhow::Error {
    Usage(format!("{option} needs ranks: give --ranks N or --comm mpi")).into()
}

/// Errors where `mpirun` started several processes and nothing makes them ranks: every one would do the whole work, and
/// overwrite the others' output.
pub(crate) fn refuse_mpirun() -> Result<()> {
    for variable in ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"] {
        let processes = std::env::var(variable).ok().and_then(|n| n.parse::<usize>().ok()).unwrap_or(1);
        if processes > 1 {
            let message = format!("mpirun started {processes} processes; give --comm mpi to make them ranks");
            return Err(Usage(message).into());
        }
    }
    Ok(())
}

fn over_threads<T: Send>(
    args: &WorldArgs,
    work: impl Fn(Box<dyn Communicator>) -> Result<T> + Sync,
) -> Result<T> {
    refuse_mpirun()?;
    let options = ThreadOptions { limit: args.limit(), ..ThreadOptions::default() };
    let results = run_threads(args.ranks().unwrap_or(1), &options, |comm| work(comm).map_err(Cause));
    let values = results.all().map_err(|(rank, error)| cause(rank, error))?;
    values.into_iter().next().ok_or_else(|| anyhow!("no rank ran"))
}

#[cfg(not(feature = "mpi"))]
fn over_mpi<T>(_: &WorldArgs, _: impl Fn(Box<dyn Communicator>) -> Result<T> + Sync) -> Result<Option<T>> {
    Err(Usage("--comm mpi: this occult was built without MPI (cargo install ... --features mpi)".to_owned())
        .into())
}

#[cfg(feature = "mpi")]
fn over_mpi<T>(
    args: &WorldArgs,
    work: impl Fn(Box<dyn Communicator>) -> Result<T> + Sync,
) -> Result<Option<T>> {
    // Time for the others to say what they were waiting for.
    const GRACE: Duration = Duration::from_secs(2);
    let rank = std::sync::atomic::AtomicUsize::new(0);
    let result = occult_comm::run_mpi(&occult_comm::MpiOptions { limit: args.limit() }, |comm| {
        rank.store(comm.rank(), std::sync::atomic::Ordering::Relaxed);
        let (found, first) = (comm.world_size(), comm.rank() == 0);
        if let Some(asked) = args.ranks().filter(|&n| n != found) {
            return Err(Cause(
                Usage(format!("--ranks {asked}, but mpirun started {found} processes")).into(),
            ));
        }
        work(comm).map(|value| first.then_some(value)).map_err(Cause)
    });
    result.map_err(|error| cause(rank.into_inner(), error)).or_else(|error| {
        eprintln!("occult: {}", message(&error));
        occult_comm::leave_mpi(1, GRACE)
    })
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    fn world(ranks: u16) -> WorldArgs {
        WorldArgs { ranks: Some(ranks), timeout: 20.0, ..WorldArgs::default() }
    }

    #[test]
    fn every_rank_works_and_the_first_answers() {
        let sum = run_world(&world(3), |comm| {
            let mut values = [comm.rank() as f32 + 1.0];
            comm.all_reduce_sum("sum", &mut values)?;
            Ok((comm.rank(), values[0]))
        });
        assert_eq!(sum.expect("a world"), Some((0, 6.0)));
        let alone = run_world(&WorldArgs::default(), |comm| Ok(comm.world_size()));
        assert_eq!(alone.expect("a world"), Some(1));
    }

    #[test]
    fn the_rank_that_failed_is_named_with_its_reason() {
        let result = run_world(&world(3), |comm| {
            if comm.rank() == 1 {
                bail!("no weights");
            }
            comm.barrier("loading")?;
            Ok(())
        });
        assert_eq!(message(&result.expect_err("a failure")), "rank 1: no weights");
    }

    #[cfg(not(feature = "mpi"))]
    #[test]
    fn a_build_without_mpi_says_so() {
        let args = WorldArgs { comm: CommKind::Mpi, ..WorldArgs::default() };
        let error = run_world(&args, |_| Ok(())).expect_err("no MPI");
        assert!(error.to_string().contains("--features mpi"), "{error}");
    }
}
