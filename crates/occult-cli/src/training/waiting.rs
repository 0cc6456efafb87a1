//! Long work of one rank.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Result, anyhow};
use occult_comm::Communicator;

/// Runs `work` on rank 0 while all ranks meet now and then, so that nobody waits for it longer than the limit of a wait.
/// Collective. Where it fails rank 0 has the error, and the others go on to learn of it as of any rank's failure.
pub(super) fn on_first<T: Send>(
    comm: &dyn Communicator,
    what: &'static str,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<Option<T>> {
    let meet = |done: bool| -> Result<bool> {
        let mut sum = [f64::from(u8::from(done))];
        comm.all_reduce_sum_f64(what, &mut sum)?;
        Ok(sum[0] > 0.0)
    };
    if comm.rank() != 0 {
        while !meet(false)? {}
        return Ok(None);
    }
    let between = (comm.limit() / 4).min(Duration::from_secs(1));
    let (sender, done) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The receiver is gone only where meeting has failed, which is the error then.
            let _ = sender.send(work());
        });
        loop {
            let result = match done.recv_timeout(between) {
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => {
                    Some(Err(anyhow!("{what} has ended without a result")))
                }
                Ok(result) => Some(result),
            };
            meet(result.is_some())?;
            if let Some(result) = result {
                return result.map(Some);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use occult_comm::{ThreadOptions, run_threads};

    use super::*;

    #[test]
    fn the_others_wait_longer_than_one_wait_may_take() {
        let options = ThreadOptions { limit: Duration::from_secs(1), ..ThreadOptions::default() };
        let begun = std::time::Instant::now();
        let ran = AtomicUsize::new(0);
        let results = run_threads(3, &options, |comm| {
            on_first(&*comm, "long work", || {
                // Longer than one wait may take.
                while begun.elapsed() < options.limit * 3 / 2 {
                    std::thread::yield_now();
                }
                Ok(ran.fetch_add(1, Ordering::Relaxed))
            })
            .map_err(|e| e.to_string())
        });
        assert_eq!(results.all().expect("no rank fails"), [Some(0), None, None]);
    }

    #[test]
    fn a_failure_is_the_first_ranks() {
        let results = run_threads(2, &ThreadOptions::default(), |comm| {
            on_first::<()>(&*comm, "long work", || Err(anyhow!("no room"))).map_err(|e| e.to_string())
        });
        let (rank, error) = results.all().expect_err("fails");
        assert_eq!((rank, error.to_string().as_str()), (0, "no room"));
    }
}
