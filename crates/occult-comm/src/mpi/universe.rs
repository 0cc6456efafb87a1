//! The start and the end of MPI. Neither call has an immediate form and both may hang, so they run in a thread of their own.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use mpi::Threading;
use mpi::topology::Communicator as _;

/// MPI between its start and its end. Dropped, it leaves MPI as it is: ending MPI waits for all ranks.
#[derive(Debug)]
pub(super) struct Universe {
    pub(super) rank: usize,
    pub(super) num_ranks: usize,
    end: Sender<()>,
    /// Disconnected once MPI has ended.
    ended: Receiver<()>,
}

impl Universe {
    pub(super) fn start(limit: Duration) -> Result<Self, String> {
        let (started, starting) = channel();
        let (end, ending) = channel();
        let (over, ended) = channel::<()>();
        // MPI is ended by the thread that started it, as the standard asks.
        let life = move || {
            let Some((universe, threading)) = mpi::initialize_with_threading(Threading::Serialized) else {
                let _ = started.send(Err("MPI was started before"));
                return;
            };
            // Dropping it would end MPI.
            let universe = std::mem::ManuallyDrop::new(universe);
            let world = universe.world();
            let number = |n: i32| usize::try_from(n).unwrap_or(0);
            let _ = started.send(match threading {
                Threading::Serialized | Threading::Multiple => {
                    Ok((number(world.rank()), number(world.size())))
                }
                _ => Err("MPI does not offer MPI_THREAD_SERIALIZED"),
            });
            if ending.recv().is_ok() {
                drop(std::mem::ManuallyDrop::into_inner(universe));
                drop(over);
            }
        };
        let thread = std::thread::Builder::new().name("mpi-main".into());
        thread.spawn(life).map_err(|error| error.to_string())?;
        match starting.recv_timeout(limit) {
            Ok(world) => {
                world.map(|(rank, num_ranks)| Self { rank, num_ranks, end, ended }).map_err(str::to_owned)
            }
            Err(RecvTimeoutError::Timeout) => {
                Err(format!("starting MPI took more than {} s", limit.as_secs_f64()))
            }
            Err(RecvTimeoutError::Disconnected) => Err("MPI could not be started".to_owned()),
        }
    }

    /// Ends MPI. `false` when that takes more than `limit`.
    pub(super) fn end(self, limit: Duration) -> bool {
        let _ = self.end.send(());
        self.ended.recv_timeout(limit) == Err(RecvTimeoutError::Disconnected)
    }
}

/// Whether this version of MPI (in its own words) hangs when it is ended between hosts: MPICH before 4.2 over UCX. Ranks that have
/// closed their connections wait for all without answering those that still close theirs (pmodels/mpich pull request 6596).
pub(super) fn hangs_at_its_end(version: &str) -> bool {
    let mut words = version.split_whitespace();
    let number = words.find(|&word| word == "Version:").and_then(|_| words.next()).unwrap_or_default();
    let mut parts = number.split('.').map_while(|part| part.parse::<u32>().ok());
    let old = parts.next().zip(parts.next()).is_some_and(|number| number < (4, 2));
    version.starts_with("MPICH") && version.contains("ch4:ucx") && old
}

#[cfg(test)]
mod tests {
    use super::hangs_at_its_end;

    #[test]
    fn versions_that_hang_are_known_by_their_words() {
        let mpich = |number, device| {
            format!(
                "MPICH Version:\t{number}\nMPICH Release date:\tThu Apr  7\nMPICH Device:\t{device}\nMPICH configure:\t--prefix=/usr\n"
            )
        };
        for (number, device, hangs) in [
            ("4.0.2", "ch4:ucx", true),
            ("3.4", "ch4:ucx", true),
            ("4.2.0", "ch4:ucx", false),
            ("5.0", "ch4:ucx", false),
            ("4.0.2", "ch4:ofi", false),
            ("unreleased", "ch4:ucx", false),
        ] {
            assert_eq!(hangs_at_its_end(&mpich(number, device)), hangs, "{number} {device}");
        }
        assert!(!hangs_at_its_end(
            "Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4, repo rev: v4.1.4, May 26, 2022"
        ));
        assert!(!hangs_at_its_end(""));
    }
}
